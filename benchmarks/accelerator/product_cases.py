"""Products: with weights of every form, what is fused into them, the memories' rules, and small matrices."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from atlas_jax.config import MemoryConfig
from atlas_jax.kernels import feature_maps, omega, recall_features
from atlas_jax.kernels.cholesky import cholesky, solve_lower
from atlas_jax.kernels.fused_linear import gated_linear, normed_linear, summed_linear
from atlas_jax.kernels.gated_delta import gated_delta, ref_gated_delta
from atlas_jax.kernels.kernel_choice import KernelChoice
from atlas_jax.kernels.linear import PackedArray, QuantArray, linear, quantize_weight, split_rows
from atlas_jax.kernels.low_rank import LowRank, RowScales, add_low_rank
from atlas_jax.kernels.monomials import polynomial_features, ref_polynomial_features
from atlas_jax.kernels.newton_schulz import orthogonalize, ref_orthogonalize
from atlas_jax.kernels.weight_forms import Form, unpack_records
from atlas_jax.recall.adapter import GATE_FEATURES, make_adapter
from benchmarks.accelerator import machine_part
from benchmarks.accelerator.kernel_case import KernelCase, Pair, drawn, on_cpu

_BITS = {
    Form.FLOATS: "4.25",
    Form.LEVELS: "4.5 (IQ4)",
    Form.PAIRS: "5",
    Form.FOUR: "4.5",
    Form.FIVE: "5.5",
    Form.SIX: "6.56",
}
"""Of a weight in each form."""


def _int8(size: int, seed: int = 1) -> tuple[QuantArray, np.ndarray]:
    """A matrix in 8 bits, and what it stands for."""
    weight = QuantArray(*map(jnp.asarray, quantize_weight(drawn(size, size, seed=seed))))
    return weight, np.asarray(weight.values, np.float64) * np.asarray(weight.scale)[:, None]


def _in_two_terms(x: np.ndarray) -> np.ndarray:
    """What activations are rounded to before a product."""
    high, low, unit = (part.astype(np.float64) for part in on_cpu(split_rows, x))
    return (256 * high + low) * unit


def _int8_linear(rows: int, size: int) -> Pair:
    x, (weight, plain) = drawn(rows, size), _int8(size)
    return jax.jit(linear)(weight, jnp.asarray(x)), _in_two_terms(x) @ plain.T


def _packed_linear(form: Form, rows: int, size: int) -> Pair:
    random = np.random.default_rng(2)
    records = random.integers(0, 256, (size, size // form.span, form.value)).astype(np.uint8)
    scale = random.uniform(0.01, 0.02, size).astype(np.float32)
    x, plain = drawn(rows, size), np.asarray(unpack_records(records, form), np.float64) * scale[:, None]
    weight = PackedArray(jnp.asarray(records), jnp.asarray(scale), form)
    return jax.jit(linear)(weight, jnp.asarray(x)), _in_two_terms(x) @ plain.T


def _fused(rows: int, size: int) -> Pair:
    """A norm, a sum and a norm, and a gate, each with the product after it."""
    eps, block = 1e-5, 64
    x, added = drawn(rows, size), drawn(rows, size, seed=3)
    gate_and_up = drawn(rows, 2 * size, seed=38)
    gain, added_gain = 1 + drawn(size, seed=39) / 4, 1 + drawn(size, seed=40) / 4
    weight, plain = _int8(size)

    def run(weight: QuantArray, x: Any, added: Any, gate_and_up: Any, gain: Any, added_gain: Any) -> Any:
        summed = summed_linear(weight, x, added, added_gain, gain, eps)
        return normed_linear(weight, x, gain, eps), *summed, gated_linear(weight, gate_and_up, block, "silu")

    def normed(part: np.ndarray, gain: np.ndarray) -> np.ndarray:
        return part / np.sqrt((part**2).mean(axis=-1, keepdims=True) + eps) * gain

    found = jax.jit(run)(weight, *map(jnp.asarray, (x, added, gate_and_up, gain, added_gain)))
    wide, more, both = (part.astype(np.float64) for part in (x, added, gate_and_up))
    total = wide + normed(more, added_gain)
    gate, up = np.moveaxis(both.reshape(rows, -1, 2, block), 2, 0)
    made = (gate / (1 + np.exp(-gate)) * up).reshape(rows, size)
    return found, (normed(wide, gain) @ plain.T, normed(total, gain) @ plain.T, total, made @ plain.T)


def _low_rank(size: int) -> Pair:
    """Two adapters of eight columns each, of which three rows use one, both and none."""
    out, x, gain = drawn(3, 2, size, seed=44), drawn(3, 2, size, seed=45), drawn(16, seed=46)
    a, b = (QuantArray(*map(jnp.asarray, quantize_weight(drawn(*of)))) for of in ((16, size), (size, 16)))
    scales = np.asarray([[0.5, 0.0], [1.0, -2.0], [0.0, 0.0]], np.float32)
    owner = np.repeat(np.arange(2, dtype=np.int32), 8)
    rows = RowScales(jnp.asarray(scales), jnp.asarray([True, True, False]))
    weights = LowRank(a, b, jnp.asarray(gain), jnp.asarray(owner))

    def run(out: Any, x: Any, weights: LowRank, rows: RowScales) -> jax.Array:
        return add_low_rank(out, weights, rows, lambda a: linear(a, x))

    thin = [np.asarray(part.values, np.float64) * np.asarray(part.scale)[:, None] for part in (a, b)]
    added = (x.astype(np.float64) @ thin[0].T * (scales[:, owner] * gain)[:, None]) @ thin[1].T
    return jax.jit(run)(*map(jnp.asarray, (out, x)), weights, rows), out + added


def _cholesky(batch: int) -> Pair:
    root, right = drawn(batch, 64, 96, seed=41), drawn(batch, 64, 16, seed=42)
    matrix = root @ root.swapaxes(-1, -2) / 96 + np.eye(64, dtype=np.float32)

    def run(matrix: Any, right: Any) -> Any:
        factor = cholesky(matrix)
        return factor, solve_lower(factor, right), solve_lower(factor, right, transposed=True)

    exact = np.linalg.cholesky(matrix.astype(np.float64))
    solved = np.linalg.solve(exact, right), np.linalg.solve(exact.swapaxes(-1, -2), right)
    return jax.jit(run)(*map(jnp.asarray, (matrix, right))), (exact, *solved)


def _memory_read(rows: int) -> Pair:
    config = MemoryConfig(layers=(0,), components=96, features=9216, code_dim=256, max_window=512)
    mean, projection = np.zeros((1, 32)), np.zeros((1, 32, config.components))
    rest = np.ones(64), np.zeros(GATE_FEATURES), np.zeros(config.components + 1)
    adapter = jax.jit(lambda: make_adapter(config, 64, mean, projection, *rest))()
    random = np.random.default_rng(10)
    values = jnp.asarray(random.integers(-127, 128, (rows, config.code_dim, config.features)).astype(np.int8))
    scale = jnp.asarray(random.uniform(1e-3, 1.0, (rows, config.code_dim)).astype(np.float32))
    key = drawn(rows, 1, 2, config.components, seed=11)
    key[..., adapter.halves[1] :] = 0.0
    key /= np.linalg.norm(key, axis=-1, keepdims=True)
    degree = jnp.ones(rows, jnp.int32)
    args = jnp.asarray(key.reshape(rows, 1, -1)), degree, values, scale, adapter.factors, adapter.feature_weight
    found = jax.jit(lambda *args: recall_features.read_out(*args, adapter.halves))(*args)
    return found, on_cpu(recall_features.ref_read_out, *args)


def _newton_schulz(batch: int) -> Pair:
    x = drawn(batch, 64, 256, seed=12)
    return jax.jit(orthogonalize)(jnp.asarray(x)), on_cpu(ref_orthogonalize, x)


def _delta(tokens: int) -> Pair:
    heads, dim = 4, 64
    start, (q, k, v) = drawn(2, heads, dim, dim, seed=13), drawn(3, 2, tokens, heads, dim, seed=14)
    k = k / np.linalg.norm(k, axis=-1, keepdims=True)
    decay = -np.exp(drawn(2, tokens, heads, seed=15) - 2.0)
    share = np.random.default_rng(16).uniform(size=(2, tokens, heads)).astype(np.float32)
    args = start, q, k, v, decay, share
    return jax.jit(gated_delta)(*map(jnp.asarray, args)), on_cpu(ref_gated_delta, *args)


def _omega(chunk: int, tail: int) -> Pair:
    outputs, inputs = 64, 256
    random = np.random.default_rng(17)
    weight, momentum = 0.1 * drawn(2, outputs, inputs, seed=18)
    x, left, right = (
        0.1 * drawn(*shape, seed=seed)
        for seed, shape in ((19, (chunk, inputs)), (20, (chunk + tail, outputs)), (21, (chunk + tail, inputs)))
    )
    gates = [
        random.uniform(low, high, (chunk, 1)).astype(np.float32)
        for low, high in ((0.9, 1), (0.5, 0.9), (0, 0.2), (0, 1))
    ]
    band = np.tril(random.random((chunk, chunk + tail)), tail).astype(np.float32)

    def run(weight: Any, momentum: Any, x: Any, left: Any, right: Any, *rest: Any) -> Any:
        coefficients = omega.chunk_coefficients(*rest)
        y = omega.dual_product(x, weight, momentum, left, right, coefficients, "row")
        return (y, *omega.chunk_end(weight, momentum, left, right, coefficients, "row"))

    args = weight, momentum, x, left, right, *gates, band
    wide = [np.broadcast_to(gate, (chunk, outputs)) for gate in gates]
    return jax.jit(run)(*map(jnp.asarray, args)), on_cpu(
        lambda *args: omega.ref_omega_chunk(*args, "row"), *args[:5], *wide, band
    )


def _features(rows: int) -> Pair:
    x, coefficients = 0.3 * drawn(rows, 16, seed=22), (1.0, 1.0, 0.5)
    found = jax.jit(lambda x: polynomial_features(x, coefficients))(jnp.asarray(x))
    full = on_cpu(lambda x: ref_polynomial_features(x, coefficients), x)
    return np.asarray(found) @ np.asarray(found).T, full @ full.T


def _polynomial(rows: int) -> Pair:
    x, scale = 0.3 * drawn(rows, 12, seed=23), np.asarray([1.0, 0.7, 0.3], np.float32)
    return jax.jit(feature_maps.polynomial)(jnp.asarray(x), jnp.asarray(scale)), on_cpu(
        feature_maps.ref_polynomial, x, scale
    )


def _size(quick: bool) -> int:
    return 256 if quick else 2048


def _weights(form: Form | None, count: int, outputs: int, inner: int) -> list[QuantArray | PackedArray]:
    """Any bytes, made on the device."""
    scale = jnp.full((outputs,), 1e-3, jnp.float32)

    @jax.jit
    def made(key: jax.Array) -> jax.Array:
        if form is None:
            return jax.lax.bitcast_convert_type(jax.random.bits(key, (outputs, inner), jnp.uint8), jnp.int8)
        return jax.random.bits(key, (outputs, inner // form.span, form.value), jnp.uint8)

    stored = [made(jax.random.key(seed)) for seed in range(count)]
    return [QuantArray(one, scale) if form is None else PackedArray(one, scale, form) for one in stored]


def speed(task: Any) -> None:
    """Bytes of weights that a GEMV reads in a second, of more of them than caches hold."""
    kernels = {"XLA": KernelChoice()} | ({"Triton": _TRITON} if jax.default_backend() == "gpu" else {})
    count, outputs, inner = (2, 512, 512) if task.quick else (8, 14_336, 4096)
    x = jnp.asarray(drawn(1, inner))
    for form in (None, *Form):
        weights = _weights(form, count, outputs, inner)
        size = sum(leaf.nbytes for leaf in jax.tree.leaves(weights))
        for name, choice in kernels.items():
            with choice.scope():
                run = jax.jit(lambda weights, x: [linear(weight, x) for weight in weights])
                rate = size / machine_part.seconds(lambda run=run, weights=weights: run(weights, x))  # type: ignore[misc]
            bits = "8" if form is None else _BITS[form]
            task.found(f"{bits}-bit GEMV by {name}", f"{rate / 1e9:.0f} GB/s of weights", bytes_per_second=rate)


_TRITON = KernelChoice(gpu=True)
CASES = {
    "int8 GEMV": KernelCase(("linear",), lambda quick: _int8_linear(1, _size(quick)), 1e-3),
    "int8 GEMM of 16 rows": KernelCase(("linear",), lambda quick: _int8_linear(16, _size(quick)), 1e-3),
    "int8 GEMM of 128 rows": KernelCase(("linear",), lambda quick: _int8_linear(128, _size(quick)), 1e-3),
    **{
        f"{bits}-bit {name}": KernelCase(
            ("linear", "weight_forms"),
            lambda quick, form=form, rows=rows: _packed_linear(form, rows, _size(quick)),  # type: ignore[misc]
            1e-3,
        )
        for form, bits in _BITS.items()
        for name, rows in (("GEMV", 1), ("GEMM of 128 rows", 128))
    },
    **{
        f"{'8' if form is None else _BITS[form]}-bit GEMM of {rows} rows by Triton": KernelCase(
            ("linear", "gpu"),
            lambda quick, form=form, rows=rows: (  # type: ignore[misc]
                _int8_linear(rows, _size(quick)) if form is None else _packed_linear(form, rows, _size(quick))
            ),
            1e-3,
            _TRITON,
            "gpu",
        )
        for form in (None, *Form)
        for rows in (1, 32)
    },
    "norms and gates before products": KernelCase(
        ("fused_linear", "reductions"), lambda quick: _fused(3, _size(quick)), 2e-2
    ),
    "LoRA adapters": KernelCase(("low_rank",), lambda quick: _low_rank(_size(quick)), 2e-2),
    "memory read": KernelCase(("recall_features", "monomials"), lambda quick: _memory_read(1 if quick else 8), 1e-2),
    "Newton–Schulz": KernelCase(("newton_schulz",), lambda quick: _newton_schulz(2 if quick else 64), 2e-2),
    "gated delta rule, a step": KernelCase(("gated_delta",), lambda _: _delta(1), 1e-3),
    "gated delta rule, a chunk": KernelCase(("gated_delta",), lambda quick: _delta(16 if quick else 64), 1e-2),
    "Omega chunk": KernelCase(("omega",), lambda quick: _omega(16 if quick else 64, 4), 1e-2),
    "Cholesky factors and solves": KernelCase(("cholesky",), lambda quick: _cholesky(2 if quick else 64), 1e-3),
    "polynomial features": KernelCase(("monomials",), lambda _: _features(8), 1e-2),
    "polynomial map": KernelCase(("feature_maps",), lambda _: _polynomial(8), 1e-3),
}
