"""The real TPU compiler, without a TPU, takes the engine's steps at real sizes; prints what it says of them.

Run by `make tpu-compile`. Four v5e chips; times are lower bounds: the larger of what arithmetic and memory alone take.
"""

from __future__ import annotations

import functools
import os
import time

import jax
import pytest
from jax.experimental import topologies

from atlas_jax.config import PAGE, LayerConfig, MemoryConfig, ModelConfig, RopeConfig
from atlas_jax.engine.runner import monolithic_step
from atlas_jax.engine.runner.step import StepConfig
from atlas_jax.kernels import lowering_platform
from atlas_jax.sharding import MeshLayout, check_mesh, make_mesh

FLOPS, BYTES, HBM = 197e12, 819e9, 16 * 2**30
"""Of one v5e chip: bfloat16 operations (twice as many in 8 bits) and bytes a second, and bytes in all."""
ROWS, PAGES = 8, 16


def model(family: str, vocab: int, embed: int, heads: int, kv_heads: int, ff: int, layers: int) -> StepConfig:
    dim = 128 if embed >= 4096 else 64
    config = ModelConfig(
        family=family,
        vocab=vocab,
        embed=embed,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=dim,
        ff=ff,
        layers=(LayerConfig(),) * layers,
        ropes=(RopeConfig(base=500_000.0 if embed >= 4096 else 100_000.0, dims=dim),),
        context_length=8192,
        norm_eps=1e-5,
        tied_head=embed < 4096,
    )
    return StepConfig(config, MemoryConfig(layers=(layers // 2, layers - 2), max_window=2048))


SMALL = model("llama", vocab=49_152, embed=576, heads=9, kv_heads=3, ff=1536, layers=30)  # SmolLM2-135M
LARGE = model("llama", vocab=128_256, embed=4096, heads=32, kv_heads=8, ff=14_336, layers=32)  # Llama 3 8B


@pytest.fixture(scope="module")
def chips() -> list[jax.Device]:
    pytest.importorskip("libtpu", reason="needs libtpu, the TPU compiler (make tpu-compile)")
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    return list(topologies.get_topology_desc(topology_name="v5e:2x2", platform="tpu").devices)


@pytest.mark.tpu_backend
@pytest.mark.parametrize("kind", ["decode", "read"])
@pytest.mark.parametrize(
    ("name", "config", "data", "parts"),
    [("SmolLM2-135M", SMALL, 4, 1), ("Llama-3-8B", LARGE, 1, 4)],
    ids=["SmolLM2-135M", "Llama-3-8B"],
)
@pytest.mark.timeout(3600)
def test_the_tpu_compiler_takes_a_step(
    chips: list[jax.Device], name: str, config: StepConfig, data: int, parts: int, kind: str
) -> None:
    check_mesh(config.model, data, parts)
    placement = MeshLayout(make_mesh(chips, data, parts))
    weights = monolithic_step.weight_shapes(config)
    if kind == "decode":
        args = monolithic_step.decode_shapes(config, weights, ROWS, PAGES, "int8", placement)
        function, donate, tokens = monolithic_step.decode, (1, 2), ROWS
    else:
        args = monolithic_step.read_shapes(config, weights, PAGE, PAGES, "int8", placement)
        function, donate, tokens = monolithic_step.read, (1,), PAGE
    started = time.process_time()
    program = jax.jit(placement.program(functools.partial(function, config)), donate_argnums=donate)
    with placement.scope(), lowering_platform.elsewhere("tpu"):
        compiled = program.lower(*args).compile()
    seconds = time.process_time() - started
    cost, memory = compiled.cost_analysis(), compiled.memory_analysis()
    peak = (
        memory.argument_size_in_bytes
        + memory.output_size_in_bytes
        + memory.temp_size_in_bytes
        - memory.alias_size_in_bytes
    )
    bound = max(cost["flops"] / FLOPS, cost["bytes accessed"] / BYTES)
    print(
        f"\n| {name} | {data} × {parts} | {kind} {tokens} | {cost['flops'] / 1e9:.2f} | "
        f"{cost['bytes accessed'] / 1e6:.0f} | {peak / 2**20:.0f} | {1e3 * bound / tokens:.3f} | {seconds:.0f} |"
    )
    assert memory.argument_size_in_bytes > 0
    assert peak < HBM
