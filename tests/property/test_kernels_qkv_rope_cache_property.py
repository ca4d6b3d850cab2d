"""What happens to a step's heads before attention, beside the same in float64."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from atlas_jax.config import PAGE
from atlas_jax.kernels.kernel_choice import KernelChoice
from atlas_jax.kernels.kv_pages import LayerKV, PairChoice, QuantPages, RingView, init_layer_kv, init_pair_choice
from atlas_jax.kernels.qkv_rope_cache import qkv_rope_cache

EPS, PAGES, SINKS, SAMPLES = 1e-6, 3, 4, 32
# rows, tokens, KV heads, queries of each, dimensions, half of the rotated ones
shapes = st.sampled_from(
    [(1, 1, 1, 1, 64, 32), (2, 1, 3, 3, 64, 32), (1, 19, 1, 4, 256, 128), (3, 5, 2, 2, 64, 16), (2, 7, 2, 1, 32, 8)]
)
cases = st.tuples(st.integers(0, 2**32 - 1), shapes, st.booleans(), st.booleans())


@jax.jit
def compiled(x: Any, gains: Any, *rest: Any) -> Any:
    return qkv_rope_cache(x, gains, EPS, *rest)


def run(cpu: bool, *args: Any) -> Any:
    """`qkv_rope_cache`, traced with or without the kernels."""
    with KernelChoice(cpu=cpu).scope():
        return compiled(*args)


def some_step(seed: int, shape: tuple[int, ...], normed: bool, keeps: bool) -> tuple[Any, ...]:
    """Arguments of `qkv_rope_cache`; some tokens are not valid, and the cache is full of other numbers."""
    batch, tokens, kv_heads, groups, dim, half = shape
    random = np.random.default_rng(seed)

    def floats(*of: int) -> jax.Array:
        return jnp.asarray(random.standard_normal(of), jnp.float32)

    def rotation() -> tuple[jax.Array, jax.Array]:
        angle = random.uniform(0, 7, (batch, tokens, half))
        return jnp.asarray(np.cos(angle), jnp.float32), jnp.asarray(np.sin(angle), jnp.float32)

    def filled(pages: QuantPages) -> QuantPages:
        values = random.integers(-127, 128, pages.values.shape)
        return QuantPages(jnp.asarray(values, jnp.int8), jnp.abs(floats(*pages.scale.shape)))

    empty = init_layer_kv(batch, PAGES, kv_heads, dim, SINKS, "int8")
    assert isinstance(empty.k, QuantPages)
    assert isinstance(empty.v, QuantPages)
    kv = LayerKV(filled(empty.k), filled(empty.v), empty.sink_k, empty.sink_v)
    if keeps:
        choice = init_pair_choice(batch, PAGES, kv_heads * groups, kv_heads, dim, SAMPLES)
        queries = jnp.asarray(random.integers(-127, 128, choice.queries.shape), jnp.int8)
        choice = dataclasses.replace(choice, queries=queries, query_scale=floats(*choice.query_scale.shape))
        kv = dataclasses.replace(kv, choice=choice)
    first = random.integers(0, PAGE - tokens + 1, batch)
    view = RingView(
        page=jnp.tile(jnp.arange(PAGES, dtype=jnp.int32), (batch, 1)),
        slot=jnp.asarray(random.integers(0, PAGES, batch), jnp.int32),
        positions=jnp.asarray(first[:, None] + np.arange(tokens), jnp.int32),
        valid=jnp.asarray(np.arange(tokens) < random.integers(0, tokens + 1, (batch, 1))),
        first_page=jnp.zeros(batch, jnp.int32),
    )
    gains = (1 + floats(dim) / 4, 1 + floats(dim) / 4) if normed else None
    return 3 * floats(batch, tokens, kv_heads, groups + 2, dim), gains, rotation(), rotation(), kv, view


def rotated(x: np.ndarray, rotation: Any) -> np.ndarray:
    """Pairs (i, i + half) of [B, T, heads, D] turned, in float64."""
    cos, sin = (np.asarray(part, np.float64)[:, :, None] for part in rotation)
    half = cos.shape[-1]
    first, second = x[..., :half], x[..., half : 2 * half]
    return np.concatenate([first * cos - second * sin, first * sin + second * cos, x[..., 2 * half :]], axis=-1)


@pytest.mark.parametrize("wanted", [True, False])
@settings(deadline=None, max_examples=12)
@given(cases)
def test_queries_are_normed_and_rotated_and_keys_and_values_stored(wanted: bool, case: tuple) -> None:
    x, gains, rotary, near, kv, view = some_step(*case)
    q, q_sink, after = run(wanted, x, gains, rotary, near, kv, view)
    parts = np.asarray(x, np.float64)
    queries, keys, values = parts[..., :-2, :].reshape(*q.shape), parts[..., -2, :], parts[..., -1, :]
    if gains is not None:
        queries, keys = (
            part / np.sqrt((part**2).mean(axis=-1, keepdims=True) + EPS) * np.asarray(gain, np.float64)
            for part, gain in zip((queries, keys), gains, strict=True)
        )
    np.testing.assert_allclose(q, rotated(queries, rotary), atol=2e-5)
    np.testing.assert_allclose(q_sink, rotated(queries, near), atol=2e-5)
    for ring, before, stored in ((after.k, kv.k, rotated(keys, rotary)), (after.v, kv.v, values)):
        wanted_values, wanted_scale = np.array(before.values), np.array(before.scale)
        for row, token in zip(*np.nonzero(view.valid), strict=True):
            place = row, int(view.slot[row]), slice(None), int(view.positions[row, token]) % PAGE
            numbers = np.asarray(ring.values[place], np.float64) * np.asarray(ring.scale[place], np.float64)[:, None]
            unit = np.abs(stored[row, token]).max(axis=-1, keepdims=True) / 127
            assert np.abs(numbers - stored[row, token]).max() <= (0.501 * unit).max()
            assert np.all(np.abs(ring.values[place]).max(axis=-1) == 127), "all of the eight bits are used"
            wanted_values[place], wanted_scale[place] = ring.values[place], ring.scale[place]
        np.testing.assert_array_equal(ring.values, wanted_values, "nothing else is written")
        np.testing.assert_array_equal(ring.scale, wanted_scale)
    assert (after.choice is None) == (kv.choice is None)
    if after.choice is not None:
        check_noted(after.choice, kv.choice, rotated(queries, rotary), view)


def check_noted(kept: PairChoice, before: PairChoice, queries: np.ndarray, view: RingView) -> None:
    """The last query of each stretch is noted, and nothing else changes."""
    values, scale = np.array(before.queries), np.array(before.query_scale)
    stretch = PAGE // SAMPLES
    for row, token in zip(*np.nonzero(view.valid), strict=True):
        offset = int(view.positions[row, token]) % PAGE
        if offset % stretch == stretch - 1:
            place = row, offset // stretch
            numbers = np.asarray(kept.queries[place], np.float64) * np.asarray(kept.query_scale[place])[:, None]
            unit = np.abs(queries[row, token]).max(axis=-1, keepdims=True) / 127
            assert np.all(np.abs(numbers - queries[row, token]) <= 0.501 * unit)
            values[place], scale[place] = kept.queries[place], kept.query_scale[place]
    np.testing.assert_array_equal(kept.queries, values)
    np.testing.assert_array_equal(kept.query_scale, scale)
    assert np.array_equal(kept.ring_score, before.ring_score)


@settings(deadline=None, max_examples=8)
@given(cases)
def test_a_tokens_heads_depend_on_nothing_beside_it(case: tuple) -> None:
    x, gains, rotary, near, kv, view = some_step(*case)
    q, q_sink, together = run(True, x, gains, rotary, near, kv, view)
    for row in range(x.shape[0]):
        own = jax.tree.map(lambda leaf, row=row: leaf[row : row + 1], kv)
        for token in range(x.shape[1]):
            at = np.s_[row : row + 1, token : token + 1]
            here = slice(row, row + 1)
            where = RingView(
                view.page[here], view.slot[here], view.positions[at], view.valid[at], view.first_page[here]
            )
            turns = [tuple(part[at] for part in rotation) for rotation in (rotary, near)]
            alone, alone_sink, own = run(True, x[at], gains, *turns, own, where)
            np.testing.assert_array_equal(alone, q[at])
            np.testing.assert_array_equal(alone_sink, q_sink[at])
        for one, other in zip(jax.tree.leaves(own), jax.tree.leaves(together), strict=True):
            np.testing.assert_array_equal(one[0], other[row])
