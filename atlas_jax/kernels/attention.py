"""Attention over a ring of KV pages and a few sink tokens, for a few query tokens per row.

A row's keys and values lie in N pages of P tokens. `page[b, n]` says which page of the text ring slot n holds (−1: none),
so a ring needs no order and a window is a comparison. The step's own tokens are written first and read back with the
rest: a token sees the same stored numbers whether it arrived alone or in a chunk (sums over them round differently in
programs of different shapes).

Keys and values are int8 with one scale per token and head (`QuantPages`): for SmolLM2-135M that costs 0.04 % of
perplexity, halves the bytes, and lets both products run on the CPU's int8 units. Probabilities are rounded to two int8
terms; one term loses the long tail (1.2 % of perplexity). Float pages are the reference mode.
"""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp

from atlas_jax.config import PAGE
from atlas_jax.config import KVDtype as KVDtype
from atlas_jax.kernels.cpu import ffi
from atlas_jax.kernels.linear import quantize_rows
from atlas_jax.kernels.reductions import row_max, row_sum
from atlas_jax.typing import Array, Bool, Float, Int8, Int32

LOW_TERM = 254.0
"""The second int8 term of a probability counts in units of 1/254 of the first, so that half a unit of the first is 127."""

_NEGATIVE = -1e30


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class QuantPages:
    """Keys or values in 8 bits.

    Attributes:
      values: int8 [B, N, K, P, D].
      scale: float32 [B, N, K, P].
    """

    values: Int8[Array, "B N K P D"]
    scale: Float[Array, "B N K P"]


Pages = QuantPages | jax.Array


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class LayerKV:
    """One layer's keys and values.

    Attributes:
      k, v: the ring, [B, N, K, P, D].
      sink_k, sink_v: the first S tokens of the text, float32 [B, K, S, D], kept for when their page has left the ring.
    """

    k: Pages
    v: Pages
    sink_k: Float[Array, "B K S D"]
    sink_v: Float[Array, "B K S D"]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class RingView:
    """Where a step's tokens go and what they may see; the same for every layer.

    Attributes:
      page: page of the text in each ring slot after this step's write, −1 where there is none.
      slot: ring slot the step's tokens are written to.
      positions: absolute position of every token of the step (all in one page).
      valid: which tokens of the step are real.
      first_page: pages before it have left the window.
    """

    page: Int32[Array, "B N"]
    slot: Int32[Array, B]
    positions: Int32[Array, "B T"]
    valid: Bool[Array, "B T"]
    first_page: Int32[Array, B]


def init_pages(batch: int, pages: int, kv_heads: int, head_dim: int, dtype: KVDtype) -> Pages:
    """An empty ring."""
    shape = (batch, pages, kv_heads, PAGE, head_dim)
    if dtype == "float32":
        return jnp.zeros(shape, jnp.float32)
    return QuantPages(jnp.zeros(shape, jnp.int8), jnp.zeros(shape[:-1], jnp.float32))


def init_layer_kv(batch: int, pages: int, kv_heads: int, head_dim: int, sinks: int, dtype: KVDtype) -> LayerKV:
    """An empty layer."""

    def pages_of() -> Pages:
        return init_pages(batch, pages, kv_heads, head_dim, dtype)

    def sink() -> jax.Array:  # never one array twice: the cache is donated
        return jnp.zeros((batch, kv_heads, sinks, head_dim), jnp.float32)

    return LayerKV(pages_of(), pages_of(), sink(), sink())


def write(kv: LayerKV, k: Float[Array, "B T K D"], v: Float[Array, "B T K D"], view: RingView) -> LayerKV:
    """Stores a step's keys and values in the ring."""
    return LayerKV(_write_pages(kv.k, k, view), _write_pages(kv.v, v, view), kv.sink_k, kv.sink_v)


@jax.jit  # compiled into its caller; layers alike are traced once
def first_tokens(
    kv: LayerKV, slot: Int32[Array, B], keep: Bool[Array, B]
) -> tuple[Float[Array, "B K S D"], Float[Array, "B K S D"]]:
    """The sinks of a layer, with the first S tokens of ring slot `slot` copied in for rows whose first page is leaving.

    They become the numbers the ring gave while it held them, so nothing changes at the moment of the hand-over.
    """
    sinks = kv.sink_k.shape[2]

    def first(pages: Pages, old: jax.Array) -> jax.Array:
        row = jnp.arange(old.shape[0])
        if isinstance(pages, QuantPages):
            values = pages.values[row, slot, :, :sinks].astype(jnp.float32)
            new = values * pages.scale[row, slot, :, :sinks, None]
        else:
            new = pages[row, slot, :, :sinks]
        return jnp.where(keep[:, None, None, None], new, old)

    return first(kv.k, kv.sink_k), first(kv.v, kv.sink_v)


