"""Kept pairs: what stays of a page that leaves the window."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from atlas_jax.config import PAGE
from atlas_jax.kernels import kernel_choice
from atlas_jax.kernels.cpu import library
from atlas_jax.kernels.exchange_pairs import exchange_pairs
from atlas_jax.kernels.kernel_choice import DEFAULT_KERNELS, KernelChoice
from atlas_jax.kernels.kv_pages import KeptPairs, QuantPages, init_kept_pairs
from atlas_jax.kernels.packed_pages import KEY_BITS, VALUE_BITS, Bits, PackedPages, pack, unpack, upper_half

HEADS, KV_HEADS = 6, 2
seeds = st.integers(0, 2**32 - 1)


@settings(max_examples=100, deadline=None)
@given(seeds, st.sampled_from([64, 80, 128, 256]), st.sampled_from([0.0, 1.0, 20.0, 200.0]), st.sampled_from([2, 4]))
def test_packed_numbers_are_the_nearest_levels(seed: int, dim: int, size: float, bits: Bits) -> None:
    random = np.random.default_rng(seed)
    values = np.clip(np.round(random.standard_normal((3, dim)) * size), -127, 127).astype(np.int8)
    scale = random.random(3).astype(np.float32)
    packed = pack(jnp.asarray(values), jnp.asarray(scale), bits)
    found = np.asarray(unpack(packed), np.float64)
    group = 32 if dim % 64 == 0 else dim // 2
    by_group = values.astype(np.float64).reshape(3, -1, group)
    width = np.ceil((by_group.max(-1) - by_group.min(-1)) * 8 / 15) / 8 * (15 / (2**bits - 1))
    error = np.abs(found.reshape(by_group.shape) - by_group)
    assert (error <= width[..., None] / 2 + 0.5).all()  # half a level, and the rounding to whole units
    np.testing.assert_allclose(packed.scale, scale, rtol=2.0**-8)
    assert np.asarray(packed.numbers).nbytes * 8 == values.nbytes * bits


def kept_pairs(random: np.random.Generator, rows: int, pages: int, dim: int) -> KeptPairs:
    empty = init_kept_pairs(rows, pages, KV_HEADS, dim, "int8")

    def filled(old: PackedPages) -> PackedPages:
        values = random.integers(-127, 128, (*old.scale.shape, dim)).astype(np.int8)
        return pack(jnp.asarray(values), jnp.asarray(random.random(old.scale.shape), jnp.float32), old.bits)

    score = random.integers(0, 6, empty.stored_score.shape).astype(np.float32)  # many are equal
    assert isinstance(empty.k, PackedPages)
    assert isinstance(empty.v, PackedPages)
    return KeptPairs(filled(empty.k), filled(empty.v), upper_half(jnp.asarray(score)))


def page(random: np.random.Generator, dim: int) -> QuantPages:
    values = random.integers(-127, 128, (KV_HEADS, PAGE, dim)).astype(np.int8)
    return QuantPages(jnp.asarray(values), jnp.asarray(random.random((KV_HEADS, PAGE)), jnp.float32))


@pytest.mark.parametrize("kernels", [KernelChoice(cpu=False), DEFAULT_KERNELS])
@settings(max_examples=6, deadline=None)
@given(seeds, st.integers(1, 3), st.sampled_from([64, 80]), st.data())
def test_the_highest_scores_stay(kernels: KernelChoice, seed: int, pages: int, dim: int, data: st.DataObject) -> None:
    random = np.random.default_rng(seed)
    places = pages * PAGE
    capacity = data.draw(st.integers(0, places))
    kept = data.draw(st.integers(0, capacity))
    sinks = data.draw(st.sampled_from([0, 4]))
    row = data.draw(st.integers(0, 1))
    first = data.draw(st.integers(0, 2))
    pairs, k, v = kept_pairs(random, 2, pages + 2, dim), page(random, dim), page(random, dim)
    stretch = slice(first, first + pages)
    own = random.integers(0, 6, (KV_HEADS, PAGE)).astype(np.float32)
    own[:, :sinks] = -np.inf
    with kernels.scope():
        exchange = jax.jit(exchange_pairs, static_argnums=8)
        of_layer = jax.tree.map(lambda part: jnp.asarray(part)[None], (first, own, k, v, kept, capacity))
        new = exchange(pairs, row, *of_layer, pages)
    others = np.ones((2, pages + 2), bool)
    others[row, stretch] = False
    for before, after in zip(jax.tree.leaves(pairs), jax.tree.leaves(new), strict=True):
        assert np.array_equal(before[others], after[others]), "another row's pairs, or another layer's"
    for head in range(KV_HEADS):
        # what there was and what came, as (score, how new, keys, values): the best of them, newer first where equal
        def listed(of: KeptPairs, count: int, head: int = head) -> list[tuple[float, int, bytes, bytes]]:
            keys = np.asarray(unpack(of.k))[row, stretch, head].reshape(places, dim)
            values = np.asarray(unpack(of.v))[row, stretch, head].reshape(places, dim)
            score = np.asarray(of.score)[row, stretch, head].reshape(places)
            return [(float(score[i]), i, keys[i].tobytes(), values[i].tobytes()) for i in range(count)]

        def whole(of: QuantPages, bits: Bits, head: int = head) -> np.ndarray:
            return np.asarray(unpack(pack(of.values, of.scale, bits)))[head]

        keys, values = whole(k, KEY_BITS), whole(v, VALUE_BITS)
        came = [(float(own[head, i]), places + i, keys[i].tobytes(), values[i].tobytes()) for i in range(sinks, PAGE)]
        filled = min(kept + PAGE - sinks, capacity)
        wanted = sorted(listed(pairs, kept) + came)[::-1][:filled]
        found = listed(new, filled)
        assert sorted((s, a, b) for s, _, a, b in found) == sorted((s, a, b) for s, _, a, b in wanted)


def test_kernel_is_there() -> None:
    """The other half of `test_the_highest_scores_stay` is of the C kernel where there is one."""
    with kernel_choice.chosen().scope():
        assert library.usable() == library.available()
