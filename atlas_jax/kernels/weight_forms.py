"""The forms of coded weights: how many bits a weight takes, what the bytes are, and how a file's types become them.

A weight is the upper byte of `code * step + base`, in 16-bit arithmetic that wraps, times a scale of its output. Forms
differ in their codes and in how step and base are found: a record is what of one output's weights lies together. In FLOATS a
weight is `FLOATS4[code] * 2**(FLOATS4_SHIFT - shift)`, rounded to a whole number, times the scale; in LEVELS
`LEVELS4[code]` takes the code's place, and there is no base.

FLOATS 4.25 bits a weight, 64 in 34 bytes, as MXFP4: the shift of either 32, uint8; codes of 4 bits. Weights of a block that
       is at most 2**FLOATS4_SHIFT times smaller than the largest of its output are exact.
LEVELS 4.5 bits, 64 in 36 bytes, as IQ4_NL: the step of either 32, int16; codes of 4 bits.
PAIRS  5 bits a weight, 64 in 40 bytes: step and base of either 32, int16; codes of 4 bits.
FOUR   4.5 bits, 256 in 144 bytes: as Q4_K, units of step and base (int16, uint16), for every 32 weights a factor of 6
       bits for either, codes of 4 bits.
FIVE   5.5 bits, 256 in 176 bytes: as Q5_K, the same with codes of 5 bits.
SIX    6.56 bits, 256 in 210 bytes: as Q6_K, a unit of the step, for every 16 weights a factor of 8 bits, codes of 6 bits
       around 32.

Codes of 4 bits, or their lower 4, lie two to a byte, the even one in the lower half; in FOUR the weights l and 64 + l of
either half of a record. Above 4 bits, the bits of the weights
2l and 2l + 1 of each quarter of a record lie together, those of its four quarters after one another in the lth word of 8 or
16 bits.
"""

from __future__ import annotations

import enum
import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt
from gguf.constants import GGMLQuantizationType

from atlas_jax.kernels.cpu import library
from atlas_jax.typing import Array, Int8, UInt8


class Form(enum.Enum):
    """A form, by the bytes of its record."""

    FLOATS = 34
    LEVELS = 36
    PAIRS = 40
    FOUR = 144
    FIVE = 176
    SIX = 210

    @property
    def span(self) -> int:
        """Weights of a record."""
        return 64 if self in (Form.FLOATS, Form.LEVELS, Form.PAIRS) else 256


OWN_FORM: Mapping[int, Form] = {
    GGMLQuantizationType.Q4_K: Form.FOUR,
    GGMLQuantizationType.Q5_K: Form.FIVE,
    GGMLQuantizationType.Q6_K: Form.SIX,
}
"""Types of a file that `pack_rows` takes, and the form that has their codes and factors."""

FLOATS4 = 0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12
"""What each code of a float of 4 bits stands for, times two: sign, two bits of exponent, one of mantissa."""
FLOATS4_SHIFT, FLOATS4_SMALLEST = 3, 8
FLOATS4_LARGEST = max(FLOATS4) << FLOATS4_SHIFT
"""How far these can be shifted to the left in 8 bits; the shift, of a block, from which on all of them are 0; and the largest
number in 8 bits."""
_OF_SHIFT = np.rint(np.multiply.outer(2.0 ** (FLOATS4_SHIFT - np.arange(FLOATS4_SMALLEST + 1)), FLOATS4)).astype(
    np.int8
)
"""The number in 8 bits of every shift and code."""

LEVELS4 = -127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113
"""What each code of a weight of IQ4 stands for, times the step of its block."""

_ROWS = 256
"""Rows that a thread packs at a time."""


class NotFinite(ValueError):
    """A weight is infinite or not a number."""


def unpack_records(records: UInt8[Array, "*rows records bytes"], form: Form) -> Int8[Array, "*rows inp"]:
    """The weights of records in 8 bits each; of a NumPy array one of NumPy."""
    if form is Form.FLOATS:
        shift = records[..., :2, None].astype(np.int32).clip(0, FLOATS4_SMALLEST)
        codes = _bits(records[..., 2:], (0, 4), 15).reshape(*shift.shape[:-1], 32)
        numbers = _OF_SHIFT.reshape(-1) if isinstance(records, np.ndarray) else jnp.asarray(_OF_SHIFT.reshape(-1))
        return numbers[shift * 16 + codes].reshape(*records.shape[:-2], -1)
    if form is Form.LEVELS:
        step = _signed(_words(records[..., :4]), 16)
        codes = _bits(records[..., 4:], (0, 4), 15).reshape(*step.shape, 32)
        levels = np.asarray(LEVELS4, np.int32) if isinstance(records, np.ndarray) else jnp.asarray(LEVELS4, jnp.int32)
        wrapped = (levels[codes] * step[..., None] + 128).astype(np.int16)
        return (wrapped >> 8).astype(np.int8).reshape(*records.shape[:-2], -1)
    at = {Form.PAIRS: 8, Form.FOUR: 16, Form.FIVE: 48, Form.SIX: 82}[form]
    if form is Form.FOUR:
        halves = records[..., at:].reshape(*records.shape[:-1], 2, 1, 64).astype(np.int32)
        code = halves >> np.asarray([[0], [4]], np.int32) & 15
    else:
        code = _bits(records[..., at:], (0, 4), 15)
    code = code.reshape(*records.shape[:-1], form.span)
    if form in (Form.FIVE, Form.SIX):
        code = code | _high(records, form).reshape(code.shape) << 4
    step, base = _steps_and_bases(records, form)
    by_block = code.reshape(*step.shape, -1)
    wrapped = (by_block * step[..., None] + base[..., None]).astype(np.int16)
    return (wrapped >> 8).astype(np.int8).reshape(*records.shape[:-2], -1)


