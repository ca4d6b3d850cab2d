"""Attention over kept pairs: each form against a softmax in float64, and what it must not depend on."""

from __future__ import annotations

import dataclasses
import functools
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from atlas_jax.config import PAGE
from atlas_jax.kernels import packed_pages
from atlas_jax.kernels.attention import ref_window_attention, window_attention
from atlas_jax.kernels.cpu import library
from atlas_jax.kernels.kernel_choice import KernelChoice
from atlas_jax.kernels.kv_pages import (
    KVDtype,
    LayerKV,
    LayerPairs,
    Pages,
    QuantPages,
    init_kept_pairs,
    init_layer_kv,
    unpacked,
)
from atlas_jax.kernels.packed_pages import PackedPages

SINKS, SAMPLES, SCALE = 4, 32, 0.125
OTHERS = 2
"""Pages of other layers among those of the pairs, before or behind this one's."""
needs_kernels = pytest.mark.skipif(not library.available(), reason="no C compiler, or no AVX-512 VNNI")
seeds = st.integers(0, 2**32 - 1)


@dataclass(frozen=True)
class Shape:
    """A step's shape, which a compiled program is bound to."""

    rows: int
    tokens: int
    groups: int
    kv_heads: int
    pages: int
    kept_pages: int
    dim: int = 64


SHAPES = (Shape(1, 1, 1, 1, 1, 1), Shape(2, 3, 3, 1, 2, 3), Shape(3, 1, 4, 2, 1, 2, 128), Shape(1, 19, 3, 1, 2, 2))
shapes = st.sampled_from(SHAPES)


@dataclass(frozen=True)
class Form:
    """A way of computing it, and how far it may be from another with other sums, and from the definition."""

    cpu: bool
    dtype: KVDtype
    sums: float
    rounding: float


FORMS = [
    pytest.param(Form(True, "int8", 1e-3, 0.03), id="C", marks=needs_kernels),
    pytest.param(Form(False, "int8", 1e-3, 0.03), id="XLA"),
    pytest.param(Form(False, "float32", 2e-5, 2e-5), id="float32"),
]


@dataclass(frozen=True)
class Step:
    """What `window_attention` gets."""

    q: jax.Array
    q_sink: jax.Array
    kv: LayerKV
    seen: jax.Array
    sinks_seen: jax.Array
    pairs: LayerPairs

    @property
    def kept(self) -> np.ndarray:
        """Pairs of each row."""
        return np.asarray(self.pairs.stretch[:, 1])

    @property
    def first(self) -> int:
        """Where the layer's pages begin among all."""
        return int(self.pairs.stretch[0, 0])

    @property
    def filled(self) -> np.ndarray:
        """Which places of all pages hold a pair of the layer, [B, pool, 1, P]."""
        pool = self.pairs.pool.stored_score.shape[1]
        index = np.arange(pool * PAGE).reshape(1, pool, 1, PAGE) - self.first * PAGE
        return (index >= 0) & (index < self.kept[:, None, None, None])

    def near(self) -> tuple[jax.Array, jax.Array]:
        """The layer's kept keys and values as float32 pages."""
        own = slice(self.first, self.first + self.pairs.pages)
        k, v = (stored(unpacked(x))[:, own] for x in (self.pairs.pool.k, self.pairs.pool.v))
        return jnp.asarray(k, jnp.float32), jnp.asarray(v, jnp.float32)

    def with_count(self, count: Any) -> Step:
        """With other numbers of pairs."""
        stretch = self.pairs.stretch.at[:, 1].set(count)
        return dataclasses.replace(self, pairs=dataclasses.replace(self.pairs, stretch=stretch))

    def rows(self, part: slice) -> Step:
        return Step(*(jax.tree.map(lambda leaf: leaf[part], value) for value in vars(self).values()))

    def tokens(self, part: slice) -> Step:
        q, q_sink, seen, sinks_seen = (x[:, part] for x in (self.q, self.q_sink, self.seen, self.sinks_seen))
        return Step(q, q_sink, self.kv, seen, sinks_seen, self.pairs)

    def with_pairs(self, change: Any) -> Step:
        """With other kept keys and values, changed leaf by leaf."""
        pool = self.pairs.pool
        k, v = (jax.tree.map(change, pairs) for pairs in (pool.k, pool.v))
        pool = dataclasses.replace(pool, k=k, v=v)
        return dataclasses.replace(self, pairs=dataclasses.replace(self.pairs, pool=pool))


@functools.cache
def compiled(cpu: bool) -> Any:
    return jax.jit(lambda *args: window_attention(*args[:5], SCALE, args[5], null_logit=args[6]))


