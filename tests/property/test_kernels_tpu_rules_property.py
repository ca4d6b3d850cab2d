"""The TPU kernels of the memory rules, interpreted on the CPU, against XLA's programs; and compiled by Mosaic."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import SingleDeviceSharding

from atlas_jax.kernels import newton_schulz, omega
from atlas_jax.kernels.kernel_choice import KernelChoice
from atlas_jax.kernels.newton_schulz import COEFFICIENTS, orthogonalize, ref_orthogonalize
from atlas_jax.kernels.tpu import newton_schulz as mosaic_newton_schulz
from atlas_jax.kernels.tpu import omega as mosaic_omega
from atlas_jax.memory import PRESETS, chunked, init_params, init_state, make_tokens

FEW = settings(max_examples=5, deadline=None, derandomize=True, database=None)
seeds = st.integers(0, 2**32 - 1)
JORDAN = (COEFFICIENTS["jordan"] * 5)[:5]


@pytest.fixture
def interpreted() -> Iterator[None]:
    """As on one TPU, but the kernels are interpreted."""
    with KernelChoice(interpret_tpu=True).scope():
        yield


@FEW
@given(
    seeds,
    st.lists(st.integers(1, 3), max_size=2),
    st.integers(1, 20),
    st.integers(1, 20),
    st.sampled_from([1e-30, 1e-3, 1.0, 1e30]),
)
def test_newton_schulz_is_its_definition(seed: int, batch: list[int], m: int, n: int, size: float) -> None:
    x = np.random.default_rng(seed).standard_normal((*batch, m, n)).astype(np.float32) * np.float32(size)
    x.reshape(-1, m, n)[0] = 0 if seed % 3 == 0 else x.reshape(-1, m, n)[0]
    found = mosaic_newton_schulz.orthogonalize(jnp.asarray(x), JORDAN, interpret=True)
    np.testing.assert_allclose(found, ref_orthogonalize(jnp.asarray(x)), atol=1e-3)


def test_a_batch_that_fills_no_grid_is_cut_off() -> None:
    """512 × 256 matrices go two to a step of the grid; three of them leave half a step empty."""
    x = np.random.default_rng(0).standard_normal((3, 512, 256)).astype(np.float32)
    found = mosaic_newton_schulz.orthogonalize(jnp.asarray(x), JORDAN[:1], interpret=True)
    np.testing.assert_allclose(found, ref_orthogonalize(jnp.asarray(x), steps=1), atol=1e-4)


@pytest.mark.parametrize("momentum", [True, False])
def test_the_omega_rule_where_they_are_called(momentum: bool, interpreted: None) -> None:
    b, m, o, i = 3, 5, 4, 6
    rng = np.random.default_rng(0)
    x, weight, old, left, right, band = (
        jnp.asarray(rng.standard_normal(shape), jnp.float32)
        for shape in ((b, i), (o, i), (o, i), (m, o), (m, i), (b, m))
    )
    alpha, theta, inner, outer = jnp.asarray(rng.uniform(0.2, 1, (4, b, 1)), jnp.float32)

    def both(x: Any, weight: Any, old: Any, left: Any, right: Any, alpha: Any, theta: Any, channels: int = 1) -> Any:
        wide = jnp.broadcast_to(alpha, (b, channels))
        gates = omega.chunk_coefficients(wide, theta if momentum else None, inner, outer, band)
        start = old if momentum else None
        args = left, right, gates, "row"
        return omega.dual_product(x, weight, start, *args), omega.chunk_end(weight, start, *args)

    def loss(*args: jax.Array) -> jax.Array:
        return sum(jnp.sum(jnp.sin((1 + n) * y)) for n, y in enumerate(jax.tree.leaves(both(*args))))

    args = x, weight, old, left, right, alpha, theta
    text = str(jax.make_jaxpr(both)(*args))
    assert "omega_dual_product" in text
    assert "omega_chunk_end" in text
    assert "pallas_call" not in str(jax.make_jaxpr(functools.partial(both, channels=o))(*args))
    mosaic = both(*args), jax.grad(loss, argnums=range(7))(*args)
    with KernelChoice(tpu=False).scope():
        plain = both(*args), jax.grad(loss, argnums=range(7))(*args)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5), mosaic, plain)


@pytest.mark.slow
def test_newton_schulz_where_they_are_called(interpreted: None) -> None:
    x = jnp.asarray(np.random.default_rng(0).standard_normal((2, 4, 6)), jnp.float32)
    for table in ("jordan", "polar_express"):
        run = functools.partial(orthogonalize, steps=3, table=table)
        assert "newton_schulz" in str(jax.make_jaxpr(run)(x))
        mosaic = run(x), jax.grad(lambda x, run=run: jnp.sum(jnp.sin(run(x))))(x)
        definition = functools.partial(ref_orthogonalize, steps=3, table=table)
        plain = definition(x), jax.grad(lambda x, run=definition: jnp.sum(jnp.sin(run(x))))(x)
        jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-3, atol=1e-4), mosaic, plain)


_SLOW = [pytest.param(name, marks=pytest.mark.slow) for name in ("titans", "deltanet", "atlas")]


@pytest.mark.parametrize("name", ["omeganet", *_SLOW])
def test_rules_and_their_gradients_are_xlas(name: str, interpreted: None) -> None:
    """Batches, momentum or none, a window's tail, Newton–Schulz per token."""
    rule = PRESETS[name](6, 6, **({} if name == "deltanet" else {"hidden": 8, "chunk": 4}), remat=False)
    rng = np.random.default_rng(3)
    params = jax.tree.map(
        lambda x: x + jnp.asarray(0.2 * rng.standard_normal(x.shape), x.dtype), init_params(rule, jax.random.key(0))
    )
    q, k, v = (jnp.asarray(rng.standard_normal((2, 11, 6)), jnp.float32) for _ in range(3))
    gates = {
        name: jnp.asarray(rng.uniform(low, 1, (2, 11, 1)), jnp.float32)
        for name, low in (("alpha", 0.9), ("theta", 0.2), ("gamma", 0.1))
        if rule.uses(name)
    }

    def loss(params: Any, q: jax.Array, k: jax.Array, v: jax.Array) -> tuple[jax.Array, jax.Array]:
        tokens = make_tokens(rule, q, k, v, eta=0.02, **gates)
        state, y = chunked(rule, params, init_state(rule, params, (2,)), tokens)
        return jnp.sum(jnp.sin(y)) + sum(jnp.sum(w * w) for w in jax.tree.leaves(state.weights)), y

    def run() -> Any:
        both = jax.value_and_grad(loss, argnums=(0, 1, 2, 3), has_aux=True)
        return jax.jit(lambda *args: both(*args))(params, q, k, v)  # traced anew: the kernels are another choice

    mosaic = run()
    text = str(jax.make_jaxpr(lambda: loss(params, q, k, v))())
    assert ("newton_schulz" in text) == (name == "atlas")
    assert ("omega_dual_product" in text and "omega_chunk_end" in text) == (name != "atlas")
    with KernelChoice(tpu=False).scope():
        plain = run()
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=2e-3, atol=2e-4), mosaic, plain)


