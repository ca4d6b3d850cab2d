"""A GGUF file, opened once, checked, and read through a memory map."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from io import FileIO
from mmap import ACCESS_READ, mmap
from pathlib import Path
from typing import Any, TypeVar, overload

import numpy as np
import numpy.typing as npt
from gguf import quants
from gguf.constants import GGMLQuantizationType

from atlas_jax.gguf import _metadata
from atlas_jax.gguf._header import GGUFError, TensorInfo, quote, scan_header
from atlas_jax.gguf._nibbles import Nibbles, holds_nibbles, unpack_nibbles

T = TypeVar("T", bool, int, float, str, list[str], np.ndarray)

# Packed bytes dequantised or hashed at a time: large enough for NumPy to run at full speed, small beside a tensor.
_CHUNK = 4 << 20


class _Source:
    """The open file behind a `GGUFFile`.

    Attributes:
      digest: of the whole file, once it has been computed.
    """

    def __init__(self, path: Path) -> None:
        self._name = path.name
        self._file = FileIO(path)
        self._stamp = self._identity()
        self._map: mmap | None = None
        self.digest: str | None = None
        if self.size == 0:
            self._file.close()
            raise GGUFError(f"{path.name} is empty")
        self._map = mmap(self._file.fileno(), self.size, access=ACCESS_READ)

    @property
    def size(self) -> int:
        return self._stamp[0]

    def view(self) -> mmap:
        """The map of the file, after a look whether the file is still the one that was mapped."""
        if self._map is None:
            raise GGUFError(f"{self._name} is closed")
        # Reading a map past the end of a file that has shrunk kills the process, hence a look before every use.
        if self._identity() != self._stamp:
            raise GGUFError(f"{self._name} was changed after it was opened")
        return self._map

    def close(self) -> None:
        if self._map is not None:
            with suppress(BufferError):  # an array from `raw` still looks at the map, which ends with it
                self._map.close()
            self._map = None
            self._file.close()

    def _identity(self) -> tuple[int, int]:
        status = os.fstat(self._file.fileno())
        return status.st_size, status.st_mtime_ns


@dataclass(frozen=True, slots=True, eq=False)
class GGUFFile:
    """A GGUF model file: its metadata, its tensor table and, on demand, its weights.

    Attributes:
      path: the file.
      version: GGUF version, 2 or 3.
      size: bytes of the file.
      metadata: key → `bool`, `int`, `float`, `str`, `list[str]` or a read-only numeric `numpy.ndarray`.
      tensors: name → `TensorInfo`.
    """

    path: Path
    version: int
    size: int
    metadata: Mapping[str, Any] = field(repr=False)
    tensors: Mapping[str, TensorInfo] = field(repr=False)
    _source: _Source = field(repr=False)

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> GGUFFile:
        """Opens a file and checks its header.

        Raises:
          GGUFError: not a GGUF file, or a damaged or hostile one.
          OSError: the file cannot be opened.
        """
        source = _Source(Path(path))
        try:
            header = scan_header(source.view())
        except BaseException:
            source.close()
            raise
        return cls(Path(path), header.version, source.size, header.metadata, header.tensors, source)

    def close(self) -> None:
        """Lets go of the file; arrays from `raw` stay valid until they are dropped, everything else is an error."""
        self._source.close()

    def __enter__(self) -> GGUFFile:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def require(self, key: str, kind: type[T]) -> T:
        """The value of a metadata key that must be there; see `atlas_jax.gguf.require`."""
        return _metadata.require(self.metadata, key, kind)

    @overload
    def get(self, key: str, kind: type[T]) -> T | None: ...
    @overload
    def get(self, key: str, kind: type[T], default: T) -> T: ...
    def get(self, key: str, kind: type[T], default: T | None = None) -> T | None:
        """The value of a metadata key, or `default`; see `atlas_jax.gguf.get`."""
        found = _metadata.get(self.metadata, key, kind)
        return default if found is None else found

    def tensor(self, name: str) -> TensorInfo:
        """The table row of a tensor.

        Raises:
          GGUFError: there is no such tensor.
        """
        if name not in self.tensors:
            raise GGUFError(f"{self.path.name} has no tensor {quote(name)}")
        return self.tensors[name]

    def raw(self, name: str) -> npt.NDArray[np.uint8]:
        """The packed blocks of a tensor as a read-only view of the file, without a copy.

        Raises:
          GGUFError: there is no such tensor, or the file was closed or changed after it was opened.
        """
        info = self.tensor(name)
        return np.frombuffer(self._source.view(), np.uint8, info.nbytes, info.offset)

    def dequantize(self, name: str, dtype: npt.DTypeLike = np.float32) -> npt.NDArray[Any]:
        """A tensor as an array of floats, unpacked a few rows at a time so that the only large array is the result.

        Raises:
          GGUFError: as `raw`, or the type is one that `gguf.quants` cannot unpack.
        """
        info = self.tensor(name)
        blocks = self.raw(name)
        width = info.shape[-1]
        rows = int(np.prod(info.shape[:-1], dtype=np.int64))
        packed = blocks.reshape(rows, -1)
        out = np.empty((rows, width), dtype)
        step = max(1, _CHUNK // packed.shape[1])
        for start in range(0, rows, step):
            out[start : start + step] = _unpack(info, packed[start : start + step])
        return out.reshape(info.shape)

    def has_nibbles(self, name: str) -> bool:
        """Whether a tensor is a matrix of 4-bit codes; GGUFError as `tensor`."""
        info = self.tensor(name)
        return len(info.shape) == 2 and holds_nibbles(info.ggml_type)

    def nibbles(self, name: str) -> Nibbles:
        """The codes of a matrix for which `has_nibbles`; GGUFError as `raw`."""
        info = self.tensor(name)
        return unpack_nibbles(info.ggml_type, self.raw(name).reshape(info.shape[0], -1))

    def fingerprint(self) -> str:
        """SHA-256 of the whole file (header, tensor table and data), as `sha256sum` prints it; computed once.

        Raises:
          GGUFError: the file was closed or changed after it was opened.
        """
        if self._source.digest is None:
            digest = hashlib.sha256()
            with memoryview(self._source.view()) as view:
                for start in range(0, self.size, _CHUNK):
                    digest.update(view[start : start + _CHUNK])
            self._source.view()
            self._source.digest = digest.hexdigest()
        return self._source.digest


def _unpack(info: TensorInfo, packed: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
    """Rows of blocks as rows of float32."""
    match info.ggml_type:
        case GGMLQuantizationType.F32:
            return packed.view("<f4")
        case GGMLQuantizationType.F16:
            return packed.view("<f2").astype(np.float32)
    try:
        # Values of hostile blocks may overflow; they are values like any other, and the model's checks see them.
        with np.errstate(all="ignore"):
            values: npt.NDArray[np.float32] = quants.dequantize(packed, info.ggml_type)
    except NotImplementedError:
        message = f"tensor {quote(info.name)} is of type {info.ggml_type.name}, which cannot be dequantised"
        raise GGUFError(message) from None
    return values
