# Two commands are all a newcomer needs: `make serve` and `make test`.

PYTHON ?= python3
VENV   ?= .venv
MODEL  ?= data/models/SmolLM2-135M-Instruct.Q4_1.gguf
GEMMA  := data/models/gemma-3-270m-q4_k_m.gguf
QWEN   := data/models/qwen2.5-coder-0.5b-instruct-q4_k_m.gguf
ARGS   ?=
EXTRA  ?= cuda
RUN    := $(VENV)/bin/python
# portable flags: a native build of llama.cpp crashes on some virtual machines
PEER_FLAGS := -DGGML_NATIVE=OFF -DGGML_AVX512=ON -DGGML_AVX512_VNNI=ON -DGGML_AVX2=ON -DGGML_FMA=ON -DGGML_F16C=ON \
  -DGGML_BMI2=ON
GOLDEN := tests/golden/peer
FILLER := data/corpora/documents/docutils_pep258.txt data/corpora/perplexity/britannica.txt
CHAT   := $(addprefix data/corpora/documents/,alice.txt twisted_deferred.txt psutil_reference.txt)

.DEFAULT_GOAL := help
.PHONY: help serve test test-slow check lint readme-check first-start model gemma qwen fit quality bench bench-sizes endless load crash reproduction replicas ray deploy-check attack neighbours \
  clients overhead scale schemathesis bench-memory mutation eval recall chat-recall log-hour tpu-compile gpu-compile accelerator-check docs diagrams page-images openapi config lock clean

help: ## show this list
	@awk -F':.*## ' '/^[a-z-]+:.*## / {printf "  make %-14s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

serve: $(VENV)/serve model ## install, download the default model, serve it with the memory on (ARGS="--port 9000 …")
	$(VENV)/bin/atlas-jax serve --model $(MODEL) $(ARGS)

test: $(VENV)/dev model ## install what tests need and run them (ARGS="-k name …")
	$(RUN) -m pytest -n 2 --dist loadfile --no-loadscope-reorder $(ARGS)

test-slow: $(VENV)/dev model ## the tests that `make test` leaves out
	$(RUN) -m pytest -n 2 --dist loadfile -m slow $(ARGS)

check: lint test ## ruff, mypy and the tests

lint: $(VENV)/dev ## ruff and mypy
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

readme-check: $(VENV)/dev model ## run every block of README.md as printed, in a bare clone (ARGS="--recall 10": what it recalls)
	$(RUN) -m tools.readme_check --venv $(VENV) $(ARGS)

first-start: ## time the first and the second start of a bare clone, as a newcomer has it, up to the first answer
	$(PYTHON) -m tools.first_start $(ARGS)

model: $(VENV)/base ## download the default model (SmolLM2-135M-Instruct, Q4_1)
	@$(RUN) tools/fetch_model.py default

gemma: $(VENV)/base ## download Gemma 3 270M, for tests and benchmarks
	@$(RUN) tools/fetch_model.py gemma

qwen: $(VENV)/dev ## download Qwen2.5-Coder 0.5B and compare its greedy text with llama.cpp's: a real model of another family
	@$(RUN) tools/fetch_model.py qwen
	$(RUN) -m benchmarks.quality --model $(QWEN) --golden $(GOLDEN)/qwen2.5-coder-0.5b-instruct-q4_k_m --parts continuations

