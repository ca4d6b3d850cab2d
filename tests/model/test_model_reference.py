"""The model, from GGUF file to scores, against a float64 transformer that sees the whole text at once."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from atlas_jax.config import PAGE, LayerConfig, RopeConfig
from atlas_jax.gguf import GGUFFile
from atlas_jax.kernels.linear import PackedArray, uses_cpu_kernel
from atlas_jax.model.loading import load_params, model_config, parameter_count
from atlas_jax.model.page_schedule import PageSchedule
from tests import tiny_model
from tests.model.scoring import scores
from tests.reference import transformer_reference

LENGTH = 2 * PAGE + 40
TEXT = np.random.default_rng(3).integers(0, 300, LENGTH).tolist()
SHORT = TEXT[: PAGE - 10]
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


ROPES = st.builds(
    RopeConfig,
    base=st.sampled_from([10_000.0, 1e6]),
    dims=st.sampled_from([8, 16]),
    position_scale=st.sampled_from([1.0, 0.25]),
    interleaved=st.booleans(),
)
LAYERS = st.builds(LayerConfig, sliding_window=st.sampled_from([None, 70]), rope=st.integers(0, 1))
CHOICES = st.fixed_dictionaries(
    {
        "layers": st.tuples(LAYERS, LAYERS),
        "ropes": st.tuples(ROPES, ROPES),
        "activation": st.sampled_from(["silu", "gelu_tanh"]),
        "qk_norm": st.booleans(),
        "post_norms": st.booleans(),
        "embed_scale": st.sampled_from([1.0, 3.0]),
        "attention_scale": st.sampled_from([None, 0.15]),
        "final_softcap": st.sampled_from([None, 8.0]),
    }
)
ROTATED_IN_PAIRS = RopeConfig(base=10_000.0, dims=8, interleaved=True)


@settings(max_examples=4, deadline=None, derandomize=True, database=None)
@example({"qk_norm": True, "ropes": (ROTATED_IN_PAIRS,)})  # rotation's order of a head is also that of its norm
@given(CHOICES)
def test_what_a_family_may_choose_is_computed(choices: dict[str, Any]) -> None:
    """Also what no family chooses together yet: somebody who adds one writes values, and must be able to rely on them."""
    random, shape = np.random.default_rng(2), tiny_model.LLAMA
    norms = {"attn_q_norm": shape.head_dim, "attn_k_norm": shape.head_dim} if choices.get("qk_norm") else {}
    norms |= {"post_attention_norm": shape.embed, "post_ffw_norm": shape.embed} if choices.get("post_norms") else {}
    tensors = {
        f"blk.{layer}.{name}.weight": random.uniform(0.5, 1.5, size).astype(np.float32)
        for layer in range(shape.layers)
        for name, size in norms.items()
    }
    with tempfile.TemporaryDirectory() as folder:
        path = tiny_model.write_model(Path(folder) / "model.gguf", shape, tensors=tensors)
        with GGUFFile.open(path) as file:
            config = model_config(file).replace(**choices)
            params = load_params(file, config, dtype="float32")
        wanted = transformer_reference.logits(config, transformer_reference.tensors(path), SHORT)
    found = scores(config, params, SHORT, "float32", PageSchedule(window=None))
    assert np.abs(found - wanted).max() < 2e-3 * wanted.std()


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
