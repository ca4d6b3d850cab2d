"""What a model is read from: a GGUF file, or something that shows itself as one."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol, Self

import numpy as np
import numpy.typing as npt

from atlas_jax.gguf._header import TensorInfo
from atlas_jax.gguf._nibbles import Floats4, Levels4, Nibbles


class ModelFile(Protocol):
    """The part of `GGUFFile` that models are loaded through."""

    @property
    def path(self) -> Path:
        """The file, or the folder."""

    @property
    def name(self) -> str:
        """Name of the model."""

    @property
    def size(self) -> int:
        """Bytes of its files."""

    @property
    def metadata(self) -> Mapping[str, Any]:
        """Keys and values as in a GGUF file."""

    @property
    def tensors(self) -> Mapping[str, TensorInfo]:
        """The tensor table by name."""

    def dequantize(self, name: str, dtype: npt.DTypeLike = np.float32) -> npt.NDArray[Any]:
        """A tensor as floats; raises GGUFError where there is none, or a file has changed."""

    def raw(self, name: str) -> npt.NDArray[np.uint8]:
        """A tensor's bytes as they lie in the file; raises GGUFError where there is none, or a file has changed."""

    def release(self, name: str) -> None:
        """Takes a tensor out of this process's memory until it is looked at again."""

    def has_nibbles(self, name: str) -> bool:
        """Whether a tensor is a matrix of 4-bit codes, or several."""

    def nibbles(self, name: str) -> Nibbles | Floats4 | Levels4:
        """The codes of one, several matrices as the rows of one; raises GGUFError."""

    def fingerprint(self) -> str:
        """SHA-256 of what makes the model; raises GGUFError where a file has changed."""

    def close(self) -> None:
        """Lets go of the files."""

    def __enter__(self) -> Self:
        """Itself."""

    def __exit__(self, *exc: object) -> None:
        """Closes it."""
