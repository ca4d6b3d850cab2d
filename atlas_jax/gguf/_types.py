"""The types of tensors in GGUF files, and their numbers as floats."""

from __future__ import annotations

from collections.abc import Mapping
from enum import IntEnum, unique

import numpy as np
import numpy.typing as npt
from gguf import quants
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType


@unique
class TensorType(IntEnum):
    """ggml's types: those of the gguf package, and one that it does not know."""

    F32 = 0
    F16 = 1
    Q4_0 = 2
    Q4_1 = 3
    Q5_0 = 6
    Q5_1 = 7
    Q8_0 = 8
    Q8_1 = 9
    Q2_K = 10
    Q3_K = 11
    Q4_K = 12
    Q5_K = 13
    Q6_K = 14
    Q8_K = 15
    IQ2_XXS = 16
    IQ2_XS = 17
    IQ3_XXS = 18
    IQ1_S = 19
    IQ4_NL = 20
    IQ3_S = 21
    IQ2_S = 22
    IQ4_XS = 23
    I8 = 24
    I16 = 25
    I32 = 26
    I64 = 27
    F64 = 28
    IQ1_M = 29
    BF16 = 30
    TQ1_0 = 34
    TQ2_0 = 35
    MXFP4 = 39
    NVFP4 = 40
    Q1_0 = 41
    Q2_0 = 42


BLOCKS: Mapping[TensorType, tuple[int, int]] = {
    **{TensorType(kind): size for kind, size in GGML_QUANT_SIZES.items()},
    TensorType.Q1_0: (128, 18),
    TensorType.Q2_0: (64, 18),
}
"""Numbers and bytes of a block of each type."""


def as_floats(kind: TensorType, packed: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
    """Rows of blocks as rows of float32.

    Raises:
      NotImplementedError: the type is not one of weights.
    """
    match kind:
        case TensorType.F32:
            return packed.view("<f4")
        case TensorType.F16:
            return packed.view("<f2").astype(np.float32)
        case TensorType.Q1_0 | TensorType.Q2_0:
            return _few_bits(packed, 1 if kind == TensorType.Q1_0 else 2)
    values: npt.NDArray[np.float32] = quants.dequantize(packed, GGMLQuantizationType(kind))
    return values


def _few_bits(packed: npt.NDArray[np.uint8], bits: int) -> npt.NDArray[np.float32]:
    """Blocks of a scale in half precision and 16 bytes of codes, the first in the lowest bits: ±1, or −1, 0, 1 and 2."""
    blocks = packed.reshape(-1, 18)
    scale = np.ascontiguousarray(blocks[:, :2]).view("<f2").astype(np.float32)
    codes = blocks[:, 2:, None] >> np.arange(0, 8, bits, dtype=np.uint8) & ((1 << bits) - 1)
    signed = codes.astype(np.float32).reshape(len(blocks), -1)
    values: npt.NDArray[np.float32] = scale * (2 * signed - 1 if bits == 1 else signed - 1)
    return values.reshape(len(packed), -1)
