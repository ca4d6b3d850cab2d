"""Arrays of sessions at rest in host memory, where a matrix that nothing has been written to takes no room."""

from __future__ import annotations

import math
import mmap
from typing import Any

import jax
import numpy as np

from atlas_jax.engine.runner.decode_state import Sequences

_zeros: dict[tuple[tuple[int, ...], str], np.ndarray] = {}


def shared_zeros(shape: tuple[int, ...], dtype: np.dtype[Any] | str) -> np.ndarray:
    """A read-only array of zeros, the same for everyone who asks for that shape and type.

    No memory stands behind it: private pages that are only ever read are the kernel's one page of zeros. They are aligned,
    so that XLA on a CPU reads them where they lie.
    """
    kind = np.dtype(dtype)
    key = shape, kind.str
    if key not in _zeros:
        count = math.prod(shape)
        pages = mmap.mmap(
            -1, max(1, count * kind.itemsize), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, prot=mmap.PROT_READ
        )
        _zeros.setdefault(key, np.frombuffer(pages, kind, count).reshape(shape))
    return _zeros[key]


def held_bytes(row: Sequences) -> int:
    """Bytes of a row's arrays; shared zeros are none."""
    return sum(leaf.nbytes for leaf in jax.tree.leaves(row) if not _is_shared_zeros(leaf))


def _is_shared_zeros(leaf: Any) -> bool:
    return isinstance(leaf, np.ndarray) and _zeros.get((leaf.shape, leaf.dtype.str)) is leaf


def to_numpy(row: Sequences) -> Sequences:
    """The same row as NumPy arrays."""
    return jax.tree.map(np.asarray, row)


def to_host(row: Sequences) -> Sequences:
    """The same row in host memory. A CPU's arrays are there already; making them NumPy's would wait for their values."""
    return jax.tree.map(_to_host, row)


def _to_host(leaf: Any) -> Any:
    if isinstance(leaf, jax.Array) and all(device.platform == "cpu" for device in leaf.devices()):
        return leaf
    return np.asarray(leaf)
