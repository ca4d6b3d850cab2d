"""Linear layers over weights that may be quantised: `QuantArray`, and the one matmul that knows about it.

On CPU, XLA sends int8 × int8 → int32 GEMMs of at least two rows to AMX / VNNI kernels, at memory speed for few rows
and 600–800 GOP/s for many; a GEMV, or a float × int8 GEMM, is a slow loop. So weights stay int8 with one scale per
output, stored [out, in], and activations are quantised per row just before the GEMM. For few rows a GEMM takes as
long as its weights take to come from memory; where the processor multiplies faster than it reads, weights that a file
has in 4 to 6 bits stay in about as many (`PackedArray`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import jax
import jax.numpy as jnp
import numpy as np

from atlas_jax.kernels import gpu
from atlas_jax.kernels.cpu import ffi, library
from atlas_jax.kernels.reductions import row_max
from atlas_jax.kernels.weight_forms import FLOATS4_SHIFT, FLOATS4_SMALLEST, LEVELS4, Form, unpack_records
from atlas_jax.typing import Array, Float, Int8, Int32, UInt8

_GPU_ROWS = 32
"""Rows up to which a GEMM on a GPU waits for its weights."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class QuantArray:
    """A weight matrix in 8 bits, `values * scale[:, None]`.

    Attributes:
      values: int8 [out, in].
      scale: float32 [out].
    """

    values: Int8[Array, "out inp"]
    scale: Float[Array, out]

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the matrix it stands for."""
        return tuple(self.values.shape)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class PackedArray:
    """A weight matrix in 8 bits that is stored in fewer: a weight is what its record decodes to, times `scale`.

    Attributes:
      blocks: uint8 [out, records, bytes of one]; of several matrices with a leading axis, like the scale.
      scale: float32 [out].
      form: what the records are.
    """

    blocks: UInt8[Array, "out records bytes"]
    scale: Float[Array, out]
    form: Form = field(default=Form.PAIRS, metadata={"static": True})

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the matrix it stands for."""
        return (*self.blocks.shape[:-2], self.form.span * self.blocks.shape[-2])


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class InterleavedArray:
    """A weight matrix whose outputs are those of several in turns, which lie in forms of their own.

    Attributes:
      parts: the matrices.
      lengths: how many outputs of each lie together.
    """

    parts: tuple[QuantArray | PackedArray, ...]
    lengths: tuple[int, ...] = field(metadata={"static": True})

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the matrix it stands for."""
        return (sum(part.shape[0] for part in self.parts), self.parts[0].shape[1])

    def interleaved(self, outputs: Sequence[Float[Array, "*rows part"]]) -> Float[Array, "*rows out"]:
        """What the parts give, as one."""
        turns = [out.reshape(*out.shape[:-1], -1, n) for out, n in zip(outputs, self.lengths, strict=True)]
        return jnp.concatenate(turns, axis=-1).reshape(*turns[0].shape[:-2], -1)


Weight = QuantArray | PackedArray | InterleavedArray | jax.Array
"""A matrix [out, in]: quantised, or plain float32 (reference mode)."""


def quantize_weight(matrix: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Quantises each row of a float matrix to int8 with its own scale.

    Args:
      matrix: float32 [out, in].

    Returns:
      values int8 [out, in] in −127 … 127 and scale float32 [out]; a zero row has scale 0.
    """
    peak = np.abs(matrix).max(axis=1, initial=0.0)
    inverse = np.divide(127.0, peak, out=np.zeros_like(peak), where=peak > 0)
    values = np.rint(matrix * inverse[:, None]).astype(np.int8)
    return values, (peak / 127.0).astype(np.float32)


