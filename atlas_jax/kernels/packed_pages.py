"""Pages of keys in 4 bits and of values in 2: of what is kept of a text long after it has left the window.

A number is a step of its group, in eighths of a unit of the 8-bit page it stands for:

    int8 = offset + (n · step + 4) >> 3,      n in 0 … 15; in 2 bits 0, 5, 10 or 15

with a scale per token and head, the upper 16 bits of the page's own. So a kernel may unpack to int8 and go on as for any
page: all forms compute with the same integers. Groups are 32 numbers, and 64 numbers share bytes: the lowest bits of all
bytes are numbers 0, 1, … and the highest the last ones.

Which bits: for the same bytes 1 024 pairs with values in 2 bits close 0.810 of the gap between window and full attention, 768
with values in 4 close 0.779; keys in 3 bits, and 1 152 pairs, 0.702 (docs/experiments/kept_pairs.md).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import jax
import jax.numpy as jnp

from atlas_jax.typing import Array, Float, Int8, UInt8, UInt16

Bits = Literal[2, 4]
KEY_BITS: Bits = 4
VALUE_BITS: Bits = 2
_BLOCK = 64
_LEVELS = 15
_EIGHTHS = 8


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class PackedPages:
    """Keys or values in a few bits.

    Attributes:
      numbers: 8 / `bits` of them a byte.
      step: of each group, in eighths.
      offset: of each group, what n = 0 stands for.
      half_scale: of one int8 unit, the upper half of a float32.
      bits: of a number.
    """

    numbers: UInt8[Array, "*rows bytes"]
    step: UInt8[Array, "*rows groups"]
    offset: Int8[Array, "*rows groups"]
    half_scale: UInt16[Array, "*rows"]
    bits: Bits = field(metadata={"static": True})

    @property
    def scale(self) -> Float[Array, "*rows"]:
        """Of one int8 unit."""
        return whole(self.half_scale)


def upper_half(x: Float[Array, "*shape"]) -> UInt16[Array, "*shape"]:
    """The upper 16 bits of float32 numbers, rounded."""
    return ((jax.lax.bitcast_convert_type(x, jnp.uint32) + 0x8000) >> 16).astype(jnp.uint16)


def whole(half: UInt16[Array, "*shape"]) -> Float[Array, "*shape"]:
    """The float32 numbers that have these upper 16 bits, the others 0."""
    return jax.lax.bitcast_convert_type(half.astype(jnp.uint32) << 16, jnp.float32)


def _block(dim: int) -> int:
    """Numbers that share bytes: two groups."""
    return _BLOCK if dim % _BLOCK == 0 else dim


def _every(bits: Bits) -> int:
    """The 4-bit numbers that are used: every so many."""
    return _LEVELS // (2**bits - 1)


def init_packed(rows: tuple[int, ...], dim: int, bits: Bits) -> PackedPages:
    """Zeros; `dim` must be a multiple of 8 / `bits`."""
    groups = 2 * dim // _block(dim)
    return PackedPages(
        numbers=jnp.zeros((*rows, dim * bits // 8), jnp.uint8),
        step=jnp.zeros((*rows, groups), jnp.uint8),
        offset=jnp.zeros((*rows, groups), jnp.int8),
        half_scale=jnp.zeros(rows, jnp.uint16),
        bits=bits,
    )


def pack(values: Int8[Array, "*rows D"], scale: Float[Array, "*rows"], bits: Bits) -> PackedPages:
    """The nearest numbers of so many bits to int8 ones."""
    *rows, dim = values.shape
    block, each, every = _block(dim), 8 // bits, _every(bits)
    of_group = values.astype(jnp.int32).reshape(*rows, dim // block, 2, block // 2)
    low, high = of_group.min(axis=-1), of_group.max(axis=-1)
    step = -(-(high - low) * _EIGHTHS // _LEVELS)  # rounded up: 15 steps reach the largest
    width = every * jnp.maximum(step, 1)[..., None]
    n = (2 * _EIGHTHS * (of_group - low[..., None]) + width) // (
        2 * width
    )  # rounded in integers: the same in every form
    n = jnp.minimum(n, _LEVELS // every).astype(jnp.uint8).reshape(*rows, dim // block, each, block // each)
    place = jnp.arange(0, 8, bits, dtype=jnp.uint8)[:, None]
    return PackedPages(
        numbers=(n << place).sum(axis=-2, dtype=jnp.uint8).reshape(*rows, dim // each),
        step=step.reshape(*rows, -1).astype(jnp.uint8),
        offset=low.reshape(*rows, -1).astype(jnp.int8),
        half_scale=upper_half(scale),
        bits=bits,
    )


def unpack(pages: PackedPages) -> Int8[Array, "*rows D"]:
    """The int8 numbers that they stand for, in units of `scale`."""
    *rows, size = pages.numbers.shape
    each = 8 // pages.bits
    dim = each * size
    block = _block(dim)
    shared = pages.numbers.reshape(*rows, dim // block, 1, block // each)
    place = jnp.arange(0, 8, pages.bits, dtype=jnp.uint8)[:, None]
    n = (shared >> place & (2**pages.bits - 1)).reshape(*rows, dim // block, 2, block // 2).astype(jnp.int32)
    step = pages.step.reshape(*rows, -1, 2, 1).astype(jnp.int32)
    offset = pages.offset.reshape(*rows, -1, 2, 1).astype(jnp.int32)
    values = offset + ((n * _every(pages.bits) * step + _EIGHTHS // 2) >> 3)
    return jnp.clip(values, -127, 127).astype(jnp.int8).reshape(*rows, dim)
