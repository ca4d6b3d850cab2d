"""Attention over int8 ring pages on TPU: `kernels.attention.window_attention` as one Mosaic kernel.

A row's pages pass through VMEM once, all KV heads of some slots at a time, in int8; scores and probabilities never leave
it. The softmax is accumulated page by page (Milakov & Gimelshein, arXiv 1805.02867; FlashAttention, arXiv 2205.14135),
beginning with the sinks. Slots that no token of the step sees are neither read nor computed: what is visible follows from
the pages' labels and the tokens' positions, so there is no mask in memory either. Pages of kept pairs follow the ring's:
they are read packed and unpacked in VMEM, as many as a row has filled.

Numbers: int8 values are exact in bfloat16, the MXU's own type. Queries and weighted probabilities are two bfloat16 terms
each (relative error 2⁻¹⁶) and sums are float32, so the result is the float32 softmax over the stored numbers. XLA's
program quantises queries to one int8 term, which is coarser; the two are not equal bit for bit.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from atlas_jax.config import PAGE
from atlas_jax.kernels.kv_pages import LayerKV, LayerPairs, QuantPages, RingView
from atlas_jax.kernels.packed_pages import KEY_BITS, VALUE_BITS, Bits, PackedPages
from atlas_jax.typing import Array, Bool, Float, Int32

_NEGATIVE = -1e30
_SUBLANES = 8
_LANES = 128
_TILE_NUMBERS = 1 << 17
"""Scores of one page, or numbers of the queries: bounds what a program keeps in VMEM. Longer steps read the pages again."""
_BLOCK_BYTES = 512 << 10
"""Keys of one grid step. A grid step costs about what reading a quarter of this does, and four such blocks are in VMEM."""


def attention(
    q: Float[Array, "B T H D"],
    q_sink: Float[Array, "B T H D"],
    kv: LayerKV,
    view: RingView,
    sliding_window: int | None,
    scale: float,
    pairs: LayerPairs | None = None,
    null_logit: Float[Array, H] | None = None,
    *,
    interpret: bool = False,
) -> Float[Array, "B T H D"]:
    """Softmax attention of a step's tokens over the ring, the sinks and the kept pairs.

    Args:
      q, q_sink, kv, scale, pairs, null_logit: as for `kernels.attention.window_attention`; the pages are `QuantPages`.
      view, sliding_window: as for `kernels.attention.visible`, which says what is seen.
      interpret: run as an XLA program on any platform, for tests.

    Returns:
      The attention output; zeros for a token that sees nothing.

    Raises:
      TypeError: the pages are float ones.
    """
    if not isinstance(kv.k, QuantPages) or not isinstance(kv.v, QuantPages):
        raise TypeError("float pages are attended by XLA's program")
    batch, tokens, heads, dim = q.shape
    count, kv_heads = kv.k.scale.shape[1:3]
    queries = tokens * heads // kv_heads
    most = max(_TILE_NUMBERS // (kv_heads * max(dim, PAGE)), _SUBLANES)
    tiles = -(-queries // most)
    tile = _round_up(-(-queries // tiles), _SUBLANES)
    rows = tiles * tile
    slots = _slots(count, kv_heads, dim)
    blocks = count // slots

    positions = jnp.repeat(view.positions[:, None], heads // kv_heads, axis=1).reshape(batch, -1, 1)
    positions = _pad_rows(positions, rows, -1)
    labels = _labels(view, sliding_window)
    order = _visits(labels.reshape(batch, blocks, slots).max(axis=2) >= 0)
    sinks_seen = (view.first_page > 0).astype(jnp.int32) if sliding_window is None else jnp.zeros_like(view.first_page)
    kept_k, kept_v = _kept_pages(pairs)
    kept_slots = 1 if pairs is None else _slots(pairs.pages, kv_heads, dim // 2)
    kept_blocks = 0 if pairs is None else pairs.pages // kept_slots
    stretch = jnp.zeros((batch, 2), jnp.int32) if pairs is None else pairs.stretch
    kept_order = _visits(jnp.arange(max(kept_blocks, 1)) * kept_slots * PAGE < stretch[:, 1:])
    order = jnp.pad(order, ((0, 0), (0, kept_blocks)), mode="edge")
    kept_order = jnp.pad(kept_order, ((0, 0), (blocks, 0)), mode="edge")

    query = _two_terms(_group(q * scale, kv_heads, rows).reshape(batch, kv_heads, tiles, tile, dim))
    query = query.reshape(batch, kv_heads, -1, dim)
    lanes_are_tokens = dim % _LANES != 0
    keys, values = kv.k.values, kv.v.values
    if lanes_are_tokens:  # XLA stores such a ring with the tokens last, for then nothing is padded: this moves no byte
        keys, values = keys.swapaxes(-1, -2), values.swapaxes(-1, -2)
    key_scale, value_scale = kv.k.scale, kv.v.scale
    heads_first = kv_heads % _SUBLANES != 0 and (slots == count or slots % _SUBLANES == 0)
    if heads_first:  # likewise, for the slots fill tiles that so few heads would leave half empty
        key_scale, value_scale = key_scale.swapaxes(1, 2), value_scale.swapaxes(1, 2)

    def block(size: int) -> pl.BlockSpec:
        return pl.BlockSpec((1, kv_heads, size, dim), lambda b, r, j, *_: (b, 0, r, 0))

    pages = pl.BlockSpec((1, slots, *keys.shape[2:]), lambda b, r, j, order, *_: (b, order[b, j], 0, 0, 0))
    if heads_first:
        scales = pl.BlockSpec((1, kv_heads, slots, PAGE), lambda b, r, j, order, *_: (b, 0, order[b, j], 0))
    else:
        scales = pl.BlockSpec((1, slots, kv_heads, PAGE), lambda b, r, j, order, *_: (b, order[b, j], 0, 0))
    sinks = pl.BlockSpec((1, *kv.sink_k.shape[1:]), lambda b, r, j, *_: (b, 0, 0, 0))

    null_score: tuple[jax.Array, ...] = ()
    if null_logit is not None:
        by_query = jnp.repeat(null_logit.reshape(kv_heads, -1), tokens, axis=1)[..., None]
        null_score = (_pad_rows(by_query, rows, 0),)
    null_spec = pl.BlockSpec((kv_heads, tile, 1), lambda b, r, j, *_: (0, r, 0))

    def kept_spec(part: jax.Array) -> pl.BlockSpec:
        rest = part.shape[2:]
        # a layer's pages begin anywhere in the pool, not where a block does
        return pl.BlockSpec(
            tuple(map(pl.Element, (1, kept_slots, *rest))),
            lambda b, r, j, _, kept_order, labels, sinks_seen, stretch: (
                b,
                stretch[b, 0] + kept_order[b, j] * kept_slots,
                *(0 for _ in rest),
            ),
        )

    grid = pltpu.PrefetchScalarGridSpec(
        num_scalar_prefetch=5,
        grid=(batch, tiles, blocks + kept_blocks),
        in_specs=[
            block(2 * tile),
            block(tile),
            pl.BlockSpec((1, tile, 1), lambda b, r, j, *_: (b, r, 0)),
            pages,
            scales,
            pages,
            scales,
            sinks,
            sinks,
            (null_spec,) * len(null_score),
            tuple(map(kept_spec, kept_k)),
            tuple(map(kept_spec, kept_v)),
        ],
        out_specs=block(tile),
        scratch_shapes=[
            pltpu.VMEM((kv_heads, tile, 1), jnp.float32),
            pltpu.VMEM((kv_heads, tile, 1), jnp.float32),
            pltpu.VMEM((kv_heads, tile, dim), jnp.float32),
        ],
    )
    kept_pages = kept_slots * kept_blocks
    page_bytes = 2 * kv_heads * PAGE * (count * (dim + 4) + kept_pages * (dim // 2 + dim // 16 + 4))
    out = pl.pallas_call(
        functools.partial(_kernel, sliding_window, lanes_are_tokens, heads_first, blocks),
        grid_spec=grid,
        out_shape=jax.ShapeDtypeStruct((batch, kv_heads, rows, dim), jnp.float32),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel", "arbitrary")),
        cost_estimate=pl.CostEstimate(
            flops=8 * batch * kv_heads * rows * (count + kept_pages) * PAGE * dim,
            transcendentals=batch * kv_heads * rows * (count + kept_pages) * PAGE,
            bytes_accessed=batch * (tiles * page_bytes + 16 * kv_heads * rows * dim),
        ),
        interpret=interpret,
        name="window_attention",
    )(
        order,
        kept_order,
        labels,
        sinks_seen,
        stretch,
        query,
        _group(q_sink * scale, kv_heads, rows),
        positions,
        keys,
        key_scale,
        values,
        value_scale,
        kv.sink_k,
        kv.sink_v,
        null_score,
        kept_k,
        kept_v,
    )
    out = out[:, :, :queries].reshape(batch, kv_heads, heads // kv_heads, tokens, dim)
    return out.transpose(0, 3, 1, 2, 4).reshape(batch, tokens, heads, dim)


def _kernel(
    sliding_window: int | None,
    lanes_are_tokens: bool,
    heads_first: bool,
    blocks: int,
    _order: jax.Array,
    _kept_order: jax.Array,
    labels: jax.Array,
    sinks_seen: jax.Array,
    stretch: jax.Array,
    q: jax.Array,
    q_sink: jax.Array,
    positions: jax.Array,
    keys: jax.Array,
    key_scale: jax.Array,
    values: jax.Array,
    value_scale: jax.Array,
    sink_k: jax.Array,
    sink_v: jax.Array,
    null_score: tuple[jax.Array, ...],
    kept_k: tuple[jax.Array, ...],
    kept_v: tuple[jax.Array, ...],
    out: jax.Array,
    peak: jax.Array,
    mass: jax.Array,
    total: jax.Array,
) -> None:
    """One row, one tile of its queries, one block of its ring or of its kept pairs."""
    row, step = pl.program_id(0), pl.program_id(2)
    slots, tokens, features = keys.shape[1], (2 if lanes_are_tokens else 1), (1 if lanes_are_tokens else 2)

    @pl.when(step == 0)
    def _begin() -> None:
        seen = sinks_seen[row] > 0
        count = sink_k.shape[2]
        score = [jnp.sum(q_sink[0] * sink_k[0, :, s : s + 1], axis=-1, keepdims=True) for s in range(count)]
        score = [jnp.where(seen, one, _NEGATIVE) for one in score]
        highest = functools.reduce(jnp.maximum, (*score, *(of_heads[...] for of_heads in null_score)))
        weight = [jnp.where(seen, jnp.exp(one - highest), 0.0) for one in score]
        peak[...] = highest
        mass[...] = sum((jnp.exp(of_heads[...] - highest) for of_heads in null_score), sum(weight[1:], weight[0]))
        total[...] = sum((one * sink_v[0, :, s : s + 1] for s, one in enumerate(weight)), jnp.zeros(total.shape))

    def scale(of: jax.Array, slot: jax.Array) -> jax.Array:
        return (of[0, :, slot] if heads_first else of[0, slot])[:, None]

    def take(score: jax.Array, seen: jax.Array, values: jax.Array, scale: jax.Array, contract: int) -> None:
        """Adds a page to the softmax."""
        score = jnp.where(seen[None], score, _NEGATIVE)
        highest = jnp.maximum(peak[...], jnp.max(score, axis=-1, keepdims=True))
        weight = jnp.where(seen[None], jnp.exp(score - highest), 0.0)
        fade = jnp.exp(peak[...] - highest)
        terms = _two_terms(weight * scale)
        mass[...] = mass[...] * fade + jnp.sum(weight, axis=-1, keepdims=True)
        total[...] = total[...] * fade + _sum_terms(_page_matmul(terms, values, contract))
        peak[...] = highest

    place = jax.lax.broadcasted_iota(jnp.int32, (positions.shape[1], PAGE), 1)

    def attend(slot: jax.Array, page: jax.Array) -> None:
        score = _sum_terms(_page_matmul(q[0], keys[0, slot], features)) * scale(key_scale, slot)
        token = page * PAGE + place
        seen = token <= positions[0]
        if sliding_window is not None:
            seen = seen & (token > positions[0] - sliding_window)
        take(score, seen, values[0, slot], scale(value_scale, slot), tokens)

    @pl.when(step < blocks)
    def _block() -> None:
        @pl.loop(0, slots)
        def _slot(slot: jax.Array) -> None:
            page = labels[row, step * slots + slot]
            pl.when(page >= 0)(functools.partial(attend, slot, page))

    def attend_kept(slot: jax.Array, count: jax.Array) -> None:
        near = _two_terms(q_sink[0])
        score = _sum_terms(_page_matmul(near, _unpacked(kept_k, slot, KEY_BITS), 1)) * kept_k[3][0, slot][:, None]
        # what is not filled may have any scale, and a weight of 0 does not cancel what is not a number
        scale = jnp.where(place[:1] < count, kept_v[3][0, slot][:, None], 0.0)
        take(score, place < count, _unpacked(kept_v, slot, VALUE_BITS), scale, 2)

    if kept_k:
        kept_slots = kept_k[0].shape[1]

        @pl.when(step >= blocks)
        def _kept_block() -> None:
            @pl.loop(0, kept_slots)
            def _slot(slot: jax.Array) -> None:
                count = stretch[row, 1] - ((step - blocks) * kept_slots + slot) * PAGE
                pl.when(count > 0)(functools.partial(attend_kept, slot, count))

    @pl.when(step == pl.num_programs(2) - 1)
    def _end() -> None:
        out[0] = total[...] / jnp.maximum(mass[...], 1e-30)


def _unpacked(pages: tuple[jax.Array, ...], slot: jax.Array, bits: Bits) -> jax.Array:
    """A page of kept pairs of every KV head, as `packed_pages.unpack` has it, the tokens last: [K, D, P]."""
    numbers, step, offset = (part[0, slot].astype(jnp.int32) for part in pages[:3])
    each, groups = 8 // bits, step.shape[1]
    size = 2 * numbers.shape[1] // groups  # bytes that two groups share
    parts = []
    for part in range(groups // 2 * each):
        shared = numbers[:, part // each * size : (part // each + 1) * size]
        n = (shared >> part % each * bits & (2**bits - 1)) * (15 // (2**bits - 1))
        group = 2 * part // each
        of_group = slice(group, group + 1)
        parts.append(offset[:, of_group] + ((n * (step[:, of_group] & 255) + 4) >> 3))
    return jnp.clip(jnp.concatenate(parts, axis=1), -127, 127)


def _kept_pages(pairs: LayerPairs | None) -> tuple[tuple[jax.Array, ...], tuple[jax.Array, ...]]:
    """Numbers, steps and offsets of kept keys and values with the tokens last, all as int8, and scales; none of none."""

    def parts(pages: PackedPages | jax.Array) -> tuple[jax.Array, ...]:
        if not isinstance(pages, PackedPages):
            raise TypeError("float pages are attended by XLA's program")
        numbers, step = (jax.lax.bitcast_convert_type(x, jnp.int8) for x in (pages.numbers, pages.step))
        return (*(x.swapaxes(-1, -2) for x in (numbers, step, pages.offset)), pages.scale)

    return ((), ()) if pairs is None else (parts(pairs.pool.k), parts(pairs.pool.v))


def _page_matmul(terms: jax.Array, page: jax.Array, contract: int) -> jax.Array:
    """[K, Q, n] times a page of every KV head, over the page's axis `contract`."""
    page = page.astype(jnp.float32).astype(jnp.bfloat16)
    dims = (((2,), (contract,)), ((0,), (0,)))
    return jax.lax.dot_general(terms, page, dims, preferred_element_type=jnp.float32)


