"""Every type of tensor that llama.cpp reads as numbers, against what it reads (`benchmarks/peer/types_golden.py`)."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

from atlas_jax.gguf._types import BLOCKS, TensorType, as_floats

PEER = np.load(Path(__file__).parents[1] / "golden" / "peer" / "types.npz")
NAMES = sorted({name.partition(".")[0] for name in PEER.files})


@pytest.mark.parametrize("name", NAMES)
def test_numbers_are_those_of_llama_cpp(name: str) -> None:
    kind, packed = TensorType[name], PEER[f"{name}.packed"]
    numbers, size = BLOCKS[kind]
    assert 256 // numbers * size == packed.shape[1]
    with np.errstate(all="ignore"):
        found = as_floats(kind, packed)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, PEER[f"{name}.values"], rtol=1e-6)


def test_types_are_those_of_the_gguf_package() -> None:
    for kind in GGMLQuantizationType:
        assert TensorType[kind.name] == kind
        assert BLOCKS[TensorType(kind)] == GGML_QUANT_SIZES[kind]
    assert len(NAMES) >= 26