def test_they_run_where_a_program_surely_has_one_device(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = jnp.zeros((64, 256))
    assert not newton_schulz.uses_tpu_kernel(weight.shape)
    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
    monkeypatch.setattr(jax, "device_count", lambda: 1)
    assert newton_schulz.uses_tpu_kernel((7, *weight.shape))
    assert omega.uses_tpu_kernel(weight.shape, 1)
    assert not omega.uses_tpu_kernel(weight.shape, 64)
    assert not newton_schulz.uses_tpu_kernel((4096, 4096))
    monkeypatch.setattr(jax, "device_count", lambda: 4)
    assert not newton_schulz.uses_tpu_kernel(weight.shape)
    assert not omega.uses_tpu_kernel(weight.shape, 1)


# --- the TPU compiler -------------------------------------------------------------------------------------------------
def on_tpu(*shapes: tuple[int, ...]) -> list[jax.ShapeDtypeStruct]:
    from jax.experimental import topologies

    chip = SingleDeviceSharding(topologies.get_topology_desc("v5e:2x2", "tpu").devices[0])
    return [jax.ShapeDtypeStruct(shape, jnp.float32, sharding=chip) for shape in shapes]


def counted(function: Any, *shapes: tuple[int, ...]) -> float:
    """Megabytes that the compiler counts."""
    compiled = jax.jit(function).lower(*on_tpu(*shapes)).compile()
    return float(compiled.cost_analysis()["bytes accessed"]) / 1e6


@pytest.mark.tpu_backend
@pytest.mark.parametrize("shape", [(512, 64, 256), (512, 256, 64), (512, 256, 256), (100, 48, 40)])
def test_mosaic_reads_and_writes_a_matrix_once(shape: tuple[int, ...]) -> None:
    kernel = counted(lambda x: mosaic_newton_schulz.orthogonalize(x, JORDAN), shape)
    whole = counted(orthogonalize, shape)
    print(f"\n| Newton–Schulz {list(shape)} | {whole:.0f} | {kernel:.0f} |")
    assert kernel < whole / 3


@pytest.mark.tpu_backend
def test_mosaic_keeps_an_omega_chunk_in_vmem() -> None:
    count, b, c, o, i = 512, 64, 16, 64, 256
    m = b + c - 1
    shapes = [(b, i), (o, i), (o, i), (m, o), (m, i), (b, 1), (b, 1), (b, m)]
    kernel = counted(jax.vmap(mosaic_omega.dual_product), *((count, *shape) for shape in shapes))

    def xla(*args: jax.Array) -> jax.Array:
        x, weight, momentum, left, right, kept, lost, tokens = args
        gates = omega.Coefficients(kept, lost, tokens[..., None], kept, tokens[..., None])
        return omega.dual_product(x, weight, momentum, left, right, gates)

    whole = counted(jax.vmap(xla), *((count, *shape) for shape in shapes))
    print(f"\n| `dual_product`, {count} chunks | {whole:.0f} | {kernel:.0f} |")
    assert kernel < whole / 2
    shapes = [(o, i), (o, i), (m, o), (m, i), (1, 1), (m, 1), (1, 1), (1, 1), (m, 1)]
    kernel = counted(jax.vmap(mosaic_omega.chunk_end), *((count, *shape) for shape in shapes))

    def xla_end(*args: jax.Array) -> Any:
        weight, momentum, left, right, kept, tokens, lost, momentum_kept, momentum_tokens = args
        gates = omega.Coefficients(kept, lost, tokens[None], momentum_kept, momentum_tokens[None])
        return omega.chunk_end(weight, momentum, left, right, gates)

    whole = counted(jax.vmap(xla_end), *((count, *shape) for shape in shapes))
    print(f"| `chunk_end`, {count} chunks | {whole:.0f} | {kernel:.0f} |")
    assert kernel < whole
