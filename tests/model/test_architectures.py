"""Every architecture, from its file to its logits: against its definition, and against what llama.cpp makes of the file."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from atlas_jax.aot import INLINE
from atlas_jax.config import ConfigError, ModelConfig, WeightDtype
from atlas_jax.gguf import GGUFFile
from atlas_jax.kernels.kv_pages import KVDtype
from atlas_jax.kernels.linear import QuantArray
from atlas_jax.model.families import FAMILIES, UnsupportedModel
from atlas_jax.model.kv_cache import KVCache, init_kv_cache, page_start, start_page
from atlas_jax.model.layer_groups import Trunk
from atlas_jax.model.loading import load_params, model_config, param_shapes
from atlas_jax.model.page_schedule import PageSchedule
from atlas_jax.model.params import ModelParams
from atlas_jax.model.transformer import logits
from atlas_jax.sharding import check_mesh
from tests import tiny_families
from tests.reference import transformer_reference
from tests.tiny_families import SAMPLES, TEXT

GOLDEN = Path(__file__).parents[1] / "golden" / "peer"
EXACT, OF_A_STATE, OF_A_TABLE = 2e-5, 1e-4, 1e-3
"""How far logits may be off, of the largest. llama.cpp looks GELU up in a table of half-precision values, and rounds states
of layers to 2e-5 of their definition."""


@dataclasses.dataclass(frozen=True)
class Tiny:
    path: Path
    config: ModelConfig
    params: ModelParams


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("families")


def opened(folder: Path, name: str, dtype: WeightDtype = "float32") -> Tiny:
    path = tiny_families.write_sample(folder / f"{name}.gguf", SAMPLES[name])
    with GGUFFile.open(path) as file:
        config = model_config(file)
        return Tiny(path, config, load_params(file, config, dtype=dtype))


class Reader:
    """A model that reads rows of a batch, by one program for every number of tokens."""

    def __init__(self, tiny: Tiny, rows: int, dtype: KVDtype = "float32") -> None:
        config, trunk = tiny.config, Trunk(tiny.config)

        def step(params: ModelParams, cache: KVCache, tokens: jax.Array, count: jax.Array) -> tuple[jax.Array, KVCache]:
            *_, (cache, _, states) = trunk.parts(INLINE, None, params, cache, tokens, count)
            return logits(config, params, states[-1]), cache

        # compiled fast instead of well
        self._step = jax.jit(step, compiler_options={"xla_backend_optimization_level": 0})
        self._params = tiny.params
        self._cache = init_kv_cache(config, rows, 1, dtype)
        for row in range(rows):
            self._cache = start_page(self._cache, page_start(row, PageSchedule(window=None).next_page(0)))
        self._rows = rows

    def __call__(self, tokens: np.ndarray) -> np.ndarray:
        """Scores after each of the next tokens of every row."""
        count = np.full(self._rows, tokens.shape[1], np.int32)
        scores, self._cache = self._step(self._params, self._cache, tokens.astype(np.int32), count)
        return np.asarray(scores)


def scores_of(tiny: Tiny, dtype: KVDtype) -> np.ndarray:
    """Scores of the text: operation by operation, most of which are compiled once for all architectures."""
    with jax.disable_jit():
        (scores,) = Reader(tiny, 1, dtype)(np.asarray([TEXT]))
    return scores


def relative_error(found: np.ndarray, wanted: np.ndarray) -> float:
    return float(np.abs(found - wanted).max() / np.abs(wanted).max())


def test_every_architecture_has_a_sample_and_a_golden_file() -> None:
    assert {sample.architecture for sample in SAMPLES.values()} == set(FAMILIES)
    of_peer = {f"{name}.logits.npy" for name, sample in SAMPLES.items() if sample.peer}
    assert of_peer == {path.name for path in GOLDEN.glob("*.logits.npy")}


@pytest.mark.parametrize("name", SAMPLES)
def test_logits_are_those_of_the_definition_and_of_llama_cpp(folder: Path, name: str) -> None:
    tiny = opened(folder, name)
    found = scores_of(tiny, "float32")
    wanted = transformer_reference.logits(tiny.config, transformer_reference.tensors(tiny.path), TEXT)
    assert relative_error(found, wanted) < EXACT
    if SAMPLES[name].peer:
        peer = np.load(GOLDEN / f"{name}.logits.npy")
        of_state = OF_A_STATE if tiny.config.recurrent else EXACT
        assert relative_error(found, peer) < (of_state if tiny.config.activation != "gelu_tanh" else OF_A_TABLE)


@pytest.mark.parametrize(
    "name",
    ["qwen2moe", "stablelm-parallel", *(pytest.param(name, marks=pytest.mark.slow) for name in ("gpt-oss", "qwen35"))],
)
def test_parts_of_a_text_and_rows_of_a_batch_are_the_text(folder: Path, name: str) -> None:
    tiny = opened(folder, name)
    texts = np.stack([np.asarray(TEXT), np.asarray(TEXT[::-1])])
    whole = Reader(tiny, 2)(texts)
    parts = Reader(tiny, 2)
    found = [parts(piece) for piece in np.split(texts, [31, 62, 63], axis=1)]
    np.testing.assert_allclose(np.concatenate(found, axis=1), whole, atol=EXACT * np.abs(whole).max())


@pytest.mark.parametrize("name", ["gemma2", "qwen2moe", "granite"])
def test_logits_in_8_bits_are_near(folder: Path, name: str) -> None:
    tiny = opened(folder, name, "int8")
    found = scores_of(tiny, "int8")
    wanted = transformer_reference.logits(tiny.config, transformer_reference.tensors(tiny.path), TEXT)
    assert np.sqrt(((found - wanted) ** 2).mean()) < 0.05 * wanted.std()


@pytest.mark.parametrize("name", SAMPLES)
def test_8_bits_are_the_same_weights(folder: Path, name: str) -> None:
    tiny = opened(folder, name)
    rounded = opened(folder, name, "int8").params
    assert shapes_of(rounded) == shapes_of(param_shapes(tiny.config, "int8"))
    assert shapes_of(tiny.params) == shapes_of(param_shapes(tiny.config, "float32"))

    def compare(matrix: Any, exact: jax.Array) -> None:
        if isinstance(matrix, QuantArray):
            scale = np.asarray(matrix.scale)[..., None]
            assert (np.abs(np.asarray(matrix.values) * scale - np.asarray(exact)) <= 0.501 * np.abs(scale)).all()
        else:
            assert np.array_equal(matrix, exact)

    jax.tree.map(compare, rounded, tiny.params, is_leaf=lambda leaf: isinstance(leaf, QuantArray))


def hybrid_config(folder: Path, key: str, value: Any) -> ModelConfig:
    """Of a model with layers that keep a state, with one value of its metadata."""
    sample = SAMPLES["qwen35"]
    changed = dataclasses.replace(sample, metadata={**sample.metadata, key: value})
    with GGUFFile.open(tiny_families.write_sample(folder / "changed.gguf", changed)) as file:
        return model_config(file)


@pytest.mark.parametrize(
    ("key", "value", "kinds"),
    [
        ("attention.recurrent_layers", [True, False, False, True, True], "dAAdd"),
        ("full_attention_interval", 2, "dAdAd"),
        ("rope.dimension_sections", None, "dddAd"),
    ],
)
def test_a_file_says_which_layers_keep_a_state(folder: Path, key: str, value: Any, kinds: str) -> None:
    config = hybrid_config(folder, key, value)
    assert "".join("A" if layer.kind == "attention" else "d" for layer in config.layers) == kinds
    with pytest.raises(ConfigError, match="mesh_model"):
        check_mesh(config, 1, 2)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("rope.dimension_sections", [1, 1, 0, 2]),  # pairs of the last section do not rotate in text
        ("rope.dimension_sections", [0, 0, 0, 0]),
        ("rope.dimension_sections", 4),
        ("attention.recurrent_layers", 2),
        ("full_attention_interval", 0),
        ("nextn_predict_layers", 5),
        ("ssm.inner_size", 64),
        ("ssm.group_count", 4),
        ("ssm.conv_kernel", 1),
        ("ssm.state_size", None),
    ],
)
def test_a_state_that_is_not_understood_is_refused_by_name(folder: Path, key: str, value: Any) -> None:
    with pytest.raises(UnsupportedModel, match=re.escape(key)):
        hybrid_config(folder, key, value)


def shapes_of(params: ModelParams) -> Any:
    return jax.tree.map(lambda leaf: (leaf.shape, str(leaf.dtype)), params)
