"""GGUF files as people have them: neutral keys, padded vocabularies, other parts beside the text, and senseless values."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from atlas_jax.gguf import GGUFFile
from atlas_jax.kernels.rope import frequencies
from atlas_jax.model.families._family import UnsupportedModel
from atlas_jax.model.loading import left_out, load_params, model_config
from atlas_jax.model.page_schedule import PageSchedule
from tests import tiny_model
from tests.model.scoring import scores
from tests.reference import transformer_reference

TEXT = np.random.default_rng(5).integers(0, 300, 120).tolist()
WHOLE = PageSchedule(window=None)

# the keys of real files of these names, and what converters add to them, each at the value that says "nothing here"
NEUTRAL: dict[str, Any] = {
    "rope.scaling.attn_factor": 1.0,
    "rope.scaling.finetuned": False,
    "rope.scaling.original_context_length": 8192,
    "rope.scaling.type": "none",
    "rope.scaling.factor": 0.0,
    "rope.scaling.yarn_ext_factor": -1.0,
    "rope.scaling.yarn_beta_fast": 32.0,
    "rope.scale_linear": 1.0,
    "expert_count": 0,
    "expert_used_count": 0,
    "expert_gating_func": 0,
    "leading_dense_block_count": 1,
    "tensor_data_layout": "Meta AI original pth",
    "attention.causal": True,
    "attention.clamp_kqv": 0.0,
    "attention.max_alibi_bias": 0.0,
    "attention.scale": 0.25,
    "attention.layer_norm_epsilon": 1e-5,
    "attn_logit_softcapping": 0.0,
    "final_logit_softcapping": 0.0,
    "use_parallel_residual": False,
    "logit_scale": 1.0,
    "residual_scale": 1.0,
    "embedding_scale": 0.0,
    "pooling_type": 0,
    "nextn_predict_layers": 0,
}


def config_of(path: Path) -> Any:
    with GGUFFile.open(path) as file:
        return model_config(file)


def write(folder: Path, changes: dict[str, Any], shape: tiny_model.Shape = tiny_model.LLAMA, **more: Any) -> Path:
    metadata = {f"{shape.architecture}.{key}": value for key, value in changes.items()}
    return tiny_model.write_model(folder / "changed.gguf", shape, metadata=metadata, **more)


def assert_right(path: Path) -> None:
    """Scores of the product in float32 mode are those of the definition."""
    with GGUFFile.open(path) as file:
        config = model_config(file)
        params = load_params(file, config, dtype="float32")
    wanted = transformer_reference.logits(config, transformer_reference.tensors(path), TEXT)
    found = scores(config, params, TEXT, "float32", WHOLE)
    assert found.shape == wanted.shape
    assert np.abs(found - wanted).max() < 2e-3 * wanted.std()


@pytest.mark.parametrize("shape", [tiny_model.LLAMA, tiny_model.GEMMA], ids=["llama", "gemma3"])
def test_keys_at_their_neutral_value_change_nothing(tmp_path: Path, shape: tiny_model.Shape) -> None:
    plain = config_of(tiny_model.write_model(tmp_path / "plain.gguf", shape))
    assert config_of(write(tmp_path, NEUTRAL, shape)) == plain
    for key, value in NEUTRAL.items():
        assert config_of(write(tmp_path, {key: value}, shape)) == plain, key


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("rope.scaling.attn_factor", 0.0),
        ("rope.scaling.type", "dynamic"),
        ("rope.scaling.yarn_ext_factor", 1.0),
        ("rope.scaling.yarn_attn_factor", 1.2),
        ("rope.scaling.yarn_log_multiplier", 0.1),
        ("expert_count", -1),
        ("expert_count", "many"),
        ("tensor_data_layout", "upside down"),
        ("attention.causal", False),
        ("attention.causal", 1),
        ("attention.clamp_kqv", 8.0),
        ("attention.scale", 0.5),
        ("attention.sliding_window", -1),
        ("attn_logit_softcapping", 50.0),
        ("use_parallel_residual", True),
        ("logit_scale", 0.0625),
        ("logit_scale", math.nan),
        ("residual_scale", 0.22),
        ("embedding_scale", 12.0),
        ("rope.dimension_sections", [16, 24, 24, 0]),
        ("a_new_idea", 1),
    ],
)
def test_keys_that_would_change_the_result_are_refused_by_name(tmp_path: Path, key: str, value: Any) -> None:
    with pytest.raises(UnsupportedModel, match=rf"metadata key 'llama\.{key}' "):
        config_of(write(tmp_path, {key: value}))


@pytest.mark.parametrize(
    ("architecture", "key", "value"),
    [
        ("llama", "expert_used_count", None),
        ("llama", "expert_used_count", 9),
        ("llama", "expert_gating_func", 2),
        ("llama", "expert_weights_scale", 2.5),
        ("llama", "expert_group_count", 4),
        ("llama", "leading_dense_block_count", 1),
        ("qwen2", "expert_count", 8),
    ],
)
def test_other_mixtures_of_experts_are_refused_by_name(tmp_path: Path, architecture: str, key: str, value: Any) -> None:
    keys = {"expert_count": 8, "expert_used_count": 2, key: value}
    with pytest.raises(UnsupportedModel, match=rf"metadata key '{architecture}\.{key}' "):
        config_of(write(tmp_path, keys, tiny_model.Shape(architecture=architecture)))


def test_llama_3_1_as_its_files_are(tmp_path: Path) -> None:
    """Its rope scaling lies in a tensor of factors; the key of the attention factor is there, at 1."""
    factors = np.asarray([1, 1, 1.5, 3, 8, 8, 8, 8], np.float32)
    keys = {"rope.scaling.attn_factor": 1.0, "rope.dimension_count": 16, "vocab_size": 314, "rope.freq_base": 500_000.0}
    tokens = len(tiny_model.byte_level_vocabulary()[0])
    path = write(tmp_path, keys | {"vocab_size": tokens}, tensors={"rope_freqs.weight": factors})
    assert config_of(path).ropes[0].frequency_factors == tuple(factors.tolist())
    assert_right(path)


@pytest.mark.parametrize(
    ("key", "factor"), [("rope.scaling.factor", 4.0), ("rope.scale_linear", 2.0), ("rope.scaling.factor", 1.0)]
)
def test_linear_scaling_by_either_key(tmp_path: Path, key: str, factor: float) -> None:
    path = write(tmp_path, {key: factor})
    assert config_of(path).ropes[0].position_scale == 1 / factor
    assert_right(path)


def yarn(base: float, dims: int, original: int, factor: float, fast: float, slow: float) -> np.ndarray:
    """Frequencies as the paper has them: γ of the turns that a pair makes in the original context."""
    plain = base ** -(np.arange(0, dims, 2) / dims)
    first, last = (dims * np.log(original / (turns * 2 * np.pi)) / (2 * np.log(base)) for turns in (fast, slow))
    first, last = max(np.floor(first), 0), min(np.ceil(last), dims - 1)
    stretched = np.clip((np.arange(dims // 2) - first) / (last - first), 0, 1)
    return plain * (1 - stretched) + plain / factor * stretched


@pytest.mark.parametrize("betas", [(32.0, 1.0), (8.0, 2.0)])
def test_yarn(tmp_path: Path, betas: tuple[float, float]) -> None:
    keys = {"rope.scaling.type": "yarn", "rope.scaling.factor": 8.0, "rope.scaling.original_context_length": 1024}
    more = {"rope.scaling.yarn_beta_fast": betas[0], "rope.scaling.yarn_beta_slow": betas[1]} if betas[1] != 1 else {}
    (rope,) = config_of(write(tmp_path, {**keys, **more, "rope.scaling.attn_factor": 1.5})).ropes
    np.testing.assert_allclose(frequencies(rope), yarn(10_000.0, 16, 1024, 8.0, *betas), rtol=1e-6)
    assert rope.magnitude == pytest.approx(1.5 * (1 + 0.1 * math.log(8)))
    # with nothing to scale it is no scaling
    (rope,) = config_of(write(tmp_path, {**keys, "rope.scaling.factor": 1.0})).ropes
    assert rope == config_of(tiny_model.write_model(tmp_path / "plain.gguf")).ropes[0]


def test_long_rope_has_factors_for_the_models_whole_context(tmp_path: Path) -> None:
    tensors = {
        f"rope_factors_{name}.weight": np.full(8, value, np.float32) for name, value in (("long", 4), ("short", 2))
    }
    for original, expected in ((None, 2), (4096, 2), (1024, 4)):
        keys = {"rope.scaling.type": "longrope", "rope.scaling.original_context_length": original}
        (rope,) = config_of(write(tmp_path, keys, tensors=tensors)).ropes
        assert rope.frequency_factors == (expected,) * 8
    with pytest.raises(UnsupportedModel, match=r"tensor 'rope_factors_long\.weight' is missing"):
        config_of(write(tmp_path, keys))
    for architecture in ("qwen2", "llama"):  # of which only one has them
        path = write(tmp_path, keys, tiny_model.Shape(architecture=architecture), tensors=tensors)
        if architecture == "llama":
            config_of(path)
            continue
        with pytest.raises(UnsupportedModel, match=r"'qwen2\.rope\.scaling\.type' has unsupported value 'longrope'"):
            config_of(path)


def test_a_list_of_one_value_for_every_layer_is_that_value(tmp_path: Path) -> None:
    plain = config_of(tiny_model.write_model(tmp_path / "plain.gguf"))
    lists = {"attention.head_count": [4, 4], "attention.head_count_kv": [2, 2], "feed_forward_length": [96, 96]}
    assert config_of(write(tmp_path, {**lists, "swiglu_clamp_exp": [0.0, 0.0]})) == plain
    for key in lists:
        for value, message in (([4, 2], "differs from layer to layer"), ([4, 4, 4], "list of 3 values for 2 layers")):
            with pytest.raises(UnsupportedModel, match=rf"'llama\.{key}' .*{message}"):
                config_of(write(tmp_path, {key: value}))


@pytest.mark.parametrize(
    ("pattern", "sliding"),
    [
        ([True, False, True, True, False, True], [True, False, True, True, False, True]),
        (3, [True, True, False, True, True, False]),
        (1, [False] * 6),
        (0, [True] * 6),
        (6, [True] * 5 + [False]),
    ],
)
def test_gemmas_pattern_of_windows(tmp_path: Path, pattern: Any, sliding: list[bool]) -> None:
    path = write(tmp_path, {"attention.sliding_window_pattern": pattern}, tiny_model.GEMMA)
    layers = config_of(path).layers
    assert [layer.sliding_window is not None for layer in layers] == sliding
    assert [layer.rope for layer in layers] == [int(one) for one in sliding]
    assert_right(path)


@pytest.mark.parametrize("pattern", [[True, False], [1, 0, 1, 1, 0, 1], "5:1", -1, 1.5])
def test_a_pattern_that_is_none_is_refused_by_name(tmp_path: Path, pattern: Any) -> None:
    with pytest.raises(UnsupportedModel, match=r"'gemma3\.attention\.sliding_window_pattern' must "):
        config_of(write(tmp_path, {"attention.sliding_window_pattern": pattern}, tiny_model.GEMMA))


def test_gemma_with_images_beside_the_text_loads_its_text(tmp_path: Path) -> None:
    """As another runtime stores it: one file with all parts, and other names for the two rotary bases."""
    keys = {
        "rope.freq_base": None,
        "rope.global.freq_base": 1_000_000.0,
        "rope.local.freq_base": 20_000.0,
        "vision.block_count": 27,
        "vision.image_size": 896,
        "vision.attention.layer_norm_epsilon": 1e-6,
        "mm.tokens_per_image": 256,
        "final_logit_softcapping": 30.0,
    }
    other = {
        "v.blk.0.attn_k.weight": np.ones((4, 4), np.float32),
        "v.patch_embedding.weight": np.ones((4, 2), np.float32),
        "mm.mm_input_projection.weight": np.ones((4, 4), np.float32),
    }
    path = write(tmp_path, keys, tiny_model.GEMMA, tensors=other)
    config = config_of(path)
    assert [rope.base for rope in config.ropes] == [1_000_000.0, 20_000.0]
    assert config.final_softcap == 30.0
    with GGUFFile.open(path) as file:
        assert left_out(file) == list(other)
    assert_right(path)


@pytest.mark.parametrize(
    ("tensor", "message"),
    [
        ("blk.0.attn_q.bias", r"'blk\.0\.attn_k\.bias' is missing"),
        ("blk.1.attn_q.bias", r"'blk\.1\.attn_q\.bias' is not understood"),
        ("blk.0.attn_norm.bias", r"'blk\.0\.ffn_norm\.bias' is missing"),
        ("blk.0.attn_q_norm.weight", r"'blk\.0\.attn_q_norm\.weight' is not understood"),
        ("blk.0.attn_rot_embd.weight", r"'blk\.0\.attn_rot_embd\.weight' is not understood"),
    ],
)
def test_tensors_that_are_not_of_every_layer_are_refused_by_name(tmp_path: Path, tensor: str, message: str) -> None:
    path = write(tmp_path, {}, tensors={tensor: np.ones(64, np.float32)})
    with GGUFFile.open(path) as file, pytest.raises(UnsupportedModel, match=message):
        load_params(file, model_config(file))


@pytest.mark.parametrize("shape", [tiny_model.LLAMA, tiny_model.NIBBLES, tiny_model.GEMMA])
@pytest.mark.parametrize("padding", [1, 64])
def test_rows_past_the_last_token_stand_for_nothing(tmp_path: Path, shape: tiny_model.Shape, padding: int) -> None:
    tokens = len(tiny_model.byte_level_vocabulary()[0])
    for vocab_size in (None, tokens, tokens + padding):
        path = write(tmp_path, {"vocab_size": vocab_size}, shape, padding=padding)
        assert config_of(path).vocab == tokens
    assert_right(path)
    with GGUFFile.open(path) as file:
        params = load_params(file, model_config(file))
    assert params.embed.shape[0] == tokens


def test_fewer_rows_than_tokens_are_refused(tmp_path: Path) -> None:
    tokens = len(tiny_model.byte_level_vocabulary()[0])
    with pytest.raises(UnsupportedModel, match=rf"'token_embd\.weight' has {tokens - 3} rows for {tokens} tokens"):
        config_of(write(tmp_path, {}, padding=-3))
    with pytest.raises(UnsupportedModel, match=r"'llama\.vocab_size' is 9999"):
        config_of(write(tmp_path, {"vocab_size": 9999}))


@pytest.mark.parametrize(
    ("key", "value"),
    [
        *(("attention.layer_norm_rms_epsilon", value) for value in (0.0, -1e-5, math.nan, math.inf, 1e30)),
        *(("rope.freq_base", value) for value in (0.0, -1.0, math.nan, math.inf, 1e-9)),
        *(("rope.scaling.factor", value) for value in (-2.0, math.nan, math.inf)),
        *(("rope.dimension_count", value) for value in (0, -2, 7, 18, 1 << 20)),
        *(("attention.key_length", value) for value in (0, 15, -16, 1 << 30)),
        *(("attention.head_count", value) for value in (0, -4)),
        *(("attention.head_count_kv", value) for value in (0, 3, -1)),
        *(("context_length", value) for value in (0, -1, 1 << 40)),
        *(("block_count", value) for value in (0, -1, 1 << 20)),
        *(("embedding_length", value) for value in (0, -64)),
        *(("feed_forward_length", value) for value in (0, -96)),
        *(("attention.value_length", value) for value in (0, 8)),
        ("embedding_length", 64.5),
        ("attention.head_count", True),
        ("context_length", "long"),
        ("rope.freq_base", []),
    ],
)
def test_senseless_values_are_refused_by_name(tmp_path: Path, key: str, value: Any) -> None:
    if value == []:
        value = np.asarray([], np.float32).tolist() or [1.0, 2.0]
    with pytest.raises(UnsupportedModel, match=rf"metadata key 'llama\.{key}' "):
        config_of(write(tmp_path, {key: value}))


def test_no_scaling_by_a_factor_is_a_contradiction(tmp_path: Path) -> None:
    with pytest.raises(
        UnsupportedModel, match=r"'llama\.rope\.scaling\.factor' is 8, but rope\.scaling\.type is 'none'"
    ):
        config_of(write(tmp_path, {"rope.scaling.type": "none", "rope.scaling.factor": 8.0}))


@pytest.mark.parametrize("factors", [np.zeros(8), np.full(8, np.nan), np.full(8, -1.0), np.ones(5), np.full(8, np.inf)])
def test_senseless_frequency_factors_are_refused_by_name(tmp_path: Path, factors: np.ndarray) -> None:
    with pytest.raises(UnsupportedModel, match=r"tensor 'rope_freqs\.weight' "):
        config_of(write(tmp_path, {}, tensors={"rope_freqs.weight": factors.astype(np.float32)}))
