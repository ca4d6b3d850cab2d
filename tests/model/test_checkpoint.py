"""Folders of Hugging Face: the same model as its GGUF file, bit for bit, and no damaged one that is not named."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from atlas_jax.config import ModelConfig
from atlas_jax.gguf import ChatTemplate, GGUFError, GGUFFile, Tokenizer, recommended_sampling
from atlas_jax.model.checkpoint import CheckpointError, CheckpointFolder, open_model_file
from atlas_jax.model.families import UnsupportedModel
from atlas_jax.model.loading import load_params, model_config
from atlas_jax.model.page_schedule import PageSchedule
from tests import tiny_model
from tests.model import checkpoint_writer
from tests.model.scoring import scores

CONFIGS: dict[str, dict[str, Any]] = {
    "llama": {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_act": "silu",
        "rope_theta": 10000.0,
        "rope_scaling": None,
        "attention_bias": False,
        "tie_word_embeddings": False,
        "torch_dtype": "float32",
        "use_cache": True,
    },
    "gemma3": {
        "architectures": ["Gemma3ForCausalLM"],
        "model_type": "gemma3_text",
        "hidden_activation": "gelu_pytorch_tanh",
        "rope_theta": 10000.0,
        "rope_local_base_freq": 10000.0,
        "query_pre_attn_scalar": 16,
        "sliding_window_pattern": 6,
        "attn_logit_softcapping": None,
        "final_logit_softcapping": None,
    },
}


def config_of(shape: tiny_model.Shape, **more: Any) -> dict[str, Any]:
    sizes = {
        "hidden_size": shape.embed,
        "intermediate_size": shape.ff,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "head_dim": shape.head_dim,
        "max_position_embeddings": shape.context,
        "rms_norm_eps": 1e-5,
        "vocab_size": 300,
        "sliding_window": shape.sliding_window,
        "bos_token_id": 1,
    }
    return {key: value for key, value in (CONFIGS[shape.architecture] | sizes | more).items() if value != "absent"}


def write_both(folder: Path, shape: tiny_model.Shape) -> tuple[Path, Path]:
    """A model as a GGUF file and as a folder."""
    plain = tiny_model.write_model(folder / "plain.gguf", shape)
    norms = {}
    if shape.architecture == "gemma3":  # so near 1 that taking it away and adding it loses nothing
        found = checkpoint_writer.read(plain)
        norms = {name: np.round(one * 1024) / np.float32(1024) for name, one in found.items() if "norm" in name}
    path = tiny_model.write_model(folder / "model.gguf", shape, tensors=norms)
    made = folder / "tiny"
    made.mkdir()
    values = checkpoint_writer.tensors(path, shape.architecture, shape.heads, shape.kv_heads)
    checkpoint_writer.safetensors(made / "model.safetensors", values)
    checkpoint_writer.write(made / "config.json", config_of(shape))
    tokens, types, merges = tiny_model.byte_level_vocabulary()
    checkpoint_writer.write(
        made / "tokenizer.json", checkpoint_writer.byte_level(tokens, types, merges, checkpoint_writer.SMOLLM)
    )
    checkpoint_writer.write(
        made / "tokenizer_config.json",
        {
            "bos_token": {"content": "<|endoftext|>", "special": True},
            "eos_token": "<|im_end|>",
            "add_bos_token": False,
            "chat_template": tiny_model.CHAT_TEMPLATE,
        },
    )
    checkpoint_writer.write(made / "generation_config.json", {"temperature": 0.25, "top_k": 7, "do_sample": True})
    return path, made


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Path]]:
    shapes = (tiny_model.LLAMA, tiny_model.GEMMA)
    return {shape.architecture: write_both(tmp_path_factory.mktemp(shape.architecture), shape) for shape in shapes}


@pytest.fixture
def folder(both: dict[str, tuple[Path, Path]], tmp_path: Path) -> Path:
    """A copy of Llama's that may be damaged."""
    return Path(shutil.copytree(both["llama"][1], tmp_path / "tiny"))


