"""Quantised products and staged reductions against float64, with the errors their rounding allows and no more."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gguf import GGMLQuantizationType, quants
from hypothesis import given, settings
from hypothesis import strategies as st

from atlas_jax.gguf import Levels4, TensorType
from atlas_jax.gguf._nibbles import unpack_nibbles
from atlas_jax.kernels.linear import (
    PackedArray,
    QuantArray,
    linear,
    pack_floats,
    pack_levels,
    pack_weight,
    quantize_rows,
    quantize_weight,
    rows_of,
    split_rows,
    unpack,
)
from atlas_jax.kernels.reductions import row_max, row_sum
from atlas_jax.kernels.weight_forms import Form
from tests.property.rounding_support import halfway

ROWS, IN, OUT = 4, 48, 24
seeds = st.integers(0, 2**32 - 1)
magnitudes = st.sampled_from([0.0, 1e-12, 1e-3, 1.0, 300.0, 1e12])

product = jax.jit(linear)


def numbers(seed: int, shape: tuple[int, int], size: float) -> np.ndarray:
    """Rows of very different size, some of one large number among small ones."""
    random = np.random.default_rng(seed)
    values = random.standard_normal(shape) * size * 10.0 ** random.integers(-2, 3, (shape[0], 1))
    values[random.random(shape) < 0.02] *= 50
    return values.astype(np.float32)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(seeds, magnitudes)
def test_a_weight_is_rounded_to_half_a_unit_of_its_row(seed: int, size: float) -> None:
    matrix = numbers(seed, (OUT, IN), size)
    values, scale = quantize_weight(matrix)
    assert values.dtype == np.int8
    assert np.abs(values.astype(int)).max() <= 127
    error = np.abs(matrix - values * scale[:, None].astype(np.float64))
    assert (error <= scale[:, None] * 0.5001).all()
    assert (scale[np.abs(matrix).max(axis=1) == 0] == 0).all()


@settings(max_examples=60, deadline=None, derandomize=True)
@given(seeds, magnitudes, magnitudes)
def test_a_quantised_product_errs_by_half_a_unit_of_each_activation(seed: int, size: float, weight_size: float) -> None:
    weight = QuantArray(*map(jnp.asarray, quantize_weight(numbers(seed, (OUT, IN), weight_size))))
    x = numbers(seed + 1, (ROWS, IN), size)
    found = np.asarray(product(weight, x), np.float64)
    matrix = np.asarray(weight.values, np.float64) * np.asarray(weight.scale, np.float64)[:, None]
    wanted = x.astype(np.float64) @ matrix.T
    half = np.asarray(split_rows(x)[2], np.float64) / 2
    rounding = 4e-7 * np.abs(x).max(axis=1, keepdims=True).astype(np.float64) + 1e-30
    assert (np.abs(found - wanted) <= (half * 1.001 + rounding) * np.abs(matrix).sum(axis=1) + 1e-37).all()


@settings(max_examples=30, deadline=None, derandomize=True)
@given(seeds, st.permutations(range(ROWS)))
def test_a_row_of_a_quantised_product_knows_nothing_of_its_neighbours(seed: int, order: list[int]) -> None:
    weight = QuantArray(*map(jnp.asarray, quantize_weight(numbers(seed, (OUT, IN), 1.0))))
    x = numbers(seed + 1, (ROWS, IN), 1.0)
    together = np.asarray(product(weight, x))
    assert np.array_equal(np.asarray(product(weight, x[order])), together[order])
    for row in range(ROWS):
        assert np.array_equal(np.asarray(product(weight, x[row : row + 1]))[0], together[row])


@settings(max_examples=40, deadline=None, derandomize=True)
@given(seeds, magnitudes)
def test_float_products_and_lookups_are_float32_exact(seed: int, size: float) -> None:
    matrix, x = numbers(seed, (OUT, IN), 1.0), numbers(seed + 1, (ROWS, IN), size)
    wanted = x.astype(np.float64) @ matrix.T.astype(np.float64)
    bound = 1e-6 * (np.abs(x).astype(np.float64) @ np.abs(matrix).T.astype(np.float64)) + 1e-37
    assert (np.abs(np.asarray(product(jnp.asarray(matrix), x), np.float64) - wanted) <= bound).all()
    values, scale = quantize_weight(matrix)
    ids = np.asarray([3, 0, OUT - 1, 3], np.int32)
    quantised = rows_of(QuantArray(jnp.asarray(values), jnp.asarray(scale)), ids)
    assert np.array_equal(quantised, values[ids].astype(np.float32) * scale[ids, None])
    assert np.array_equal(rows_of(jnp.asarray(matrix), ids), matrix[ids])


@settings(max_examples=60, deadline=None, derandomize=True)
@given(seeds, magnitudes, st.integers(1, 16))
def test_packed_weights_err_by_little_more_than_half_a_unit(seed: int, size: float, used: int) -> None:
    """Also where blocks use few of their codes, and step and base are far larger than what they make."""
    random = np.random.default_rng(seed)
    codes = random.integers(16 - used, 16, (OUT, 2 * 64)).astype(np.uint8)
    step = (random.uniform(0.1, 1.0, (OUT, 4)) * size).astype(np.float32)
    base = (random.normal(size=(OUT, 4)) * size - step * (16 - used)).astype(np.float32)
    codes[0], step[0], base[0] = 0, 0.0, 0.0
    packed = PackedArray(*map(jnp.asarray, pack_weight(codes, step, base)))
    assert packed.shape == codes.shape
    by_block = codes.reshape(OUT, 4, 32).astype(np.float64)
    wanted = (by_block * step[..., None].astype(np.float64) + base[..., None]).reshape(codes.shape)
    found = unpack(packed)
    scale = np.asarray(found.scale, np.float64)[:, None]
    np.testing.assert_allclose(scale[:, 0], np.abs(wanted).max(axis=1) / 127, rtol=1e-5, atol=1e-38)
    assert (np.abs(np.asarray(found.values, np.float64) * scale - wanted) <= 0.54 * scale + 1e-38).all()
    ids = np.asarray([[3, 0], [OUT - 1, 3]], np.int32)
    assert np.array_equal(rows_of(packed, jnp.asarray(ids)), rows_of(found, ids))
    x = numbers(seed + 1, (ROWS, 2 * 64), 1.0)
    assert np.array_equal(product(packed, x), product(found, x))


@settings(max_examples=60, deadline=None, derandomize=True)
@given(seeds, st.integers(1, 12), st.integers(20, 250))
def test_floats_of_4_bits_are_exact_up_to_an_eighth_of_the_largest(seed: int, spread: int, most: int) -> None:
    random = np.random.default_rng(seed)
    codes = random.integers(0, 16, (OUT, 2 * 64)).astype(np.uint8)
    exponent = (most - random.integers(0, spread, (OUT, 4))).astype(np.uint8)
    codes[0] = 8  # all −0
    codes[1, :32], exponent[1, 0] = 0, 255  # zeros say nothing of the size
    coded = PackedArray(*map(jnp.asarray, pack_floats(codes, exponent)), Form.FLOATS)
    assert coded.shape == codes.shape
    blocks = np.empty((OUT, 4, 17), np.uint8)  # as files have them
    blocks[..., 0] = exponent
    halves = codes.reshape(OUT, 4, 2, 16)
    blocks[..., 1:] = halves[..., 0, :] | halves[..., 1, :] << 4
    with np.errstate(over="ignore"):
        wanted = quants.dequantize(blocks.reshape(OUT, -1), GGMLQuantizationType.MXFP4).astype(np.float64)
    found = unpack(coded)
    values, scale = np.asarray(found.values, np.float64), np.asarray(found.scale, np.float64)[:, None]
    used = exponent.astype(int) * (codes & 7).reshape(OUT, 4, 32).any(axis=-1)
    near = np.repeat(used >= used.max(axis=1, keepdims=True) - 3, 32, axis=1)
    off = np.abs(values * scale - wanted)
    assert (off[near] == 0).all()
    assert (off <= 0.5 * scale).all()
    ids = np.asarray([[3, 0], [OUT - 1, 3]], np.int32)
    assert np.array_equal(rows_of(coded, jnp.asarray(ids)), rows_of(found, ids))
    x = numbers(seed + 1, (ROWS, 2 * 64), 1.0)
    assert np.array_equal(product(coded, x), product(found, x))


@pytest.mark.parametrize("kind", [GGMLQuantizationType.IQ4_NL, GGMLQuantizationType.IQ4_XS])
@settings(max_examples=40, deadline=None, derandomize=True)
@given(seed=seeds, used=st.integers(1, 16))
def test_levels_of_4_bits_are_those_of_the_file_up_to_their_step(
    kind: GGMLQuantizationType, seed: int, used: int
) -> None:
    """Whatever codes a block uses: one that has small levels only may have a step that others would overflow with."""
    random = np.random.default_rng(seed)
    rows, width = 4, {GGMLQuantizationType.IQ4_NL: 18, GGMLQuantizationType.IQ4_XS: 136}[kind]
    blocks = random.integers(0, 256, (rows, 512 // (32 if width == 18 else 256), width)).astype(np.uint8)
    allowed = random.choice(16, used, replace=False).astype(np.uint8)
    at = 2 if width == 18 else 8
    pairs = random.choice(allowed, (2, *blocks[..., at:].shape))
    blocks[..., at:] = pairs[0] | pairs[1] << 4
    units = (random.normal(size=blocks.shape[:2]) * np.exp(random.normal(size=(rows, 1)))).astype("<f2")
    blocks[..., :2] = units[..., None].view(np.uint8)
    blocks[0, :, :2] = 0  # a row of zeros
    wanted = quants.dequantize(blocks.reshape(rows, -1), kind).astype(np.float64)
    found = unpack_nibbles(TensorType(kind), blocks.reshape(rows, -1))
    assert isinstance(found, Levels4)
    coded = PackedArray(*map(jnp.asarray, pack_levels(found.codes, found.step)), Form.LEVELS)
    assert coded.shape == wanted.shape
    values = unpack(coded)
    scale = np.asarray(values.scale, np.float64)[:, None]
    np.testing.assert_allclose(scale[:, 0], np.abs(wanted).max(axis=1) / 127, rtol=1e-5)
    assert (np.abs(np.asarray(values.values, np.float64) * scale - wanted) <= 0.751 * scale).all()
    ids = np.asarray([[3, 0], [rows - 1, 2]], np.int32)
    assert np.array_equal(rows_of(coded, jnp.asarray(ids)), rows_of(values, ids))
    x = numbers(seed + 1, (3, 512), 1.0)
    assert np.array_equal(product(coded, x), product(values, x))


@settings(max_examples=60, deadline=None, derandomize=True)
@given(seeds, magnitudes)
def test_two_terms_hold_an_activation_to_a_share_of_what_is_usual_in_its_row(seed: int, size: float) -> None:
    """Half a unit of error, where a unit is 5/127 of the mean |x| or a little more, and never coarser than one term's."""
    x = numbers(seed, (ROWS, IN), size)
    high, low, unit = (np.asarray(part, np.float64) for part in split_rows(x))
    peak = np.abs(x).max(axis=1, keepdims=True).astype(np.float64)
    assert (np.abs((256 * high + low) * unit - x) <= unit * 0.5001 + 1e-37).all()
    largest = min(127 * 256, 2**31 // (128 * IN))
    assert (unit <= 1.0001 * np.maximum(peak, 1e-30) / 127).all()
    usual = np.abs(x).astype(np.float64).mean(axis=1, keepdims=True) * 5 / 127
    assert (unit <= 1.0001 * (usual + 3 * np.maximum(peak, 1e-30) / largest)).all()
    values, scale = (np.asarray(part, np.float64) for part in quantize_rows(x))
    assert (np.abs(values * scale - x) <= scale * 0.5001 + 1e-37).all()
    zero = peak[:, 0] == 0
    assert (high[zero] == 0).all()
    assert (low[zero] == 0).all()
    assert (values[zero] == 0).all()


@settings(max_examples=20, deadline=None)
@given(seeds, magnitudes)
def test_rounding_in_a_compiled_program_is_that_of_its_operations_one_by_one(seed: int, size: float) -> None:
    """What XLA makes of several operations rounds as they do, even a number halfway between two whole ones."""
    x = halfway(jnp.asarray(numbers(seed, (512, IN), size)))
    for compiled, plain in zip(jax.jit(split_rows)(x), split_rows(x), strict=True):
        np.testing.assert_array_equal(compiled, plain)


reductions = functools.cache(lambda: (jax.jit(row_max), jax.jit(row_sum)))


@pytest.mark.parametrize("size", [1, 2, 31, 32, 33, 37, 64, 576, 1031, 1536, 4096])
def test_staged_reductions_are_the_maximum_and_the_sum(size: int) -> None:
    """Sizes below and above a stage, primes, and sizes with prime factors larger than a stage."""
    maximum, total = reductions()
    for seed in range(5):
        x = numbers(seed, (3, size), 1.0)
        assert np.array_equal(maximum(x), x.max(axis=1))
        bound = 4e-7 * np.log2(size + 1) * np.abs(x).astype(np.float64).sum(axis=1)
        if size % 2 and size > 32:
            bound = bound * 4  # a prime size is summed in one go
        assert (np.abs(np.asarray(total(x), np.float64) - x.astype(np.float64).sum(axis=1)) <= bound).all()
    special = np.zeros((3, size), np.float32)
    special[0, -1], special[1, 0], special[2] = np.inf, -np.inf, -5.0
    assert np.array_equal(maximum(special), special.max(axis=1))
