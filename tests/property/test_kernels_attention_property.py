"""Attention over a ring of pages against one float64 softmax over the tokens a row is meant to see."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from atlas_jax.config import PAGE, RopeConfig
from atlas_jax.kernels import attention, kv_pages
from atlas_jax.kernels.kv_pages import KVDtype, LayerKV, QuantPages, RingView
from atlas_jax.kernels.linear import quantize_rows
from atlas_jax.kernels.rope import RopeTable, apply_rope, rope_table, rotations
from atlas_jax.model.page_schedule import PageSchedule
from tests.reference.attention_reference import attend, rotation, visible_positions

ROWS, RING, KV_HEADS, GROUPS, DIM, SINKS, TOKENS = 2, 4, 2, 2, 16, 4, 8
HEADS = KV_HEADS * GROUPS
SCALE = DIM**-0.5
cases = st.tuples(
    st.lists(st.integers(1, 9 * PAGE), min_size=ROWS, max_size=ROWS),  # how much each row has read in the end
    st.sampled_from([(1, 1), (2, 1), (4, 1), (1, 3), (2, 2), (3, 2)]),  # pages of the window, pages per update
    st.sampled_from([None, 1, 100, PAGE, 300]),
    st.integers(0, 2**32 - 1),
)


@jax.jit
def write_and_attend(
    kv: LayerKV, q: jax.Array, k: jax.Array, v: jax.Array, view: RingView, seen: jax.Array, sinks_seen: jax.Array
) -> tuple[LayerKV, jax.Array]:
    kv = kv_pages.write(kv, k, v, view)
    return kv, attention.window_attention(q, q, kv, seen, sinks_seen, SCALE)


def step(
    kv: LayerKV, q: jax.Array, k: jax.Array, v: jax.Array, view: RingView, sliding_window: int | None
) -> tuple[LayerKV, jax.Array]:
    """One layer's step; every sliding window runs the same compiled program."""
    return write_and_attend(kv, q, k, v, view, *attention.visible(view, sliding_window))


def stored(pages: kv_pages.Pages) -> np.ndarray:
    """What a ring holds, as float64 numbers."""
    if isinstance(pages, QuantPages):
        return np.asarray(pages.values, np.float64) * np.asarray(pages.scale, np.float64)[..., None]
    return np.asarray(pages, np.float64)


class Row:
    """A row's ring filled as the engine fills it, and how it ends: its last tokens, all of one page."""

    def __init__(self, length: int, plan: PageSchedule, random: np.random.Generator) -> None:
        self.last = length - 1
        self.page = self.last // PAGE
        self.count = min(TOKENS, self.last % PAGE + 1)
        self.first = self.last - self.count + 1
        self.first_page = plan.left(self.page)
        self.slots = np.full(RING, -1, np.int32)
        for page in range(self.page + 1):
            self.slots[plan.slot(page)] = page
        self.slot = plan.slot(self.page)
        self.k, self.v = random.standard_normal((2, (self.page + 1) * PAGE, KV_HEADS, DIM)).astype(np.float32)
        self.stale = random.standard_normal((2, RING, PAGE, KV_HEADS, DIM)).astype(np.float32) * 50


def build(rows: list[Row], dtype: KVDtype) -> tuple[LayerKV, RingView]:
    """The rings before the last tokens are written; what nobody may see is large garbage."""
    ring = np.stack([row.stale for row in rows], axis=1)  # [2, B, N, P, K, D]
    for index, row in enumerate(rows):
        for slot, page in enumerate(row.slots):
            if page >= 0:
                part = slice(page * PAGE, min((page + 1) * PAGE, row.first))
                for which, text in enumerate((row.k, row.v)):
                    ring[which, index, slot, : part.stop - part.start] = text[part]
    ring = ring.transpose(0, 1, 2, 4, 3, 5)
    sinks = np.stack([np.stack([t[:SINKS].transpose(1, 0, 2) for t in (r.k, r.v)]) for r in rows], axis=1)
    pages: list[kv_pages.Pages] = [jnp.asarray(part) for part in ring]
    if dtype == "int8":
        pages = [QuantPages(*(x if x.ndim == 5 else x[..., 0] for x in quantize_rows(p))) for p in pages]
        pages = [QuantPages(p.values, p.scale.reshape(p.values.shape[:-1])) for p in pages]
    kv = LayerKV(pages[0], pages[1], jnp.asarray(sinks[0]), jnp.asarray(sinks[1]))
    view = RingView(
        page=jnp.asarray(np.stack([row.slots for row in rows])),
        slot=jnp.asarray([row.slot for row in rows], jnp.int32),
        positions=jnp.asarray([row.first + np.arange(TOKENS) for row in rows], jnp.int32),
        valid=jnp.asarray([np.arange(TOKENS) < row.count for row in rows]),
        first_page=jnp.asarray([row.first_page for row in rows], jnp.int32),
    )
    return kv, view