def loaded(path: Path) -> tuple[ModelConfig, Any]:
    with open_model_file(path) as file:
        config = model_config(file)
        return config, load_params(file, config)


def assert_same(left: Any, right: Any) -> None:
    assert jax.tree.structure(left) == jax.tree.structure(right)
    for one, other in zip(jax.tree.leaves(left), jax.tree.leaves(right), strict=True):
        assert np.array_equal(np.asarray(one), np.asarray(other))


@pytest.mark.parametrize("architecture", ["llama", "gemma3"])
def test_it_is_the_model_of_its_gguf_file(both: dict[str, tuple[Path, Path]], architecture: str) -> None:
    path, folder = both[architecture]
    (config, params), (found, read) = loaded(path), loaded(folder)
    assert found == config
    assert_same(params, read)
    if architecture == "llama":  # the same numbers in the same program; compiled once for each
        text, schedule = np.random.default_rng(1).integers(0, 250, 60).tolist(), PageSchedule(window=None)
        first, second = (scores(found, each, text, "int8", schedule) for each in (params, read))
        assert np.array_equal(first, second)
    with GGUFFile.open(path) as file, CheckpointFolder.open(folder) as made:
        assert (made.name, made.path, made.size) == ("tiny", folder, (folder / "model.safetensors").stat().st_size)
        assert recommended_sampling(made.metadata) == {"temperature": 0.25, "top_k": 7}
        one, other = Tokenizer.from_metadata(file.metadata), Tokenizer.from_metadata(made.metadata)
        assert (one.bos_id, one.eos_id, one.eog_ids, one.add_bos) == (
            other.bos_id,
            other.eos_id,
            other.eog_ids,
            other.add_bos,
        )
        messages = [{"role": "user", "content": "page <|im_end|> token"}, {"role": "assistant", "content": "again"}]
        templates = [ChatTemplate.from_metadata(which.metadata) for which in (file, made)]
        assert templates[0] is not None
        assert templates[1] is not None
        assert templates[0].render(messages) == templates[1].render(messages)
        assert templates[0].render_tokens(one, messages) == templates[1].render_tokens(other, messages)


def test_rows_in_halves_rotate_as_pairs_do() -> None:
    """What the writer of these tests believes of the order of rows, from the two definitions of RoPE."""
    random = np.random.default_rng(0)
    q, k = random.standard_normal((2, 8))
    angles = np.outer([3, 17], 10_000.0 ** (-np.arange(4) / 4))

    def pairs(x: np.ndarray, angle: np.ndarray) -> np.ndarray:
        return ((x[0::2] + 1j * x[1::2]) * np.exp(1j * angle)).view(float)

    def halves(x: np.ndarray, angle: np.ndarray) -> np.ndarray:
        half = np.concatenate([-x[4:], x[:4]])
        return x * np.tile(np.cos(angle), 2) + half * np.tile(np.sin(angle), 2)

    wanted = pairs(q, angles[0]) @ pairs(k, angles[1])
    q, k = (checkpoint_writer.in_halves(one, 1) for one in (q, k))
    assert halves(q, angles[0]) @ halves(k, angles[1]) == pytest.approx(wanted)


@pytest.mark.parametrize("dtype", ["F16", "BF16"])
def test_values_of_16_bits_are_the_values(both: dict[str, tuple[Path, Path]], folder: Path, dtype: str) -> None:
    path, _ = both["llama"]
    values = checkpoint_writer.tensors(path, "llama", 4, 2)
    checkpoint_writer.safetensors(folder / "model.safetensors", values, dtype)
    with CheckpointFolder.open(folder) as made:
        found = made.dequantize("blk.1.ffn_down.weight")
        wanted = values["model.layers.1.mlp.down_proj.weight"].astype(checkpoint_writer.DTYPES[dtype])
        assert np.array_equal(found, wanted.astype(np.float32))
        assert made.dequantize("output_norm.weight", np.float64).dtype == np.float64