def _write_pages(pages: Pages, new: jax.Array, view: RingView) -> Pages:
    if not isinstance(pages, QuantPages):
        return _put_tokens(pages, new, view)
    values, scale = quantize_rows(new)
    return QuantPages(_put_tokens(pages.values, values, view), _put_tokens(pages.scale, scale[..., 0], view))


def _put_tokens(ring: jax.Array, new: jax.Array, view: RingView) -> jax.Array:
    """Writes [B, T, K, …] at each token's place in [B, N, K, P, …].

    In a step of one token a row whose token is not valid writes back what was there: at the end of a page, its next
    page not begun, that place holds the first token of the page before.
    """
    batch, tokens = new.shape[:2]
    offset = view.positions % PAGE
    row, slot = jnp.arange(batch)[:, None], view.slot[:, None]
    if tokens == 1:
        valid = view.valid.reshape(view.valid.shape + (1,) * (new.ndim - 2))
        new = jnp.where(valid, new, ring[row, slot, :, offset])
        return ring.at[row, slot, :, offset].set(new, mode="promise_in_bounds", unique_indices=True)
    offset = jnp.where(view.valid, offset, PAGE)  # offset P is out of range: dropped
    return ring.at[row, slot, :, offset].set(new, mode="drop")


def visible(view: RingView, sliding_window: int | None) -> tuple[Bool[Array, "B T N P"], Bool[Array, "B T"]]:
    """Which ring tokens, and whether the sinks, each token of the step attends.

    The sinks count only once their page has left the window: until then they are in the ring. A layer with a sliding
    window of its own never sees them again, as in the model's training.
    """
    token = view.page[:, :, None] * PAGE + jnp.arange(PAGE)  # [B, N, P]
    in_window = (view.page >= view.first_page[:, None]) & (view.page >= 0)
    query = view.positions[:, :, None, None]
    seen = in_window[:, None, :, None] & (token[:, None] <= query)
    if sliding_window is None:
        return seen, jnp.broadcast_to(view.first_page[:, None] > 0, view.positions.shape)
    return seen & (token[:, None] > query - sliding_window), jnp.zeros(view.positions.shape, bool)


def window_attention(
    q: Float[Array, "B T H D"],
    q_sink: Float[Array, "B T H D"],
    kv: LayerKV,
    seen: Bool[Array, "B T N P"],
    sinks_seen: Bool[Array, "B T"],
    scale: float,
) -> Float[Array, "B T H D"]:
    """Softmax attention of a step's tokens over the ring and the sinks.

    Args:
      q: queries rotated to their positions.
      q_sink: queries rotated no further than the model was trained for, to meet the sinks (positions 0 … S−1).
      kv: the layer's cache, with the step's own tokens already written.
      seen, sinks_seen: from `visible`; a token always sees itself.
      scale: factor on q·k.

    Returns:
      The attention output. What is not seen contributes an exact zero.
    """
    batch, tokens, heads, dim = q.shape
    kv_heads = kv.sink_k.shape[1]
    k, v = kv.k, kv.v
    taken = ffi.takes_attention(tokens, PAGE, dim, kv.sink_k.shape[2])
    if taken and isinstance(k, QuantPages) and isinstance(v, QuantPages):
        ring = k.values, k.scale, v.values, v.scale
        return ffi.attention(q, q_sink, *ring, kv.sink_k, kv.sink_v, seen, sinks_seen, scale)
    groups = heads // kv_heads
    score = _page_scores(_group(q, kv_heads), kv.k) * scale  # [B, N, K, G·T, P]
    by_token = score.reshape(*score.shape[:3], groups, tokens, PAGE)
    mask = seen.transpose(0, 2, 1, 3)[:, :, None, None]
    score = jnp.where(mask, by_token, _NEGATIVE).reshape(score.shape)
    # four sinks: an elementwise product and sum, cheaper than another batched product's set-up
    sink_score = jnp.einsum("bkqd,bksd->bkqs", _group(q_sink, kv_heads), kv.sink_k) * scale
    sink_mask = jnp.broadcast_to(sinks_seen[:, None, :], (batch, groups, tokens)).reshape(batch, 1, -1, 1)
    sink_score = jnp.where(sink_mask, sink_score, _NEGATIVE)

    peak = jnp.maximum(row_max(score).max(axis=1), sink_score.max(axis=-1))  # [B, K, G·T]
    weight = jnp.exp(score - peak[:, None, :, :, None])
    sink_weight = jnp.exp(sink_score - peak[..., None])
    mass = row_sum(weight).sum(axis=1) + sink_weight.sum(axis=-1)
    total = _weighted_values(weight, kv.v) + jnp.einsum("bkqs,bksd->bkqd", sink_weight, kv.sink_v)
    out = total / mass[..., None]
    return out.reshape(batch, kv_heads, groups, tokens, dim).transpose(0, 3, 1, 2, 4).reshape(batch, tokens, heads, dim)


