"""How many programs a step runs, and which kernels are in them."""

from __future__ import annotations

import functools
import threading
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from atlas_jax.aot import AotProgram
from atlas_jax.config import PAGE
from atlas_jax.engine.api import MemoryParams, SamplingParams
from atlas_jax.engine.runner.base import Buckets
from atlas_jax.engine.runner.pretrained import PretrainedRunner
from atlas_jax.engine.runner.step import StepConfig, Weights
from atlas_jax.engine.runner.step_inputs import memory_settings, recent_text, sampling_state
from atlas_jax.gguf import GGUFFile
from atlas_jax.kernels.cpu import library
from atlas_jax.kernels.kernel_choice import KernelChoice
from atlas_jax.kernels.linear import QuantArray, linear
from atlas_jax.model import layer_groups
from atlas_jax.model.loading import load_params, model_config
from atlas_jax.model.page_schedule import PageSchedule
from atlas_jax.recall import adapter_store
from tests import tiny_model

LAYERS = 3
SHAPE = tiny_model.Shape(layers=LAYERS, embed=64, heads=2, kv_heads=1, head_dim=64, ff=128)
needs_kernels = pytest.mark.skipif(not library.available(), reason="no C compiler, or no AVX-512 VNNI")


@pytest.fixture(scope="module")
def runner(tmp_path_factory: pytest.TempPathFactory) -> Iterator[PretrainedRunner]:
    """A model whose layers are a program each, with a memory and draft tokens, everything compiled but monolithic steps."""
    folder = tmp_path_factory.mktemp("model")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(layer_groups, "_PREFERRED", (1,))
        model = tiny_model.write_model(folder / "model.gguf", SHAPE)
        adapter = tiny_model.write_adapter(folder / "adapter.safetensors", model)
        with GGUFFile.open(model) as file:
            config, params = model_config(file), load_params(file, model_config(file))
            memory, found = adapter_store.decode(adapter.read_bytes(), file.fingerprint(), config, max_window=2 * PAGE)
        weights = Weights(params, found, jnp.arange(1, config.vocab + 1) % config.vocab)
        made = PretrainedRunner(StepConfig(config, memory), weights, "int8", Buckets(rows=(1,), pages=(4,)))
        made.compile_decode(1, 4)
        made.compile_prefill(4, 32)
        made.compile_scored_prefill(32)
        made.compile_pooled_prefill(32)
        made.compile_row_moves(1, 4)
        yield made


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Every executable that this thread runs; it compiles none. Engines of other tests have threads of their own."""
    calls: list[Any] = []
    run, compile_ = jax.stages.Compiled.__call__, AotProgram.executable
    here = threading.current_thread()

    def counted(self: jax.stages.Compiled, *args: Any) -> Any:
        if threading.current_thread() is here:
            calls.append(self)
        return run(self, *args)

    def refuse(self: AotProgram, *args: Any) -> Any:
        assert threading.current_thread() is not here, "a program is compiled that was not compiled ahead"
        return compile_(self, *args)

    monkeypatch.setattr(jax.stages.Compiled, "__call__", counted)
    monkeypatch.setattr(AotProgram, "executable", refuse)
    return calls


SETTINGS = memory_settings(MemoryParams(), 1, 1)
TEXT = [3, 4, 5, 6] * 8


def test_a_step_runs_its_programs_and_no_others(runner: PretrainedRunner, ran: list[Any]) -> None:
    def began() -> Any:
        return runner.start_page(runner.new_row(4), PageSchedule(None).next_page(0), None)

    row = began()
    ran.clear()
    parts = [*runner.prefill(row, SETTINGS, TEXT)]
    assert [part.done for part in parts] == [False] * (LAYERS - 1) + [True]
    assert len(ran) == 1 + LAYERS + 1, "embeddings and masks, the layers, the memory"
    row = began()
    ran.clear()
    scored = [*runner.prefill_scored(row, SETTINGS, TEXT, TEXT[1:] + [3], alternatives=False)]
    assert [part.scores is None for part in scored] == [True] * LAYERS + [False]
    assert len(ran) == 1 + LAYERS + 1
    row = began()
    ran.clear()
    pooled = [*runner.prefill_pooled(row, SETTINGS, TEXT, np.zeros((1, runner.embed), np.float32), mean=True)]
    assert [part.pooled is None for part in pooled] == [True] * (LAYERS - 1) + [False]
    assert len(ran) == 1 + LAYERS + 1 + 1, "what a prefill runs, and the pool"
    sampling = sampling_state(SamplingParams(temperature=0.8), runner.vocab, 7, [])
    runner.insert(0, parts[-1].row, 3, recent_text(TEXT, len(TEXT)), sampling, SETTINGS, with_memory=True)
    wanted = np.ones(1, np.int32)
    runner.decode(wanted)  # the first of a batch of its size makes the mask that allows all tokens
    for _ in range(2):
        ran.clear()
        runner.decode(wanted)
        assert len(ran) == 1 + LAYERS + 1, "embeddings and masks, the layers, head and memory and sampler"


@needs_kernels
def test_a_monolithic_step_runs_one_program(runner: PretrainedRunner, request: pytest.FixtureRequest) -> None:
    runner.compile_monolithic_step(1, 4)
    ran = request.getfixturevalue("ran")
    runner.decode(np.ones(1, np.int32))
    assert len(ran) == 1


@needs_kernels
def test_programs_of_one_process_differ_in_their_kernels() -> None:
    """Whichever thread compiles them, whatever that thread has chosen itself."""
    rng = np.random.default_rng(0)
    weight = QuantArray(
        jnp.asarray(rng.integers(-127, 128, (32, 64)).astype(np.int8)), jnp.asarray(rng.random(32), jnp.float32)
    )
    x = jnp.asarray(rng.standard_normal((3, 64)), jnp.float32)
    choices = [KernelChoice(cpu=True), KernelChoice(cpu=False)]
    programs = [AotProgram(linear, kernels=choice) for choice in choices]

    def compile_other(own: KernelChoice, program: AotProgram) -> None:
        with own.scope():
            program.compile((), weight, x)

    threads = [
        threading.Thread(target=compile_other, args=pair) for pair in zip(reversed(choices), programs, strict=True)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert ["atlas_linear" in program.executable((), weight, x).as_text() for program in programs] == [True, False]
    np.testing.assert_array_equal(*(program((), weight, x) for program in programs))


@needs_kernels
def test_a_runner_compiles_what_its_config_chooses(runner: PretrainedRunner) -> None:
    """Not what is chosen on the thread that happens to compile."""
    config = StepConfig(runner.config.model, None, KernelChoice(cpu=False))
    plain = PretrainedRunner(
        config, Weights(runner._weights.params, None, runner._weights.successor), "int8", Buckets((1,), (4,))
    )
    made = [runner._steps, plain._steps]
    for one in (runner, plain):
        one.compile_decode(1, 4)
    texts = [steps._finish_decode.executable((1, True)).as_text() for steps in made]
    assert ["atlas_greedy" in text for text in texts] == [True, False]


def test_what_was_traced_with_one_choice_is_not_taken_for_another() -> None:
    traced = []

    @functools.partial(jax.jit, inline=False)
    def inner(x: jax.Array) -> jax.Array:
        traced.append(library.usable())
        return x + 1

    outer = jax.jit(lambda x: inner(x))
    for cpu in (True, False, True, False):
        with KernelChoice(cpu=cpu).scope():
            outer(1.0)
    assert traced == [library.available(), False]
