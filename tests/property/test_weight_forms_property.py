"""Coded weights: what records made of a file's bytes stand for, and products with them."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gguf import quants
from gguf.constants import GGMLQuantizationType
from hypothesis import given, settings
from hypothesis import strategies as st

from atlas_jax.kernels.cpu import library
from atlas_jax.kernels.fused_linear import normed_linear, summed_linear
from atlas_jax.kernels.kernel_choice import KernelChoice
from atlas_jax.kernels.linear import InterleavedArray, PackedArray, QuantArray, Weight, linear, rows_of
from atlas_jax.kernels.weight_forms import OWN_FORM, Form, NotFinite, pack_rows, unpack_records

pytestmark = pytest.mark.skipif(not library.available(), reason="no C compiler, or no AVX-512 VNNI")

Q4_K, Q5_K, Q6_K = GGMLQuantizationType.Q4_K, GGMLQuantizationType.Q5_K, GGMLQuantizationType.Q6_K
BYTES = {Q4_K: 144, Q5_K: 176, Q6_K: 210}
CODES = {Form.FOUR: 15, Form.FIVE: 31, Form.SIX: 31}
seeds = st.integers(0, 2**32 - 1)
kinds = st.sampled_from(list(OWN_FORM))


def in_file(
    rng: np.random.Generator, kind: GGMLQuantizationType, outputs: int, inner: int, spread: float = 1.0
) -> np.ndarray:
    """Rows of a type as they lie in a file: any bytes, but for their units, which are of a size."""
    blocks = rng.integers(0, 256, (outputs, inner // 256, BYTES[kind]), dtype=np.uint8)
    units = np.exp(rng.normal(size=(*blocks.shape[:2], 2)) * spread) * 0.001
    if kind == Q6_K:
        units[..., 0] *= rng.choice([-1, 1], blocks.shape[:2])
        blocks[..., 192] = 127  # one of the factors is the largest, as llama.cpp has it
        blocks[..., 208:] = units[..., :1].astype("<f2").view(np.uint8)
    else:
        blocks[..., 4] = blocks[..., 8] = 63
        units[..., 1] *= CODES[OWN_FORM[kind]] / 2  # about as much below zero as above
        blocks[..., :4] = units.astype("<f2").view(np.uint8).reshape(*blocks.shape[:2], 4)
    return blocks.reshape(outputs, -1)


def packed(kind: GGMLQuantizationType, rows: np.ndarray, inner: int, form: Form | None = None) -> PackedArray:
    form = OWN_FORM[kind] if form is None else form
    records, scale = pack_rows(form, [(kind, rows)], inner)
    return PackedArray(jnp.asarray(records), jnp.asarray(scale), form)


def product(use: bool, weight: Weight, x: jax.Array) -> jax.Array:
    with KernelChoice(cpu=use).scope():
        return jax.jit(linear)(weight, x)


@settings(max_examples=15, deadline=None)
@given(seeds, kinds, st.integers(1, 40), st.integers(1, 5), st.sampled_from([0.0, 0.5, 2.0]))
def test_weights_of_a_file_err_by_little_more_than_half_a_unit(
    seed: int, kind: GGMLQuantizationType, outputs: int, supers: int, spread: float
) -> None:
    rows = in_file(np.random.default_rng(seed), kind, outputs, 256 * supers, spread)
    wanted = quants.dequantize(rows, kind).astype(np.float64)
    records, units = pack_rows(OWN_FORM[kind], [(kind, rows)], 256 * supers)
    assert records.nbytes == rows.nbytes  # as many bytes as the file has
    found, scale = unpack_records(records, OWN_FORM[kind]), units.astype(np.float64)[:, None]
    np.testing.assert_allclose(scale[:, 0], np.abs(wanted).max(axis=1) / 127, rtol=1e-5)
    assert (np.abs(found * scale - wanted) <= 0.58 * scale).all()


@settings(max_examples=15, deadline=None)
@given(seeds, kinds, st.sampled_from(list(CODES)), st.integers(1, 3))
def test_another_form_rounds_once_more(seed: int, kind: GGMLQuantizationType, form: Form, supers: int) -> None:
    """Within half a step of the new codes, which is the block's range divided by their number, and a factor's rounding."""
    inner = 256 * supers
    rows = in_file(np.random.default_rng(seed), kind, 5, inner, 0.3)
    assert_near(kind, rows, inner, form)


def assert_near(kind: GGMLQuantizationType, rows: np.ndarray, inner: int, form: Form) -> None:
    """No weight is off by more than its row's rounding and that of its record."""
    wanted = quants.dequantize(rows, kind).astype(np.float64)
    records, units = pack_rows(form, [(kind, rows)], inner)
    largest = np.abs(wanted.reshape(len(rows), -1, 256)).max(axis=-1).repeat(256, axis=1)
    error = np.abs(unpack_records(records, form) * units[:, None].astype(np.float64) - wanted)
    assert (error <= 0.6 * units[:, None] + largest * 2.2 / CODES[form]).all()