def inputs(rows: list[Row], random: np.random.Generator) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    q = random.standard_normal((ROWS, TOKENS, HEADS, DIM)).astype(np.float32)
    k, v = random.standard_normal((2, ROWS, TOKENS, KV_HEADS, DIM)).astype(np.float32)
    for index, row in enumerate(rows):
        part = slice(row.first, row.last + 1)
        k[index, : row.count], v[index, : row.count] = row.k[part], row.v[part]
    return q, k, v


@pytest.mark.parametrize("dtype", ["float32", "int8"])
@settings(max_examples=25, deadline=None, derandomize=True)
@given(cases)
def test_attention_is_a_softmax_over_the_window_and_the_sinks(dtype: KVDtype, case: tuple) -> None:
    lengths, (window, update), sliding_window, seed = case
    random = np.random.default_rng(seed)
    rows = [Row(length, PageSchedule(window, update), random) for length in lengths]
    kv, view = build(rows, dtype)
    q, k, v = inputs(rows, random)
    kv, out = step(kv, q, k, v, view, sliding_window)
    keys, values = stored(kv.k), stored(kv.v)
    for index, row in enumerate(rows):
        for token in range(row.count):
            where = visible_positions(row.first + token, row.first_page, sliding_window, PAGE)
            slots = [int(np.flatnonzero(row.slots == p // PAGE)[0]) for p in where]
            offsets = [p % PAGE for p in where]
            for head in range(HEADS):
                group = head // GROUPS
                own_k, own_v = keys[index, slots, group, offsets], values[index, slots, group, offsets]
                if row.first_page > 0 and sliding_window is None:
                    own_k = np.concatenate([own_k, np.asarray(kv.sink_k, np.float64)[index, group]])
                    own_v = np.concatenate([own_v, np.asarray(kv.sink_v, np.float64)[index, group]])
                wanted = attend(q[index, token, head], own_k, own_v, SCALE)
                found = np.asarray(out[index, token, head], np.float64)
                peak = np.abs(own_v).max()
                bound = 3e-5 * peak
                if dtype == "int8":  # half a unit of the query per product, and of the second term of a probability
                    shift = np.abs(own_k).sum(axis=1).max() * np.abs(q[index, token, head]).max() / 254 * SCALE
                    bound += np.expm1(2 * shift) * peak + len(own_k) * peak / 127 / 508
                assert np.abs(found - wanted).max() <= bound


@pytest.mark.parametrize("dtype", ["float32", "int8"])
@settings(max_examples=25, deadline=None, derandomize=True)
@given(cases)
def test_what_is_not_seen_changes_no_bit(dtype: KVDtype, case: tuple) -> None:
    lengths, (window, update), sliding_window, seed = case
    random = np.random.default_rng(seed)
    rows = [Row(length, PageSchedule(window, update), random) for length in lengths]
    q, k, v = inputs(rows, random)
    kv, view = build(rows, dtype)
    _, first = step(kv, q, k, v, view, sliding_window)
    for row in rows:
        row.stale = -row.stale * 3 + 1
        row.k[: row.first_page * PAGE] *= -2  # pages that have left; the sinks are handed over unchanged below
    changed, _ = build(rows, dtype)
    changed = LayerKV(changed.k, changed.v, kv.sink_k, kv.sink_v)
    _, second = step(changed, q, k, v, view, sliding_window)
    for index, row in enumerate(rows):
        assert np.array_equal(first[index, : row.count], second[index, : row.count])


@pytest.mark.parametrize("dtype", ["float32", "int8"])
@settings(max_examples=15, deadline=None, derandomize=True)
@given(cases)
def test_a_token_gets_the_same_output_alone_and_in_a_chunk(dtype: KVDtype, case: tuple) -> None:
    lengths, (window, update), sliding_window, seed = case
    random = np.random.default_rng(seed)
    rows = [Row(length, PageSchedule(window, update), random) for length in lengths]
    kv, view = build(rows, dtype)
    q, k, v = inputs(rows, random)
    together, outputs = step(kv, q, k, v, view, sliding_window)
    count = min(row.count for row in rows)
    alone = kv
    for token in range(count):
        part = slice(token, token + 1)
        one = RingView(view.page, view.slot, view.positions[:, part], view.valid[:, part], view.first_page)
        alone, output = step(alone, q[:, part], k[:, part], v[:, part], one, sliding_window)
        np.testing.assert_allclose(output[:, 0], outputs[:, token], rtol=0, atol=2e-5)
    if all(row.count == count for row in rows):
        for one, other in zip(jax.tree.leaves(alone), jax.tree.leaves(together), strict=True):
            assert np.array_equal(one, other), "the cache does not depend on how its tokens arrived"


@pytest.mark.parametrize("dtype", ["float32", "int8"])
def test_sinks_are_handed_over_as_the_ring_held_them(dtype: KVDtype) -> None:
    random = np.random.default_rng(0)
    rows = [Row(3 * PAGE, PageSchedule(4), random) for _ in range(ROWS)]
    kv, _ = build(rows, dtype)
    sink_k, sink_v = kv_pages.first_tokens(kv, jnp.asarray([0, 0], jnp.int32), jnp.asarray([True, False]))
    assert np.array_equal(sink_k[0], stored(kv.k)[0, 0, :, :SINKS].astype(np.float32))
    assert np.array_equal(sink_v[0], stored(kv.v)[0, 0, :, :SINKS].astype(np.float32))
    assert np.array_equal(sink_k[1], kv.sink_k[1])
    assert np.array_equal(sink_v[1], kv.sink_v[1])


@pytest.mark.parametrize("dtype", ["float32", "int8"])
@pytest.mark.parametrize("tokens", [1, TOKENS])
def test_a_row_that_sits_a_step_out_keeps_its_cache(dtype: KVDtype, tokens: int) -> None:
    """Also one that stands at the end of a page: its next page has not begun, the place it would write is taken."""
    random = np.random.default_rng(0)
    rows = [Row(2 * PAGE, PageSchedule(4), random), Row(2 * PAGE - 3, PageSchedule(4), random)]
    kv, view = build(rows, dtype)
    view = RingView(
        page=view.page,
        slot=view.slot,
        positions=jnp.asarray([[2 * PAGE], [2 * PAGE - 3]], jnp.int32) + jnp.arange(tokens)[None],
        valid=jnp.broadcast_to(jnp.asarray([[False], [True]]), (ROWS, tokens)) & (jnp.arange(tokens) < 1),
        first_page=view.first_page,
    )
    k, v = random.standard_normal((2, ROWS, tokens, KV_HEADS, DIM)).astype(np.float32)
    after = kv_pages.write(kv, jnp.asarray(k), jnp.asarray(v), view)
    for new, old in zip(jax.tree.leaves(after), jax.tree.leaves(kv), strict=True):
        assert np.array_equal(new[0], old[0])
    assert not np.array_equal(stored(after.k)[1], stored(kv.k)[1])


@functools.cache
def table_of(base: float, dims: int, position_scale: float) -> RopeTable:
    return rope_table(RopeConfig(base=base, dims=dims, position_scale=position_scale))


POSITIONS = st.integers(0, 2**30 - 1) | st.sampled_from([0, 1, 1023, 1024, 1048575, 1048576, 2**30 - 1])


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    st.lists(POSITIONS, min_size=4, max_size=4),
    st.sampled_from([(10_000.0, 64, 1.0), (1e6, 32, 1.0), (5e5, 128, 0.125)]),
)
def test_rotations_are_exact_up_to_two_to_the_thirtieth(positions: list[int], rope: tuple[float, int, float]) -> None:
    base, dims, position_scale = rope
    table = table_of(base, dims, position_scale)
    cos, sin = rotations(table, jnp.asarray(positions, jnp.int32))
    for index, position in enumerate(positions):
        for pair in (0, 1, dims // 4, dims // 2 - 1):
            wanted = rotation(position, pair, base, dims, position_scale)
            assert abs(float(cos[index, pair]) - wanted[0]) < 5e-7
            assert abs(float(sin[index, pair]) - wanted[1]) < 5e-7


@settings(max_examples=30, deadline=None, derandomize=True)
@given(st.integers(0, 2**29), st.integers(0, 2**20), st.integers(0, 2**32 - 1))
def test_rotated_products_depend_on_distance_alone(position: int, distance: int, seed: int) -> None:
    table = table_of(10_000.0, 32, 1.0)
    q, k = np.random.default_rng(seed).standard_normal((2, 2, 1, 48)).astype(np.float32)
    near = apply_rope(jnp.stack([q[0], k[0]]), *rotations(table, jnp.asarray([distance, 0], jnp.int32)))
    far = apply_rope(jnp.stack([q[0], k[0]]), *rotations(table, jnp.asarray([position + distance, position])))
    assert np.array_equal(near[:, :, 32:], np.stack([q[0], k[0]])[:, :, 32:]), "the rest passes through"
    products = [float(np.sum(np.asarray(x[0], np.float64) * np.asarray(x[1], np.float64))) for x in (near, far)]
    assert abs(products[0] - products[1]) < 1e-4
    np.testing.assert_allclose(np.linalg.norm(near[..., :32]), np.linalg.norm(np.stack([q[0], k[0]])[..., :32]), 1e-5)
