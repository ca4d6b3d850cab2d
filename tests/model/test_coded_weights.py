"""Loading a model whose matrices lie in records of 256 weights: forms, order, and memory."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf import GGMLQuantizationType, GGUFWriter

from atlas_jax.gguf import GGUFFile
from atlas_jax.kernels.cpu import library
from atlas_jax.kernels.linear import InterleavedArray, PackedArray, QuantArray, Weight, unpack
from atlas_jax.kernels.weight_forms import Form, pack_rows
from atlas_jax.model import tensor_reader
from atlas_jax.model.loading import load_params, model_config, parameter_count
from atlas_jax.model.tensor_reader import TensorReader
from benchmarks.sized_models import Size, matrices, write_sized_model
from tests import tiny_model

pytestmark = pytest.mark.skipif(not library.available(), reason="no C compiler, or no AVX-512 VNNI")

SIZE = Size(layers=2, embed=256, ff=512, heads=4, kv_heads=2, head_dim=64)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    return write_sized_model(folder / "coded.gguf", SIZE, tiny_model.write_model(folder / "tiny.gguf"))


def floats(weight: Weight) -> tuple[np.ndarray, np.ndarray]:
    """A matrix, and the unit of each of its outputs."""
    if isinstance(weight, InterleavedArray):
        values, scales = zip(*map(floats, weight.parts), strict=True)
        turns = [part.reshape(-1, n, part.shape[1]) for part, n in zip(values, weight.lengths, strict=True)]
        units = [part.reshape(-1, n) for part, n in zip(scales, weight.lengths, strict=True)]
        return np.concatenate(turns, axis=1).reshape(weight.shape), np.concatenate(units, axis=1).reshape(-1)
    if isinstance(weight, PackedArray):
        weight = unpack(weight)
    assert isinstance(weight, QuantArray)
    scale = np.asarray(weight.scale)
    return np.asarray(weight.values) * scale[:, None], scale


def test_weights_stay_in_the_bits_of_the_file(model: Path) -> None:
    with GGUFFile.open(model) as file:
        config = model_config(file)
        exact, coded = (load_params(file, config, dtype=dtype) for dtype in ("float32", "int8"))
        size = sum(info.nbytes for name, info in file.tensors.items() if name.startswith("blk.") and "norm" not in name)
    assert parameter_count(exact) == parameter_count(coded)
    stored = 0
    pairs = list[tuple[Weight | None, Weight | None]]()
    for one, other in zip(exact.layers, coded.layers, strict=True):
        pairs += [(one.qkv, other.qkv), (one.out, other.out), (one.gate_up, other.gate_up), (one.down, other.down)]
        assert isinstance(other.qkv, InterleavedArray)
        assert [part.form for part in other.qkv.parts if isinstance(part, PackedArray)] == [Form.FOUR, Form.SIX]
    for wanted, weight in pairs:
        assert weight is not None
        found, unit = floats(weight)
        assert (np.abs(found - np.asarray(wanted)) <= 0.6 * unit[:, None]).all()
        parts = weight.parts if isinstance(weight, InterleavedArray) else (weight,)
        stored += sum(part.blocks.nbytes for part in parts if isinstance(part, PackedArray))
    assert stored == size


@pytest.mark.parametrize("kind", [GGMLQuantizationType.IQ4_NL, GGMLQuantizationType.IQ4_XS])
def test_unequal_levels_stay_coded_beside_values_in_more_bits(tmp_path: Path, kind: GGMLQuantizationType) -> None:
    tokenizer = tiny_model.write_model(tmp_path / "tiny.gguf")
    kinds = {name: kind for name, *_, own in matrices(SIZE, 1) if own == GGMLQuantizationType.Q4_K}
    path = write_sized_model(tmp_path / "levels.gguf", SIZE, tokenizer, kinds=kinds)
    with GGUFFile.open(path) as file:
        config = model_config(file)
        exact, coded = (load_params(file, config, dtype=dtype) for dtype in ("float32", "int8"))
    for one, other in zip(exact.layers, coded.layers, strict=True):
        assert isinstance(other.qkv, InterleavedArray)
        assert [part.form for part in other.qkv.parts if isinstance(part, PackedArray)] == [Form.LEVELS, Form.SIX]
        for wanted, weight in ((one.qkv, other.qkv), (one.out, other.out), (one.gate_up, other.gate_up)):
            assert weight is not None
            if isinstance(weight, PackedArray):
                assert weight.form is Form.LEVELS
            found, unit = floats(weight)
            assert (np.abs(found - np.asarray(wanted)) <= 0.76 * unit[:, None]).all()


def test_what_was_packed_is_not_copied(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A large model is in memory once while it is loaded."""
    made: list[int] = []

    def noted(*args: Any) -> tuple[np.ndarray, np.ndarray]:
        records, scale = pack_rows(*args)
        made.append(records.ctypes.data)
        return records, scale

    monkeypatch.setattr(tensor_reader, "pack_rows", noted)
    with GGUFFile.open(model) as file:
        params = load_params(file, model_config(file))
    for layer in params.layers:
        assert isinstance(layer.down, PackedArray)
        assert layer.down.blocks.unsafe_buffer_pointer() in made