def run(cpu: bool, step: Step, *, pairs: bool = True, null_logit: np.ndarray | None = None) -> np.ndarray:
    """`window_attention`, traced with or without the kernels; of a layer that keeps `pairs`, or none."""
    args = list(vars(step).values())
    with KernelChoice(cpu=cpu).scope():
        return np.asarray(compiled(cpu)(*args[:5], args[5] if pairs else None, null_logit))


def some_step(seed: int, shape: Shape, dtype: KVDtype, counts: tuple[int, ...] | None = None) -> Step:
    """Queries, a cache with kept pairs, and masks in which every token sees something."""
    random = np.random.default_rng(seed)

    def floats(*size: int) -> jax.Array:
        return jnp.asarray(random.standard_normal(size), jnp.float32)

    def pages(count: int) -> QuantPages:
        size = shape.rows, count, shape.kv_heads, PAGE
        values = random.integers(-127, 128, (*size, shape.dim))
        return QuantPages(jnp.asarray(values, jnp.int8), jnp.asarray(random.uniform(1e-3, 0.02, size), jnp.float32))

    def ring() -> Pages:
        return (
            pages(shape.pages) if dtype == "int8" else floats(shape.rows, shape.pages, shape.kv_heads, PAGE, shape.dim)
        )

    def pairs(bits: packed_pages.Bits) -> PackedPages | jax.Array:
        if dtype == "float32":
            return floats(shape.rows, pool, shape.kv_heads, PAGE, shape.dim)
        whole = pages(pool)
        return packed_pages.pack(whole.values, whole.scale, bits)

    heads, pool = shape.kv_heads * shape.groups, shape.kept_pages + OTHERS
    sizes = shape.kv_heads, shape.dim
    empty = init_layer_kv(shape.rows, shape.pages, *sizes, SINKS, dtype)
    nothing = init_kept_pairs(shape.rows, pool, *sizes, dtype)
    kv = dataclasses.replace(
        empty,
        k=ring(),
        v=ring(),
        sink_k=floats(*empty.sink_k.shape),
        sink_v=floats(*empty.sink_v.shape),
    )
    both = dataclasses.replace(nothing, k=pairs(packed_pages.KEY_BITS), v=pairs(packed_pages.VALUE_BITS))
    seen = random.random((shape.rows, shape.tokens, shape.pages, PAGE)) < 0.5
    seen[:, :, random.integers(shape.pages), random.integers(PAGE)] = True
    most = shape.kept_pages * PAGE
    kept = counts or random.choice([0, 1, PAGE, most, *random.integers(0, most + 1, 4)], shape.rows)
    queries = shape.rows, shape.tokens, heads, shape.dim
    sinks_seen = random.random((shape.rows, shape.tokens)) < 0.5
    stretch = np.stack([np.full(shape.rows, random.integers(OTHERS + 1)), kept], axis=1)
    of_layer = LayerPairs(both, jnp.asarray(stretch, jnp.int32), shape.kept_pages)
    return Step(floats(*queries), floats(*queries), kv, jnp.asarray(seen), jnp.asarray(sinks_seen), of_layer)


def stored(pages: Pages) -> np.ndarray:
    if isinstance(pages, QuantPages):
        return np.asarray(pages.values, np.float64) * np.asarray(pages.scale, np.float64)[..., None]
    return np.asarray(pages, np.float64)


def softmax_of(step: Step, null_logit: np.ndarray | None = None, *, pairs: bool = True) -> np.ndarray:
    """The attention output in float64, one query after another."""
    ring, values = stored(step.kv.k), stored(step.kv.v)
    near, near_values = (np.asarray(x, np.float64) for x in step.near())
    out = np.zeros(step.q.shape)
    groups = step.q.shape[2] // ring.shape[2]
    for row, token, head in np.ndindex(*step.q.shape[:3]):
        group, mask, count = head // groups, np.asarray(step.seen)[row, token], int(step.kept[row]) * pairs
        far_k, far_v = ring[row].swapaxes(0, 1)[group][mask], values[row].swapaxes(0, 1)[group][mask]
        kept_k, kept_v = (x[row].swapaxes(0, 1)[group].reshape(-1, x.shape[-1])[:count] for x in (near, near_values))
        sinks = slice(SINKS if step.sinks_seen[row, token] else 0)
        sink_k, sink_v = (np.asarray(x, np.float64)[row, group, sinks] for x in (step.kv.sink_k, step.kv.sink_v))
        score = [far_k @ np.asarray(step.q, np.float64)[row, token, head]]
        score += [x @ np.asarray(step.q_sink, np.float64)[row, token, head] for x in (sink_k, kept_k)]
        scores = SCALE * np.concatenate(score)
        peak = max(scores.max(), -np.inf if null_logit is None else null_logit[head])
        weight = np.exp(scores - peak)
        mass = weight.sum() + (0.0 if null_logit is None else np.exp(null_logit[head] - peak))
        out[row, token, head] = weight @ np.concatenate([far_v, sink_v, kept_v]) / mass
    return out


