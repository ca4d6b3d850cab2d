"""Every kernel, as this device runs it, against its `ref_` definition on the host's CPU in float32."""

from __future__ import annotations

import traceback
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from atlas_jax.config import PAGE, MemoryConfig
from atlas_jax.kernels import feature_maps, omega, recall_features
from atlas_jax.kernels.attention import attend, ref_window_attention, visible
from atlas_jax.kernels.gated_delta import gated_delta, ref_gated_delta
from atlas_jax.kernels.kv_pages import LayerKV, QuantPages, RingView
from atlas_jax.kernels.linear import PackedArray, QuantArray, linear, pack_weight, quantize_weight, unpack
from atlas_jax.kernels.monomials import polynomial_features, ref_polynomial_features
from atlas_jax.kernels.newton_schulz import orthogonalize, ref_orthogonalize
from atlas_jax.kernels.speculative_drafter import NONE, draft_tokens, ref_draft_tokens
from atlas_jax.recall.adapter import GATE_FEATURES, make_adapter

Pair = tuple[Any, Any]
"""What the kernel gives, and its definition."""


def _drawn(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def _on_cpu(function: Callable[..., Any], *args: Any) -> Any:
    """The definition: on the host, with products in full float32."""
    with jax.default_device(jax.devices("cpu")[0]), jax.default_matmul_precision("highest"):
        return jax.tree.map(np.asarray, function(*jax.tree.map(np.asarray, args)))


def _int8_linear(rows: int, size: int) -> Pair:
    x, matrix = _drawn(rows, size), _drawn(size, size, seed=1)
    weight = QuantArray(*map(jnp.asarray, quantize_weight(matrix)))
    exact = x.astype(np.float64) @ (np.asarray(weight.values, np.float64) * np.asarray(weight.scale)[:, None]).T
    return jax.jit(linear)(weight, jnp.asarray(x)), exact


def _packed_linear(rows: int, size: int) -> Pair:
    random = np.random.default_rng(2)
    codes = random.integers(0, 16, (size, size)).astype(np.uint8)
    step = random.uniform(0.01, 0.02, (size, size // 32)).astype(np.float32)
    weight = PackedArray(*map(jnp.asarray, pack_weight(codes, step, -8 * step)))
    x, plain = _drawn(rows, size), unpack(weight)
    exact = x.astype(np.float64) @ (np.asarray(plain.values, np.float64) * np.asarray(plain.scale)[:, None]).T
    return jax.jit(linear)(weight, jnp.asarray(x)), exact


def _attention(rows: int, tokens: int, pages: int) -> Pair:
    kv_heads, groups, dim, sinks = 3, 3, 64, 4
    random = np.random.default_rng(3)

    def quantised(seed: int) -> QuantPages:
        size = rows, pages, kv_heads, PAGE
        values = random.integers(-127, 128, (*size, dim)).astype(np.int8)
        scale = np.random.default_rng(seed).uniform(1e-3, 0.02, size).astype(np.float32)
        return QuantPages(jnp.asarray(values), jnp.asarray(scale))

    near = (jnp.asarray(_drawn(rows, kv_heads, sinks, dim, seed=seed)) for seed in (4, 5))
    kv = LayerKV(quantised(6), quantised(7), *near)
    page = np.tile(np.arange(pages), (rows, 1)).astype(np.int32)
    positions = np.tile((pages - 1) * PAGE + 9 + np.arange(tokens), (rows, 1)).astype(np.int32)
    last, first = np.full(rows, pages - 1, np.int32), np.ones(rows, np.int32)
    view = RingView(*map(jnp.asarray, (page, last, positions, np.ones(positions.shape, bool), first)))
    queries = [jnp.asarray(_drawn(rows, tokens, kv_heads * groups, dim, seed=seed)) for seed in (8, 9)]
    masks = visible(view, None)
    found = jax.jit(lambda q, q_sink, kv, view: attend(q, q_sink, kv, view, None, visible(view, None), dim**-0.5))(
        *queries, kv, view
    )
    k, v = (np.asarray(x.values, np.float32) * np.asarray(x.scale)[..., None] for x in (kv.k, kv.v))
    exact = _on_cpu(lambda *args: ref_window_attention(*args, dim**-0.5), *queries, k, v, kv.sink_k, kv.sink_v, *masks)
    return found, exact


def _memory_read(rows: int) -> Pair:
    config = MemoryConfig(layers=(0,), components=96, features=9216, code_dim=256, max_window=512)
    mean, projection = np.zeros((1, 32)), np.zeros((1, 32, config.components))
    rest = np.ones(64), np.zeros(GATE_FEATURES), np.zeros(config.components + 1)
    adapter = jax.jit(lambda: make_adapter(config, 64, mean, projection, *rest))()
    random = np.random.default_rng(10)
    values = jnp.asarray(random.integers(-127, 128, (rows, config.code_dim, config.features)).astype(np.int8))
    scale = jnp.asarray(random.uniform(1e-3, 1.0, (rows, config.code_dim)).astype(np.float32))
    key = _drawn(rows, 1, 2, config.components, seed=11)
    key[..., adapter.halves[1] :] = 0.0
    key /= np.linalg.norm(key, axis=-1, keepdims=True)
    degree = jnp.ones(rows, jnp.int32)
    args = jnp.asarray(key.reshape(rows, 1, -1)), degree, values, scale, adapter.factors, adapter.feature_weight
    found = jax.jit(lambda *args: recall_features.read_out(*args, adapter.halves))(*args)
    return found, _on_cpu(recall_features.ref_read_out, *args)


def _newton_schulz(batch: int) -> Pair:
    x = _drawn(batch, 64, 256, seed=12)
    return jax.jit(orthogonalize)(jnp.asarray(x)), _on_cpu(ref_orthogonalize, x)


def _delta(tokens: int) -> Pair:
    heads, dim = 4, 64
    start, (q, k, v) = _drawn(2, heads, dim, dim, seed=13), _drawn(3, 2, tokens, heads, dim, seed=14)
    k = k / np.linalg.norm(k, axis=-1, keepdims=True)
    decay = -np.exp(_drawn(2, tokens, heads, seed=15) - 2.0)
    share = np.random.default_rng(16).uniform(size=(2, tokens, heads)).astype(np.float32)
    args = start, q, k, v, decay, share
    return jax.jit(gated_delta)(*map(jnp.asarray, args)), _on_cpu(ref_gated_delta, *args)


def _omega(chunk: int, tail: int) -> Pair:
    outputs, inputs = 64, 256
    random = np.random.default_rng(17)
    weight, momentum = 0.1 * _drawn(2, outputs, inputs, seed=18)
    x, left, right = (
        0.1 * _drawn(*shape, seed=seed)
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
    return jax.jit(run)(*map(jnp.asarray, args)), _on_cpu(
        lambda *args: omega.ref_omega_chunk(*args, "row"), *args[:5], *wide, band
    )


def _features(rows: int) -> Pair:
    x, coefficients = 0.3 * _drawn(rows, 16, seed=22), (1.0, 1.0, 0.5)
    found = jax.jit(lambda x: polynomial_features(x, coefficients))(jnp.asarray(x))
    full = _on_cpu(lambda x: ref_polynomial_features(x, coefficients), x)
    return np.asarray(found) @ np.asarray(found).T, full @ full.T


def _polynomial(rows: int) -> Pair:
    x, scale = 0.3 * _drawn(rows, 12, seed=23), np.asarray([1.0, 0.7, 0.3], np.float32)
    return jax.jit(feature_maps.polynomial)(jnp.asarray(x), jnp.asarray(scale)), _on_cpu(
        feature_maps.ref_polynomial, x, scale
    )


def _drafts() -> Pair:
    random = np.random.default_rng(24)
    texts = [random.integers(0, 4, 60) for _ in range(4)]
    ring = np.full((4, 128), NONE, np.int32)
    ring[:, :60] = texts
    successor, last = np.full(51, NONE, np.int32), np.full(4, 59, np.int32)
    found = jax.jit(draft_tokens, static_argnums=3)(ring, last, successor, 3)
    return found, np.asarray([ref_draft_tokens(text, successor, 3) for text in texts])


# What a kernel is, and by how much of the largest value it may be off: int8 and bfloat16 terms have their own rounding.
KERNELS: dict[str, tuple[Callable[[bool], Pair], float]] = {
    "int8 GEMV": (lambda quick: _int8_linear(1, 128 if quick else 2048), 1e-3),
    "int8 GEMM of 128 rows": (lambda quick: _int8_linear(128, 128 if quick else 2048), 1e-3),
    "4-bit GEMV": (lambda quick: _packed_linear(1, 128 if quick else 2048), 1e-3),
    "4-bit GEMM of 128 rows": (lambda quick: _packed_linear(128, 128 if quick else 2048), 1e-3),
    "window attention of one token": (lambda quick: _attention(2, 1, 2 if quick else 8), 1e-2),
    "window attention of a chunk": (lambda quick: _attention(1, 32, 2 if quick else 8), 1e-2),
    "memory read": (lambda quick: _memory_read(1 if quick else 8), 1e-2),
    "Newton–Schulz": (lambda quick: _newton_schulz(2 if quick else 64), 2e-2),
    "gated delta rule, a step": (lambda quick: _delta(1), 1e-3),
    "gated delta rule, a chunk": (lambda quick: _delta(16 if quick else 64), 1e-2),
    "Omega chunk": (lambda quick: _omega(16 if quick else 64, 4), 1e-2),
    "polynomial features": (lambda quick: _features(8), 1e-2),
    "polynomial map": (lambda quick: _polynomial(8), 1e-3),
    "drafts": (lambda quick: _drafts(), 0.0),
}


def run(task: Any) -> None:
    """See `benchmarks.accelerator`."""
    for name, (kernel, tolerance) in KERNELS.items():
        try:
            found, wanted = (jax.tree.leaves(one) for one in kernel(task.quick))
        except Exception:  # the next one may work
            task.found(name, traceback.format_exc(limit=-3)[-600:], ok=False)
            continue
        off = 0.0
        for one, other in zip(found, wanted, strict=True):
            exact = np.asarray(other, np.float64)
            most = float(np.abs(np.asarray(one, np.float64) - exact).max()) / max(float(np.abs(exact).max()), 1e-30)
            off = max(off, most if np.isfinite(most) else np.inf)
        task.found(name, f"off by {off:.1e}, at most {tolerance:.0e}", ok=bool(off <= tolerance))
