"""What would be made of a file's tensors is what is made of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import pytest

from atlas_jax.config import WeightDtype
from atlas_jax.gguf import GGUFFile
from atlas_jax.kernels.cpu import library
from atlas_jax.kernels.kernel_choice import KernelChoice
from atlas_jax.kernels.linear import PackedArray, QuantArray
from atlas_jax.model.loading import load_params, model_config
from atlas_jax.model.tensor_shapes import loaded_shapes
from tests import tiny_families, tiny_model


def described(tree: Any) -> Any:
    leaves, structure = jax.tree.flatten(tree)
    return structure, [(leaf.shape, leaf.dtype) for leaf in leaves]


def check(path: Path, dtype: WeightDtype) -> None:
    with GGUFFile.open(path) as file, KernelChoice(cpu=True, tpu=False).scope():
        config = model_config(file)
        assert described(loaded_shapes(file, config, dtype=dtype)) == described(load_params(file, config, dtype=dtype))


@pytest.mark.parametrize("dtype", ["int8", "float32"])
@pytest.mark.parametrize("shape", [tiny_model.LLAMA, tiny_model.NIBBLES, tiny_model.GEMMA])
def test_shapes_are_those_of_what_is_loaded(tmp_path: Path, shape: tiny_model.Shape, dtype: WeightDtype) -> None:
    check(tiny_model.write_model(tmp_path / "tiny.gguf", shape), dtype)


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(tiny_families.SAMPLES))
def test_shapes_are_those_of_every_architecture(tmp_path: Path, name: str) -> None:
    check(tiny_families.write_sample(tmp_path / f"{name}.gguf", tiny_families.SAMPLES[name]), "int8")


def test_weights_stay_coded_where_a_kernel_reads_them_so(tmp_path: Path) -> None:
    path = tiny_model.write_model(tmp_path / "tiny.gguf", tiny_model.NIBBLES)
    with GGUFFile.open(path) as file:
        config = model_config(file)

        def kinds(choice: KernelChoice) -> set[type]:
            with choice.scope():
                layer = loaded_shapes(file, config, dtype="int8").layers[0]
            return {type(layer.qkv), type(layer.out), type(layer.gate_up), type(layer.down)}

        assert kinds(KernelChoice(cpu=False)) == {QuantArray}
        if library.available():
            assert kinds(KernelChoice(cpu=False, gpu=True, interpret_gpu=True)) == {PackedArray}


def test_no_weight_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tiny_model.write_model(tmp_path / "tiny.gguf", tiny_model.NIBBLES)
    with GGUFFile.open(path) as file:
        config = model_config(file)
        monkeypatch.setattr(GGUFFile, "raw", lambda self, name: pytest.fail(f"{name} was read"))
        loaded_shapes(file, config)
