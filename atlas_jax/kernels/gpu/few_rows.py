"""Products of few rows with quantised weights on GPU: records are decoded in registers, on their way to the tensor cores.

For few rows a product takes as long as its weights take to come from memory. XLA's program for coded weights writes them out
in 8 bits and reads them again: 2.6 bytes a weight of 4.5 bits. The kernel reads the records where they lie, 0.56 bytes, and
writes nothing but the sums.

What lies in a byte decides the order of the multiplication. The lower halves of 32 neighbouring bytes are one stretch of
weights and the upper halves another, so the activations are laid out as two planes of columns, and no weight is moved.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

from atlas_jax.kernels.linear import PackedArray, QuantArray
from atlas_jax.kernels.weight_forms import FLOATS4, FLOATS4_SHIFT, FLOATS4_SMALLEST, LEVELS4, Form
from atlas_jax.typing import Array, Int8, Int32

_GROUP = 32
"""Bytes of codes that are decoded together; their steps and bases are found once."""
_OUTPUTS, _GROUPS = 32, 4
"""A tile: outputs, and groups of each."""
_PROGRAMS = 264
"""That keep a large device busy, two for each multiprocessor of an H200. Few outputs are divided along their inputs."""
_SIZES = sum(size << 4 * code for code, size in enumerate(FLOATS4[:8]))
"""What the floats of 4 bits stand for without their sign, 4 bits each."""
_LEVELS = [
    sum(level + 127 << 8 * at for at, level in enumerate(LEVELS4[first : first + 4])) for first in range(0, 16, 4)
]
"""The levels of IQ4 above the lowest, four to a word."""
_LEAST_TERMS = 16
"""Rows of a tensor core's tile."""

_Tile = jax.Array
"""int32 [outputs, groups, parts of a group, 32 / parts]."""
_Load = Callable[[jax.Array | int], _Tile]
"""Bytes of every record at these places, as int32."""


