"""Kept pairs in snapshots: those there are, and what chooses the next."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import jax
import numpy as np

from atlas_jax.config import PAGE
from atlas_jax.engine.sessions.host_arrays import shared_zeros
from atlas_jax.engine.sessions.snapshot_arrays import SnapshotArrays
from atlas_jax.kernels.kv_pages import KeptPairs, LayerKV, PairChoice
from atlas_jax.model.kv_cache import KVCache, first_pages
from atlas_jax.model.transformer import LayerState


def pool_arrays(prefix: str, cache: KVCache) -> dict[str, np.ndarray]:
    """A row's kept pairs as arrays: the pages that hold any, layer after layer."""
    filled = _filled(cache.kept_pages, np.asarray(cache.kept)[0])
    return {prefix + name: np.asarray(leaf)[0, filled] for name, leaf in _leaves(cache.pairs)}


def kept_pairs(prefix: str, empty: KVCache, kept: Sequence[int], given: SnapshotArrays | None) -> KeptPairs:
    """A row's kept pairs again.

    Args:
      empty: shapes of a row's.
      kept: pairs of each layer.
      given: the arrays; None where a session keeps none.

    Raises:
      SnapshotInvalid: an array is not what this engine would have written.
    """
    filled = _filled(empty.kept_pages, kept)

    def read(path: tuple[object, ...], leaf: jax.ShapeDtypeStruct) -> np.ndarray:
        if given is None:
            return shared_zeros(leaf.shape, leaf.dtype)
        found = given.take(prefix + jax.tree_util.keystr(path), (len(filled), *leaf.shape[2:]), leaf.dtype.str)
        if not len(filled):
            return shared_zeros(leaf.shape, leaf.dtype)
        whole = np.zeros(leaf.shape, leaf.dtype)
        whole[0, filled] = found
        return whole

    made: KeptPairs = jax.tree_util.tree_map_with_path(read, empty.pairs)
    return made


def choice_arrays(prefix: str, choice: PairChoice, ring: int, count: int) -> dict[str, np.ndarray]:
    """What the next pairs of a layer are chosen by, as arrays.

    Before anything has left the window there are no scores of what is in it.
    """
    arrays = {name: np.asarray(leaf)[0] for name, leaf in _leaves(choice)}
    arrays[".ring_score"] = arrays[".ring_score"][: ring if count else 0]
    return {prefix + name: array for name, array in arrays.items()}


def pair_choice(prefix: str, empty: PairChoice, ring: int, count: int, given: SnapshotArrays | None) -> PairChoice:
    """The same again; arguments and errors as for `kept_pairs`, in a ring of `ring` pages."""

    def read(path: tuple[object, ...], leaf: jax.ShapeDtypeStruct) -> np.ndarray:
        name, shape = jax.tree_util.keystr(path), leaf.shape[1:]
        if given is None:
            return shared_zeros(leaf.shape, leaf.dtype)
        if name == ".ring_score":
            shape = (ring if count else 0, *shape[1:])
        found = given.take(prefix + name, shape, leaf.dtype.str)
        return found[None] if found.size else shared_zeros(leaf.shape, leaf.dtype)

    made: PairChoice = jax.tree_util.tree_map_with_path(read, empty)
    return made


def _filled(pages: Sequence[int], kept: Sequence[int]) -> np.ndarray:
    """Which pages of all layers hold pairs."""
    stretches = [first + np.arange(-(-count // PAGE)) for first, count in zip(first_pages(pages), kept, strict=True)]
    return np.concatenate(stretches).astype(np.intp)


def _leaves(tree: Any) -> list[tuple[str, Any]]:
    return [(jax.tree_util.keystr(path), leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(tree)]


def without_kept(cache: KVCache, *, queries: bool) -> KVCache:
    """The state of a row that has kept no pairs yet, whose room for them takes none.

    Args:
      queries: leave out those by which it would choose the first, too: of a row that never keeps any.
    """

    def zeros(leaf: jax.Array) -> np.ndarray:
        return shared_zeros(leaf.shape, leaf.dtype)

    def layer(kv: LayerState) -> LayerState:
        if not isinstance(kv, LayerKV) or kv.choice is None:
            return kv
        none: PairChoice = jax.tree.map(zeros, kv.choice)
        return replace(kv, choice=none if queries else replace(kv.choice, ring_score=none.ring_score))

    if not isinstance(cache, KVCache):  # a trained model's own state
        return cache
    return replace(cache, kv=tuple(map(layer, cache.kv)), pairs=jax.tree.map(zeros, cache.pairs))