fit: $(VENV)/dev model ## fit the memory and make the bigram table that are shipped for the default model
	$(RUN) -m atlas_jax.evaluation.corpora --out data/texts --group calibration
	$(RUN) -m atlas_jax.recall.fit $(MODEL) --gate-texts data/texts/calibration/*.txt --ship
	$(RUN) -m atlas_jax.engine.fit_bigrams $(MODEL) --ship

quality: $(VENV)/dev model gemma ## greedy text and perplexity against llama.cpp's golden files (30 min)
	for dtype in int8 float32; do \
	  $(RUN) -m benchmarks.quality --model $(MODEL) --golden $(GOLDEN)/smollm2-135m-instruct-q4_1 --dtype $$dtype; \
	  $(RUN) -m benchmarks.quality --model $(GEMMA) --golden $(GOLDEN)/gemma-3-270m-q4_k_m --dtype $$dtype; \
	done

eval: $(VENV)/bench model ## what the memory is worth, beside other ways to remember: an hour, goes on where it stopped (ARGS="--quick …")
	$(VENV)/bin/atlas-jax eval $(MODEL) --out build/eval --texts data/corpora $(ARGS)

recall: $(VENV)/bench model ## facts asked for long after they left the window, in the library and over HTTP
	$(RUN) -m atlas_jax.evaluation.corpora --out data/corpora --group documents --group perplexity
	$(RUN) -m atlas_jax.experiments.fact_recall $(MODEL) --filler $(FILLER) --seed 41
	$(RUN) -m benchmarks.recall_http $(MODEL) --filler $(FILLER) --seed 41

chat-recall: $(VENV)/bench model ## everyday facts of a long message asked for in a chat: window, memory, everything sent
	$(RUN) -m atlas_jax.evaluation.corpora --out data/corpora --group documents
	$(RUN) -m benchmarks.chat_recall $(MODEL) --texts $(CHAT) --output docs/benchmarks/chat_recall.md

log-hour: $(VENV)/bench model ## an hour of ordinary use: the lines of the log by kind; fails where they are more than 30
	$(RUN) -m benchmarks.log_hour $(MODEL) $(ARGS)

bench: $(VENV)/bench model gemma ## speed beside llama.cpp, cost of the memory (builds llama-cpp-python: ten minutes once)
	test -x data/peer/bin/python || ($(PYTHON) -m venv data/peer && CMAKE_ARGS="$(PEER_FLAGS)" data/peer/bin/pip install \
	  --quiet 'llama-cpp-python>=0.3.16,<0.4' numpy)
	$(RUN) -m benchmarks.speed $(MODEL) --peer-python data/peer/bin/python --output docs/benchmarks/speed.md
	$(RUN) -m benchmarks.speed $(GEMMA) --peer-python data/peer/bin/python --output docs/benchmarks/speed_gemma.md
	$(RUN) -m benchmarks.memory_cost $(MODEL) --output docs/benchmarks/memory_cost.md

bench-sizes: $(VENV)/bench model ## 1B and 8B in Q4_K_M with random weights beside llama.cpp: speed, start, memory (needs 16 GiB)
	$(RUN) -m benchmarks.sizes --tokenizer $(MODEL) --peer-python data/peer/bin/python --output docs/benchmarks/sizes.md

endless: $(VENV)/bench model ## what a token costs in a session of 2 000, 32 000 and 128 000 tokens
	$(RUN) -m benchmarks.endless $(MODEL) --output docs/benchmarks/endless.md

load: $(VENV)/bench model ## a hundred streams at once with settings drawn at random: all end, nothing compiles, memory comes back
	$(RUN) -m benchmarks.load $(MODEL) --output docs/benchmarks/load.md

crash: $(VENV)/bench model ## kill and stop servers under load: nothing acknowledged is lost (90 min; needs a C compiler)
	$(RUN) -m benchmarks.crash rounds --kills 150 --stops 20 --sessions 200
	$(RUN) -m benchmarks.crash rounds --model $(MODEL) --kills 50 --stops 4 --sessions 24 --disk-mb 20
	$(RUN) -m benchmarks.crash many
	$(RUN) -m benchmarks.crash cost --model $(MODEL)

clients: $(VENV)/dev model ## the flows of twenty client libraries and agents against a server (installs them: 4 GB in data/clients)
	$(RUN) -m benchmarks.clients $(MODEL) --output docs/benchmarks/clients.md $(ARGS)

overhead: $(VENV)/dev ## what the server adds to the engine's time, beside uvicorn alone (ARGS="--peer-python PYTHON": and llama_cpp.server)
	$(RUN) -m benchmarks.overhead --output docs/benchmarks/overhead.md $(ARGS)

neighbours: $(VENV)/bench model ## what a stream notices of other clients: long prompts into sessions, plain ones
	$(RUN) -m benchmarks.neighbours $(MODEL) --output docs/benchmarks/neighbours.md

replicas: $(VENV)/dev ## kill -9 one of two servers on one object store; how long another takes to go on (40 min)
	$(RUN) -m benchmarks.replicas kills --kills 100
	$(RUN) -m benchmarks.replicas resume

ray: $(VENV)/ray ## run deploy/ray on this machine: sessions stay on their replica, replicas come and go, nothing is lost (10 min)
	$(RUN) -m benchmarks.replicas ray

deploy-check: $(VENV)/deploy ## render the Helm chart, hold it against Kubernetes' schemas and the server
	$(RUN) -m pytest -n 0 tests/server/test_server_replicas.py $(ARGS)

reproduction: $(VENV)/bench ## memories of the papers as language models of equal size: goes on where it stopped (ARGS="--size small")
	test -d data/corpora/documents || $(RUN) -m atlas_jax.evaluation.corpora --out data/corpora --group documents
	$(RUN) -m atlas_jax.experiments.reproduction $(ARGS)

attack: $(VENV)/dev model ## attack a server in a process: it lives, keeps its sessions, its memory and its pace (half an hour; ARGS=--quick)
	$(RUN) -m benchmarks.attack $(MODEL) --output docs/benchmarks/attack.md $(ARGS)

scale: $(VENV)/dev ## simulate a million sessions on many replicas and one object store
	$(RUN) -m benchmarks.scale --output docs/benchmarks/scale.md $(ARGS)

schemathesis: $(VENV)/dev ## 500 generated requests and more for every operation of the OpenAPI document (ARGS="--examples 20")
	$(RUN) -m pip install --quiet --constraint requirements.lock -e '.[fuzz]'
	$(RUN) -m tests.server.fuzz_openapi $(ARGS)

bench-memory: $(VENV)/bench ## speed of every memory beside titans-pytorch
	test -x data/titans/bin/python || ($(PYTHON) -m venv data/titans && data/titans/bin/pip install --quiet \
	  titans-pytorch)
	$(RUN) -m benchmarks.memory_speed --titans-python data/titans/bin/python --output docs/benchmarks/memory_speed.md

tpu-compile: $(VENV)/dev ## compile steps for four TPU chips, and the Mosaic kernels, without a TPU (installs libtpu)
	$(RUN) -m pip install --quiet --constraint requirements.lock -e '.[tpu-compile]'
	JAX_PLATFORMS=cpu TPU_SKIP_MDS_QUERY=1 $(RUN) -m pytest -s -m tpu_backend tests/engine/runner/test_tpu_compile.py \
	  tests/property/test_kernels_tpu_property.py tests/property/test_kernels_tpu_rules_property.py

gpu-compile: $(VENV)/dev ## compile the Triton kernel for two GPUs without a GPU (installs triton)
	$(RUN) -m pip install --quiet --constraint requirements.lock -e '.[gpu-compile]'
	JAX_PLATFORMS=cpu $(RUN) -m pytest -s -m gpu_backend tests/property/test_kernels_gpu_property.py

accelerator-check: $(VENV)/dev ## check and measure on this machine's GPU or TPU in ten minutes (EXTRA=tpu; EXTRA= and ARGS=--quick on a CPU)
	test -z "$(EXTRA)" || $(RUN) -m pip install --quiet --constraint requirements.lock -e '.[$(EXTRA)]'
	$(RUN) -m benchmarks.accelerator $(ARGS)

mutation: $(VENV)/dev ## break the memory rules one small way at a time: does a test notice? (goes on where it stopped)
	mkdir -p data
	$(RUN) -m benchmarks.mutate --results data/mutation.jsonl --output docs/benchmarks/mutation.md

docs: $(VENV)/docs ## build the documentation site into build/site, with warnings as errors
	NO_MKDOCS_2_WARNING=1 $(VENV)/bin/mkdocs build --strict --quiet

diagrams: ## write docs/images/*.svg, the diagrams of README and DESIGN
	$(PYTHON) tools/draw_diagrams.py

page-images: $(VENV)/dev ## take the pictures of the page at / from a running server (ARGS=http://…; needs a Chromium)
	$(RUN) -m tools.page_images $(ARGS)

openapi: $(VENV)/dev ## write docs/atlas-openapi.yaml, the HTTP API as the server describes it
	$(RUN) -m server.openapi --output docs/atlas-openapi.yaml

config: $(VENV)/dev ## write examples/atlas-config.json and .md: every setting, and the atlas object's table in docs/README-atlas.md
	$(RUN) tools/write_settings.py

lock: ## refresh requirements.lock (needs uv)
	uv pip compile pyproject.toml --extra serve --extra dev --extra train --extra plots --extra export --extra docs --extra fuzz --extra deploy --universal --no-emit-index-url \
	  --no-annotate --custom-compile-command "make lock" --output-file requirements.lock

clean: ## remove what make has installed and built, not the models
	rm -rf $(VENV) build .pytest_cache .hypothesis .mypy_cache .ruff_cache

# One virtual environment; each marker file says which extras it holds. Versions are those of requirements.lock.
$(VENV)/base:
	$(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --quiet --upgrade 'pip>=24'
	touch $@

$(VENV)/serve: $(VENV)/base pyproject.toml requirements.lock
	$(RUN) -m pip install --quiet --constraint requirements.lock -e '.[serve]'
	touch $@

$(VENV)/dev: $(VENV)/serve pyproject.toml requirements.lock
	$(RUN) -m pip install --quiet --constraint requirements.lock -e '.[serve,dev,train]'
	touch $@

$(VENV)/bench: $(VENV)/dev
	$(RUN) -m pip install --quiet --constraint requirements.lock -e '.[serve,dev,train,plots]'
	touch $@

$(VENV)/ray: $(VENV)/dev
	$(RUN) -m pip install --quiet --constraint requirements.lock -e '.[serve,dev,train,ray]'
	touch $@

$(VENV)/deploy: $(VENV)/dev
	$(RUN) -m pip install --quiet --constraint requirements.lock -e '.[serve,dev,train,deploy]'
	touch $@

$(VENV)/docs: $(VENV)/base pyproject.toml requirements.lock
	$(RUN) -m pip install --quiet --constraint requirements.lock -e '.[docs]'
	touch $@
