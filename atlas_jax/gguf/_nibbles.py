"""The GGML types whose weights are 4-bit codes: what they hold, without making floats of it."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from gguf import quants

from atlas_jax.gguf._types import TensorType


@dataclass(frozen=True)
class Nibbles:
    """A matrix of 4-bit codes: weight i of block j is `codes[i] * step[j] + base[j]`.

    Attributes:
      codes: uint8 [out, in], 0 … 15.
      step, base: float32 [out, in / 32].
    """

    codes: npt.NDArray[np.uint8]
    step: npt.NDArray[np.float32]
    base: npt.NDArray[np.float32]


@dataclass(frozen=True)
class Floats4:
    """Matrices of floats of 4 bits (e2m1): weight i of block j is half the value of `codes[i]` times 2**(exponent[j] - 127).

    Attributes:
      codes: uint8 [out, in], 0 … 15.
      exponent: uint8 [out, in / 32].
    """

    codes: npt.NDArray[np.uint8]
    exponent: npt.NDArray[np.uint8]


@dataclass(frozen=True)
class Levels4:
    """Matrices of codes for 16 unequal levels, those of IQ4: weight i of block j is the level of `codes[i]` times `step[j]`.

    Attributes:
      codes: uint8 [out, in], 0 … 15.
      step: float32 [out, in / 32].
    """

    codes: npt.NDArray[np.uint8]
    step: npt.NDArray[np.float32]


def holds_nibbles(kind: TensorType) -> bool:
    """Whether `unpack_nibbles` takes a type."""
    return kind in _BYTES


def unpack_nibbles(kind: TensorType, packed: npt.NDArray[np.uint8]) -> Nibbles | Floats4 | Levels4:
    """Rows of blocks as they lie in the file, uint8 [out, bytes], as codes and what they stand for."""
    rows = packed.shape[0]
    blocks = packed.reshape(-1, _BYTES[kind])
    if kind == TensorType.MXFP4:
        halves = blocks[:, 1:]
        codes = np.concatenate([halves & 15, halves >> 4], axis=1)
        return Floats4(codes.reshape(rows, -1), blocks[:, 0].reshape(rows, -1))
    if kind == TensorType.IQ4_XS:
        high = blocks[:, 2:4].copy().view("<u2") >> np.arange(0, 16, 2, dtype=np.uint16) & 3
        low = (blocks[:, 4:8, None] >> np.asarray([0, 4], np.uint8) & 15).reshape(-1, 8)
        step = _float(blocks, 0)[:, None] * ((high << 4 | low).astype(np.float32) - 32)
        return Levels4(_halves(blocks[:, 8:].reshape(-1, 8, 16), rows), step.reshape(rows, -1))
    if kind == TensorType.IQ4_NL:
        return Levels4(_halves(blocks[:, 2:].reshape(-1, 1, 16), rows), _float(blocks, 0).reshape(rows, -1))
    if kind == TensorType.Q4_K:
        scale, least = (_float(blocks, at)[:, None] for at in (0, 2))
        factor, offset = quants.Q4_K.get_scale_min(blocks[:, 4:16])
        step, base = scale * factor.astype(np.float32), -least * offset.astype(np.float32)
        pairs = blocks[:, 16:].reshape(-1, 4, 32)
    else:
        step = _float(blocks, 0)
        base = _float(blocks, 2) if kind == TensorType.Q4_1 else step * -8.0
        pairs = blocks[:, -16:].reshape(-1, 1, 16)
    return Nibbles(_halves(pairs, rows), step.reshape(rows, -1), base.reshape(rows, -1))


def _halves(pairs: npt.NDArray[np.uint8], rows: int) -> npt.NDArray[np.uint8]:
    """Codes of rows, of bytes [blocks, parts, n] that have the first n of a part in their lower halves."""
    return np.stack([pairs & 15, pairs >> 4], axis=2).reshape(rows, -1)


def _float(blocks: npt.NDArray[np.uint8], at: int) -> npt.NDArray[np.float32]:
    return np.ascontiguousarray(blocks[:, at : at + 2]).view("<f2")[:, 0].astype(np.float32)


_BYTES = {
    TensorType.Q4_0: 18,
    TensorType.Q4_1: 20,
    TensorType.Q4_K: 144,
    TensorType.MXFP4: 17,
    TensorType.IQ4_NL: 18,
    TensorType.IQ4_XS: 136,
}
