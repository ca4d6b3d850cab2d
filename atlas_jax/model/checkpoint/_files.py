"""The files of a checkpoint folder, read with bounds: whatever they hold, the worst is an error that names file and field."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from atlas_jax.gguf._header import MAX_DIMS, MAX_TENSORS, GGUFError, TensorInfo, quote
from atlas_jax.gguf._mapped import MappedFile
from atlas_jax.gguf._types import TensorType

MAX_JSON = 256 << 20
_MAX_CONFIG = 4 << 20
_MAX_HEADER = 100 << 20
INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
_SHARD = re.compile(r"[A-Za-z0-9][\w.-]{0,200}\.safetensors", re.ASCII)
_TYPES = {
    "F32": (TensorType.F32, 4),
    "F16": (TensorType.F16, 2),
    "BF16": (TensorType.BF16, 2),
}


class CheckpointError(GGUFError):
    """A folder that is damaged, hostile, or asks for something that is not read."""


def read_bytes(folder: Path, name: str, limit: int = MAX_JSON) -> bytes:
    """A file of the folder; raises CheckpointError where it is too large or no file, OSError where it cannot be read."""
    path = folder / name
    if path.exists() and not path.is_file():
        raise CheckpointError(f"{name} is no file")
    with path.open("rb") as file:
        data = file.read(limit + 1)
    if len(data) > limit:
        raise CheckpointError(f"{name} is larger than {limit} bytes")
    return data


def decode(data: bytes, name: str, kind: Any = dict[str, Any]) -> Any:
    """JSON as a `kind`; raises CheckpointError."""
    try:
        return msgspec.json.decode(data, type=kind)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise CheckpointError(f"{name}: {str(error)[:200]}") from None


def read_json(folder: Path, name: str) -> dict[str, Any] | None:
    """A small file of settings, or None where there is none."""
    if not (folder / name).exists():
        return None
    found: dict[str, Any] = decode(read_bytes(folder, name, _MAX_CONFIG), name)
    return found


class _Entry(msgspec.Struct, frozen=True):
    """A tensor of a header."""

    dtype: str
    shape: list[int]
    data_offsets: tuple[int, int]


@dataclass(frozen=True, slots=True)
class Shard:
    """A safetensors file that is open.

    Attributes:
      tensors: with offsets from the start of the file.
    """

    name: str
    file: MappedFile
    tensors: Mapping[str, TensorInfo]

    @classmethod
    def open(cls, folder: Path, name: str) -> Shard:
        """Opens a file and checks its header; raises CheckpointError, OSError."""
        path = folder / name
        if path.exists() and not path.is_file():
            raise CheckpointError(f"{name} is no file")
        file = MappedFile(path)
        try:
            return cls(name, file, _header(name, file))
        except BaseException:
            file.close()
            raise


def _header(name: str, file: MappedFile) -> dict[str, TensorInfo]:
    view = file.view()
    length = int.from_bytes(view[:8], "little")
    if file.size < 8 or length > min(_MAX_HEADER, file.size - 8):
        raise CheckpointError(f"{name} is no safetensors file: a header of {length} bytes in a file of {file.size}")
    raw: dict[str, msgspec.Raw] = decode(view[8 : 8 + length], name, dict[str, msgspec.Raw])
    raw.pop("__metadata__", None)
    if len(raw) > MAX_TENSORS:
        raise CheckpointError(f"{name} has {len(raw)} tensors, more than {MAX_TENSORS}")
    begin, found = 8 + length, {}
    for tensor, data in raw.items():
        what = f"{name}: tensor {quote(tensor)}"
        entry: _Entry = decode(bytes(data), what, _Entry)
        if entry.dtype not in _TYPES:
            raise CheckpointError(f"{what} has dtype {quote(entry.dtype)}; read are {', '.join(_TYPES)}")
        kind, width = _TYPES[entry.dtype]
        if not 1 <= len(entry.shape) <= MAX_DIMS or any(not 0 < dim < 1 << 40 for dim in entry.shape):
            raise CheckpointError(f"{what} has shape {str(entry.shape)[:80]}")
        size, (first, end) = math.prod(entry.shape) * width, entry.data_offsets
        if not 0 <= first <= end <= file.size - begin or end - first != size:
            raise CheckpointError(
                f"{what} has data_offsets {first} to {end}: {size} bytes are needed, of {file.size - begin} in the file"
            )
        found[tensor] = TensorInfo(tensor, tuple(entry.shape), kind, begin + first, size)
    return found


def open_shards(folder: Path) -> list[Shard]:
    """The weights of a folder: one file, or those that its index names; raises CheckpointError, OSError."""
    index = read_json(folder, INDEX)
    if index is None:
        if not (folder / SINGLE).exists():
            raise CheckpointError(f"{quote(folder.name)} has neither {SINGLE} nor {INDEX}")
        return [Shard.open(folder, SINGLE)]
    where = index.get("weight_map")
    if not isinstance(where, dict) or not where:
        raise CheckpointError(f"{INDEX} has no weight_map")
    for name in where.values():
        if not isinstance(name, str) or not _SHARD.fullmatch(name):
            raise CheckpointError(f"{INDEX}: weight_map names {quote(str(name))}, which is no file of this folder")
    missing = sorted({name for name in where.values() if not (folder / name).exists()})
    if missing:
        raise CheckpointError(f"{INDEX} names files that are missing: {', '.join(missing[:8])}")
    shards: list[Shard] = []
    try:
        for name in sorted(set(where.values())):
            shards.append(Shard.open(folder, name))
        held: dict[str, str] = {}
        for shard in shards:
            for tensor in shard.tensors:
                if tensor in held:
                    raise CheckpointError(f"tensor {quote(tensor)} is in {held[tensor]} and in {shard.name}")
                held[tensor] = shard.name
        for tensor, name in where.items():
            if held.get(tensor) != name:
                raise CheckpointError(f"{INDEX} says that {name} has tensor {quote(tensor)}, which it has not")
    except BaseException:
        for shard in shards:
            shard.file.close()
        raise
    return shards
