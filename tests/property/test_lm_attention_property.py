"""Attention in training form against its definition, and the deep memory against its sums."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from atlas_jax.model.lm import attend, deep_memory, window_attend
from atlas_jax.model.lm.attention import rotate, window_mask
from atlas_jax.model.lm.deep import window_weights


@settings(max_examples=6, deadline=None)
@given(st.integers(1, 17), st.integers(1, 6), st.integers(0, 2), st.integers(0, 2**31))
def test_blocks_are_the_window(tokens: int, window: int, prefix: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    q, k, v = (jnp.asarray(rng.normal(size=(2, prefix + tokens, h, 4)), jnp.float32) for h in (4, 2, 2))
    mask = jnp.pad(window_mask(tokens, window), ((0, 0), (prefix, 0)), constant_values=True)
    expected = jax.jit(attend)(q[:, prefix:], k, v, mask[None])
    found = jax.jit(window_attend, static_argnums=(3, 4))(q, k, v, window, prefix)
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_rotation_depends_on_distance_only() -> None:
    rng = np.random.default_rng(0)
    x = jnp.asarray(np.tile(rng.normal(size=8), (1, 9, 1, 1)), jnp.float32)
    a = rotate(x, 100.0)[0, :, 0]
    products = np.asarray(a @ a.T)
    for distance in range(9):
        diagonal = np.diagonal(products, distance)
        np.testing.assert_allclose(diagonal, diagonal[0], rtol=1e-4, atol=1e-4)


@settings(max_examples=8, deadline=None)
@given(st.integers(1, 9), st.integers(1, 12), st.integers(0, 2**31))
def test_window_weights_count_the_windows(tokens: int, window: int, seed: int) -> None:
    gamma = np.random.default_rng(seed).uniform(size=(1, 1, tokens, window))
    expected = np.zeros((tokens, tokens))
    for t in range(tokens):
        for n in range(t + 1):
            for i in range(max(0, n - window + 1), n + 1):
                expected[t, i] += gamma[0, 0, n, n - i]
    np.testing.assert_allclose(window_weights(jnp.asarray(gamma))[0, 0], expected, rtol=1e-5, atol=1e-6)


def test_deep_memory_is_its_sums() -> None:
    """Token by token, with explicit exponentials, as the module's text has it."""
    rng = np.random.default_rng(1)
    tokens, dim, hidden, window = 5, 4, 3, 2
    q, k, v = (rng.normal(size=(tokens, dim)) for _ in range(3))
    w1, w2 = rng.normal(size=(hidden, dim)), rng.normal(size=(dim, hidden))
    gamma = rng.uniform(size=(tokens, window))
    for l2 in (False, True):
        slope = np.asarray(jax.vmap(jax.vmap(jax.grad(jax.nn.gelu)))(jnp.asarray(k @ w2)))
        inside = np.asarray(jax.nn.gelu(jnp.asarray(k @ w2)))
        error = v - inside @ w1 if l2 else v
        delta = (error @ w1.T) * slope
        expected = []
        for t in range(tokens):
            weight = np.exp(k[: t + 1] @ q[t] / dim**0.5)
            count = [sum(gamma[n, n - i] for n in range(i, min(t, i + window - 1) + 1)) for i in range(t + 1)]
            before = q[t] @ w2 + (weight / weight.sum() * count) @ delta[: t + 1]
            active = np.asarray(jax.nn.gelu(jnp.asarray(before)))
            again = (inside[: t + 1] @ active) * count / (hidden**0.5 * (t + 1))
            expected.append(active @ w1 + again @ error[: t + 1])
        arrays = (jnp.asarray(x, jnp.float32)[None, :, None] for x in (q, k, v))
        one = jnp.asarray(gamma, jnp.float32)[None, None]
        found = deep_memory(*arrays, jnp.asarray(w1)[None], jnp.asarray(w2)[None], one, l2=l2)[0, :, 0]
        np.testing.assert_allclose(found, np.stack(expected), rtol=2e-4, atol=2e-5)