def term_sums(
    terms: Int8[Array, "rows inp"], weight: QuantArray | PackedArray, *, interpret: bool = False
) -> Int32[Array, "rows out"]:
    """`terms @ weight.T` of a matrix in 8 bits and its units, as `linear.linear` sums it; exact. Not differentiable.

    Args:
      weight: inputs in a multiple of 64.
      interpret: run as an XLA program on any platform, for tests.
    """
    outputs = weight.shape[0]
    form = weight.form if isinstance(weight, PackedArray) else None
    stored = weight.blocks if isinstance(weight, PackedArray) else weight.values
    planes = _planes(terms, form)
    groups = planes.shape[2] // _GROUP
    tiles = pl.cdiv(outputs, _OUTPUTS)
    splits = max(1, min(pl.cdiv(groups, _GROUPS), _PROGRAMS // tiles))
    steps = pl.cdiv(groups, _GROUPS * splits)
    rows = max(pl.next_power_of_2(terms.shape[0]), _LEAST_TERMS)
    # columns of zeros, so that what a tile reads beyond the last group, the last one again, counts for nothing
    more = splits * steps * _GROUPS * _GROUP - planes.shape[2]
    planes = jnp.pad(planes, ((0, 0), (0, rows - terms.shape[0]), (0, more)))
    out = pl.pallas_call(
        functools.partial(_kernel, form, outputs, groups, steps),
        grid=(tiles, splits),
        out_specs=pl.BlockSpec((1, _OUTPUTS, rows), lambda tile, split: (split, tile, 0)),
        out_shape=jax.ShapeDtypeStruct((splits, tiles * _OUTPUTS, rows), jnp.int32),
        compiler_params=triton.CompilerParams(num_warps=4, num_stages=3),
        interpret=interpret,
        name="few_rows",
    )(planes, stored.reshape(-1))
    return out.sum(axis=0)[:outputs, : terms.shape[0]].T  # whole numbers: in any order


def _planes(terms: jax.Array, form: Form | None) -> jax.Array:
    """Columns in the order in which weights lie in the stored bytes: [halves of a byte, rows, bytes]."""
    rows = terms.shape[0]
    if form is None:
        return terms[None]
    if form is Form.FOUR:
        return terms.reshape(rows, -1, 2, 64).transpose(2, 0, 1, 3).reshape(2, rows, -1)
    return terms.reshape(rows, -1, 2).transpose(2, 0, 1)


def _kernel(
    form: Form | None, outputs: int, groups: int, steps: int, planes: jax.Array, stored: jax.Array, out: jax.Array
) -> None:
    """One tile of outputs, one part of their inputs."""
    tile, split = pl.program_id(0), pl.program_id(1)
    output = jnp.minimum(tile * _OUTPUTS + jnp.arange(_OUTPUTS), outputs - 1)[:, None, None, None]

    def step(index: jax.Array, sums: jax.Array) -> jax.Array:
        first = (split * steps + index) * _GROUPS
        group = jnp.minimum(first + jnp.arange(_GROUPS), groups - 1)[None, :, None, None]
        weights = (
            _whole(stored, output, group, groups)
            if form is None
            else _DECODE[form](*_records(form, stored, output, group, groups))
        )
        for plane, numbers in enumerate(weights):
            columns = planes[plane, :, pl.ds(first * _GROUP, _GROUPS * _GROUP)]
            rows = numbers.astype(jnp.int8).reshape(_OUTPUTS, _GROUPS * _GROUP)
            sums += jax.lax.dot_general(rows, columns, (((1,), (1,)), ((), ())), preferred_element_type=jnp.int32)
        return sums

    out[0] = jax.lax.fori_loop(0, steps, step, jnp.zeros(out.shape[1:], jnp.int32))


def _whole(stored: jax.Array, output: jax.Array, group: jax.Array, groups: int) -> tuple[_Tile]:
    return (stored[(output * groups + group) * _GROUP + _place(1)],)


def _records(
    form: Form, stored: jax.Array, output: jax.Array, group: jax.Array, groups: int
) -> tuple[_Load, jax.Array]:
    """What reads bytes of the groups' records, and which group of its record each is."""
    each = form.span // (2 * _GROUP)
    start = (output * (groups // each) + group // each) * form.value

    def load(place: jax.Array | int) -> _Tile:
        return stored[start + place].astype(jnp.int32)

    return load, group % each


def _place(parts: int) -> jax.Array:
    """The places of a group's bytes, by its parts."""
    size = _GROUP // parts
    return jnp.arange(parts)[:, None] * size + jnp.arange(size)


def _part(parts: int) -> jax.Array:
    return jnp.arange(parts)[:, None]


def _decoded(code: _Tile, step: _Tile, base: _Tile) -> _Tile:
    """The upper byte of 16 bits; what is above it is cut off where it becomes one."""
    return code * step + base >> 8


def _pairs(load: _Load, _: jax.Array) -> tuple[_Tile, _Tile]:
    codes = load(8 + _place(2))
    step, base = (_signed(load(4 * _part(2) + at) | load(4 * _part(2) + at + 1) << 8, 16) for at in (0, 2))
    return _decoded(codes & 15, step, base), _decoded(codes >> 4, step, base)


def _floats(load: _Load, _: jax.Array) -> tuple[_Tile, _Tile]:
    codes = load(2 + _place(2))
    unit = 1 << FLOATS4_SHIFT + 8 >> jnp.minimum(load(_part(2)), FLOATS4_SMALLEST)  # of a size, in 256ths

    def number(code: _Tile) -> _Tile:
        size = (jnp.uint32(_SIZES) >> (4 * (code & 7)).astype(jnp.uint32)).astype(jnp.int32) & 15
        size = size * unit
        size = size + 127 + (size >> 8 & 1) >> 8  # halves to even numbers
        return jnp.where(code & 8 == 0, size, -size)

    return number(codes & 15), number(codes >> 4)


def _levels(load: _Load, _: jax.Array) -> tuple[_Tile, _Tile]:
    codes = load(4 + _place(2))
    step = _signed(load(2 * _part(2)) | load(2 * _part(2) + 1) << 8, 16)

    def number(code: _Tile) -> _Tile:
        first, second, third, fourth = map(jnp.uint32, _LEVELS)
        word = jnp.where(code < 8, jnp.where(code < 4, first, second), jnp.where(code < 12, third, fourth))
        level = ((word >> (8 * (code & 3)).astype(jnp.uint32)).astype(jnp.int32) & 255) - 127
        return _decoded(level, step, jnp.int32(128))

    return number(codes & 15), number(codes >> 4)


def _four(load: _Load, group: jax.Array) -> tuple[_Tile, _Tile]:
    codes = load(16 + _GROUP * group + _place(1))
    block = group // 2 * 4 + group % 2  # of 32 weights; the upper halves' is two on
    return _decoded(codes & 15, *_factored(load, block)), _decoded(codes >> 4, *_factored(load, block + 2))


def _five(load: _Load, group: jax.Array) -> tuple[_Tile, _Tile]:
    codes, above = load(48 + _GROUP * group + _place(2)), load(16 + _place(2))
    scaling = _factored(load, 2 * group + _part(2))
    even, odd = (above >> 2 * group + parity & 1 for parity in (0, 1))
    return _decoded(codes & 15 | even << 4, *scaling), _decoded(codes >> 4 | odd << 4, *scaling)


def _six(load: _Load, group: jax.Array) -> tuple[_Tile, _Tile]:
    codes, above = load(82 + _GROUP * group + _place(4)), load(18 + 2 * _place(4) + group // 2)
    unit, factor = _signed(load(0) | load(1) << 8, 16), _signed(load(2 + 4 * group + _part(4)), 8)
    step = factor * unit + 1024 >> 11
    even, odd = (above >> 4 * (group % 2) + 2 * parity & 3 for parity in (0, 1))
    base = 128 - 32 * step
    return _decoded(codes & 15 | even << 4, step, base), _decoded(codes >> 4 | odd << 4, step, base)


def _factored(load: _Load, block: jax.Array) -> tuple[_Tile, _Tile]:
    """Step and base of blocks of a record in FOUR or FIVE."""
    unit, base_unit = _signed(load(0) | load(1) << 8, 16), load(2) | load(3) << 8
    factor = load(4 + block)
    below = load(12 + block // 2) >> 4 * (block % 2) & 15 | factor >> 6 << 4
    return (factor & 63) * unit + 128 >> 8, 128 - (below * base_unit >> 6)


def _signed(number: _Tile, bits: int) -> _Tile:
    return (number ^ 1 << bits - 1) - (1 << bits - 1)


_DECODE: dict[Form, Callable[[_Load, jax.Array], tuple[_Tile, _Tile]]] = {
    Form.FLOATS: _floats,
    Form.LEVELS: _levels,
    Form.PAIRS: _pairs,
    Form.FOUR: _four,
    Form.FIVE: _five,
    Form.SIX: _six,
}
"""The weights in the lower and in the upper halves of the bytes of groups, as whole numbers."""
