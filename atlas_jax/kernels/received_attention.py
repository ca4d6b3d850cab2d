"""How much attention each pair of a row receives from a sample of its queries."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from atlas_jax.kernels.attention import kept_index
from atlas_jax.kernels.kv_pages import LayerKV, Pages, QuantPages, unpacked
from atlas_jax.typing import Array, Bool, Float, Int32

_NEGATIVE = -1e30


def received_attention(
    q: Float[Array, "samples H D"],
    q_near: Float[Array, "samples H D"],
    kv: LayerKV,
    row: Int32[Array, ""],
    seen: Bool[Array, "samples N P"],
    sinks_seen: Bool[Array, ""],
    kept: Int32[Array, ""],
    scale: float,
) -> tuple[Float[Array, "N K P"], Float[Array, "kept K P"]]:
    """Softmax probabilities of each pair, summed over the samples and the query heads that share its KV head."""
    assert kv.kept is not None
    kv_heads = kv.sink_k.shape[1]

    def own(leaf: jax.Array) -> jax.Array:
        return jax.lax.dynamic_index_in_dim(leaf, row, 0, keepdims=False)

    def score(queries: jax.Array, pages: Pages) -> jax.Array:
        keys = pages.values * pages.scale[..., None] if isinstance(pages, QuantPages) else pages
        return jnp.einsum("skgd,nkpd->ksgnp", queries, keys) * scale

    def grouped(queries: jax.Array) -> jax.Array:
        return queries.reshape(queries.shape[0], kv_heads, -1, queries.shape[-1])

    q, q_near = grouped(q), grouped(q_near)
    ring = score(q, jax.tree.map(own, kv.k))
    ring = jnp.where(seen[None, :, None], ring, _NEGATIVE)
    pairs = score(q_near, unpacked(jax.tree.map(own, kv.kept.k)))
    pairs = jnp.where(kept_index(pairs.shape[3]) < kept, pairs, _NEGATIVE)
    sinks = jnp.einsum("skgd,kcd->ksgc", q_near, own(kv.sink_k)) * scale
    sinks = jnp.where(sinks_seen, sinks, _NEGATIVE)
    parts = ring, pairs, sinks
    peak = jnp.stack([part.max(axis=tuple(range(3, part.ndim))) for part in parts]).max(axis=0)
    ring, pairs, sinks = (jnp.exp(part - peak.reshape(peak.shape + (1,) * (part.ndim - 3))) for part in parts)
    mass = ring.sum(axis=(3, 4)) + pairs.sum(axis=(3, 4)) + sinks.sum(axis=3)
    return tuple((part / mass[..., None, None]).sum(axis=(1, 2)).transpose(1, 0, 2) for part in (ring, pairs))  # type: ignore[return-value]