def _high(records: jax.Array, form: Form) -> jax.Array:
    """What codes have above their lower 4 bits: [..., quarter, l, even or odd]."""
    bits = 2 if form is Form.SIX else 1
    words = _words(records[..., 18:82]) if form is Form.SIX else records[..., 16:48].astype(np.int32)
    return words[..., None, :, None] >> np.arange(8, dtype=np.int32).reshape(4, 1, 2) * bits & (1 << bits) - 1


def _steps_and_bases(records: jax.Array, form: Form) -> tuple[jax.Array, jax.Array]:
    """Of every block of a record, int32."""
    if form is Form.PAIRS:
        halves = _signed(_words(records[..., :8]), 16)
        return halves[..., 0::2], halves[..., 1::2]
    unit = _signed(_words(records[..., :2]), 16)
    if form is Form.SIX:
        step = _signed(records[..., 2:18].astype(np.int32), 8) * unit + 1024 >> 11
        return step, 128 - 32 * step
    factor, rest = records[..., 4:12].astype(np.int32), records[..., 12:16]
    below = _bits(rest, (0, 4), 15).reshape(factor.shape) | factor >> 6 << 4
    return (factor & 63) * unit + 128 >> 8, 128 - (below * _words(records[..., 2:4]) >> 6)


def _bits(packed: jax.Array, shifts: tuple[int, ...], mask: int) -> jax.Array:
    """Parts of every byte, on a new last axis, int32."""
    return packed.astype(np.int32)[..., None] >> np.asarray(shifts, np.int32) & mask


def _words(pairs: jax.Array) -> jax.Array:
    """Bytes two by two as unsigned numbers, in little-endian order, int32."""
    return pairs[..., 0::2].astype(np.int32) | pairs[..., 1::2].astype(np.int32) << 8


def _signed(numbers: jax.Array, bits: int) -> jax.Array:
    """The signed numbers that have these bits."""
    return (numbers ^ 1 << bits - 1) - (1 << bits - 1)


def pack_rows(
    form: Form,
    tensors: Sequence[tuple[int, npt.NDArray[np.uint8]]],
    inner: int,
    order: npt.NDArray[np.intp] | None = None,
    factor: float = 1.0,
) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.float32]]:
    """Records and scales of rows as they lie in a file, on all cores; needs `library.available()`.

    Args:
      tensors: of each its type, of `OWN_FORM`, and uint8 [out, bytes of a row]; they follow one another, are then put in
        `order`, and multiplied. In another form than their type's own they are rounded once more.
      inner: weights of a row.

    Returns:
      uint8 [out, records, bytes of one] and float32 [out].

    Raises:
      NotFinite: a weight is not finite.
    """
    rows = np.concatenate(
        [tensor.ctypes.data + np.arange(len(tensor), dtype=np.uintp) * tensor.strides[0] for _, tensor in tensors]
    )
    kinds = np.concatenate([np.full(len(tensor), kind, np.uint8) for kind, tensor in tensors])
    if order is not None:
        rows, kinds = rows[order], kinds[order]
    records = aligned((len(rows), inner // form.span, form.value), np.uint8)
    scale = aligned((len(rows),), np.float32)
    pack = library.pack()

    def part(first: int) -> int:
        count = min(_ROWS, len(rows) - first)
        given, made = (kinds[first:], rows[first:]), (records[first:], scale[first:])
        kind, row, record, unit = (array.ctypes.data for array in (*given, *made))
        return int(pack(form.value, kind, row, count, inner, factor, record, unit))

    with ThreadPoolExecutor(cores()) as pool:
        outcomes = set(pool.map(part, range(0, len(rows), _ROWS)))
    if 2 in outcomes:
        raise MemoryError("no room to pack weights in")
    if 1 in outcomes:
        raise NotFinite
    assert outcomes <= {0}, outcomes
    return records, scale


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def aligned(shape: tuple[int, ...], dtype: npt.DTypeLike) -> npt.NDArray[Any]:
    """An array that has not been filled, aligned to cache lines: `jax.device_put` takes such a one without a copy."""
    kind = np.dtype(dtype)
    size = int(np.prod(shape)) * kind.itemsize
    room = np.empty(size + 64, np.uint8)
    start = -room.ctypes.data % 64
    return room[start : start + size].view(kind).reshape(shape)
