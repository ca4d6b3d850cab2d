"""The model, from GGUF file to scores, against a float64 transformer that sees the whole text at once."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from atlas_jax.config import PAGE
from atlas_jax.gguf import GGUFFile
from atlas_jax.kernels.linear import PackedArray, uses_cpu_kernel
from atlas_jax.model.loading import load_params, model_config, parameter_count
from atlas_jax.model.page_schedule import PageSchedule
from tests import tiny_model
from tests.model.scoring import scores
from tests.reference import transformer_reference

LENGTH = 2 * PAGE + 40
TEXT = np.random.default_rng(3).integers(0, 300, LENGTH).tolist()
families = pytest.mark.parametrize(
    "shape", [tiny_model.LLAMA, tiny_model.NIBBLES, tiny_model.GEMMA], ids=["llama", "llama-q4", "gemma3"]
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("models")


@families
def test_scores_are_those_of_the_definition(folder: Path, shape: tiny_model.Shape) -> None:
    path = tiny_model.write_model(folder / f"{shape.architecture}-{shape.nibbles}.gguf", shape)
    with GGUFFile.open(path) as file:
        config = model_config(file)
        exact, rounded = (load_params(file, config, dtype=dtype) for dtype in ("float32", "int8"))
    assert isinstance(rounded.layers[0].gate_up, PackedArray) == (shape.nibbles and uses_cpu_kernel(64, 16))
    weights = transformer_reference.tensors(path)
    assert parameter_count(exact) == parameter_count(rounded) == sum(value.size for value in weights.values())
    wanted = transformer_reference.logits(config, weights, TEXT)
    found = scores(config, exact, TEXT, "float32", PageSchedule(window=None))
    spread = wanted.std()
    assert np.abs(found - wanted).max() < 2e-3 * spread
    eight_bits = scores(config, rounded, TEXT, "int8", PageSchedule(window=None))
    assert np.sqrt(((eight_bits - wanted) ** 2).mean()) < 0.15 * spread
    if any(layer.sliding_window is not None for layer in config.layers):
        assert shape.sliding_window is not None
        assert shape.sliding_window < LENGTH, "the sliding window is felt"


def test_a_window_is_the_whole_model_until_its_first_page_leaves(folder: Path) -> None:
    path = tiny_model.write_model(folder / "window.gguf", tiny_model.LLAMA)
    with GGUFFile.open(path) as file:
        config = model_config(file)
        params = load_params(file, config, dtype="float32")
    whole = scores(config, params, TEXT, "float32", PageSchedule(window=None))
    windowed = scores(
        config, params, TEXT, "float32", PageSchedule(window=2, update=2)
    )  # as many ring slots as the whole text
    assert np.array_equal(windowed, whole)
    narrow = scores(config, params, TEXT, "float32", PageSchedule(window=1, update=1))
    np.testing.assert_allclose(narrow[:PAGE], whole[:PAGE], atol=2e-3)
    assert np.abs(narrow[PAGE:] - whole[PAGE:]).max() > 1e-2
