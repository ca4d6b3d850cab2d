"""A model's bigram table: what follows each token most often in what the model writes; drafts fall back on it.

A file is bound to the model's fingerprint. It holds nothing of any request: `fit_successors` makes it before one comes.
"""

from __future__ import annotations

from importlib import resources
from pathlib import Path

import msgspec
import numpy as np

from atlas_jax import _tensors
from atlas_jax.engine import cache_folder
from atlas_jax.kernels.speculative_drafter import NONE
from atlas_jax.typing import Int32

_VERSION = 1


class TableError(ValueError):
    """A bigram table that is damaged, or was made for another model; the message says which."""


class _Header(msgspec.Struct, forbid_unknown_fields=True):
    version: int
    model: str


def most_frequent(pairs: Int32[np.ndarray, "pairs 2"], vocab: int) -> Int32[np.ndarray, V]:
    """The table of (token, next token) pairs: the token that followed most often, of equally frequent ones the least.

    Tokens that never came have the successor `speculative_drafter.NONE`.
    """
    table = np.full((vocab,), NONE, np.int32)
    kinds, counts = np.unique(pairs.reshape(-1, 2), axis=0, return_counts=True)
    order = np.lexsort((kinds[:, 1], -counts, kinds[:, 0]))
    tokens, first = np.unique(kinds[order, 0], return_index=True)
    table[tokens] = kinds[order[first], 1]
    return table


def encode(fingerprint: str, table: Int32[np.ndarray, V]) -> bytes:
    """Serialises a table; tokens without a successor are left out."""
    tokens = np.flatnonzero(table != NONE).astype(np.int32)
    return _tensors.encode(_Header(_VERSION, fingerprint), {"token": tokens, "successor": table[tokens]})


def decode(data: bytes, fingerprint: str, vocab: int) -> Int32[np.ndarray, V]:
    """Reads the table of a model.

    Raises:
      TableError: it is damaged or made for another model.
    """
    try:
        header, arrays = _tensors.decode(data, _Header)
    except _tensors.DamagedFile as error:
        raise TableError("bigram table is damaged") from error
    if header.version != _VERSION:
        raise TableError(f"bigram table version {header.version} is not supported")
    if header.model != fingerprint:
        raise TableError("bigram table was made for another model")
    empty = np.empty((0, 0))
    token, successor = arrays.get("token", empty), arrays.get("successor", empty)
    for array in (token, successor):
        if array.dtype != np.int32 or array.shape != (token.size,) or ((array < 0) | (array >= vocab)).any():
            raise TableError(f"bigram table: not two equally long lists of tokens below {vocab}")
    table = np.full((vocab,), NONE, np.int32)
    table[token] = successor
    return table


def find(cache: Path | None, fingerprint: str, vocab: int) -> Int32[np.ndarray, V]:
    """The table shipped for a model, or else the one in a cache folder, or else an empty one.

    A file that cannot be used is named in the log and, in the cache folder, set aside: a table only saves time.
    """
    own = None if cache is None else cached_path(cache, fingerprint)
    found = cache_folder.load(
        "bigram table", shipped_path(fingerprint), own, lambda data: decode(data, fingerprint, vocab)
    )
    return np.full((vocab,), NONE, np.int32) if found is None else found[0]


def shipped_path(fingerprint: str) -> Path:
    """Where the library keeps the table it ships for a model."""
    return Path(str(resources.files("atlas_jax.engine.runner"))) / "tables" / f"{fingerprint[:16]}.safetensors"


def cached_path(cache: Path, fingerprint: str) -> Path:
    """Where a table made on this machine is kept; `cache` is an engine's cache folder."""
    return cache / "successors" / f"{fingerprint[:32]}.safetensors"
