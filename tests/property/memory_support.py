"""What the memory tests share: the reference, small rules of every kind, random tokens, compiled functions."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from atlas_jax.memory import PRESETS, MemoryRule, chunked, init_params, init_state, scan, step
from atlas_jax.memory import Tokens as Tokens
from tests.reference import memory_reference as reference

# the tests run each program on a handful of small arrays: code that compiles twice as fast matters more than its speed
QUICK = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
jit = functools.partial(jax.jit, compiler_options=QUICK)

run_chunked = jit(chunked, static_argnums=0)
run_scan = jit(scan, static_argnums=0)
run_step = jit(step, static_argnums=0)

DIM = 3
HEADS = 2


def preset(name: str, **overrides) -> MemoryRule:
    """A preset at test size: a window of 3 where it has one, 2 Newton–Schulz steps, chunks of 4 but for the delta rules."""
    small = {"ns_steps": 2}
    plain = PRESETS[name](DIM, DIM)
    if plain.window is not None and plain.window > 1:
        small["window"] = 3
    if plain.memory != "matrix":
        small["hidden"] = 4
    small |= {"block": 4} if plain.sequential else {"chunk": 4, "block": 4}
    return PRESETS[name](DIM, DIM, **small | overrides)


def draw_params(rule: MemoryRule, seed: int, heads: tuple[int, ...] = ()):
    """Random parameters, W₀ ≠ 0 for every memory, float64."""
    rng = np.random.default_rng(seed)
    shapes = jax.eval_shape(lambda: init_params(rule, jax.random.key(0), heads))
    params = jax.tree.map(lambda s: jnp.asarray(0.5 * rng.standard_normal(s.shape)), shapes)
    if "scale" in params.features:  # a square root; the sign is free, and the reference takes the positive one
        params.features["scale"] = jnp.abs(params.features["scale"])
    return params


def draw_tokens(rule: MemoryRule, seed: int, length: int, batch: int = HEADS, extremes: bool = True) -> Tokens:
    """Random tokens [batch, length, …]; some gates are exactly 0 or 1."""
    rng = np.random.default_rng(seed)

    def gate(size: int, low: float, high: float) -> jax.Array:
        x = rng.uniform(low, high, (batch, length, size))
        if extremes:
            x = np.where(rng.random(x.shape) < 0.1, 0.0, x)
            x = np.where(rng.random(x.shape) < 0.1, 1.0 if high == 1 else high, x)
        return jnp.asarray(x)

    def vectors(size: int) -> jax.Array:
        return jnp.asarray(rng.standard_normal((batch, length, size)))

    return Tokens(
        q=vectors(rule.d_k),
        k=vectors(rule.d_k),
        v=vectors(rule.d_v),
        eta=gate(rule.gate_dim("eta"), 0.0, 0.2),
        alpha=gate(rule.gate_dim("alpha"), 0.3, 1.0),
        theta=gate(rule.gate_dim("theta"), 0.0, 1.0),
        gamma=gate(rule.window_gates, 0.0, 1.0),
    )


def expected(rule: MemoryRule, params, tokens: Tokens) -> np.ndarray:
    """The reference's outputs [batch, T, d_v]."""
    weights = {n: np.asarray(w) for n, w in params.weights.items()}
    learned = {n: np.asarray(w) for n, w in params.features.items()}
    arrays = {f.name: np.asarray(getattr(tokens, f.name)) for f in dataclasses.fields(tokens)}
    batch = arrays["k"].shape[0]
    rows = [{n: x[b] for n, x in arrays.items()} for b in range(batch)]
    return np.stack([reference.run(rule, weights, learned, row) for row in rows])


def at(tokens: Tokens, index) -> Tokens:
    """A part of the tokens along time."""
    return jax.tree.map(lambda x: x[:, index], tokens)


def fresh(rule: MemoryRule, params, batch: int = HEADS):
    """A new state for a batch."""
    return init_state(rule, params, (batch,))


def close(actual, wanted, tolerance: float = 1e-9) -> None:
    """Equal to a relative and absolute tolerance."""
    np.testing.assert_allclose(np.asarray(actual), np.asarray(wanted), rtol=tolerance, atol=tolerance)
