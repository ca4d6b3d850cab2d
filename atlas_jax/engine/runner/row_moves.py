"""Compiled moves of rows between steps: out of a batch and into one, to another position, into a ring of another size."""

from __future__ import annotations

import dataclasses
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from atlas_jax.engine.runner.decode_state import DecodeState, Sequences
from atlas_jax.kernels.kv_pages import LayerKV
from atlas_jax.model.kv_cache import KVCache
from atlas_jax.model.transformer import LayerState
from atlas_jax.recall import recall_state
from atlas_jax.typing import Array, Int32

State = TypeVar("State", Sequences, DecodeState)


def extract(batch: State, row: Int32[Array, ""]) -> State:
    """A copy of one row as a batch of one."""
    return jax.tree.map(lambda leaf: jax.lax.dynamic_slice_in_dim(leaf, row, 1, axis=0), batch)


def set_position(sequences: Sequences, position: Int32[Array, ""], slot: Int32[Array, ""]) -> Sequences:
    """Sets a single row back (or leaves it) at a position whose window the row still holds; nothing else moves."""
    cache = sequences.cache
    cache = dataclasses.replace(
        cache, position=jnp.full_like(cache.position, position), slot=jnp.full_like(cache.slot, slot)
    )
    return dataclasses.replace(sequences, cache=cache)


def resize_ring(cache: KVCache, empty: KVCache) -> KVCache:
    """A single row's attention state in a ring of another size, `empty`; the slots in use fit the smaller one."""
    pages = min(cache.page.shape[1], empty.page.shape[1])

    def cut(leaf: jax.Array, into: jax.Array) -> jax.Array:
        return jax.lax.dynamic_update_slice(into, leaf[:, :pages], (0,) * into.ndim)

    def resized(layer: LayerState, new: LayerState) -> LayerState:
        if not (isinstance(layer, LayerKV) and isinstance(new, LayerKV)):
            return layer
        choice = layer.choice
        if choice is not None and new.choice is not None:
            choice = dataclasses.replace(choice, ring_score=cut(choice.ring_score, new.choice.ring_score))
        k, v = (jax.tree.map(cut, old, into) for old, into in ((layer.k, new.k), (layer.v, new.v)))
        return dataclasses.replace(layer, k=k, v=v, choice=choice)

    return dataclasses.replace(
        cache,
        kv=tuple(resized(layer, new) for layer, new in zip(cache.kv, empty.kv, strict=True)),
        page=cut(cache.page, empty.page),
    )


def insert_kv_cache(batch: KVCache, single: KVCache, row: Int32[Array, ""]) -> KVCache:
    """Puts a row's attention state into a batch with a ring of the same size."""
    return jax.tree.map(lambda whole, part: _put_row(whole, part, row), batch, single)


@jax.jit  # compiled into its caller; leaves of one shape are traced once
def _put_row(whole: jax.Array, part: jax.Array, row: jax.Array) -> jax.Array:
    start = (row,) + (jnp.zeros_like(row),) * (part.ndim - 1)
    return jax.lax.dynamic_update_slice(whole, part, start)


def insert_memory(
    batch: recall_state.RecallState, single: recall_state.RecallState, row: Int32[Array, ""]
) -> recall_state.RecallState:
    """Puts a row's memory into a batch."""
    return jax.tree.map(lambda whole, part: _put_row(whole, part, row), batch, single)


def insert_decode_state(decode_state: DecodeState, single: DecodeState, row: Int32[Array, ""]) -> DecodeState:
    """Gives a row that has been inserted its next token and its settings."""
    return jax.tree.map(lambda whole, part: _put_row(whole, part, row), decode_state, single)


def whole_ring(row: Sequences, pages: int) -> Sequences:
    """A row from a file, which has the pages in use and no others, in a ring of `pages` pages; on the host."""
    missing = pages - row.cache.page.shape[1]
    if not missing:
        return row

    def pad(leaf: Any, value: int = 0) -> Any:
        return np.pad(leaf, [(0, missing if axis == 1 else 0) for axis in range(leaf.ndim)], constant_values=value)

    cache = row.cache

    def whole(layer: LayerState) -> LayerState:
        if not isinstance(layer, LayerKV):
            return layer
        choice = layer.choice
        if choice is not None:
            choice = dataclasses.replace(choice, ring_score=pad(choice.ring_score))
        return dataclasses.replace(layer, k=jax.tree.map(pad, layer.k), v=jax.tree.map(pad, layer.v), choice=choice)

    kv = tuple(whole(layer) for layer in cache.kv)
    return Sequences(dataclasses.replace(cache, kv=kv, page=pad(cache.page, -1)), row.memory)
