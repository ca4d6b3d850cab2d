"""A snapshot's arrays, each checked against what this engine would have written."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from atlas_jax.engine.sessions import snapshot


class SnapshotArrays:
    """Arrays by name."""

    def __init__(self, arrays: Mapping[str, np.ndarray]) -> None:
        self._arrays = arrays

    def take(self, name: str, shape: tuple[int, ...], dtype: str) -> np.ndarray:
        """An array; raises SnapshotInvalid where it is missing, or of another shape or type."""
        return snapshot.check_array(name, self._arrays.get(name), shape, np.dtype(dtype))

    def has(self, name: str) -> bool:
        """Whether there is one of this name."""
        return name in self._arrays
