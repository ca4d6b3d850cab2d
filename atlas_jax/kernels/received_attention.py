"""How much attention a row's pairs receive from a few of its queries: by it, the pairs that are kept are chosen."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from atlas_jax.config import PAGE
from atlas_jax.kernels import attention
from atlas_jax.kernels.attention import UNSEEN, by_query, capped, group_queries, kept_index, page_scores
from atlas_jax.kernels.cpu import ffi
from atlas_jax.kernels.kv_pages import KeptPairs, LayerKV, QuantPages, stretch_of, unpacked
from atlas_jax.kernels.packed_pages import PackedPages
from atlas_jax.kernels.reductions import row_max, row_sum
from atlas_jax.typing import Array, Bool, Float, Int32


def uses_cpu_kernel(dim: int, sinks: int) -> bool:
    """Whether what pairs in 8 and in 4 bits receive is computed in C."""
    return attention.uses_cpu_kernel(1, dim, sinks)


def received_attention(
    q: Float[Array, "samples H D"],
    q_near: Float[Array, "samples H D"],
    kv: LayerKV,
    pairs: KeptPairs,
    row: Int32[Array, ""],
    seen: Bool[Array, "samples N P"],
    sinks_seen: Bool[Array, ""],
    first: Int32[Array, ""],
    kept: Int32[Array, ""],
    pages: int,
    scale: float,
    softcap: float | None = None,
    null_logit: Float[Array, H] | None = None,
) -> tuple[Float[Array, "N K P"], Float[Array, "kept_pages K P"]]:
    """The probability that each pair of a row gets of some queries' attention, added up over them and their heads.

    Args:
      q: queries rotated to their positions.
      q_near: the same queries, as they meet the sinks and the kept pairs.
      kv: the layer's ring and sinks.
      pairs: the kept pairs of all layers.
      row: the row of the batch.
      seen: which places of the ring each query sees.
      sinks_seen: whether all of them see the sinks.
      first, kept: the first page of the layer's pairs, and how many of them the row has; all queries see them.
      pages: of the kept pairs to tell of, as many as the layer has filled or more.
      scale: factor on q·k.
      softcap: see `attention.capped`.
      null_logit: see `attention.window_attention`.

    Returns:
      Of the ring and of the kept pairs, for each KV head the sums over the queries that share it; 0 where none sees.
    """
    samples, heads, dim = q.shape
    kv_heads, sinks = kv.sink_k.shape[1:3]
    k, kept_k = kv.k, pairs.k
    if (
        softcap is None
        and uses_cpu_kernel(dim, sinks)
        and isinstance(k, QuantPages)
        and isinstance(kept_k, PackedPages)
    ):
        rest = kv.sink_k, kept_k, row, seen, sinks_seen, first, kept, pages, scale, null_logit
        return ffi.received_attention(q, q_near, k.values, k.scale, *rest)

    def own(leaf: jax.Array) -> jax.Array:
        return jax.lax.dynamic_slice_in_dim(leaf, row, 1)

    ring, sink_k = jax.tree.map(own, (k, kv.sink_k))
    near_k = unpacked(stretch_of(kept_k, first, pages, row))
    far, near = group_queries(q[None], kv_heads), group_queries(q_near[None], kv_heads)  # [1, K, G·samples, D]
    mask = jnp.broadcast_to(seen.swapaxes(0, 1)[:, None, None], (seen.shape[1], 1, heads // kv_heads, samples, PAGE))
    mask = mask.reshape(seen.shape[1], 1, -1, PAGE)
    filled = (kept_index(pages) < kept)[:, None, None]
    score = jnp.where(mask, capped(page_scores(far, ring)[0] * scale, softcap), UNSEEN)
    kept_score = jnp.where(filled, capped(page_scores(near, near_k)[0] * scale, softcap), UNSEEN)
    sink_score = jnp.einsum("kqd,ksd->kqs", near[0], sink_k[0], precision=jax.lax.Precision.HIGHEST) * scale
    sink_score = jnp.where(sinks_seen, capped(sink_score, softcap), UNSEEN)
    peaks = row_max(score).max(axis=0), row_max(kept_score).max(axis=0), sink_score.max(axis=-1)
    peak = jnp.maximum(jnp.maximum(peaks[0], peaks[1]), peaks[2])  # [K, G·samples]
    if null_logit is not None:
        null_score = by_query(null_logit, kv_heads, samples)
        peak = jnp.maximum(peak, null_score)
    weight = jnp.where(mask, jnp.exp(score - peak[..., None]), 0.0)
    kept_weight = jnp.where(filled, jnp.exp(kept_score - peak[..., None]), 0.0)
    sink_weight = jnp.where(sinks_seen, jnp.exp(sink_score - peak[..., None]), 0.0)
    mass = row_sum(weight).sum(axis=0) + row_sum(kept_weight).sum(axis=0) + sink_weight.sum(axis=-1)
    if null_logit is not None:
        mass = mass + jnp.exp(null_score - peak)
    share = jnp.where(mass > 0, 1.0 / mass, 0.0)

    def added(weight: jax.Array) -> jax.Array:
        return jnp.einsum("nkqp,kq->nkp", weight, share, precision=jax.lax.Precision.HIGHEST)

    return added(weight), added(kept_weight)


def ref_received_attention(
    q: Float[Array, "samples H D"],
    q_near: Float[Array, "samples H D"],
    k: Float[Array, "N K P D"],
    sink_k: Float[Array, "K S D"],
    kept_k: Float[Array, "kept_pages K P D"],
    seen: Bool[Array, "samples N P"],
    sinks_seen: Bool[Array, ""],
    kept: Int32[Array, ""],
    scale: float,
    null_logit: Float[Array, H] | None = None,
) -> tuple[Float[Array, "N K P"], Float[Array, "kept_pages K P"]]:
    """`received_attention` of one row by softmaxes over plain lists of keys, in float32: the definition."""
    samples, heads, dim = q.shape
    kv_heads, sinks = sink_k.shape[:2]
    repeat = heads // kv_heads

    def each_head(keys: jax.Array) -> jax.Array:
        return jnp.repeat(keys, repeat, axis=0)

    def flat(pages: jax.Array) -> jax.Array:
        return pages.swapaxes(0, 1).reshape(kv_heads, -1, dim)

    def pages_of(sums: jax.Array) -> jax.Array:
        return sums.reshape(kv_heads, -1, PAGE).swapaxes(0, 1)

    near_k = jnp.concatenate([sink_k, flat(kept_k)], axis=1)
    score = jnp.concatenate(
        [jnp.einsum("thd,hsd->hts", q, each_head(flat(k))), jnp.einsum("thd,hsd->hts", q_near, each_head(near_k))],
        axis=-1,
    )
    filled = jnp.arange(kept_k.shape[0] * PAGE) < kept
    near_seen = jnp.concatenate([jnp.broadcast_to(sinks_seen, sinks), filled])
    mask = jnp.concatenate([seen.reshape(samples, -1), jnp.broadcast_to(near_seen, (samples, near_seen.size))], axis=-1)
    score = jnp.where(mask, score * scale, -jnp.inf)
    if null_logit is not None:
        score = jnp.concatenate([score, jnp.broadcast_to(null_logit[:, None, None], (heads, samples, 1))], axis=-1)
    probability = jnp.where(mask, jax.nn.softmax(score, axis=-1)[..., : mask.shape[-1]], 0.0)
    sums = probability.reshape(kv_heads, -1, mask.shape[1]).sum(axis=1)
    ring = seen.shape[1] * PAGE
    return pages_of(sums[:, :ring]), pages_of(sums[:, ring + sinks :])
