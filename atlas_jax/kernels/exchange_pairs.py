"""The pairs of a page that leaves a row's window take the places of kept pairs with lower scores."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp

from atlas_jax.config import PAGE
from atlas_jax.kernels.attention import kept_index
from atlas_jax.kernels.cpu import ffi, library
from atlas_jax.kernels.kv_pages import KeptPairs, Pages, QuantPages, stretch_of
from atlas_jax.kernels.packed_pages import PackedPages, pack
from atlas_jax.typing import Array, Float, Int32


def exchange_pairs(
    pairs: KeptPairs,
    row: Int32[Array, ""],
    first: Int32[Array, layers],
    own: Float[Array, "layers K P"],
    k: Pages,
    v: Pages,
    kept: Int32[Array, layers],
    capacity: Int32[Array, layers],
    pages: int,
) -> KeptPairs:
    """Keeps the highest scores of a row's kept pairs and a page's, in each layer and head; of equal ones the newer stays.

    Args:
      first: the first page of each layer's.
      own: scores of the page's pairs, not negative but for −∞, which is never kept.
      k, v: the page, [layers, K, P, D].
      kept: how many places of each layer are filled.
      capacity: how many may be; free ones are filled first, in order.
      pages: that hold them, or more.
    """
    if isinstance(pairs.k, PackedPages) and isinstance(pairs.v, PackedPages) and library.usable():
        assert isinstance(k, QuantPages)
        assert isinstance(v, QuantPages)
        page = k.values, k.scale, v.values, v.scale
        score, keys, values = ffi.exchange_pairs(
            row, first, kept, capacity, own, page, pairs.stored_score, pairs.k, pairs.v
        )
        return KeptPairs(keys, values, score)
    for layer in range(own.shape[0]):
        of_layer = jax.tree.map(lambda part, layer=layer: part[layer], (first, own, k, v, kept, capacity))
        pairs = _exchange(pairs, row, *of_layer, pages)
    return pairs


@functools.partial(jax.jit, static_argnums=8)  # compiled into its caller; layers alike are traced once
def _exchange(
    pairs: KeptPairs,
    row: Int32[Array, ""],
    first: Int32[Array, ""],
    own: Float[Array, "K P"],
    k: Pages,
    v: Pages,
    kept: Int32[Array, ""],
    capacity: Int32[Array, ""],
    pages: int,
) -> KeptPairs:
    """`exchange_pairs` of one layer by XLA."""
    score = stretch_of(pairs, first, pages, row).score[0]
    place, source = choose(score, own, kept, capacity)
    heads = jnp.arange(own.shape[0])[:, None]
    # a place that does not exist is no other layer's either
    where = (
        row,
        jnp.where(place < pages * PAGE, first + place // PAGE, pairs.stored_score.shape[1]),
        heads,
        place % PAGE,
    )

    def put(old: PackedPages | jax.Array, page: Pages) -> PackedPages | jax.Array:
        new = jax.tree.map(lambda leaf: leaf[heads, source], page)
        packed = pack(new.values, new.scale, old.bits) if isinstance(old, PackedPages) else new
        return jax.tree.map(lambda leaf, one: leaf.at[where].set(one, mode="drop"), old, packed)

    return dataclasses.replace(
        pairs,
        k=put(pairs.k, k),
        v=put(pairs.v, v),
        stored_score=pairs.stored_score.at[where].set(pairs.as_stored(own[heads, source]), mode="drop"),
    )


def choose(
    score: Float[Array, "kept K P"], own: Float[Array, "K P"], kept: Int32[Array, ""], capacity: Int32[Array, ""]
) -> tuple[Int32[Array, "K P"], Int32[Array, "K P"]]:
    """Which of a page's pairs go where.

    Returns:
      Places among the kept pairs, as many as change hands and then places that do not exist; and the pairs of the page that
      go there.
    """
    heads, places = own.shape[0], score.shape[0] * PAGE
    index = kept_index(score.shape[0]).reshape(-1)
    flat = score.transpose(1, 0, 2).reshape(heads, places)
    flat = jnp.where(index < kept, flat, index - places)
    flat = jnp.where(index < capacity, flat, jnp.inf)
    _, lowest = jax.lax.top_k(-jnp.concatenate([flat, own], axis=1), PAGE)
    rows = jnp.arange(heads)[:, None]
    goes = jnp.zeros((heads, places + PAGE), bool).at[rows, lowest].set(True)

    def first(chosen: jax.Array, none: int) -> jax.Array:
        """Indices of what is chosen, in order, and then `none`."""
        rank = jnp.where(chosen, jnp.cumsum(chosen, axis=1) - 1, PAGE)
        which = jnp.broadcast_to(jnp.arange(chosen.shape[1], dtype=jnp.int32), chosen.shape)
        return jnp.full((heads, PAGE), none, jnp.int32).at[rows, rank].set(which, mode="drop")

    return first(goes[:, :places], places), first(~goes[:, places:], 0)
