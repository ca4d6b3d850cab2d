"""LoRA adapters beside a model's weights: against their definition, against llama.cpp, and files that cannot be used."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from atlas_jax.aot import INLINE
from atlas_jax.config import ModelConfig, WeightDtype
from atlas_jax.gguf import GGUFFile
from atlas_jax.kernels.kv_pages import KVDtype
from atlas_jax.model.kv_cache import KVCache, init_kv_cache, page_start, start_page
from atlas_jax.model.layer_groups import Trunk
from atlas_jax.model.loading import load_params, model_config
from atlas_jax.model.lora import with_adapters
from atlas_jax.model.lora_file import LoraError, LoraFile
from atlas_jax.model.page_schedule import PageSchedule
from atlas_jax.model.params import ModelParams
from atlas_jax.model.transformer import logits
from tests import tiny_families, tiny_lora
from tests.reference import transformer_reference
from tests.tiny_families import SAMPLES, TEXT
from tests.tiny_lora import ADAPTED, SCALE

GOLDEN = Path(__file__).parents[1] / "golden" / "peer"
ALPHA, RANK = 6.0, 4


def loaded(model: Path, adapters: list[Path], dtype: WeightDtype = "float32") -> tuple[ModelConfig, ModelParams]:
    with GGUFFile.open(model) as file:
        config = model_config(file)
        params = load_params(file, config, dtype=dtype)
        return config, with_adapters(params, file, config, [LoraFile.read(path) for path in adapters], dtype=dtype)


def scores(config: ModelConfig, params: ModelParams, scales: list[list[float]], dtype: KVDtype = "float32") -> Any:
    """Scores of the text in rows that use the adapters so."""
    cache = init_kv_cache(config, len(scales), 1, dtype, (), len(scales[0]))
    cache = jax.tree.map(lambda leaf: leaf, cache)
    cache = KVCache(**{**vars(cache), "lora": np.asarray(scales, np.float32)})
    for row in range(len(scales)):
        cache = start_page(cache, page_start(row, PageSchedule(window=None).next_page(0)))
    tokens = np.tile(np.asarray(TEXT, np.int32), (len(scales), 1))
    count = np.full(len(scales), len(TEXT), np.int32)
    *_, (cache, view, states) = Trunk(config).parts(INLINE, None, params, cache, tokens, count)
    return np.asarray(logits(config, params, states[-1], view.lora))


def error(found: np.ndarray, wanted: np.ndarray) -> float:
    return float(np.abs(found - wanted).max() / np.abs(wanted).max())


@pytest.mark.parametrize("name", ["llama", "qwen2", pytest.param("qwen35", marks=pytest.mark.slow)])
def test_an_adapter_does_what_its_definition_and_llama_cpp_say(tmp_path: Path, name: str) -> None:
    model = tiny_families.write_sample(tmp_path / "model.gguf", SAMPLES[name])
    pairs = tiny_lora.pairs_of(model, chosen=ADAPTED[name])
    config, params = loaded(model, [tiny_lora.write_lora(tmp_path / "one.lora", model, pairs)])
    with jax.disable_jit():
        plain, adapted = scores(config, params, [[0.0], [SCALE]])
    weights = transformer_reference.tensors(model)
    wanted = transformer_reference.logits(config, tiny_lora.merged(weights, pairs, SCALE * ALPHA / RANK), TEXT)
    bound = 1e-4 if config.recurrent else 2e-5
    assert error(adapted, wanted) < bound
    assert error(plain, transformer_reference.logits(config, weights, TEXT)) < bound
    assert error(plain, wanted) > 0.1
    assert error(adapted, np.load(GOLDEN / f"{name}.lora.npy")) < bound


@pytest.mark.slow
def test_adapters_add_up_and_each_row_has_its_own_scales(tmp_path: Path) -> None:
    """Of other weights, ranks and sizes: in 8 bits a small one is not lost beside a large one."""
    model = tiny_families.write_sample(tmp_path / "model.gguf", SAMPLES["phi3"])
    given = [
        tiny_lora.pairs_of(model, rank=70, seed=1, size=1.0),
        tiny_lora.pairs_of(model, chosen=r"blk\.0\.ffn_", rank=3, seed=2, size=0.3),
    ]
    files = [tiny_lora.write_lora(tmp_path / f"{n}.gguf", model, pairs, alpha=None) for n, pairs in enumerate(given)]
    weights = transformer_reference.tensors(model)
    rows = [[0.0, 0.0], [1.0, 0.0], [0.0, -2.0], [0.5, 1.0]]
    exact, coded = (loaded(model, files, dtype) for dtype in ("float32", "int8"))
    with jax.disable_jit():
        found, rounded = scores(*exact, rows), scores(*coded, rows, "int8")
    errors = []
    for row, one, other in zip(rows, found, rounded, strict=True):
        both = weights
        for factor, pairs in zip(row, given, strict=True):
            both = tiny_lora.merged(both, pairs, factor)
        wanted = transformer_reference.logits(exact[0], both, TEXT)
        assert error(one, wanted) < 5e-5
        errors.append(np.sqrt(((other - wanted) ** 2).mean()) / wanted.std())
    # an adapter as large as the weights, whose two matrices are rounded like them, has twice their error squared
    assert max(errors) < 2 * errors[0] < 0.15


@pytest.mark.slow
def test_rows_without_an_adapter_have_the_bits_of_the_model_alone(tmp_path: Path) -> None:
    model = tiny_families.write_sample(tmp_path / "model.gguf", SAMPLES["llama"])
    path = tiny_lora.write_lora(tmp_path / "one.gguf", model)
    config, params = loaded(model, [path], "int8")
    with GGUFFile.open(model) as file:
        alone = load_params(file, config)
    with jax.disable_jit():
        wanted = scores(config, alone, [[0.0]], "int8")[0]
        assert np.array_equal(scores(config, params, [[0.0]], "int8")[0], wanted)
        found = scores(config, params, [[0.0], [1.0], [-0.0]], "int8")
    assert np.array_equal(found[0], wanted)
    assert np.array_equal(found[2], wanted)
    assert not np.array_equal(found[1], wanted)


Tensors = dict[str, np.ndarray]


def renamed(old: str, new: str) -> Callable[[Tensors], None]:
    def change(tensors: Tensors) -> None:
        tensors[new] = tensors.pop(old)

    return change


def changed(name: str, how: Callable[[np.ndarray], np.ndarray]) -> Callable[[Tensors], None]:
    def change(tensors: Tensors) -> None:
        tensors[name] = how(tensors[name])

    return change


Q = "blk.0.attn_q.weight"


@pytest.mark.parametrize(
    ("metadata", "change", "message"),
    [
        ({"general.type": "model"}, None, "general.type is 'model', not 'adapter'"),
        ({"general.type": None}, None, "general.type is None"),
        ({"adapter.type": "control_vector"}, None, "adapter.type is 'control_vector'"),
        ({"adapter.lora.alpha": float("nan")}, None, "alpha is nan"),
        ({"adapter.lora.alpha": float("inf")}, None, "alpha is inf"),
        ({"adapter.lora.alpha": "8"}, None, "adapter.lora.alpha"),
        ({"adapter.alora.invocation_tokens": 3.0}, None, "'adapter.alora.invocation_tokens' is not understood"),
        ({"general.architecture": "qwen2"}, None, "architecture 'qwen2', not 'llama'"),
        ({"general.architecture": None}, None, "general.architecture"),
        ({}, lambda tensors: tensors.clear(), "no tensors"),
        ({}, lambda tensors: tensors.pop(f"{Q}.lora_b"), f"'{Q}.lora_b' is missing"),
        ({}, lambda tensors: tensors.pop(f"{Q}.lora_a"), f"'{Q}.lora_a' is missing"),
        ({}, renamed(f"{Q}.lora_a", "blk.0.attn_norm.weight"), "'blk.0.attn_norm.weight' is not understood"),
        ({}, changed(f"{Q}.lora_a", lambda a: a.T), f"'{Q}.lora_a' has shape"),
        ({}, changed(f"{Q}.lora_b", lambda b: b[:-1]), f"'{Q}.lora_b' has shape"),
        ({}, changed(f"{Q}.lora_b", lambda b: b[0]), "no matrix"),
        ({}, changed(f"{Q}.lora_a", lambda a: a[:2]), f"'{Q}.lora_a' has shape"),
        ({}, changed(f"{Q}.lora_a", lambda a: a * np.float32("nan")), f"'{Q}.lora_a' holds values that are not finite"),
        ({}, changed(f"{Q}.lora_b", lambda b: np.zeros((64, 1025), np.float32)), "rank 1025, at most 1024"),
    ],
)
def test_refuses_a_file_by_what_is_wrong_with_it(
    tmp_path: Path, metadata: dict[str, Any], change: Callable[[Tensors], Any] | None, message: str
) -> None:
    model = tiny_families.write_sample(tmp_path / "model.gguf", SAMPLES["llama"])
    path = tiny_lora.write_lora(
        tmp_path / "bad.gguf", model, metadata=metadata, change=change or (lambda tensors: None)
    )
    with pytest.raises(LoraError) as caught:
        loaded(model, [path])
    assert "bad.gguf" in str(caught.value)
    assert message in str(caught.value)
    assert str(tmp_path) not in str(caught.value)


@pytest.mark.parametrize(
    ("sample", "weight", "shape", "why"),
    [
        ("llama", "blk.7.attn_q.weight", (64, 64), "is no weight of this model"),
        ("qwen2", "output.weight", (32, 64), "is no weight of this model"),
        ("llama", "blk.0.attn_norm.weight", (64, 64), "cannot be adapted"),
        ("llama-experts", "blk.0.ffn_gate_inp.weight", (8, 64), "cannot be adapted"),
        ("qwen2moe", "blk.0.ffn_up_shexp.weight", (40, 64), "cannot be adapted"),
        ("qwen35", "blk.0.ssm_beta.weight", (6, 64), "cannot be adapted"),
    ],
)
def test_refuses_weights_that_there_are_not_or_that_have_no_place_for_it(
    tmp_path: Path, sample: str, weight: str, shape: tuple[int, int], why: str
) -> None:
    model = tiny_families.write_sample(tmp_path / "model.gguf", SAMPLES[sample])
    pairs = {weight: (np.ones((2, shape[1]), np.float32), np.ones((shape[0], 2), np.float32))}
    path = tiny_lora.write_lora(tmp_path / "bad.gguf", model, pairs)
    with pytest.raises(LoraError, match=f"bad.gguf: tensor '{weight}' {why}"):
        loaded(model, [path])


def test_a_damaged_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "bad.gguf"
    path.write_bytes(b"GGUF" + bytes(40))
    with pytest.raises(LoraError, match=r"LoRA adapter bad\.gguf"):
        LoraFile.read(path)
