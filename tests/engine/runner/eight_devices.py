"""Run by `test_mesh.py` in a process of its own: jax must not have started before XLA_FLAGS is set.

Arguments: a folder, a dtype, and meshes as data,model: every mesh answers as one device does. Or "collectives": what
devices tell one another in a decode step is small. Or "scores", a folder, and a sample of `tiny_families`.
"""

from __future__ import annotations

import os

from tests.patience import PATIENCE

os.environ["XLA_FLAGS"] = (
    f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0"
)

import functools
import math
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import jax
import numpy as np

from atlas_jax.aot import INLINE, AotProgram
from atlas_jax.config import MemoryConfig
from atlas_jax.engine import Engine
from atlas_jax.engine.runner.step import StepConfig
from atlas_jax.engine.runner.step_programs import StepPrograms, decode_inputs, weight_shapes
from atlas_jax.gguf import GGUFFile
from atlas_jax.kernels import lowering_platform
from atlas_jax.model.kv_cache import init_kv_cache, page_start, start_page
from atlas_jax.model.layer_groups import Trunk
from atlas_jax.model.loading import load_params, model_config
from atlas_jax.model.page_schedule import PageSchedule
from atlas_jax.model.transformer import logits
from atlas_jax.sharding import ONE_DEVICE, on_mesh
from tests import tiny_families, tiny_model
from tests.engine.offline import Answer, ask, ask_all, memory, request, words
from tests.tiny_families import TEXT

PLAIN, MEMORY = 1e-4, 0.2
"""Largest difference of a log-probability. Sums come in another order. A write's products are bfloat16 and a read's weights
8 bits, where the last bit of a float32 can move a value by a whole step, and p_mem is the sixth power of a score."""
SHAPE = tiny_model.Shape(heads=8, kv_heads=4, ff=512)


@contextmanager
def opened(folder: Path, dtype: str, data: int, model: int) -> Iterator[Engine]:
    engine = Engine.open(
        model_path=folder / "tiny.gguf",
        adapter_path=folder / "tiny.safetensors",
        cache_path=os.environ.get("JAX_COMPILATION_CACHE_DIR") or folder / "cache",
        weight_dtype=dtype,  # type: ignore[arg-type]
        kv_dtype=dtype,  # type: ignore[arg-type]
        max_concurrent=2,
        max_context=512,
        max_window=128,
        native_kernels=False,
        speculate=False,
        mesh_data=data,
        mesh_model=model,
    )
    engine._serving.warm_up.stop(60)  # only what is asked for is compiled
    try:
        yield engine
    finally:
        engine.close(timeout=PATIENCE)


def answers(engine: Engine) -> list[Answer]:
    """Prompts longer than a page, sampling, a memory that has been written and is read, and a session that goes on."""
    said = words(1, 200)
    session = memory("told", blend_ratio=0.9)
    plain = ask_all(engine, [request(words(2, 150), 12), request(words(3, 40), 12, temperature=0.8, seed=5, top_p=0.9)])
    told = ask_all(
        engine, [request(said * 2, 12, memory=session), request(said * 2, 12, memory=memory(use_muon=False))]
    )
    return [*plain, *told, ask(engine, request([*said * 2, *told[0].tokens, *said], 8, memory=session))]


def difference(found: Answer, wanted: Answer, tolerance: float) -> float:
    """The largest difference of a log-probability, up to where the memory's two best tokens are closer than it."""
    largest = 0.0
    for place, (one, other) in enumerate(zip(found.infos, wanted.infos, strict=True)):
        largest = max(largest, abs(one.logprob - other.logprob))
        assert largest < tolerance, (place, one, other)
        if one.token != other.token:
            assert wanted.end.memory is not None, (place, one, other)
            break
    return largest


def collectives() -> None:
    """No cache, weight or memory is moved: the largest array that is has as many numbers as a batch's logits."""
    with GGUFFile.open(tiny_model.write_model(Path(sys.argv[2]) / "tiny.gguf", SHAPE)) as file:
        model = model_config(file)
    config = StepConfig(model, MemoryConfig(layers=(0, 1), components=16, features=256, code_dim=64, max_window=128))
    rows, pages, placement = 4, 8, on_mesh(model, 2, 2)
    *inputs, _ = decode_inputs(config, placement.weights(weight_shapes(config)), rows, pages, "int8")
    with lowering_platform.elsewhere("cpu"):
        decode = functools.partial(StepPrograms(config).decode, INLINE)
        text = AotProgram(decode, donate=(1, 2), mesh_layout=placement).executable((), *inputs).as_text()
    kinds = "all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter"
    found = re.findall(rf"= (\S+) (?:{kinds})(?:-start)?\(", text)
    sizes = [math.prod(map(int, dims.split(","))) for kind in found for dims in re.findall(r"\[([\d,]+)\]", kind)]
    assert len(sizes) > 4 * len(model.layers), "two sums and two maxima a layer, at least"
    assert max(sizes) <= rows * model.vocab, max(sizes)
    print(f"{len(sizes)} collectives, of {max(sizes)} numbers at most")


def scores() -> None:
    """A model's scores on a mesh are those on one device; for what the engine's own model has not."""
    name, rows = sys.argv[3], 2
    texts = np.stack([TEXT, TEXT[::-1]]).astype(np.int32)
    with GGUFFile.open(
        tiny_families.write_sample(Path(sys.argv[2]) / "tiny.gguf", tiny_families.SAMPLES[name])
    ) as file:
        config = model_config(file)
        weights = load_params(file, config, dtype="float32")
    found = []
    for layout in (ONE_DEVICE, on_mesh(config, 2, 2)):
        program = functools.partial(AotProgram, mesh_layout=layout)
        cache, params = layout.rows(init_kv_cache(config, rows, 1, "float32")), layout.weights(weights)
        for row in range(rows):
            cache = program(start_page)((), cache, page_start(row, PageSchedule(window=None).next_page(0)))
        count = np.full(rows, texts.shape[1], np.int32)
        *_, states = Trunk(config, program)((), params, cache, texts, count)
        found.append(np.asarray(logits(config, weights, jax.device_put(np.asarray(states[-1])))))
    one, many = found
    print(f"{name} {np.abs(many - one).max() / np.abs(one).max():.1e}")
    assert np.abs(many - one).max() < 1e-5 * np.abs(one).max()


def main() -> None:
    if sys.argv[1] == "collectives":
        return collectives()
    if sys.argv[1] == "scores":
        return scores()
    folder, dtype = Path(sys.argv[1]), sys.argv[2]
    model = tiny_model.write_model(folder / "tiny.gguf", SHAPE)
    tiny_model.write_adapter(folder / "tiny.safetensors", model)
    with opened(folder, dtype, 1, 1) as engine:
        one = answers(engine)
    for mesh in sys.argv[3:]:
        data, parts = map(int, mesh.split(","))
        with opened(folder, dtype, data, parts) as engine:
            many = answers(engine)
        largest = {PLAIN: 0.0, MEMORY: 0.0}
        for found, wanted in zip(many, one, strict=True):
            kind = PLAIN if wanted.end.memory is None else MEMORY
            largest[kind] = max(largest[kind], difference(found, wanted, kind))
            if found.end.memory is not None and wanted.end.memory is not None:
                assert wanted.end.memory.blend_ratio_actual > 0
                np.testing.assert_allclose(found.end.memory.omega_loss, wanted.end.memory.omega_loss, rtol=1e-3)
        print(f"{mesh} {dtype} plain {largest[PLAIN]:.1e} memory {largest[MEMORY]:.1e}")


if __name__ == "__main__":
    main()