@pytest.mark.parametrize("form", FORMS)
@settings(deadline=None, max_examples=2)
@given(seed=seeds, shape=shapes, pairs=st.booleans(), size=st.sampled_from([1.0, 30.0]))
def test_a_score_without_a_value_takes_its_share_of_the_softmax(
    form: Form, seed: int, shape: Shape, pairs: bool, size: float
) -> None:
    step = some_step(seed, shape, form.dtype)
    null_logit = np.random.default_rng(seed).normal(0.0, size, step.q.shape[2]).astype(np.float32)
    found, wanted = run(form.cpu, step, pairs=pairs, null_logit=null_logit), softmax_of(step, null_logit, pairs=pairs)
    np.testing.assert_allclose(found, wanted, atol=form.rounding)
    np.testing.assert_allclose(found, run(False, step, pairs=pairs, null_logit=null_logit), atol=form.sums)
    kept = (*step.near(), jnp.asarray(step.kept)) if pairs else None
    plain = [jnp.asarray(stored(x), jnp.float32) for x in (step.kv.k, step.kv.v)]
    sinks = step.kv.sink_k, step.kv.sink_v, step.seen, step.sinks_seen
    definition = ref_window_attention(step.q, step.q_sink, *plain, *sinks, SCALE, kept, jnp.asarray(null_logit))
    np.testing.assert_allclose(definition, wanted, atol=2e-5)


@pytest.mark.parametrize("form", FORMS)
@settings(deadline=None, max_examples=5)
@given(seed=seeds, shape=shapes)
def test_attention_is_one_softmax_over_ring_sinks_and_kept_pairs(form: Form, seed: int, shape: Shape) -> None:
    step = some_step(seed, shape, form.dtype)
    found, wanted = run(form.cpu, step), softmax_of(step)
    np.testing.assert_allclose(found, wanted, atol=form.rounding)
    np.testing.assert_allclose(found, run(False, step), atol=form.sums)
    plain = [jnp.asarray(stored(x), jnp.float32) for x in (step.kv.k, step.kv.v)]
    sinks = step.kv.sink_k, step.kv.sink_v, step.seen, step.sinks_seen
    definition = ref_window_attention(
        step.q, step.q_sink, *plain, *sinks, SCALE, (*step.near(), jnp.asarray(step.kept))
    )
    np.testing.assert_allclose(definition, wanted, atol=2e-5)


@needs_kernels
@settings(deadline=None, max_examples=5)
@given(seed=seeds, shape=shapes)
def test_pages_in_4_bits_are_read_as_those_in_8_that_they_stand_for(seed: int, shape: Shape) -> None:
    """All bytes that there are, also such as no packing makes."""
    random = np.random.default_rng(seed)
    step = some_step(seed, shape, "int8")
    step = dataclasses.replace(step, q_sink=step.q, sinks_seen=jnp.zeros_like(step.sinks_seen))
    step = step.with_pairs(
        lambda x: (
            x
            if x.dtype in (jnp.float32, jnp.uint16)  # scales and scores are no bytes
            else jnp.asarray(random.integers(0, 256, x.shape).astype(np.uint8).view(x.dtype))
        )
    )
    pages, own = [], slice(step.first, step.first + shape.kept_pages)
    for ring, pairs in ((step.kv.k, step.pairs.pool.k), (step.kv.v, step.pairs.pool.v)):
        assert isinstance(pairs, PackedPages)
        whole = jax.tree.map(lambda x: x[:, own], unpacked(pairs))
        pages.append(jax.tree.map(lambda *x: jnp.concatenate(x, axis=1), ring, whole))
    filled = np.arange(shape.kept_pages * PAGE) < np.asarray(step.kept)[:, None]
    filled = np.broadcast_to(filled.reshape(shape.rows, 1, -1, PAGE), (*step.seen.shape[:2], shape.kept_pages, PAGE))
    wide = LayerKV(pages[0], pages[1], step.kv.sink_k, step.kv.sink_v)
    seen = jnp.concatenate([step.seen, filled], axis=2)
    as_ring = Step(step.q, step.q, wide, seen, step.sinks_seen, step.pairs)
    np.testing.assert_array_equal(run(True, step), run(True, as_ring, pairs=False))


