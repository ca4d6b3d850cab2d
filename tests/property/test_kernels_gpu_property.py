"""The GPU kernel, interpreted on the CPU, beside XLA's program of the same integers; and lowered for CUDA without a GPU."""

from __future__ import annotations

from pathlib import Path
from typing import Any

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


def lowered(choice: KernelChoice, form: Form | None, rows: int = 1, size: int = 512) -> Any:
    weight = some_weight(np.random.default_rng(0), form, size, size)
    x = jax.ShapeDtypeStruct((rows, size), jnp.float32)
    with choice.scope(), lowering_platform.elsewhere("cuda"):
        return jax.jit(linear).trace(weight, x).lower(lowering_platforms=("cuda",))


@pytest.mark.parametrize("form", FORMS, ids=NAMES)
def test_triton_takes_the_kernel(form: Form | None) -> None:
    assert CUDA in lowered(KernelChoice(gpu=True), form).as_text()


def test_nobody_takes_it_unasked() -> None:
    assert CUDA not in lowered(KernelChoice(), Form.FIVE).as_text()
    assert CUDA not in lowered(KernelChoice(gpu=True), Form.FIVE, rows=33).as_text()
    mesh = jax.make_mesh((1,), ("model",))
    with jax.set_mesh(mesh):  # XLA may divide its arrays, and cannot divide a kernel
        assert CUDA not in lowered(KernelChoice(gpu=True), Form.FIVE).as_text()


def triton_module(program: Any) -> str:
    """The Triton module of a lowered program's only kernel, as text."""
    from jaxlib.mlir import ir
    from jaxlib.triton import dialect

    found = []

    def look(op: Any) -> Any:
        if op.name == "stablehlo.custom_call" and CUDA in str(op.attributes["call_target_name"]):
            found.append(ir.StringAttr(op.attributes["mhlo.backend_config"]["ir"]).value_bytes)
        return ir.WalkResult.ADVANCE

    program.compiler_ir("stablehlo").operation.walk(look)
    (code,) = found
    with ir.Context() as context:
        dialect.register_dialect(context)
        return str(ir.Module.parse(code, context))


@pytest.mark.gpu_backend
@pytest.mark.parametrize("rows", [1, 32])
@pytest.mark.parametrize("form", FORMS, ids=NAMES)
@pytest.mark.parametrize("arch", [80, 90])
def test_triton_compiles_the_kernel(tmp_path: Path, form: Form | None, rows: int, arch: int) -> None:
    """To machine code of an A100 and of an H100, in registers alone and with products on the tensor cores."""
    triton = pytest.importorskip("triton", reason="needs the Triton compiler (make gpu-compile)")
    from triton.backends.compiler import GPUTarget

    file = tmp_path / "kernel.ttir"
    file.write_text(triton_module(lowered(KernelChoice(gpu=True), form, rows, 4096)))
    made = triton.compile(str(file), target=GPUTarget("cuda", arch, 32), options={"num_warps": 4, "num_stages": 3})
    assert made.asm["cubin"]
    code = made.asm["ptx"]
    print(f"{made.metadata.shared} bytes of shared memory, {code.count(chr(10))} lines")
    assert "mma.sync" in code or "wgmma" in code
    assert "st.local" not in code