def test_several_files_are_one_model(both: dict[str, tuple[Path, Path]], folder: Path) -> None:
    checkpoint_writer.sharded(folder, checkpoint_writer.tensors(both["llama"][0], "llama", 4, 2))
    with CheckpointFolder.open(folder) as sharded:
        before = sharded.fingerprint()
    (folder / "model.safetensors").unlink()
    assert_same(loaded(folder)[1], loaded(both["llama"][1])[1])
    with CheckpointFolder.open(folder) as sharded, CheckpointFolder.open(both["llama"][1]) as whole:
        assert sharded.fingerprint() == before != whole.fingerprint()
        assert len(whole.fingerprint()) == 64


def test_the_fingerprint_is_of_what_makes_the_model(folder: Path) -> None:
    def fingerprint() -> str:
        with CheckpointFolder.open(folder) as made:
            return made.fingerprint()

    before = fingerprint()
    (folder / "README.md").write_text("changed")
    assert fingerprint() == before
    (folder / "chat_template.jinja").write_text("{{ messages[0].content }}")
    assert fingerprint() != before


def test_embeddings_that_are_the_head(folder: Path) -> None:
    checkpoint_writer.write(folder / "config.json", config_of(tiny_model.LLAMA, tie_word_embeddings=True))
    config, params = loaded(folder)  # with a copy of the head in the file
    assert config.tied_head
    assert params.head is None


def test_a_snapshot_in_the_cache_is_called_by_its_repository(folder: Path, tmp_path: Path) -> None:
    snapshot = tmp_path / "hub" / "models--org--Some-Name" / "snapshots" / ("c" * 40)
    snapshot.parent.mkdir(parents=True)
    folder.rename(snapshot)
    with open_model_file(snapshot) as made:
        assert made.name == "Some-Name"


def test_the_scaling_of_llama_3(folder: Path) -> None:
    scaling = {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    }
    wanted = []
    for pair in range(8):
        length = 2 * np.pi * 10_000.0 ** (2 * pair / 16)
        if length < 64 / 4.0:
            wanted.append(1.0)
        elif length > 64 / 1.0:
            wanted.append(8.0)
        else:
            smooth = (64 / length - 1.0) / (4.0 - 1.0)
            wanted.append(1 / ((1 - smooth) / 8.0 + smooth))
    assert len(set(wanted)) > 2
    for parts in (
        {"rope_scaling": scaling},
        {"rope_theta": "absent", "rope_parameters": {"rope_theta": 10_000.0, **scaling}},
    ):
        checkpoint_writer.write(folder / "config.json", config_of(tiny_model.LLAMA, **parts))
        assert loaded(folder)[0].ropes[0].frequency_factors == pytest.approx(wanted, rel=1e-6)


