"""Attention over a ring of KV pages, a few sink tokens and kept pairs (`kernels.kv_pages`), for a few query tokens per row.

The step's own tokens are written first and read back with the rest: a token sees the same stored numbers whether it
arrived alone or in a chunk (sums over them round differently in programs of different shapes).

Over int8 pages the probabilities are quantised to two int8 terms; one term loses the long tail (1.2 % of perplexity).
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from atlas_jax.config import PAGE
from atlas_jax.kernels import tpu
from atlas_jax.kernels.cpu import ffi, library
from atlas_jax.kernels.kv_pages import LayerKV, LayerPairs, Pages, QuantPages, RingView
from atlas_jax.kernels.linear import quantize_rows
from atlas_jax.kernels.packed_pages import PackedPages
from atlas_jax.kernels.reductions import row_max, row_sum
from atlas_jax.typing import Array, Bool, Float, Int32

LOW_TERM = 254.0
"""The second int8 term of a probability counts in units of 1/254 of the first, so that half a unit of the first is 127."""

UNSEEN = -1e30
"""The score of a key that is not seen."""

_CPU_TOKENS = 128
"""Tokens per row up to which the C kernel is faster."""
_CPU_SINKS = 16
_TPU_SUBLANES = 32


def uses_cpu_kernel(tokens: int, dim: int, sinks: int) -> bool:
    """Whether a step of this shape over int8 pages runs the C kernel."""
    return tokens <= _CPU_TOKENS and dim % 64 == 0 and sinks <= _CPU_SINKS and library.usable()


def uses_tpu_kernel(kv: LayerKV) -> bool:
    """Whether a step over this cache runs the Mosaic kernel."""
    return isinstance(kv.k, QuantPages) and kv.sink_k.shape[-1] % _TPU_SUBLANES == 0 and tpu.usable()


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


def attend(
    q: Float[Array, "B T H D"],
    q_sink: Float[Array, "B T H D"],
    kv: LayerKV,
    view: RingView,
    sliding_window: int | None,
    masks: tuple[Bool[Array, "B T N P"], Bool[Array, "B T"]],
    scale: float,
    pairs: LayerPairs | None = None,
    softcap: float | None = None,
    null_logit: Float[Array, H] | None = None,
) -> Float[Array, "B T H D"]:
    """`window_attention` by whichever kernel there is for it.

    Args:
      view, sliding_window: what the Mosaic kernel works out the masks from.
      masks: `visible(view, sliding_window)`, the same for all layers with this window.
    """
    if softcap is not None or not uses_tpu_kernel(kv):
        return window_attention(q, q_sink, kv, *masks, scale, pairs, softcap, null_logit)
    from atlas_jax.kernels.tpu import window_attention as mosaic  # importing Pallas takes 0.4 s that only TPUs need

    rest = sliding_window, scale, pairs, null_logit
    return mosaic.attention(q, q_sink, kv, view, *rest, interpret=tpu.interpreted())


def window_attention(
    q: Float[Array, "B T H D"],
    q_sink: Float[Array, "B T H D"],
    kv: LayerKV,
    seen: Bool[Array, "B T N P"],
    sinks_seen: Bool[Array, "B T"],
    scale: float,
    pairs: LayerPairs | None = None,
    softcap: float | None = None,
    null_logit: Float[Array, H] | None = None,
) -> Float[Array, "B T H D"]:
    """Softmax attention of a step's tokens over the ring, the sinks and the kept pairs.

    Args:
      q: queries rotated to their positions.
      q_sink: queries rotated no further than the model was trained for, to meet the sinks (positions 0 … S−1) and the kept
        pairs.
      kv: the layer's cache, with the step's own tokens already written.
      seen, sinks_seen: from `visible`; a token always sees itself.
      scale: factor on q·k.
      pairs: the layer's kept pairs; all tokens of a row see those that it has.
      softcap: see `capped`; only XLA's form has it.
      null_logit: one more score in each head's softmax, of a key without a value.

    Returns:
      The attention output. What is not seen contributes an exact zero.
    """
    batch, tokens, heads, dim = q.shape
    kv_heads = kv.sink_k.shape[1]
    k, v = kv.k, kv.v
    taken = softcap is None and uses_cpu_kernel(tokens, dim, kv.sink_k.shape[2])
    if taken and isinstance(k, QuantPages) and isinstance(v, QuantPages):
        ring = k.values, k.scale, v.values, v.scale
        return ffi.attention(
            q, q_sink, *ring, kv.sink_k, kv.sink_v, seen, sinks_seen, scale, _packed_pairs(pairs), null_logit
        )
    groups = heads // kv_heads
    score = capped(page_scores(group_queries(q, kv_heads), kv.k) * scale, softcap)  # [B, N, K, G·T, P]
    by_token = score.reshape(*score.shape[:3], groups, tokens, PAGE)
    mask = seen.transpose(0, 2, 1, 3)[:, :, None, None]
    score = jnp.where(mask, by_token, UNSEEN).reshape(score.shape)
    # four sinks: a multiply and a sum, cheaper than another batched matmul's set-up
    sink_score = capped(jnp.einsum("bkqd,bksd->bkqs", group_queries(q_sink, kv_heads), kv.sink_k) * scale, softcap)
    sink_mask = jnp.broadcast_to(sinks_seen[:, None, :], (batch, groups, tokens)).reshape(batch, 1, -1, 1)
    sink_score = jnp.where(sink_mask, sink_score, UNSEEN)

    peak = jnp.maximum(row_max(score).max(axis=1), sink_score.max(axis=-1))  # [B, K, G·T]
    if null_logit is not None:
        null_score = by_query(null_logit, kv_heads, tokens)
        peak = jnp.maximum(peak, null_score)
    if pairs is not None:
        kept_score = capped(page_scores(group_queries(q_sink, kv_heads), pairs.own(pairs.pool.k)) * scale, softcap)
        filled = (kept_index(pairs.pages) < pairs.count[:, None, None])[:, :, None]  # [B, pages, 1, P]
        kept_score = jnp.where(filled[:, :, :, None], kept_score, UNSEEN)
        peak = jnp.maximum(peak, row_max(kept_score).max(axis=1))
    weight = jnp.exp(score - peak[:, None, :, :, None])
    sink_weight = jnp.exp(sink_score - peak[..., None])
    mass = row_sum(weight).sum(axis=1) + sink_weight.sum(axis=-1)
    if null_logit is not None:
        mass = mass + jnp.exp(null_score - peak)
    total = _weighted_values(weight, kv.v) + jnp.einsum("bkqs,bksd->bkqd", sink_weight, kv.sink_v)
    if pairs is not None:
        kept_weight = jnp.exp(kept_score - peak[:, None, :, :, None])
        mass = mass + row_sum(kept_weight).sum(axis=1)
        total = total + _weighted_values(kept_weight, _filled_values(pairs.own(pairs.pool.v), filled))
    out = total / mass[..., None]
    return out.reshape(batch, kv_heads, groups, tokens, dim).transpose(0, 3, 1, 2, 4).reshape(batch, tokens, heads, dim)


def capped(score: Float[Array, "*shape"], softcap: float | None) -> Float[Array, "*shape"]:
    """Scores that approach ±softcap: cap·tanh(score / cap); None leaves them."""
    return score if softcap is None else softcap * jnp.tanh(score / softcap)


def _packed_pairs(pairs: LayerPairs | None) -> tuple[PackedPages, PackedPages, Int32[Array, "B 2"]] | None:
    """What the C kernel reads of kept pairs, if there are any."""
    if pairs is None:
        return None
    k, v = pairs.pool.k, pairs.pool.v
    assert isinstance(k, PackedPages)
    assert isinstance(v, PackedPages)
    return k, v, pairs.stretch


def _filled_values(pages: Pages, filled: Bool[Array, "B pages 1 P"]) -> Pages:
    """Kept values with zeros where none is: a weight of 0 does not cancel what is not a number."""
    if isinstance(pages, QuantPages):
        return QuantPages(pages.values, jnp.where(filled, pages.scale, 0.0))
    return jnp.where(filled[..., None], pages, 0.0)


def kept_index(pages: int) -> Int32[Array, "kept P"]:
    """The place of every kept pair in the order in which they fill their pages."""
    return jnp.arange(pages * PAGE, dtype=jnp.int32).reshape(pages, PAGE)


def group_queries(q: jax.Array, kv_heads: int) -> jax.Array:
    """[B, T, H, D] → [B, K, G·T, D]: the queries that share a KV head become rows of one GEMM."""
    batch, tokens, heads, dim = q.shape
    grouped = q.reshape(batch, tokens, kv_heads, heads // kv_heads, dim).transpose(0, 2, 3, 1, 4)
    return grouped.reshape(batch, kv_heads, -1, dim)


def by_query(per_head: Float[Array, H], kv_heads: int, tokens: int) -> Float[Array, "K Q"]:
    """A number of every head, for the queries in the order of `group_queries`."""
    return jnp.repeat(per_head.reshape(kv_heads, -1), tokens, axis=1)


def page_scores(q: jax.Array, pages: Pages) -> jax.Array:
    """q·k for every page: [B, K, Q, D] × [B, N, K, P, D] → [B, N, K, Q, P]."""
    if not isinstance(pages, QuantPages):
        return jnp.einsum("bkqd,bnkpd->bnkqp", q, pages, precision=jax.lax.Precision.HIGHEST)
    values, scale = quantize_rows(q)
    dots = _page_matmul(values[:, None], pages.values, contract=2)
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
    sums = _page_matmul(terms, pages.values, contract=1).sum(axis=1)
    queries = weight.shape[3]
    total = sums[:, :, :queries].astype(jnp.float32) + sums[:, :, queries:].astype(jnp.float32) * (1.0 / LOW_TERM)
    return total * (peak[:, 0] * (1.0 / 127.0))


def _page_matmul(rows: jax.Array, pages: jax.Array, *, contract: int) -> jax.Array:
    """Batched int8 matmul of query rows with every page, contracting the page's axis `contract` (1: P, 2: D).

    One flat batch axis: with three batch axes XLA's CPU backend transposes the whole cache first (20 ms for 16 rows).
    """
    batch, count, kv_heads, _, _ = pages.shape
    rows = jnp.broadcast_to(rows, (batch, count, *rows.shape[2:]))
    flat_rows = rows.reshape(batch * count * kv_heads, *rows.shape[3:])
    flat_pages = pages.reshape(batch * count * kv_heads, *pages.shape[3:])
    out = jax.lax.dot_general(
        flat_rows, flat_pages, (((2,), (contract,)), ((0,), (0,))), preferred_element_type=jnp.int32
    )
    return out.reshape(batch, count, kv_heads, *out.shape[1:])


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
    kept: tuple[Float[Array, "B kept K P D"], Float[Array, "B kept K P D"], Int32[Array, B]] | None = None,
    null_logit: Float[Array, H] | None = None,
) -> Float[Array, "B T H D"]:
    """`window_attention` as one softmax over a plain list of keys, in float32: the definition.

    Args:
      kept: keys, values, and how many of them each row has.
    """
    batch, tokens, heads, dim = q.shape
    kv_heads = k.shape[2]

    def flat(pages: jax.Array) -> jax.Array:
        return pages.transpose(0, 2, 1, 3, 4).reshape(batch, kv_heads, -1, dim)

    near_k, near_v = [sink_k], [sink_v]
    masks = [seen.reshape(batch, tokens, -1), jnp.repeat(sinks_seen[..., None], sink_k.shape[2], axis=-1)]
    if kept is not None:
        kept_k, kept_v, count = kept
        filled = jnp.arange(kept_k.shape[1] * PAGE) < count[:, None]
        near_k.append(flat(kept_k))
        near_v.append(jnp.where(filled[:, None, :, None], flat(kept_v), 0.0))
        masks.append(jnp.broadcast_to(filled[:, None], (batch, tokens, filled.shape[1])))

    def each_head(parts: list[jax.Array]) -> jax.Array:
        return jnp.repeat(jnp.concatenate(parts, axis=2), heads // kv_heads, axis=1)

    met_k = jnp.einsum("bthd,bhsd->bhts", q, each_head([flat(k)]))
    met_near = jnp.einsum("bthd,bhsd->bhts", q_sink, each_head(near_k))
    score = jnp.where(
        jnp.concatenate(masks, axis=-1)[:, None], jnp.concatenate([met_k, met_near], axis=-1) * scale, -jnp.inf
    )
    if null_logit is not None:
        score = jnp.concatenate([score, jnp.broadcast_to(null_logit[:, None, None], (*score.shape[:3], 1))], axis=-1)
    probability = jax.nn.softmax(score, axis=-1)
    values = each_head([flat(v), *near_v])
    return jnp.einsum("bhts,bhsd->bthd", probability[..., : values.shape[2]], values)