@needs_kernels
@settings(deadline=None, max_examples=4)
@given(seed=seeds, shape=shapes)
def test_a_row_that_keeps_nothing_has_the_bits_of_a_layer_that_keeps_none(seed: int, shape: Shape) -> None:
    step = some_step(seed, shape, "int8")
    found = run(True, step)
    without = run(True, step, pairs=False)
    nothing = np.asarray(step.kept) == 0
    np.testing.assert_array_equal(found[nothing], without[nothing])
    np.testing.assert_array_equal(run(True, step.with_count(0)), without)


@pytest.mark.parametrize("form", FORMS)
@settings(deadline=None, max_examples=4)
@given(seed=seeds, shape=shapes)
def test_kept_pairs_have_no_order(form: Form, seed: int, shape: Shape) -> None:
    most = shape.kept_pages * PAGE
    random = np.random.default_rng(seed)
    count = int(random.integers(1, most + 1))
    step = some_step(seed, shape, form.dtype, (count,) * shape.rows)
    order = np.concatenate([random.permutation(count), np.arange(count, most)])

    def shuffled(leaf: jax.Array) -> jax.Array:
        own = slice(step.first, step.first + shape.kept_pages)
        flat = leaf[:, own].swapaxes(1, 2).reshape(shape.rows, shape.kv_heads, most, *leaf.shape[4:])[:, :, order]
        pages = flat.reshape(shape.rows, shape.kv_heads, shape.kept_pages, PAGE, *leaf.shape[4:]).swapaxes(1, 2)
        return leaf.at[:, own].set(pages)

    np.testing.assert_allclose(run(form.cpu, step.with_pairs(shuffled)), run(form.cpu, step), atol=form.sums)


@pytest.mark.parametrize("form", FORMS)
@settings(deadline=None, max_examples=4)
@given(seed=seeds, shape=shapes)
def test_what_lies_in_places_that_are_not_filled_changes_no_bit(form: Form, seed: int, shape: Shape) -> None:
    """Nor do the pairs of other layers, before and behind."""
    random = np.random.default_rng(seed)
    step = some_step(seed, shape, form.dtype)
    filled = step.filled

    def disturbed(leaf: jax.Array) -> jax.Array:
        noise = (
            random.integers(0, 256, leaf.shape).astype(np.uint8).view(leaf.dtype)
            if leaf.dtype.itemsize == 1
            else np.asarray(np.nan if leaf.dtype == jnp.float32 else 0x7FC0, leaf.dtype)  # the upper half of a NaN
        )
        return jnp.where(filled.reshape(*filled.shape, *(1,) * (leaf.ndim - 4)), leaf, noise)

    np.testing.assert_array_equal(run(form.cpu, step.with_pairs(disturbed)), run(form.cpu, step))


@needs_kernels
@settings(deadline=None, max_examples=4)
@given(seed=seeds, shape=shapes)
def test_a_tokens_attention_depends_on_nothing_beside_it(seed: int, shape: Shape) -> None:
    step = some_step(seed, shape, "int8")
    together = run(True, step)
    for row, token in np.ndindex(shape.rows, shape.tokens):
        alone = run(True, step.rows(slice(row, row + 1)).tokens(slice(token, token + 1)))
        np.testing.assert_array_equal(alone, together[row : row + 1, token : token + 1])


@functools.partial(jax.jit, static_argnums=2)
def packed_and_unpacked(
    values: jax.Array, scale: jax.Array, bits: packed_pages.Bits
) -> tuple[PackedPages, jax.Array, jax.Array]:
    packed = packed_pages.pack(values, scale, bits)
    return packed, packed.scale, packed_pages.unpack(packed)


@settings(deadline=None, max_examples=30)
@given(
    seed=seeds,
    dim=st.sampled_from([4, 32, 64, 96, 128]),
    spread=st.integers(0, 127),
    bits=st.sampled_from([packed_pages.KEY_BITS, packed_pages.VALUE_BITS]),
)
def test_a_packed_number_is_at_most_half_a_step_off(seed: int, dim: int, spread: int, bits: packed_pages.Bits) -> None:
    random = np.random.default_rng(seed)
    middle = random.integers(spread - 127, 128 - spread, (7, 1))
    values = (middle + random.integers(-spread, spread + 1, (7, dim))).astype(np.int8)
    scale = random.uniform(1e-3, 0.02, 7).astype(np.float32)
    packed, scale_again, unpacked_again = packed_and_unpacked(jnp.asarray(values), jnp.asarray(scale), bits)
    found = np.asarray(unpacked_again, np.int32)
    np.testing.assert_allclose(scale_again, scale, rtol=2.0**-8)
    step = np.asarray(packed.step, np.float64).max(axis=-1, keepdims=True) / 8 * (15 / (2**bits - 1))
    assert np.all(np.abs(found - values) <= step / 2 + 0.5)
    assert packed.numbers.nbytes * 8 == 7 * dim * bits