def test_other_words_for_the_same(both: dict[str, tuple[Path, Path]], folder: Path, tmp_path: Path) -> None:
    """Newer configurations, and those of models with images."""
    linear = {"rope_scaling": {"type": "linear", "factor": 4.0}}
    checkpoint_writer.write(folder / "config.json", config_of(tiny_model.LLAMA, **linear))
    assert loaded(folder)[0].ropes[0].position_scale == 0.25
    gemma = Path(shutil.copytree(both["gemma3"][1], tmp_path / "gemma"))
    plain = loaded(gemma)
    ropes = {name: {"rope_type": "default", "rope_theta": 10_000.0} for name in ("full_attention", "sliding_attention")}
    newer = config_of(
        tiny_model.GEMMA,
        rope_theta="absent",
        rope_local_base_freq="absent",
        rope_parameters=ropes,
        sliding_window_pattern="absent",
        layer_types=["sliding_attention"] * 5 + ["full_attention"],
    )
    images = {
        "architectures": ["Gemma3ForConditionalGeneration"],
        "text_config": newer,
        "vision_config": {"hidden_size": 3},
    }
    values = checkpoint_writer.tensors(both["gemma3"][0], "gemma3", 4, 1)
    for config, prefix in ((newer, "model."), (images, "language_model.model."), (images, "model.language_model.")):
        named = {name.replace("model.", prefix, 1): one for name, one in values.items()}
        if prefix != "model.":
            named["vision_tower.patch.weight"] = np.ones((2, 2), np.float32)
        checkpoint_writer.safetensors(gemma / "model.safetensors", named)
        checkpoint_writer.write(gemma / "config.json", config)
        found = loaded(gemma)
        assert found[0] == plain[0]
        assert_same(found[1], plain[1])


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (
            {"architectures": ["BloomForCausalLM"]},
            "architectures ['BloomForCausalLM'] are not supported (known: CohereForCausalLM",
        ),
        ({"architectures": None}, "architectures [] are not supported"),
        ({"hidden_act": "gelu"}, "'hidden_act' has unsupported value 'gelu', not 'silu'"),
        ({"hidden_size": "64"}, "'hidden_size' must be a whole number, found str"),
        ({"hidden_size": None}, "'hidden_size' is missing"),
        ({"num_hidden_layers": 10**9}, "'llama.block_count' is 1000000000"),
        ({"rms_norm_eps": "1e-5"}, "'rms_norm_eps' must be a number, found str"),
        ({"rope_theta": 1e300}, "'rope_theta' is 1e+300, which is no finite number of 32 bits"),
        ({"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, "'rope_scaling' is of unsupported type 'dynamic'"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "'rope_scaling.low_freq_factor' must be a number"),
        ({"rope_scaling": 3}, "'rope_scaling' must be an object, found int"),
        ({"logit_scale": 2.0}, "'logit_scale' is not understood"),
        ({"quantization_config": {"bits": 4}}, "'quantization_config' says that the weights are quantised"),
        ({"sliding_window": 128}, "'sliding_window' is 128, less than the context"),
        ({"num_attention_heads": 3}, "rows for 3 heads"),
        ({"num_attention_heads": -4}, "rows for -4 heads"),
        ({"head_dim": 8}, "tensor 'blk.0.attn_q.weight' has shape (64, 64), expected (32, 64)"),
        ({"num_hidden_layers": 3}, "tensor 'blk.2."),
        ({"num_hidden_layers": 1}, "tensor 'blk.1."),
    ],
)
def test_a_configuration_that_is_not_understood_is_named(folder: Path, change: dict[str, Any], said: str) -> None:
    checkpoint_writer.write(folder / "config.json", config_of(tiny_model.LLAMA, **change))
    with pytest.raises((CheckpointError, UnsupportedModel)) as refused:
        loaded(folder)
    assert said in str(refused.value)


def header(path: Path, **changes: Any) -> None:
    """Writes the header of a file anew, with other values of one tensor's fields."""
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    table = json.loads(data[8 : 8 + length])
    table["model.norm.weight"] |= changes
    text = json.dumps(table).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + length :])


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"dtype": "F8_E4M3"}, "'model.norm.weight' has dtype 'F8_E4M3'; read are F32, F16, BF16"),
        ({"dtype": 3}, "Expected `str`, got `int` - at `$.dtype`"),
        ({"shape": []}, "'model.norm.weight' has shape []"),
        ({"shape": [64, 0]}, "has shape [64, 0]"),
        ({"shape": [-64]}, "has shape [-64]"),
        ({"shape": [1 << 39, 1 << 39, 1 << 39]}, "bytes are needed"),
        ({"shape": [2, 2, 2, 2, 4]}, "has shape [2, 2, 2, 2, 4]"),
        ({"data_offsets": [0, 255]}, "has data_offsets 0 to 255: 256 bytes are needed"),
        ({"data_offsets": [-256, 0]}, "has data_offsets -256 to 0"),
        ({"data_offsets": [256, 0]}, "has data_offsets 256 to 0"),
        ({"data_offsets": [1 << 40, (1 << 40) + 256]}, "has data_offsets 1099511627776"),
        ({"data_offsets": [0]}, "$.data_offsets"),
    ],
)
def test_a_header_that_lies_is_named(folder: Path, changes: dict[str, Any], said: str) -> None:
    header(folder / "model.safetensors", **changes)
    with pytest.raises(CheckpointError) as refused:
        CheckpointFolder.open(folder)
    assert str(refused.value).startswith("model.safetensors: tensor 'model.norm.weight'")
    assert said in str(refused.value)


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b"", "model.safetensors is empty"),
        (b"\x10\x00", "model.safetensors is no safetensors file"),
        ((1 << 60).to_bytes(8, "little") + b"{}", "a header of 1152921504606846976 bytes in a file of 10"),
        ((2).to_bytes(8, "little") + b"[]", "model.safetensors: Expected `object`"),
        ((4).to_bytes(8, "little") + b'{"a"', "model.safetensors: Input data was truncated"),
        ((20000).to_bytes(8, "little") + b'{"a":' + b"[" * 19995, "model.safetensors: "),
    ],
)
def test_bytes_that_are_no_safetensors_are_named(folder: Path, data: bytes, said: str) -> None:
    (folder / "model.safetensors").write_bytes(data)
    with pytest.raises(GGUFError) as refused:
        CheckpointFolder.open(folder)
    assert said in str(refused.value)


