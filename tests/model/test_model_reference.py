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
    position_scale=st.sampled_from([1.0, 0.25, 0.0]),
    interleaved=st.booleans(),
    magnitude=st.sampled_from([1.0, 1.3]),
)
LAYERS = st.builds(LayerConfig, sliding_window=st.sampled_from([None, 70]), rope=st.integers(0, 1))
CHOICES = st.fixed_dictionaries(
    {
        "layers": st.tuples(LAYERS, LAYERS),
        "ropes": st.tuples(ROPES, ROPES),
        "activation": st.sampled_from(["silu", "gelu_tanh"]),
        "gated": st.booleans(),
        "norm": st.sampled_from(["rms", "layer"]),
        "norm_bias": st.booleans(),
        "pre_norms": st.booleans(),
        "post_norms": st.booleans(),
        "parallel": st.booleans(),
        "qk_norm": st.sampled_from([None, "head", "heads", "width"]),
        "qkv_bias": st.booleans(),
        "out_bias": st.booleans(),
        "gate_up_bias": st.booleans(),
        "down_bias": st.booleans(),
        "embed_scale": st.sampled_from([1.0, 3.0]),
        "residual_scale": st.sampled_from([1.0, 0.4]),
        "attention_scale": st.sampled_from([None, 0.15]),
        "attention_softcap": st.sampled_from([None, 2.0]),
        "logit_scale": st.sampled_from([1.0, 0.3]),
        "final_softcap": st.sampled_from([None, 8.0]),
    }
)
ROTATED_IN_PAIRS = RopeConfig(base=10_000.0, dims=8, interleaved=True, magnitude=1.3)


def chosen_tensors(choices: dict[str, Any]) -> dict[str, np.ndarray | None]:
    """What a Llama's file needs beside its own tensors, and what it must not have."""
    random, shape = np.random.default_rng(2), tiny_model.LLAMA
    size = {
        "q": shape.heads * shape.head_dim,
        "k": shape.kv_heads * shape.head_dim,
        "v": shape.kv_heads * shape.head_dim,
    }
    biases = {"qkv": {f"attn_{part}": size[part] for part in "qkv"}, "out": {"attn_output": shape.embed}}
    biases |= {"gate_up": {"ffn_gate": shape.ff, "ffn_up": shape.ff}, "down": {"ffn_down": shape.embed}}
    biases["norm"] = {"attn_norm": shape.embed, "ffn_norm": shape.embed}
    each: dict[str, tuple[int, ...]] = {}
    for name, parts in biases.items():
        if choices.get(f"{name}_bias"):
            each |= {f"{part}.bias": (count,) for part, count in parts.items()}
    if choices.get("qk_norm"):
        for part, heads in (("q", shape.heads), ("k", shape.kv_heads)):
            kinds = {"head": (shape.head_dim,), "heads": (heads, shape.head_dim), "width": (heads * shape.head_dim,)}
            each[f"attn_{part}_norm.weight"] = kinds[choices["qk_norm"]]
    if choices.get("post_norms"):
        each |= {"post_attention_norm.weight": (shape.embed,), "post_ffw_norm.weight": (shape.embed,)}
    absent = [] if choices.get("pre_norms", True) else ["attn_norm", "ffn_norm"]
    absent += ["ffn_norm"] if choices.get("parallel") else []
    absent += [] if choices.get("gated", True) else ["ffn_gate"]
    out: dict[str, np.ndarray | None] = {}
    for layer in range(shape.layers):
        out |= {f"blk.{layer}.{name}": random.uniform(0.5, 1.5, of).astype(np.float32) for name, of in each.items()}
        for name in absent:
            out |= {f"blk.{layer}.{name}.weight": None}
            out.pop(f"blk.{layer}.{name}.bias", None)
    if choices.get("norm_bias"):
        out["output_norm.bias"] = random.uniform(0.5, 1.5, shape.embed).astype(np.float32)
    return out


EVERYTHING: dict[str, Any] = {
    **dict.fromkeys(("norm_bias", "parallel", "post_norms", "qkv_bias", "out_bias", "gate_up_bias", "down_bias"), True),
    **{"norm": "layer", "gated": False, "qk_norm": "heads", "attention_softcap": 2.0},
    **{"residual_scale": 0.4, "logit_scale": 0.3},
}


@settings(max_examples=4, deadline=None, derandomize=True, database=None)
@example({"qk_norm": "head", "ropes": (ROTATED_IN_PAIRS,)})  # rotation's order of a head is also that of its norm
@example(EVERYTHING)
@given(CHOICES)
def test_what_a_family_may_choose_is_computed(choices: dict[str, Any]) -> None:
    """Also what no family chooses together yet: somebody who adds one writes values, and must be able to rely on them."""
    with tempfile.TemporaryDirectory() as folder:
        path = tiny_model.write_model(Path(folder) / "model.gguf", tiny_model.LLAMA, tensors=chosen_tensors(choices))
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
