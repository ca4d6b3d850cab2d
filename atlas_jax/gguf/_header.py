"""Bounded scan of a GGUF header.

Every length, count and offset is checked against what the file can hold before it is used, so that no byte string can
make the scan spin, allocate without bound or fail with anything but `GGUFError`. `gguf.GGUFReader` promises none of
this (49 bytes can keep version 0.19 busy for ever) and needs seconds for a large vocabulary, so it is not used to read.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from dataclasses import dataclass
from mmap import mmap
from types import MappingProxyType
from typing import Any

import numpy as np
from gguf.constants import GGUF_MAGIC, GGUFValueType

from atlas_jax.gguf._types import BLOCKS, TensorType

MAX_STRING_BYTES = 64 << 20
MAX_HEADER_BYTES = 256 << 20
MAX_STRINGS = 1 << 22
MAX_KEYS = 1 << 16
MAX_TENSORS = 1 << 16
MAX_DIMS = 4
MAX_ALIGNMENT = 1 << 20
DEFAULT_ALIGNMENT = 32
VERSIONS = (2, 3)

_U32 = struct.Struct("<I")
_U64 = struct.Struct("<Q")
_SCALARS = {
    GGUFValueType.UINT8: struct.Struct("<B"),
    GGUFValueType.INT8: struct.Struct("<b"),
    GGUFValueType.UINT16: struct.Struct("<H"),
    GGUFValueType.INT16: struct.Struct("<h"),
    GGUFValueType.UINT32: _U32,
    GGUFValueType.INT32: struct.Struct("<i"),
    GGUFValueType.FLOAT32: struct.Struct("<f"),
    GGUFValueType.BOOL: struct.Struct("<B"),
    GGUFValueType.UINT64: _U64,
    GGUFValueType.INT64: struct.Struct("<q"),
    GGUFValueType.FLOAT64: struct.Struct("<d"),
}


class GGUFError(ValueError):
    """A GGUF file that is damaged, hostile, or asks for something this package does not do."""


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """Where a tensor lies in the file and how its values are packed.

    Attributes:
      shape: in NumPy order, so (out, in) for the matrix of a linear layer.
      offset: of the first byte, from the start of the file.
      nbytes: of the packed blocks.
    """

    name: str
    shape: tuple[int, ...]
    ggml_type: TensorType
    offset: int
    nbytes: int


@dataclass(frozen=True, slots=True)
class Header:
    """Everything in front of the tensor data."""

    version: int
    alignment: int
    data_offset: int
    metadata: Mapping[str, Any]
    tensors: Mapping[str, TensorInfo]


def quote(name: str) -> str:
    """A name from a file as it may appear in a message: printable, quoted, short."""
    return ascii(name if len(name) <= 80 else name[:77] + "...")


class _Cursor:
    """A position in the header that never moves past the end of the file."""

    def __init__(self, buffer: bytes | mmap) -> None:
        self.buffer = buffer
        self.size = len(buffer)
        self.limit = min(self.size, MAX_HEADER_BYTES)
        self.pos = 0
        self.strings_left = MAX_STRINGS

    def take(self, count: int, what: str) -> int:
        """Reserves `count` bytes and returns where they start."""
        start = self.pos
        if count > self.limit - start:
            if count <= self.size - start:
                raise GGUFError(f"{what} at offset {start} reaches past the {MAX_HEADER_BYTES}-byte limit of a header")
            raise GGUFError(f"{what} at offset {start} needs {count} bytes, {self.size - start} are left in the file")
        self.pos = start + count
        return start

    def scalar(self, packing: struct.Struct, what: str) -> Any:
        return packing.unpack_from(self.buffer, self.take(packing.size, what))[0]

    def string(self, what: str) -> str:
        start = self.pos
        length = self.scalar(_U64, f"length of {what}")
        if length > MAX_STRING_BYTES:
            raise GGUFError(f"{what} at offset {start} has {length} bytes, more than {MAX_STRING_BYTES}")
        begin = self.take(length, what)
        try:
            return str(self.buffer[begin : begin + length], "utf-8")
        except UnicodeDecodeError as error:
            raise GGUFError(f"{what} at offset {begin} is not UTF-8 (byte {error.start})") from None

    def strings(self, count: int, what: str) -> list[str]:
        """A long array of strings; the checks of `string`, written out because vocabularies have 10⁵ of them."""
        if count > self.strings_left:
            raise GGUFError(f"{what} at offset {self.pos} brings the strings of the file past {MAX_STRINGS}")
        self.strings_left -= count
        buffer, limit, pos, unpack = self.buffer, self.limit, self.pos, _U64.unpack_from
        result: list[str] = []
        for index in range(count):
            body = pos + 8
            end = body + unpack(buffer, pos)[0] if body <= limit else limit + 1
            if end > limit or end - body > MAX_STRING_BYTES:
                self.pos = pos
                self.string(f"element {index} of {what}")
            try:
                result.append(str(buffer[body:end], "utf-8"))
            except UnicodeDecodeError as error:
                raise GGUFError(f"element {index} of {what} at offset {body} is not UTF-8 ({error.reason})") from None
            pos = end
        self.pos = pos
        return result


def _value_type(cursor: _Cursor, what: str) -> GGUFValueType:
    start = cursor.pos
    code = cursor.scalar(_U32, what)
    try:
        return GGUFValueType(code)
    except ValueError:
        raise GGUFError(f"{what} at offset {start} is {code}, which is no GGUF type") from None


def _array(cursor: _Cursor, what: str) -> list[str] | np.ndarray[Any, Any]:
    start = cursor.pos
    kind = _value_type(cursor, f"element type of {what}")
    if kind is GGUFValueType.ARRAY:
        raise GGUFError(f"{what} at offset {start} is an array of arrays")
    count = cursor.scalar(_U64, f"length of {what}")
    # The shortest string is its eight-byte length.
    size = 8 if kind is GGUFValueType.STRING else _SCALARS[kind].size
    if count > (cursor.size - cursor.pos) // size:
        raise GGUFError(
            f"{what} at offset {start} claims {count} elements of at least {size} bytes, "
            f"{cursor.size - cursor.pos} bytes are left in the file"
        )
    if kind is GGUFValueType.STRING:
        return cursor.strings(count, what)
    begin = cursor.take(count * size, what)
    dtype = np.dtype("<u1" if kind is GGUFValueType.BOOL else "<" + _SCALARS[kind].format[-1])
    values = np.frombuffer(cursor.buffer[begin : cursor.pos], dtype)
    if kind is GGUFValueType.BOOL:
        if count and values.max() > 1:
            raise GGUFError(f"{what} at offset {begin} holds a bool that is neither 0 nor 1")
        values = values.view(np.bool_)
    return values


def _value(cursor: _Cursor, key: str) -> Any:
    what = f"value of key {quote(key)}"
    kind = _value_type(cursor, f"type of key {quote(key)}")
    if kind is GGUFValueType.STRING:
        return cursor.string(what)
    if kind is GGUFValueType.ARRAY:
        return _array(cursor, what)
    start = cursor.pos
    value = cursor.scalar(_SCALARS[kind], what)
    if kind is not GGUFValueType.BOOL:
        return value
    if value > 1:
        raise GGUFError(f"{what} at offset {start} is a bool that is neither 0 nor 1")
    return bool(value)


def _alignment(metadata: Mapping[str, Any]) -> int:
    value = metadata.get("general.alignment", DEFAULT_ALIGNMENT)
    if type(value) is not int or not 0 < value <= MAX_ALIGNMENT or value & (value - 1):
        raise GGUFError(f"general.alignment is {value!r:.40}, not a power of two up to {MAX_ALIGNMENT}")
    return value


def _tensor(cursor: _Cursor, index: int) -> TensorInfo:
    """One row of the tensor table; its offset is still relative to the data section."""
    name = cursor.string(f"name of tensor {index}")
    what = f"tensor {quote(name)}"
    start = cursor.pos
    n_dims = cursor.scalar(_U32, f"number of dimensions of {what}")
    if not 1 <= n_dims <= MAX_DIMS:
        raise GGUFError(f"{what} at offset {start} has {n_dims} dimensions, not 1 to {MAX_DIMS}")
    dims = tuple(cursor.scalar(_U64, f"dimension {axis} of {what}") for axis in range(n_dims))
    type_at = cursor.pos
    code = cursor.scalar(_U32, f"type of {what}")
    try:
        ggml_type = TensorType(code)
    except ValueError:
        raise GGUFError(f"{what} at offset {type_at} has unknown GGML type {code}") from None
    elements = 1
    for dim in dims:
        elements *= dim
        if not 0 < elements < 1 << 63:
            raise GGUFError(f"{what} at offset {start} has the impossible dimensions {dims}")
    block, block_bytes = BLOCKS[ggml_type]
    if dims[0] % block:
        raise GGUFError(f"{what} at offset {start} has rows of {dims[0]}, no multiple of {ggml_type.name}'s {block}")
    offset = cursor.scalar(_U64, f"offset of {what}")
    return TensorInfo(name, tuple(reversed(dims)), ggml_type, offset, elements // block * block_bytes)


def _place(info: TensorInfo, data_offset: int, alignment: int, size: int) -> TensorInfo:
    """Turns a tensor's offset into one from the start of the file, after checking it."""
    what = f"tensor {quote(info.name)}"
    if info.offset % alignment:
        raise GGUFError(f"{what} has the offset {info.offset}, which is not aligned to {alignment}")
    offset = data_offset + info.offset
    if offset + info.nbytes > size:
        raise GGUFError(f"{what} needs bytes {offset} to {offset + info.nbytes}, the file has {size}")
    return TensorInfo(info.name, info.shape, info.ggml_type, offset, info.nbytes)


