"""The GPU kernel, interpreted on the CPU, beside XLA's program of the same integers; and lowered for CUDA without a GPU."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from atlas_jax.kernels import lowering_platform
from atlas_jax.kernels.gpu import few_rows
from atlas_jax.kernels.kernel_choice import KernelChoice
from atlas_jax.kernels.linear import InterleavedArray, PackedArray, QuantArray, linear
from atlas_jax.kernels.weight_forms import Form, unpack_records

FORMS = [None, *Form]
NAMES = ["int8", *(form.name for form in Form)]
SHAPES = [(1, 48, 256), (3, 70, 768), (32, 9, 1280)]
"""Rows, outputs and inputs: of one tile and of several, a part of a tile, and of groups that no number of tiles has."""
CUDA = "__gpu$xla.gpu.triton"
seeds = st.integers(0, 2**32 - 1)


def some_weight(random: np.random.Generator, form: Form | None, outputs: int, inner: int) -> QuantArray | PackedArray:
    """Any bytes: every code, step, base and shift occurs."""
    scale = jnp.asarray(random.uniform(1e-3, 0.1, outputs).astype(np.float32))
    if form is None:
        return QuantArray(jnp.asarray(random.integers(-128, 128, (outputs, inner)).astype(np.int8)), scale)
    records = random.integers(0, 256, (outputs, inner // form.span, form.value)).astype(np.uint8)
    if form is Form.FLOATS:
        records[..., :2] = random.integers(0, 12, records[..., :2].shape)
    return PackedArray(jnp.asarray(records), scale, form)


@pytest.mark.parametrize("form", FORMS, ids=NAMES)
@settings(max_examples=3, deadline=None, derandomize=True)
@given(seeds, st.sampled_from(SHAPES))
def test_sums_are_those_of_the_integers_that_weights_stand_for(
    form: Form | None, seed: int, shape: tuple[int, int, int]
) -> None:
    rows, outputs, inner = shape
    random = np.random.default_rng(seed)
    weight = some_weight(random, form, outputs, inner)
    terms = random.integers(-128, 128, (2 * rows, inner)).astype(np.int8)
    plain = (
        np.asarray(weight.values)
        if isinstance(weight, QuantArray)
        else unpack_records(np.asarray(weight.blocks), weight.form)
    )
    found = jax.jit(few_rows.term_sums, static_argnames="interpret")(jnp.asarray(terms), weight, interpret=True)
    np.testing.assert_array_equal(found, terms.astype(np.int64) @ plain.T.astype(np.int64))


def product(choice: KernelChoice, weight: InterleavedArray, x: jax.Array) -> np.ndarray:
    with choice.scope():
        return np.asarray(jax.jit(linear)(weight, x))


@pytest.mark.parametrize("rows", [2, 33])
def test_products_have_the_bits_of_xlas_program(rows: int) -> None:
    """Of few rows by the kernel, and of many that it does not take."""
    random = np.random.default_rng(rows)
    parts = some_weight(random, Form.FIVE, 48, 512), some_weight(random, None, 16, 512)
    weight, x = InterleavedArray(parts, (24, 8)), jnp.asarray(random.standard_normal((rows, 512)), jnp.float32)
    by_xla = product(KernelChoice(cpu=False), weight, x)
    by_kernel = product(KernelChoice(cpu=False, gpu=True, interpret_gpu=True), weight, x)
    np.testing.assert_array_equal(by_kernel, by_xla)


def lowered(choice: KernelChoice, form: Form | None, rows: int = 1) -> str:
    weight = some_weight(np.random.default_rng(0), form, 64, 512)
    x = jax.ShapeDtypeStruct((rows, 512), jnp.float32)
    with choice.scope(), lowering_platform.elsewhere("cuda"):
        return jax.jit(linear).trace(weight, x).lower(lowering_platforms=("cuda",)).as_text()


@pytest.mark.parametrize("form", FORMS, ids=NAMES)
def test_triton_takes_the_kernel(form: Form | None) -> None:
    assert CUDA in lowered(KernelChoice(gpu=True), form)


def test_nobody_takes_it_unasked() -> None:
    assert CUDA not in lowered(KernelChoice(), Form.FIVE)
    assert CUDA not in lowered(KernelChoice(gpu=True), Form.FIVE, rows=33)
    mesh = jax.make_mesh((1,), ("model",))
    with jax.set_mesh(mesh):  # XLA may divide its arrays, and cannot divide a kernel
        assert CUDA not in lowered(KernelChoice(gpu=True), Form.FIVE)
