"""Kept pairs in snapshots: those there are, and what chooses the next."""

from __future__ import annotations

from dataclasses import replace

import jax
import numpy as np

from atlas_jax.config import PAGE
from atlas_jax.engine.sessions.host_arrays import shared_zeros
from atlas_jax.engine.sessions.snapshot_arrays import SnapshotArrays
from atlas_jax.kernels.kv_pages import KeptPairs, LayerKV
from atlas_jax.model.kv_cache import KVCache

_BY_PLACE = ("k", "v", "score")
_BY_RING = ("ring_score",)
_OF_PAIRS = (*_BY_PLACE, *_BY_RING)
_QUERIES = ("queries", "query_scale")


def kept_shapes(pairs: KeptPairs, ring: int, count: int) -> KeptPairs:
    """Shapes of the arrays of one row: of the places in whole pages that hold `count` pairs, and of `ring` pages.

    Before anything has left the window there are no scores of what is in it.
    """

    def of(leaf: jax.Array, pages: int | None) -> jax.ShapeDtypeStruct:
        shape = leaf.shape[1:] if pages is None else (pages, *leaf.shape[2:])
        return jax.ShapeDtypeStruct(shape, leaf.dtype)

    pages = dict.fromkeys(_BY_PLACE, -(-count // PAGE)) | dict.fromkeys(_BY_RING, ring if count else 0)
    fields = {name: getattr(pairs, name) for name in (*_OF_PAIRS, *_QUERIES)}
    return KeptPairs(
        **{
            name: jax.tree.map(lambda leaf, name=name: of(leaf, pages.get(name)), field)
            for name, field in fields.items()
        }
    )


def kept_arrays(prefix: str, pairs: KeptPairs, ring: int, count: int) -> dict[str, np.ndarray]:
    """A row's kept pairs as arrays."""
    shapes = kept_shapes(pairs, ring, count)
    out = {}
    for (path, leaf), wanted in zip(jax.tree_util.tree_leaves_with_path(pairs), jax.tree.leaves(shapes), strict=True):
        whole = np.asarray(leaf)[0]
        out[prefix + jax.tree_util.keystr(path)] = whole[: wanted.shape[0]]
    return out


def kept_pairs(prefix: str, empty: KeptPairs, ring: int, count: int, given: SnapshotArrays | None) -> KeptPairs:
    """A row's kept pairs again.

    Args:
      empty: shapes of a row's with a ring of `ring` pages.
      given: the arrays; None where a session keeps none.

    Raises:
      SnapshotInvalid: an array is not what this engine would have written.
    """
    shapes = kept_shapes(empty, ring, count)

    def read(path: tuple[object, ...], leaf: jax.ShapeDtypeStruct, wanted: jax.ShapeDtypeStruct) -> np.ndarray:
        if given is None:
            return shared_zeros(leaf.shape, leaf.dtype)
        found = given.take(prefix + jax.tree_util.keystr(path), wanted.shape, wanted.dtype.str)
        if not found.size:
            return shared_zeros(leaf.shape, leaf.dtype)
        whole = np.zeros(leaf.shape, leaf.dtype)
        whole[0, : len(found)] = found
        return whole

    made: KeptPairs = jax.tree_util.tree_map_with_path(read, empty, shapes)
    return made


def without_kept(cache: KVCache, *, queries: bool) -> KVCache:
    """The state of a row that has kept no pairs yet, whose room for them takes none.

    Args:
      queries: leave out those by which it would choose the first, too: of a row that never keeps any.
    """
    names = (*_OF_PAIRS, *_QUERIES) if queries else _OF_PAIRS

    def zeros(leaf: jax.Array) -> np.ndarray:
        return shared_zeros(leaf.shape, leaf.dtype)

    def layer(kv: LayerKV) -> LayerKV:
        if kv.kept is None:
            return kv
        return replace(
            kv, kept=replace(kv.kept, **{name: jax.tree.map(zeros, getattr(kv.kept, name)) for name in names})
        )

    if not isinstance(cache, KVCache):  # a trained model's own state
        return cache
    return replace(cache, kv=tuple(map(layer, cache.kv)))