def _two_terms(x: jax.Array) -> jax.Array:
    """x ≈ high + low in bfloat16, the low terms after the high ones along the last axis but one."""
    high = x.astype(jnp.bfloat16).astype(jnp.float32)
    return jnp.concatenate([high, x - high], axis=-2).astype(jnp.bfloat16)


def _sum_terms(dots: jax.Array) -> jax.Array:
    rows = dots.shape[1] // 2
    return dots[:, :rows] + dots[:, rows:]


def _labels(view: RingView, sliding_window: int | None) -> jax.Array:
    """Page of the text in each slot, −1 where no token of the step sees any of it: [B, N]."""
    seen = (view.page >= view.first_page[:, None]) & (view.page >= 0)
    seen &= view.page * PAGE <= view.positions.max(axis=1, keepdims=True)
    if sliding_window is not None:
        seen &= (view.page + 1) * PAGE > view.positions.min(axis=1, keepdims=True) - sliding_window + 1
    return jnp.where(seen, view.page, -1)


def _visits(wanted: Bool[Array, "B blocks"]) -> Int32[Array, "B blocks"]:
    """The block in VMEM at each step: the wanted one, or else one that is there already, for that costs no reading."""
    index = jnp.arange(wanted.shape[1], dtype=jnp.int32)
    first = jnp.argmax(wanted, axis=1, keepdims=True).astype(jnp.int32)
    return jnp.maximum(jax.lax.cummax(jnp.where(wanted, index, 0), axis=1), first)


def _slots(count: int, kv_heads: int, dim: int) -> int:
    """Ring slots of one block: the most that divide the ring and keep within `_BLOCK_BYTES`."""
    most = max(_BLOCK_BYTES // (kv_heads * PAGE * dim), 1)
    return max(n for n in range(1, min(most, count, _SUBLANES) + 1) if count % n == 0)


def _group(q: jax.Array, kv_heads: int, rows: int) -> jax.Array:
    """[B, T, H, D] → [B, K, rows, D]: the queries that share a KV head, padded with zeros."""
    batch, tokens, heads, dim = q.shape
    grouped = q.reshape(batch, tokens, kv_heads, heads // kv_heads, dim).transpose(0, 2, 3, 1, 4)
    return _pad_rows(grouped.reshape(batch, kv_heads, -1, dim), rows, 0)


def _pad_rows(x: jax.Array, rows: int, value: int) -> jax.Array:
    """Fills the last axis but one up to `rows`."""
    width = [(0, 0)] * (x.ndim - 2) + [(0, rows - x.shape[-2]), (0, 0)]
    return jnp.pad(x, width, constant_values=value)


def _round_up(size: int, unit: int) -> int:
    return -(-size // unit) * unit