def pack_weight(codes: np.ndarray, step: np.ndarray, base: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Arrays of the `PackedArray` of a matrix of 4-bit codes, in `Form.PAIRS`: quantised to 8 bits like `quantize_weight`'s.

    Args:
      codes: uint8 [out, in], 0 … 15; in a multiple of 64.
      step, base: float32 [out, in / 32]; a weight is `codes * step + base`, with those of its block.

    Returns:
      blocks uint8 [out, in / 64, 40] and scale float32 [out]. A step is rounded to 1/256 of the scale, which adds at most
      0.03 to the half unit that rounding to 8 bits can be off.
    """
    outputs, inner = codes.shape
    by_block = codes.reshape(outputs, -1, 32)
    ends = np.stack([base + step * by_block.min(axis=-1), base + step * by_block.max(axis=-1)])
    peak = np.abs(ends).max(axis=(0, 2), initial=0.0).astype(np.float32)
    inverse = np.divide(127.0, peak, out=np.zeros(outputs), where=peak > 0)[:, None] * 256.0
    # wide integers: only their lower halves count, and step or base alone may be large where a block uses few codes
    halves = np.stack([np.rint(step * inverse), np.rint(base * inverse) + 128.0], axis=-1).astype(np.int64)
    records = np.empty((outputs, inner // 64, 40), np.uint8)
    records[..., :8] = halves.astype("<i2").view(np.uint8).reshape(outputs, -1, 8)
    pairs = codes.reshape(outputs, -1, 32, 2)
    records[..., 8:] = pairs[..., 0] | pairs[..., 1] << 4
    return records, peak / np.float32(127.0)


def pack_floats(codes: np.ndarray, exponent: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Arrays of the `PackedArray` of a matrix of 4-bit floats, in `Form.FLOATS`.

    Args:
      codes: uint8 [out, in]; in a multiple of 64.
      exponent: uint8 [out, in / 32]; a weight is `FLOATS4[code] * 2**(exponent - 128)`, with that of its block.

    Returns:
      blocks uint8 [out, in / 64, 34] and scale float32 [out]; a row of zeros has scale 0.
    """
    outputs, inner = codes.shape
    used = (codes & 7).reshape(outputs, -1, 32).max(axis=-1) > 0
    largest = np.where(used, exponent, 0).max(axis=1, initial=0).astype(np.int32)
    records = np.empty((outputs, inner // 64, 34), np.uint8)
    # a block of zeros has any exponent
    records[..., :2] = np.clip(largest[:, None] - exponent, 0, FLOATS4_SMALLEST).reshape(outputs, -1, 2)
    pairs = codes.reshape(outputs, -1, 32, 2)
    records[..., 2:] = pairs[..., 0] | pairs[..., 1] << 4
    scale = np.ldexp(used.any(axis=1).astype(np.float32), largest - 128 - FLOATS4_SHIFT)
    return records, scale.astype(np.float32)


def pack_levels(codes: np.ndarray, step: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Arrays of the `PackedArray` of a matrix of codes for unequal levels, in `Form.LEVELS`: quantised like `pack_weight`'s.

    Args:
      codes: uint8 [out, in], 0 … 15; in a multiple of 64.
      step: float32 [out, in / 32]; a weight is `LEVELS4[code] * step`, with that of its block.

    Returns:
      blocks uint8 [out, in / 64, 36] and scale float32 [out]. A step is rounded to 1/256 of the scale, which adds at most
      0.25 to the half unit that rounding to 8 bits can be off.
    """
    outputs, inner = codes.shape
    levels = np.abs(np.asarray(LEVELS4, np.float32))
    largest = levels[codes].reshape(outputs, -1, 32).max(axis=-1) * np.abs(step)
    peak = largest.max(axis=1, initial=0.0).astype(np.float32)
    inverse = np.divide(127.0, peak, out=np.zeros(outputs), where=peak > 0)[:, None] * 256.0
    # wide integers: only their lower halves count
    whole = np.rint(step * inverse).astype(np.int64)
    records = np.empty((outputs, inner // 64, 36), np.uint8)
    records[..., :4] = whole.astype("<i2").view(np.uint8).reshape(outputs, -1, 4)
    pairs = codes.reshape(outputs, -1, 32, 2)
    records[..., 4:] = pairs[..., 0] | pairs[..., 1] << 4
    return records, peak / np.float32(127.0)


def unpack(weight: PackedArray) -> QuantArray:
    """The same weights in 8 bits each."""
    return QuantArray(unpack_records(weight.blocks, weight.form), weight.scale)


def quantize_rows(x: Float[Array, "*rows inp"]) -> tuple[Int8[Array, "*rows inp"], Float[Array, "*rows 1"]]:
    """Quantises the last axis to int8 with one scale per row; an all-zero row stays zero."""
    peak = jnp.maximum(row_max(jnp.abs(x)), 1e-30)[..., None]
    return jnp.round(x * (127.0 / peak)).astype(jnp.int8), peak * (1.0 / 127.0)


def uses_cpu_kernel(inner: int, outputs: int) -> bool:
    """Whether a GEMM of quantised weights of this shape runs in C; for any number of rows, XLA's would round differently."""
    return inner % 64 == 0 and outputs % 16 == 0 and library.usable()


def stays_coded(inner: int, outputs: int) -> bool:
    """Whether a GEMM of few rows reads weights of this shape in fewer bits than 8 where they lie."""
    return uses_cpu_kernel(inner, outputs) or (inner % 64 == 0 and gpu.usable() and library.available())


def uses_gpu_kernel(rows: int, weight: QuantArray | PackedArray) -> bool:
    """Whether a GEMM of quantised weights with so many rows runs the Triton kernel."""
    stored = weight.values if isinstance(weight, QuantArray) else weight.blocks
    return rows <= _GPU_ROWS and weight.shape[1] % 64 == 0 and stored.size < 2**31 and gpu.usable()


def linear(weight: Weight, x: Float[Array, "*rows inp"]) -> Float[Array, "*rows out"]:
    """Computes `x @ weight.T`.

    Args:
      weight: [out, in]; the GEMM of a `QuantArray` runs in int8 with int32 sums, of activations in the two terms of
        `split_rows`. It is exact in the integers, so a row's result does not depend on its neighbours or on how many there
        are.
      x: any leading axes.
    """
    if isinstance(weight, InterleavedArray):
        return weight.interleaved([linear(part, x) for part in weight.parts])
    rows, inner = x.shape[:-1], x.shape[-1]
    flat = x.reshape(-1, inner)
    count = flat.shape[0]
    if not isinstance(weight, QuantArray | PackedArray):
        # a GEMV rounds differently from the same row of a GEMM
        pair = jnp.concatenate([flat, flat]) if count == 1 else flat
        out = jnp.einsum("ri,oi->ro", pair, weight, precision=jax.lax.Precision.HIGHEST)
        return out[:count].reshape(*rows, -1)
    if uses_cpu_kernel(inner, weight.shape[0]):
        stored = weight.values if isinstance(weight, QuantArray) else weight.blocks
        return ffi.linear(flat, stored, weight.scale).reshape(*rows, -1)
    high, low, unit = split_rows(flat)
    terms = jnp.stack([high, low], axis=1).reshape(
        -1, inner
    )  # a row's two side by side: they stay on one device of a mesh
    sums = _term_sums(terms, weight).reshape(count, 2, -1)
    return (from_terms(sums[:, 0], sums[:, 1]) * (unit * weight.scale)).reshape(*rows, -1)


def _term_sums(terms: Int8[Array, "terms inp"], weight: QuantArray | PackedArray) -> Int32[Array, "terms out"]:
    """Dot products with the 8-bit numbers that weights stand for."""
    if uses_gpu_kernel(terms.shape[0] // 2, weight):
        from atlas_jax.kernels.gpu import few_rows  # importing Pallas takes 0.4 s that only GPUs need

        return few_rows.term_sums(terms, weight, interpret=gpu.interpreted())
    values = unpack(weight).values if isinstance(weight, PackedArray) else weight.values
    return jnp.einsum("ri,oi->ro", terms, values, preferred_element_type=jnp.int32)


def linear_each(weight: QuantArray, x: Float[Array, "B T inp"]) -> Float[Array, "B T out"]:
    """Computes `x[b] @ weight[b].T` in 8 bits, activations in two terms: every row of a batch has a matrix of its own.

    Args:
      weight: values [B, out, in], scale [B, out].
    """
    tokens, inner = x.shape[1:]
    if uses_cpu_kernel(inner, weight.values.shape[1]):
        return ffi.linear(x, weight.values, weight.scale)
    high, low, unit = split_rows(x)
    terms = jnp.concatenate([high, low], axis=1)
    sums = jnp.einsum("bti,boi->bto", terms, weight.values, preferred_element_type=jnp.int32)
    return from_terms(sums[:, :tokens], sums[:, tokens:]) * (unit * weight.scale[:, None, :])


def split_rows(
    x: Float[Array, "*rows inp"],
) -> tuple[Int8[Array, "*rows inp"], Int8[Array, "*rows inp"], Float[Array, "*rows 1"]]:
    """Quantises the last axis to two int8 terms: `x ≈ (256 * high + low) * unit`.

    Five times the mean of |x| is about what the lower term holds, so that the upper one is 0 but for numbers that stand
    out, and a GEMM of many rows can leave it out there. The unit is never more than 1/127 of the row's peak, nor so
    small that a sum of these numbers times 8-bit weights would leave 32 bits.

    Returns:
      high, low, and the unit of each row; an all-zero row stays zero.
    """
    high, low, unit = terms_of(x, jnp.maximum(row_max(jnp.abs(x)), 1e-30)[..., None])
    return high.astype(jnp.int8), low.astype(jnp.int8), unit


def terms_of(
    x: Float[Array, "*rows inp"], peak: Float[Array, "*rows 1"]
) -> tuple[Float[Array, "*rows inp"], Float[Array, "*rows inp"], Float[Array, "*rows 1"]]:
    """What `split_rows` gives, the terms as floats, of rows whose largest |x| is known; it must not be 0."""
    inner = x.shape[-1]
    largest = min(127 * 256, (2**31 - 1) // (128 * inner))
    inverse = largest / peak
    # whole numbers, and their sum at most 2²⁴: exact in whatever order they are added
    total = jnp.abs(jnp.round(x * inverse)).sum(axis=-1, keepdims=True)
    coarse = jnp.minimum(jnp.floor(total * np.float32(5 / (127 * inner))) + 1.0, (largest + 126) // 127)
    unit = peak * (np.float32(1) / np.float32(largest)) * coarse
    # not inverse / coarse: XLA makes one division of two, which can round to the next float, and a number halfway between
    # two whole ones then becomes another than in the C kernels
    whole = jnp.round(x * (1.0 / unit))
    high = jnp.floor(whole * (1 / 256) + 0.5)
    return high, whole - 256.0 * high, unit


def from_terms(high: Int32[Array, "*shape"], low: Int32[Array, "*shape"]) -> Float[Array, "*shape"]:
    """What dot products with the two terms of `split_rows` stand for, in the row's unit."""
    return (high * 256 + low).astype(jnp.float32)


def rows_of(weight: Weight, index: Int32[Array, "*rows"]) -> Float[Array, "*rows inp"]:
    """Looks up rows of a matrix as float32: the embedding of token ids `index`."""
    if isinstance(weight, PackedArray):
        return unpack_records(weight.blocks[index], weight.form).astype(jnp.float32) * weight.scale[index][..., None]
    assert not isinstance(weight, InterleavedArray)
    if isinstance(weight, QuantArray):
        return weight.values[index].astype(jnp.float32) * weight.scale[index][..., None]
    return weight[index]