def _group(q: jax.Array, kv_heads: int) -> jax.Array:
    """[B, T, H, D] → [B, K, G·T, D]: the queries that share a KV head become rows of one product."""
    batch, tokens, heads, dim = q.shape
    grouped = q.reshape(batch, tokens, kv_heads, heads // kv_heads, dim).transpose(0, 2, 3, 1, 4)
    return grouped.reshape(batch, kv_heads, -1, dim)


def _page_scores(q: jax.Array, pages: Pages) -> jax.Array:
    """q·k for every page: [B, K, Q, D] × [B, N, K, P, D] → [B, N, K, Q, P]."""
    if not isinstance(pages, QuantPages):
        return jnp.einsum("bkqd,bnkpd->bnkqp", q, pages, precision=jax.lax.Precision.HIGHEST)
    values, scale = quantize_rows(q)
    dots = _page_product(values[:, None], pages.values, contract=2)
    return dots.astype(jnp.float32) * scale[:, None] * pages.scale[:, :, :, None, :]


def _weighted_values(weight: jax.Array, pages: Pages) -> jax.Array:
    """Σ weight·v over pages and tokens: [B, N, K, Q, P] × [B, N, K, P, D] → [B, K, Q, D]."""
    if not isinstance(pages, QuantPages):
        return jnp.einsum("bnkqp,bnkpd->bkqd", weight, pages, precision=jax.lax.Precision.HIGHEST)
    scaled = weight * pages.scale[:, :, :, None, :]
    # one scale per query over all pages, so that the integer sums of the pages can be added as integers
    peak = jnp.maximum(row_max(scaled).max(axis=1, keepdims=True), 1e-30)[..., None]  # [B, 1, K, Q, 1]
    units = scaled * (127.0 / peak)
    high = jnp.round(units)
    low = jnp.round((units - high) * LOW_TERM)
    terms = jnp.concatenate([high.astype(jnp.int8), low.astype(jnp.int8)], axis=3)
    sums = _page_product(terms, pages.values, contract=1).sum(axis=1)
    queries = weight.shape[3]
    total = sums[:, :, :queries].astype(jnp.float32) + sums[:, :, queries:].astype(jnp.float32) * (1.0 / LOW_TERM)
    return total * (peak[:, 0] * (1.0 / 127.0))


def _page_product(rows: jax.Array, pages: jax.Array, *, contract: int) -> jax.Array:
    """Batched int8 product of query rows with every page, contracting the page's axis `contract` (1: P, 2: D).

    One flat batch axis: with three batch axes XLA's CPU backend transposes the whole cache first (20 ms for 16 rows).
    """
    batch, count, kv_heads, _, _ = pages.shape
    rows = jnp.broadcast_to(rows, (batch, count, *rows.shape[2:]))
    flat_rows = rows.reshape(batch * count * kv_heads, *rows.shape[3:])
    flat_pages = pages.reshape(batch * count * kv_heads, *pages.shape[3:])
    product = jax.lax.dot_general(
        flat_rows, flat_pages, (((2,), (contract,)), ((0,), (0,))), preferred_element_type=jnp.int32
    )
    return product.reshape(batch, count, kv_heads, *product.shape[1:])


def ref_window_attention(
    q: Float[Array, "B T H D"],
    q_sink: Float[Array, "B T H D"],
    k: Float[Array, "B N K P D"],
    v: Float[Array, "B N K P D"],
    sink_k: Float[Array, "B K S D"],
    sink_v: Float[Array, "B K S D"],
    seen: Bool[Array, "B T N P"],
    sinks_seen: Bool[Array, "B T"],
    scale: float,
) -> Float[Array, "B T H D"]:
    """`window_attention` as one softmax over a plain list of keys, in float32: the definition."""
    batch, tokens, heads, dim = q.shape
    kv_heads = k.shape[2]
    repeat = heads // kv_heads
    flat_k = jnp.repeat(k.transpose(0, 2, 1, 3, 4).reshape(batch, kv_heads, -1, dim), repeat, axis=1)
    flat_v = jnp.repeat(v.transpose(0, 2, 1, 3, 4).reshape(batch, kv_heads, -1, dim), repeat, axis=1)
    score = jnp.concatenate(
        [
            jnp.einsum("bthd,bhsd->bhts", q, flat_k),
            jnp.einsum("bthd,bhsd->bhts", q_sink, jnp.repeat(sink_k, repeat, axis=1)),
        ],
        axis=-1,
    )
    mask = jnp.concatenate(
        [seen.reshape(batch, tokens, -1), jnp.repeat(sinks_seen[..., None], sink_k.shape[2], axis=-1)], axis=-1
    )
    probability = jax.nn.softmax(jnp.where(mask[:, None], score * scale, -jnp.inf), axis=-1)
    values = jnp.concatenate([flat_v, jnp.repeat(sink_v, repeat, axis=1)], axis=2)
    return jnp.einsum("bhts,bhsd->bthd", probability, values)