def scan_header(buffer: bytes | mmap) -> Header:
    """Reads and checks everything in front of the tensor data.

    Args:
      buffer: the whole file; only its header is touched.

    Returns:
      The metadata with scalars as Python values, strings as `str`, arrays of strings as `list[str]` and numeric
      arrays as read-only NumPy arrays, and the tensor table.

    Raises:
      GGUFError: names the key, tensor or field at fault and where in the file it is.
    """
    cursor = _Cursor(buffer)
    magic = cursor.scalar(_U32, "magic")
    if magic != GGUF_MAGIC:
        raise GGUFError(f"no GGUF file: it starts with {buffer[:4]!r}, not b'GGUF'")
    version = cursor.scalar(_U32, "version")
    if version not in VERSIONS:
        if version & 0xFFFF == 0:
            raise GGUFError("version at offset 4 is big-endian; only little-endian files are read")
        raise GGUFError(f"version at offset 4 is {version}, not one of {VERSIONS}")
    n_tensors = cursor.scalar(_U64, "number of tensors")
    if n_tensors > MAX_TENSORS:
        raise GGUFError(f"number of tensors at offset 8 is {n_tensors}, more than {MAX_TENSORS}")
    n_keys = cursor.scalar(_U64, "number of keys")
    if n_keys > MAX_KEYS:
        raise GGUFError(f"number of keys at offset 16 is {n_keys}, more than {MAX_KEYS}")

    metadata: dict[str, Any] = {}
    for index in range(n_keys):
        start = cursor.pos
        key = cursor.string(f"key {index}")
        if key in metadata:
            raise GGUFError(f"key {quote(key)} at offset {start} appears twice")
        metadata[key] = _value(cursor, key)
    alignment = _alignment(metadata)

    table: dict[str, TensorInfo] = {}
    for index in range(n_tensors):
        start = cursor.pos
        info = _tensor(cursor, index)
        if info.name in table:
            raise GGUFError(f"tensor {quote(info.name)} at offset {start} appears twice")
        table[info.name] = info
    data_offset = -(-cursor.pos // alignment) * alignment
    tensors = {name: _place(info, data_offset, alignment, cursor.size) for name, info in table.items()}
    return Header(version, alignment, data_offset, MappingProxyType(metadata), MappingProxyType(tensors))
