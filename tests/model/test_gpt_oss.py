"""gpt-oss: experts that stay in the bits of their file, and a text that has left the window."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from gguf import GGMLQuantizationType

from atlas_jax.config import PAGE, ModelConfig
from atlas_jax.gguf import GGUFFile
from atlas_jax.kernels.linear import PackedArray, QuantArray, unpack, uses_cpu_kernel
from atlas_jax.kernels.weight_forms import Form
from atlas_jax.model.loading import load_params, model_config, parameter_count
from atlas_jax.model.page_schedule import PageSchedule
from atlas_jax.model.params import ModelParams
from tests import tiny_families
from tests.model.scoring import read, scores
from tests.reference import transformer_reference
from tests.reference.kept_pairs_reference import KeptAttention
from tests.tiny_families import SAMPLES, VOCAB

TEXT = np.random.default_rng(9).integers(0, VOCAB, 4 * PAGE + 40).tolist()
needs_kernels = pytest.mark.skipif(not uses_cpu_kernel(64, 64), reason="no native kernels here")
Opened = tuple[Path, ModelConfig, ModelParams, ModelParams]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("gpt-oss")


def opened(folder: Path, kind: GGMLQuantizationType) -> Opened:
    path = tiny_families.write_sample(folder / f"{kind.name}.gguf", SAMPLES["gpt-oss"], experts=kind)
    with GGUFFile.open(path) as file:
        config = model_config(file)
        return path, config, load_params(file, config, dtype="float32"), load_params(file, config, dtype="int8")


@needs_kernels
@pytest.mark.parametrize(
    ("kind", "form", "bits", "off"),
    [(GGMLQuantizationType.MXFP4, Form.FLOATS, 4.25, 0.5), (GGMLQuantizationType.Q4_0, Form.PAIRS, 5.0, 0.54)],
    ids=["MXFP4", "Q4_0"],
)
def test_experts_stay_coded(folder: Path, kind: GGMLQuantizationType, form: Form, bits: float, off: float) -> None:
    _, _, exact, coded = opened(folder, kind)
    assert parameter_count(exact) == parameter_count(coded)
    for whole, layer in zip(exact.layers, coded.layers, strict=True):
        assert whole.experts is not None
        assert layer.experts is not None
        for matrices, wanted in (
            (layer.experts.expert_gate_up, whole.experts.expert_gate_up),
            (layer.experts.expert_down, whole.experts.expert_down),
        ):
            assert isinstance(matrices, PackedArray)
            assert matrices.form is form
            assert matrices.shape == np.shape(wanted)
            assert matrices.blocks.nbytes * 8 == bits * np.prod(matrices.shape)
            found: QuantArray = unpack(matrices)
            scale = np.asarray(found.scale)[..., None]
            assert (np.abs(np.asarray(found.values) * scale - np.asarray(wanted)) <= off * scale).all()


def test_scores_with_coded_experts_are_those_of_the_definition(folder: Path) -> None:
    path, config, exact, coded = opened(folder, GGMLQuantizationType.MXFP4)
    text = TEXT[: PAGE - 20]
    wanted = transformer_reference.logits(config, transformer_reference.tensors(path), text)
    plan = PageSchedule(window=None)
    assert np.abs(scores(config, exact, text, "float32", plan) - wanted).max() < 1e-4 * np.abs(wanted).max()
    found = scores(config, coded, text, "int8", plan)
    # a router chooses another expert where two score alike
    assert np.sqrt(((found - wanted) ** 2).mean()) < 0.2 * wanted.std()


def test_what_has_left_the_window_is_attended_as_by_definition(folder: Path) -> None:
    """Kept pairs compete by shares of a softmax that has a score without a value in it; layers with a window keep none."""
    path, config, exact, _ = opened(folder, GGMLQuantizationType.F32)
    assert [spec.sliding_window is None for spec in config.layers] == [False, True, False, True]
    rule = KeptAttention(1, 1, 100, 0.9)
    wanted = transformer_reference.logits(config, transformer_reference.tensors(path), TEXT, rule)
    found, cache = read(config, exact, TEXT, "float32", PageSchedule(1), kept=100, decay=0.9)
    assert [layer.choice is None for layer in cache.kv] == [True, False, True, False]
    assert np.abs(found - wanted).max() < 0.02 * np.abs(wanted).max()
    assert np.sqrt(((found - wanted) ** 2).mean()) < 1e-3 * wanted.std()