@pytest.mark.parametrize("kind", OWN_FORM)
@pytest.mark.parametrize(("rows", "supers", "outputs"), [(1, 1, 48), (3, 2, 16), (9, 3, 48), (150, 1, 80)])
def test_products_are_those_of_the_weights_unpacked(
    kind: GGMLQuantizationType, rows: int, supers: int, outputs: int
) -> None:
    rng = np.random.default_rng(rows)
    weight = packed(kind, in_file(rng, kind, outputs, 256 * supers), 256 * supers)
    x = jnp.asarray(rng.normal(size=(rows, 256 * supers)).astype(np.float32))
    values = unpack_records(np.asarray(weight.blocks), weight.form)
    wanted = product(True, QuantArray(jnp.asarray(values), weight.scale), x)
    np.testing.assert_array_equal(product(True, weight, x), wanted)
    if rows == 3:
        assert weight.shape == (outputs, 256 * supers)
        np.testing.assert_array_equal(product(False, weight, x), wanted)
        ids = jnp.asarray([[outputs - 1, 0]])
        np.testing.assert_array_equal(rows_of(weight, ids), values[ids].astype(np.float32) * weight.scale[ids, None])


def test_rows_are_put_in_order_and_multiplied() -> None:
    rng = np.random.default_rng(3)
    one, other = in_file(rng, Q4_K, 300, 512), in_file(rng, Q6_K, 213, 512)  # more than a thread takes at a time
    order = rng.permutation(513)[:400]
    records, scale = pack_rows(Form.SIX, [(Q4_K, one), (Q6_K, other)], 512, order, 0.5)
    each = [pack_rows(Form.SIX, [given], 512) for given in ((Q4_K, one), (Q6_K, other))]
    np.testing.assert_array_equal(records, np.concatenate([blocks for blocks, _ in each])[order])
    np.testing.assert_array_equal(scale, np.concatenate([own for _, own in each])[order] * np.float32(0.5))


@pytest.mark.parametrize("kind", OWN_FORM)
@pytest.mark.parametrize("unit", [np.inf, np.nan])
def test_refuses_weights_that_are_not_finite(kind: GGMLQuantizationType, unit: float) -> None:
    rows = in_file(np.random.default_rng(1), kind, 3, 512)
    at = 210 + 208 if kind == Q6_K else BYTES[kind] + (0 if np.isnan(unit) else 2)
    rows[2, at : at + 2] = np.frombuffer(np.float16(unit).tobytes(), np.uint8)
    with pytest.raises(NotFinite):
        pack_rows(OWN_FORM[kind], [(kind, rows)], 512)


@settings(max_examples=12, deadline=None)
@given(seeds, kinds)
def test_any_bytes_are_weights_of_8_bits(seed: int, kind: GGMLQuantizationType) -> None:
    """Whatever a file's units are, no weight is off by more than its row's rounding and its own block's."""
    rng = np.random.default_rng(seed)
    blocks = in_file(rng, kind, 8, 512, 4.0).reshape(8, 2, -1)
    if kind == Q6_K:
        blocks[:, 0, 192:208] = 1  # factors so small that the unit has no room
    else:
        blocks[:, 0, 4:16] &= 1
        blocks[:, 1, 2:4] = np.frombuffer(np.float16(-0.01).tobytes(), np.uint8)  # nothing that llama.cpp writes
    assert_near(kind, blocks.reshape(8, -1), 512, OWN_FORM[kind])


@pytest.mark.parametrize("rows", [1, 9])
def test_parts_in_turns_are_one_matrix(rows: int) -> None:
    rng = np.random.default_rng(rows)
    four, six = (packed(kind, in_file(rng, kind, n, 256), 256) for kind, n in ((Q4_K, 96), (Q6_K, 32)))
    weight = InterleavedArray((four, six), (48, 16))
    order = np.concatenate([np.arange(48), np.arange(96, 112), np.arange(48, 96), np.arange(112, 128)])  # turns
    values, scale = (np.concatenate(arrays)[order] for arrays in zip(*map(_arrays, (four, six)), strict=True))
    whole = QuantArray(jnp.asarray(values), jnp.asarray(scale))
    assert weight.shape == whole.shape
    x, added, gain = (jnp.asarray(rng.normal(size=(rows, 256)).astype(np.float32)) for _ in range(3))

    def products(weight: Weight) -> list[jax.Array]:
        normed = normed_linear(weight, x, gain[0], 1e-5)
        return [linear(weight, x), normed, *summed_linear(weight, x, added, None, gain[0], 1e-5)]

    for found, wanted in zip(jax.jit(products)(weight), jax.jit(products)(whole), strict=True):
        np.testing.assert_array_equal(found, wanted)


def _arrays(weight: PackedArray) -> tuple[np.ndarray, np.ndarray]:
    return unpack_records(np.asarray(weight.blocks), weight.form), np.asarray(weight.scale)