def test_experts_are_packed_one_by_one(tmp_path: Path) -> None:
    count, size, inner = 3, 16, 512
    rng = np.random.default_rng(2)
    records = rng.integers(0, 256, (2, count * size * inner // 256, 144), np.uint8)
    records[..., :4] = np.frombuffer(
        rng.uniform(0.001, 0.01, (*records.shape[:2], 2)).astype("<f2").tobytes(), np.uint8
    ).reshape(*records.shape[:2], 4)
    writer = GGUFWriter(tmp_path / "experts.gguf", "none")
    for name, blocks in zip(("gate", "up"), records, strict=True):
        writer.add_tensor(name, blocks.reshape(count, size, -1), raw_dtype=GGMLQuantizationType.Q4_K)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    order, tensors = rng.permutation(2 * size), {"gate": size, "up": size}
    with GGUFFile.open(tmp_path / "experts.gguf") as file:
        wanted = TensorReader(file, "float32", {}, ()).matrices(tensors, count, inner, order, 0.5)
        coded = TensorReader(file, "int8", dict.fromkeys(tensors, Form.FOUR), ()).matrices(
            tensors, count, inner, order, 0.5
        )
    assert isinstance(coded, PackedArray)
    assert coded.shape == np.shape(wanted) == (count, 2 * size, inner)
    assert coded.blocks.nbytes == records.nbytes
    found, scale = unpack(coded), np.asarray(coded.scale)[..., None]
    assert (np.abs(np.asarray(found.values) * scale - np.asarray(wanted)) <= 0.6 * scale).all()


def test_layers_that_differ_take_the_wider_form(model: Path, tmp_path: Path) -> None:
    """Real files have some layers' matrices in more bits; programs are shared all the same."""
    mixed = [
        (name, rows, inner, GGMLQuantizationType.Q4_K if re.match(r"blk.0.(ffn_down|attn_v)", name) else kind)
        for name, rows, inner, kind in matrices(SIZE, 300)
    ]
    path = write_sized_model(tmp_path / "mixed.gguf", SIZE, model, kinds={name: kind for name, _, _, kind in mixed})
    with GGUFFile.open(path) as file:
        config = model_config(file)
        exact, coded = (load_params(file, config, dtype=dtype) for dtype in ("float32", "int8"))
    for one, other in zip(exact.layers, coded.layers, strict=True):
        assert isinstance(other.down, PackedArray)
        assert other.down.form is Form.SIX
        found, unit = floats(other.down)
        wanted = np.asarray(one.down)
        assert np.abs(found - wanted).max() <= 0.05 * np.abs(wanted).max() + 0.6 * unit.max()
