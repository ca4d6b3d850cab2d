"""The gated delta rule: a chunk and a step are the recurrence, which is the library's own memory rule of that name."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from atlas_jax import memory
from atlas_jax.kernels.gated_delta import gated_delta, ref_gated_delta, short_convolution
from atlas_jax.memory import presets

HEADS, DIM = 3, 16
run = jax.jit(gated_delta)


def drawn(seed: int, rows: int, tokens: int) -> tuple[np.ndarray, ...]:
    """A memory, queries, keys of unit length, values, decays from hardly any to nearly all, and shares."""
    random = np.random.default_rng(seed)
    start = random.standard_normal((rows, HEADS, DIM, DIM))
    q, k, v = random.standard_normal((3, rows, tokens, HEADS, DIM))
    k /= np.linalg.norm(k, axis=-1, keepdims=True)
    decay = -np.exp(3.0 * random.standard_normal((rows, tokens, HEADS)) - 2.0)
    share = random.uniform(size=(rows, tokens, HEADS))
    return tuple(x.astype(np.float32) for x in (start, q, k, v, decay, share))


@functools.cache
def whole() -> tuple[tuple[np.ndarray, ...], jax.Array, jax.Array]:
    """Two rows of 32 tokens, what they read, and the memories they leave."""
    given = drawn(1, 2, 32)
    return given, *run(*given)


def test_a_chunk_is_the_recurrence_which_is_the_memory_rule() -> None:
    (start, q, k, v, decay, share), read, left = whole()
    wanted_read, wanted = ref_gated_delta(*map(jnp.asarray, (start, q, k, v, decay, share)))
    np.testing.assert_allclose(read, wanted_read, atol=2e-5)
    np.testing.assert_allclose(left, wanted, atol=2e-5)
    rule = presets.gated_deltanet(DIM, DIM)
    none = memory.init_state(rule, memory.init_params(rule, jax.random.key(0)), batch=(2, HEADS))
    (name,) = none.weights
    by_head = (np.moveaxis(x, 1, 2) for x in (q, k, v))
    gates = (np.moveaxis(x, 1, 2)[..., None] for x in (share / 2, np.exp(decay)))
    eta, alpha = gates
    tokens = memory.make_tokens(rule, *by_head, eta=eta, alpha=alpha)
    begun = dataclasses.replace(none, weights={name: jnp.asarray(start)})
    params = memory.init_params(rule, jax.random.key(0))
    state, y = jax.jit(memory.scan, static_argnums=0)(rule, params, begun, tokens)
    length = np.linalg.norm(q, axis=-1, keepdims=True)  # the rule asks with queries of unit length
    np.testing.assert_allclose(np.moveaxis(np.asarray(y), 2, 1) * length, read, atol=1e-4)
    np.testing.assert_allclose(state.weights[name], left, atol=5e-5)


def test_steps_are_the_chunk_and_a_row_knows_nothing_of_its_neighbours() -> None:
    (start, *tokens), read, left = whole()
    state, alone = jnp.asarray(start), jnp.asarray(start[:1])
    for place in range(tokens[0].shape[1]):
        token = [x[:, place : place + 1] for x in tokens]
        y, state = run(state, *token)
        own, alone = run(alone, *(x[:1] for x in token))
        np.testing.assert_allclose(y[:, 0], read[:, place], atol=2e-5)
        assert np.array_equal(own, y[:1])
        assert np.array_equal(alone, state[:1])
    np.testing.assert_allclose(state, left, atol=2e-5)


@pytest.mark.parametrize("real", [0, 1, 17])
def test_tokens_that_are_not_real_leave_the_memory(real: int) -> None:
    (start, q, k, v, decay, share), read, _ = whole()
    unreal = np.arange(32)[None, :, None] >= real
    y, left = run(start, q, k, v, np.where(unreal, 0.0, decay), np.where(unreal, 0.0, share))
    np.testing.assert_allclose(y[:, :real], read[:, :real], atol=2e-5)
    _, wanted = ref_gated_delta(*map(jnp.asarray, (start, *(x[:, : real or 1] for x in (q, k, v, decay, share)))))
    np.testing.assert_allclose(left, wanted if real else start, atol=2e-5 if real else 0.0)
    none = np.zeros((2, 1, HEADS), np.float32)
    assert np.array_equal(run(start, q[:, :1], k[:, :1], v[:, :1], none, none)[1], start)


def test_a_convolution_goes_on_where_the_last_real_token_was() -> None:
    random = np.random.default_rng(5)
    x, weight = random.standard_normal((2, 12, 6)).astype("f4"), random.standard_normal((6, 4)).astype("f4")
    begin = np.zeros((2, 3, 6), np.float32)
    whole, _ = short_convolution(begin, x, weight, np.ones((2, 12), bool))
    padded = np.concatenate([np.zeros((2, 3, 6)), x], axis=1)
    wanted = np.stack([(padded[:, t : t + 4] * weight.T).sum(axis=1) for t in range(12)], axis=1)
    np.testing.assert_allclose(whole, wanted, atol=1e-5)
    counts = np.asarray([5, 2])  # of seven tokens, the others padding
    _, kept = short_convolution(begin, x[:, :7], weight, np.arange(7) < counts[:, None])
    for row, count in enumerate(counts):
        again, _ = short_convolution(
            kept[row : row + 1], x[row : row + 1, count:], weight, np.ones((1, 12 - count), bool)
        )
        assert np.array_equal(again[0], whole[row, count:])
