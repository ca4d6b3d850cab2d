"""The GEMM for AMX on processors that have none: its source compiled with AMX in plain C, against that for AVX-512 VNNI.

How fast it is, and whether the processor agrees with `tiles/tiles.h`, only a processor with AMX can say: there, the tests
of `test_kernels_cpu_property.py` run the GEMM itself.
"""

from __future__ import annotations

import subprocess
from pathlib import Path

import jax
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from atlas_jax.kernels.cpu import library
from atlas_jax.kernels.linear import pack_floats, pack_weight, split_rows
from atlas_jax.kernels.weight_forms import FLOATS4, Form, unpack_records
from tests.patience import PATIENCE

HERE = Path(__file__).parent / "tiles"
KERNELS = library.SHIPPED

# the comparison is with the GEMM for VNNI, which must be able to run
pytestmark = pytest.mark.skipif(
    library.compiler() is None or not library.available(), reason="no C compiler, or no AVX-512 VNNI"
)


@pytest.fixture(scope="module")
def product(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One call of the product as a program of its own."""
    target = tmp_path_factory.mktemp("tiles") / "product"
    command = [
        str(library.compiler()),
        "-std=gnu11",
        "-O1",
        "-ffp-contract=off",
        "-I",
        str(KERNELS),
        "-I",
        jax.ffi.include_dir(),
    ]
    sources = [str(source) for source in (*sorted(KERNELS.glob("linear*.c")), HERE / "product.c")]
    subprocess.run(
        [*command, "-include", str(HERE / "tiles.h"), *sources, "-o", str(target)], check=True, timeout=PATIENCE
    )
    return target


def call(product: Path, x: np.ndarray, weight: np.ndarray, scale: np.ndarray, *, tiles: bool) -> np.ndarray:
    numbers = (int(tiles), *x.shape, weight.shape[0], weight.shape[2] if weight.dtype == np.uint8 else 64)
    given = b"".join(array.tobytes() for array in (x, weight, scale))
    words = [str(product), *(str(number) for number in numbers)]
    done = subprocess.run(words, input=given, capture_output=True, check=True, timeout=PATIENCE)
    return np.frombuffer(done.stdout, np.float32).reshape(x.shape[0], -1)


@settings(deadline=None, max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    seed=st.integers(0, 2**32 - 1),
    rows=st.integers(1, 128),
    inner=st.integers(1, 4).map(lambda n: 64 * n),
    outputs=st.integers(1, 9).map(lambda n: 16 * n),
    form=st.sampled_from(["plain", "packed", "floats"]),
)
@pytest.mark.slow
def test_tiles_give_the_bits_of_vnni(product: Path, seed: int, rows: int, inner: int, outputs: int, form: str) -> None:
    rng = np.random.default_rng(seed)
    codes = rng.integers(0, 16, (outputs, inner)).astype(np.uint8)
    if form == "packed":
        step, base = (rng.normal(size=(outputs, inner // 32)).astype(np.float32) for _ in range(2))
        weight, scale = pack_weight(codes, step, base - 8 * step)
    elif form == "floats":
        weight, scale = pack_floats(codes, rng.integers(115, 128, (outputs, inner // 32)).astype(np.uint8))
    else:
        weight = rng.integers(-127, 128, (outputs, inner)).astype(np.int8)
        scale = rng.uniform(0.1, 1.0, outputs).astype(np.float32)
    x = (rng.normal(size=(rows, inner)) * rng.choice([1.0, 300.0], p=[0.98, 0.02], size=(rows, inner))).astype(
        np.float32
    )
    x[0] = 0.0
    found, wanted = (call(product, x, weight, scale, tiles=tiles) for tiles in (True, False))
    np.testing.assert_array_equal(found, wanted)
    whole = {"plain": lambda x: x, "packed": unpacked, "floats": unpacked_floats}[form](weight)
    exact = whole.astype(np.float64) * scale[:, None]
    half = np.asarray(split_rows(x)[2]) / 2
    bound = (half * 1.001 + 1e-6 * np.abs(x).max(axis=1, keepdims=True)) * np.abs(exact).sum(axis=1)
    assert np.all(np.abs(found - x.astype(np.float64) @ exact.T) <= bound)


@settings(deadline=None, max_examples=12, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    seed=st.integers(0, 2**32 - 1),
    rows=st.integers(1, 40),
    records=st.integers(1, 3),
    outputs=st.integers(1, 5).map(lambda n: 16 * n),
    form=st.sampled_from(Form),
)
def test_records_are_multiplied_as_the_bytes_they_stand_for(
    product: Path, seed: int, rows: int, records: int, outputs: int, form: Form
) -> None:
    rng = np.random.default_rng(seed)
    blocks = rng.integers(0, 256, (outputs, records, form.value), np.uint8)
    scale = rng.uniform(0.1, 1.0, outputs).astype(np.float32)
    x = rng.normal(size=(rows, records * form.span)).astype(np.float32)
    wanted = call(product, x, unpack_records(blocks, form), scale, tiles=False)
    for tiles in (True, False):
        np.testing.assert_array_equal(call(product, x, blocks, scale, tiles=tiles), wanted)


def unpacked(blocks: np.ndarray) -> np.ndarray:
    """The weights that records of `PackedArray` stand for, as integers."""
    halves = blocks[..., :8].copy().view("<i2").astype(np.int64)  # [out, records, (step, base) of two blocks]
    codes = np.stack([blocks[..., 8:] & 15, blocks[..., 8:] >> 4], axis=-1).reshape(*blocks.shape[:-1], 2, 32)
    sums = codes * halves[..., 0::2, None] + halves[..., 1::2, None]
    return ((sums + 2**15) % 2**16 - 2**15 >> 8).reshape(blocks.shape[0], -1)


def unpacked_floats(blocks: np.ndarray) -> np.ndarray:
    """The weights that records of `Form.FLOATS` stand for, as integers."""
    codes = np.stack([blocks[..., 2:] & 15, blocks[..., 2:] >> 4], axis=-1).reshape(*blocks.shape[:-1], 2, 32)
    return np.rint(np.asarray(FLOATS4)[codes] * 2.0 ** (3 - blocks[..., :2, None].astype(int))).reshape(len(blocks), -1)