@pytest.mark.parametrize(
    ("where", "said"),
    [
        ("../secret.safetensors", "weight_map names '../secret.safetensors', which is no file of this folder"),
        ("/etc/passwd", "weight_map names '/etc/passwd'"),
        (7, "weight_map names '7'"),
        ("other.safetensors", "names files that are missing: other.safetensors"),
        ("model.safetensors", "says that model.safetensors has tensor 'a', which it has not"),
    ],
)
def test_an_index_that_lies_is_named(folder: Path, where: Any, said: str) -> None:
    checkpoint_writer.write(folder / "model.safetensors.index.json", {"weight_map": {"a": where}})
    with pytest.raises(CheckpointError) as refused:
        CheckpointFolder.open(folder)
    assert str(refused.value).startswith("model.safetensors.index.json")
    assert said in str(refused.value)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("model.layers.0.self_attn.q_proj.bias", "tensor 'blk.0.attn_k.bias' is missing"),
        (
            "model.layers.0.mlp.experts.0.weight",
            "model.safetensors: tensor 'model.layers.0.mlp.experts.0.weight' is not un",
        ),
        ("score.weight", "tensor 'score.weight' is not understood"),
        ("model.embed_tokens.weight\n", "is not understood"),
    ],
)
def test_a_tensor_too_many_is_named(both: dict[str, tuple[Path, Path]], folder: Path, name: str, said: str) -> None:
    values = checkpoint_writer.tensors(both["llama"][0], "llama", 4, 2)
    checkpoint_writer.safetensors(folder / "model.safetensors", {**values, name: np.ones(64, np.float32)})
    with pytest.raises(UnsupportedModel) as refused:
        loaded(folder)
    assert said in str(refused.value)


def test_what_is_missing_is_named(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"is a folder without a config.json"):
        CheckpointFolder.open(tmp_path)
    values = {"model.embed_tokens.weight": np.ones((300, 64), np.float32)}
    checkpoint_writer.safetensors(folder / "model.safetensors", values)
    with pytest.raises(
        UnsupportedModel, match=r"'lm_head.weight' is missing, and config.json does not say tie_word_emb"
    ):
        CheckpointFolder.open(folder)
    (folder / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"has neither model.safetensors nor model.safetensors.index.json"):
        CheckpointFolder.open(folder)
    (folder / "model.safetensors").mkdir()
    with pytest.raises(CheckpointError, match=r"model.safetensors is no file"):
        CheckpointFolder.open(folder)
    (folder / "config.json").write_bytes(b"{" * 5)
    with pytest.raises(CheckpointError, match=r"config.json: "):
        CheckpointFolder.open(folder)


def test_a_file_that_changes_is_not_read_on(folder: Path) -> None:
    with CheckpointFolder.open(folder) as made:
        with (folder / "model.safetensors").open("r+b") as file:
            file.truncate(100)
        with pytest.raises(GGUFError, match="was changed after it was opened"):
            made.dequantize("output_norm.weight")
