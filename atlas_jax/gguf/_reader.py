"""A GGUF file, or a model that was split into several, opened once, checked, and read through memory maps."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any, TypeVar, overload

import numpy as np
import numpy.typing as npt
from gguf.constants import Keys

from atlas_jax.gguf import _metadata
from atlas_jax.gguf._header import GGUFError, Header, TensorInfo, quote, scan_header
from atlas_jax.gguf._mapped import MappedFile
from atlas_jax.gguf._nibbles import Floats4, Levels4, Nibbles, holds_nibbles, unpack_nibbles
from atlas_jax.gguf._types import as_floats

T = TypeVar("T", bool, int, float, str, list[str], np.ndarray)

# Packed bytes dequantised or hashed at a time: large enough for NumPy to run at full speed, small beside a tensor.
_CHUNK = 4 << 20
_PART_NAME = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf", re.DOTALL)
_MAX_PARTS = 1024


@dataclass(frozen=True, slots=True)
class _Part:
    """One file of a model, and what its header says."""

    source: MappedFile
    header: Header

    @classmethod
    def open(cls, path: Path) -> _Part:
        source = MappedFile(path)
        try:
            return cls(source, scan_header(source.view()))
        except BaseException:
            source.close()
            raise

    def number(self, key: str) -> int:
        """A number that says how a model is split; 0 where it is not."""
        return _metadata.get(self.header.metadata, key, int, 0)


@dataclass(frozen=True, slots=True, eq=False)
class GGUFFile:
    """A GGUF model: its metadata, its tensor table and, on demand, its weights.

    Attributes:
      path: the file, or the first of the files it is split into.
      name: of the model: the file's, without its ending and without the number of a part.
      version: GGUF version, 2 or 3.
      size: bytes of the file, or of all.
      metadata: key → `bool`, `int`, `float`, `str`, `list[str]` or a read-only numeric `numpy.ndarray`.
      tensors: name → `TensorInfo`.
    """

    path: Path
    version: int
    size: int
    metadata: Mapping[str, Any] = field(repr=False)
    tensors: Mapping[str, TensorInfo] = field(repr=False)
    _sources: tuple[MappedFile, ...] = field(repr=False)
    _part_of: Mapping[str, int] = field(repr=False)
    _digest: list[str] = field(default_factory=list, repr=False)

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> GGUFFile:
        """Opens a file and checks its header; of a model in several files any of them, the others lying beside it.

        Raises:
          GGUFError: not a GGUF file, or a damaged or hostile one, or parts of the model are missing.
          OSError: the file cannot be opened.
        """
        path = Path(path)
        parts = [_Part.open(path)]
        try:
            if parts[0].number(Keys.Split.LLM_KV_SPLIT_COUNT) > 1:
                path = _open_others(path, parts)
            tensors: dict[str, TensorInfo] = {}
            part_of: dict[str, int] = {}
            for index, part in enumerate(parts):
                for name, info in part.header.tensors.items():
                    if name in tensors:
                        raise GGUFError(f"tensor {quote(name)} is in two parts of {quote(path.name)}")
                    tensors[name], part_of[name] = info, index
            expected = parts[0].number(Keys.Split.LLM_KV_SPLIT_TENSORS_COUNT)
            if len(parts) > 1 and expected not in (0, len(tensors)):
                raise GGUFError(f"the parts of {quote(path.name)} hold {len(tensors)} tensors, not {expected}")
        except BaseException:
            for part in parts:
                part.source.close()
            raise
        return cls(
            path,
            parts[0].header.version,
            sum(part.source.size for part in parts),
            parts[0].header.metadata,
            MappingProxyType(tensors),
            tuple(part.source for part in parts),
            part_of,
        )

    @property
    def name(self) -> str:
        """Name of the model."""
        part = _PART_NAME.fullmatch(self.path.name)
        return part["stem"] if part and len(self._sources) > 1 else self.path.name.removesuffix(".gguf")

    def close(self) -> None:
        """Lets go of the file; arrays from `raw` stay valid until they are dropped, everything else is an error."""
        for source in self._sources:
            source.close()

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
        return np.frombuffer(self._sources[self._part_of[name]].view(), np.uint8, info.nbytes, info.offset)

    def release(self, name: str) -> None:
        """Takes a tensor out of this process's memory until it is looked at again.

        Raises:
          GGUFError: there is no such tensor.
        """
        info = self.tensor(name)
        self._sources[self._part_of[name]].release(info.offset, info.nbytes)

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
        """Whether a tensor is a matrix of 4-bit codes, or several; GGUFError as `tensor`."""
        info = self.tensor(name)
        return len(info.shape) >= 2 and holds_nibbles(info.ggml_type)

    def nibbles(self, name: str) -> Nibbles | Floats4 | Levels4:
        """The codes of what `has_nibbles`, several matrices as the rows of one; GGUFError as `raw`."""
        info = self.tensor(name)
        return unpack_nibbles(info.ggml_type, self.raw(name).reshape(int(np.prod(info.shape[:-1])), -1))

    def fingerprint(self) -> str:
        """SHA-256 of the whole file (header, tensor table and data), as `sha256sum` prints it; computed once.

        Of a model in several files it is that of their bytes one after the other.

        Raises:
          GGUFError: the file was closed or changed after it was opened.
        """
        if not self._digest:
            digest = hashlib.sha256()
            for source in self._sources:
                with memoryview(source.view()) as view:
                    for start in range(0, source.size, _CHUNK):
                        digest.update(view[start : start + _CHUNK])
                        source.release(start, _CHUNK)
                source.view()
            self._digest.append(digest.hexdigest())
        return self._digest[0]


def _open_others(path: Path, parts: list[_Part]) -> Path:
    """Opens the parts that are missing of a model in several files, in their order; returns the first one's path."""
    count = parts[0].number(Keys.Split.LLM_KV_SPLIT_COUNT)
    found = _PART_NAME.fullmatch(path.name)
    if found is None or int(found["count"]) != count or not count <= _MAX_PARTS:
        raise GGUFError(
            f"{quote(path.name)} is one of {count} parts of a model, which are found by their names; "
            f"they must end in '-00001-of-{count:05}.gguf' and so on"
        )
    paths = [path.with_name(f"{found['stem']}-{number:05}-of-{count:05}.gguf") for number in range(1, count + 1)]
    missing = [quote(one.name) for one in paths if not one.is_file()]
    if missing:
        raise GGUFError(
            f"{quote(path.name)} is one of {count} parts of a model; beside it lack {', '.join(missing[:8])}"
        )
    own = paths.index(path)
    for index, one in enumerate(paths):
        if index != own:
            parts.append(_Part.open(one))
    parts.insert(own, parts.pop(0))
    for index, (one, part) in enumerate(zip(paths, parts, strict=True)):
        split = part.number(Keys.Split.LLM_KV_SPLIT_COUNT), part.number(Keys.Split.LLM_KV_SPLIT_NO)
        if split != (count, index):
            raise GGUFError(f"{quote(one.name)} says it is part {split[1] + 1} of {split[0]}")
    return paths[0]


def _unpack(info: TensorInfo, packed: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
    """Rows of blocks as rows of float32."""
    try:
        # Values of hostile blocks may overflow; they are values like any other, and the model's checks see them.
        with np.errstate(all="ignore"):
            return as_floats(info.ggml_type, packed)
    except NotImplementedError:
        message = f"tensor {quote(info.name)} is of type {info.ggml_type.name}, which cannot be dequantised"
        raise GGUFError(message) from None
