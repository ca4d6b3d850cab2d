"""Folders of every family: the same parameters, bit for bit, as the GGUF file of the same weights.

The file is written as the converter of llama.cpp writes it, the folder from the file with names and orders put back, by a
table that knows nothing of the project's own.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from atlas_jax.config import ModelConfig
from atlas_jax.model.checkpoint import open_model_file
from atlas_jax.model.families import FAMILIES, UnsupportedModel
from atlas_jax.model.loading import load_params, model_config
from tests import tiny_families
from tests.model import checkpoint_writer
from tests.tiny_families import CONTEXT, DIM, EMBED, FF, HEADS, KV_HEADS, SAMPLES, VOCAB, WINDOW

_NAMES = {
    **checkpoint_writer.LLAMA,
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
}
_GEMMA = {
    **_NAMES,
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}
_OLMO = {k: v for k, v in _GEMMA.items() if k not in ("attn_norm", "ffn_norm")}
_EXPERTS = {
    "ffn_gate_inp": "mlp.gate",
    "ffn_gate_exps": "mlp.experts.#.gate_proj",
    "ffn_up_exps": "mlp.experts.#.up_proj",
    "ffn_down_exps": "mlp.experts.#.down_proj",
}
_YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 1024}


@dataclass(frozen=True)
class Case:
    """A family's folder.

    Attributes:
      sample: of `tiny_families` that has its weights.
      config: beside the sizes that all have; None leaves one of those out.
      names: of a layer's tensors; `#` is a number, and the tensor is taken apart along its first axis.
      halves: queries and keys are rotated in halves here and in pairs in the file.
      minus_one: norms lack the 1.
      metadata: of the file, in place of the sample's.
    """

    sample: str
    config: Mapping[str, Any]
    names: Mapping[str, str] = field(default_factory=lambda: _NAMES)
    halves: bool = False
    minus_one: bool = False
    metadata: Mapping[str, Any] = field(default_factory=dict)


_TIED = {"tie_word_embeddings": True}
_FACTORS = np.abs(np.random.default_rng(3).standard_normal((2, DIM // 2 - 2))) + 1
_LONG = {"type": "longrope", "long_factor": _FACTORS[0].tolist(), "short_factor": _FACTORS[1].tolist()}
_PHI = {
    **{"architectures": ["Phi3ForCausalLM"], "partial_rotary_factor": (DIM - 4) / DIM, "sliding_window": WINDOW},
    "original_max_position_embeddings": 128,
}
_QWEN = {"use_sliding_window": False, "sliding_window": 32, "max_window_layers": 2, "rope_theta": 1e6}
CASES: Mapping[str, Case] = {
    "qwen2": Case(
        "qwen2",
        {"architectures": ["Qwen2ForCausalLM"], **_QWEN, **_TIED, "rope_scaling": _YARN},
    ),
    "qwen3": Case("qwen3", {"architectures": ["Qwen3ForCausalLM"], **_QWEN, **_TIED, "head_dim": DIM}),
    "qwen2moe": Case(
        "qwen2moe",
        {
            **{"architectures": ["Qwen2MoeForCausalLM"], **_QWEN, "rope_theta": 1e4, "decoder_sparse_step": 1},
            **{"num_experts": 8, "num_experts_per_tok": 3, "moe_intermediate_size": 32, "norm_topk_prob": False},
            **{"shared_expert_intermediate_size": 40, "mlp_only_layers": [], "router_aux_loss_coef": 0.001},
        },
        names={
            **_NAMES,
            **_EXPERTS,
            "ffn_gate_inp_shexp": "mlp.shared_expert_gate",
            "ffn_gate_shexp": "mlp.shared_expert.gate_proj",
            "ffn_up_shexp": "mlp.shared_expert.up_proj",
            "ffn_down_shexp": "mlp.shared_expert.down_proj",
        },
    ),
    "qwen3moe": Case(
        "qwen3moe",
        {
            **{"architectures": ["Qwen3MoeForCausalLM"], **_QWEN, "rope_theta": 1e4, "head_dim": DIM},
            **{"num_experts": 8, "num_experts_per_tok": 3, "moe_intermediate_size": 32, "norm_topk_prob": True},
        },
        names={**_NAMES, **_EXPERTS},
    ),
    "mixtral": Case(
        "llama-experts",
        {
            **{"architectures": ["MixtralForCausalLM"], "num_local_experts": 8, "num_experts_per_tok": 3},
            **{"sliding_window": None, "router_aux_loss_coef": 0.02, "output_router_logits": False},
        },
        names={
            **_NAMES,
            "ffn_gate_inp": "block_sparse_moe.gate",
            "ffn_gate_exps": "block_sparse_moe.experts.#.w1",
            "ffn_up_exps": "block_sparse_moe.experts.#.w3",
            "ffn_down_exps": "block_sparse_moe.experts.#.w2",
        },
        halves=True,
    ),
    "llama-yarn": Case(
        "llama-yarn",
        {"architectures": ["LlamaForCausalLM"], "rope_scaling": _YARN},
        halves=True,
        metadata={"rope.scaling.attn_factor": None},
    ),
    "gemma": Case(
        "gemma", {"architectures": ["GemmaForCausalLM"], "hidden_act": "gelu", "head_dim": DIM}, minus_one=True
    ),
    "gemma2": Case(
        "gemma2",
        {
            **{"architectures": ["Gemma2ForCausalLM"], "hidden_act": "gelu_pytorch_tanh", "head_dim": DIM},
            **{"hidden_activation": "gelu_pytorch_tanh", "query_pre_attn_scalar": DIM, "sliding_window": WINDOW},
            **{"attn_logit_softcapping": 3.0, "final_logit_softcapping": 4.0, "cache_implementation": "hybrid"},
        },
        names=_GEMMA,
        minus_one=True,
    ),
    "smollm3": Case(
        "smollm3",
        {
            **{"architectures": ["SmolLM3ForCausalLM"], **_TIED, "no_rope_layer_interval": 4, "rope_theta": 5e6},
            **{"no_rope_layers": [1, 1, 1, 0], "use_sliding_window": False, "attention_bias": False},
            "layer_types": ["full_attention"] * 4,
        },
        halves=True,
    ),
    "olmo2": Case("olmo2", {"architectures": ["Olmo2ForCausalLM"], "rope_theta": 1e4}, names=_OLMO),
    "olmo3": Case(
        "olmo3",
        {
            **{"architectures": ["Olmo3ForCausalLM"], "rope_theta": 1e4, "sliding_window": WINDOW},
            "rope_scaling": {**_YARN, "attention_factor": 0.1 * math.log(4) + 1, "beta_fast": 32.0, "beta_slow": 1.0},
            "layer_types": ["sliding_attention"] * 3 + ["full_attention"],
        },
        names=_OLMO,
    ),
    "granite": Case(
        "granite",
        {
            **{"architectures": ["GraniteForCausalLM"], **_TIED, "attention_multiplier": 0.05, "rope_theta": 1e4},
            **{"embedding_multiplier": 12.0, "residual_multiplier": 0.22, "logits_scaling": 3.0, "mlp_bias": False},
        },
        halves=True,
    ),
    "stablelm": Case(
        "stablelm",
        {
            **{"architectures": ["StableLmForCausalLM"], "layer_norm_eps": 1e-5, "rms_norm_eps": None},
            **{"partial_rotary_factor": 0.25, "use_qkv_bias": True, "use_parallel_residual": False},
        },
    ),
    "stablelm-parallel": Case(
        "stablelm-parallel",
        {
            **{"architectures": ["StableLmForCausalLM"], "layer_norm_eps": 1e-5, "rms_norm_eps": None},
            **{"partial_rotary_factor": 0.25, "qk_layernorm": True, "use_parallel_residual": True},
        },
        names={
            **_NAMES,
            "attn_q_norm": "self_attn.q_layernorm.norms.#",
            "attn_k_norm": "self_attn.k_layernorm.norms.#",
        },
    ),
    "starcoder2": Case(
        "starcoder2",
        {
            **{"architectures": ["Starcoder2ForCausalLM"], "norm_epsilon": 1e-5, "rms_norm_eps": None},
            **{"hidden_act": "gelu_pytorch_tanh", "use_bias": True, "sliding_window": 512, "mlp_type": "default"},
            **{"norm_type": "layer_norm", "residual_dropout": 0.1, "embedding_dropout": 0.1},
        },
        names={**_NAMES, "ffn_up": "mlp.c_fc", "ffn_down": "mlp.c_proj"},
    ),
    "cohere": Case(
        "command-r",
        {
            **{"architectures": ["CohereForCausalLM"], "layer_norm_eps": 1e-5, "rms_norm_eps": None},
            **{"logit_scale": 0.0625, "use_qk_norm": False, "max_position_embeddings": 64, "model_max_length": CONTEXT},
        },
    ),
    "phi3": Case(
        "phi3-long",
        {**_PHI, "rope_scaling": _LONG},
        names={**_NAMES, "attn_qkv": "self_attn.qkv_proj", "ffn_up": "mlp.gate_up_proj"},
        metadata={"rope.scaling.attn_factor": math.sqrt(1 + math.log(CONTEXT / 128) / math.log(128))},
    ),
}
FORBIDDEN: Mapping[str, tuple[str, dict[str, Any], str]] = {
    "a window": ("qwen2", {"use_sliding_window": True}, "'sliding_window' is 32, less than the context"),
    "some layers with a window": ("qwen3", {"layer_types": ["sliding_attention"]}, "'layer_types' has layers with"),
    "other probabilities": ("qwen3moe", {"norm_topk_prob": False}, "'norm_topk_prob' must be true"),
    "every other layer": ("qwen2moe", {"decoder_sparse_step": 2}, "'decoder_sparse_step' has unsupported value '2'"),
    "another scale": ("gemma2", {"query_pre_attn_scalar": 3}, "'query_pre_attn_scalar' has unsupported value '3'"),
    "other layers without rotation": ("smollm3", {"no_rope_layers": [1, 0, 1, 0]}, "'no_rope_layers' must leave out"),
    "other magnitude": (
        "olmo3",
        {"rope_scaling": {**_YARN, "attention_factor": 2.0}},
        "'rope_scaling.attention_factor' is 2.0",
    ),
    "scaling of another kind": ("granite", {"rope_scaling": {"rope_type": "dynamic"}}, "unsupported type 'dynamic'"),
    "scaling where there is none": ("cohere", {"rope_scaling": {"rope_type": "linear"}}, "unsupported type 'linear'"),
    "factors of another length": (
        "phi3",
        {"rope_scaling": {**_LONG, "long_factor": [1.0]}},
        "'rope_scaling.long_factor' must have 6 numbers",
    ),
    "another key": ("starcoder2", {"alibi": True}, "'alibi' is not understood"),
}


def tokenizer() -> dict[str, Any]:
    tokens = [chr(0x21 + index) for index in range(VOCAB)]
    return checkpoint_writer.byte_level(tokens, [1] * VOCAB, [], checkpoint_writer.SMOLLM)


def config_of(case: Case, layers: int) -> dict[str, Any]:
    sizes = {
        **{"hidden_size": EMBED, "intermediate_size": FF, "num_hidden_layers": layers, "num_attention_heads": HEADS},
        **{"num_key_value_heads": KV_HEADS, "max_position_embeddings": CONTEXT, "rms_norm_eps": 1e-5},
        **{"vocab_size": VOCAB, "torch_dtype": "float32", "hidden_act": "silu", "attention_dropout": 0.0},
    }
    return {key: value for key, value in {**sizes, **case.config}.items() if value is not None}


def tensors_of(path: Path, case: Case) -> dict[str, np.ndarray]:
    """The folder's tensors from those of the file."""
    found = {}
    for name, values in checkpoint_writer.read(path).items():
        *layer, part, kind = name.split(".")
        if part.startswith("rope_"):
            continue
        if case.minus_one and part.endswith("norm"):
            values = values - np.float32(1.0)
        if case.halves and part in ("attn_q", "attn_k"):
            values = checkpoint_writer.in_halves(values, HEADS if part == "attn_q" else KV_HEADS)
        if part == "ffn_gate_inp_shexp":
            values = values[None]
        target = f"model.layers.{layer[1]}.{case.names[part]}" if layer else checkpoint_writer.ROOT[part]
        if "#" in target:
            found |= {f"{target.replace('#', str(n))}.{kind}": one for n, one in enumerate(values)}
        else:
            found[f"{target}.{kind}"] = values
    return found


def write_both(folder: Path, case: Case) -> tuple[Path, Path]:
    """The same model as a file and as a folder."""
    sample = SAMPLES[case.sample]
    sample = dataclasses.replace(sample, metadata={**sample.metadata, **case.metadata})
    path = tiny_families.write_sample(folder / "plain.gguf", sample)
    replaced = {}
    if case.minus_one:  # so near 1 that taking it away and adding it loses nothing
        replaced = {
            name: np.round(one * 1024) / np.float32(1024)
            for name, one in checkpoint_writer.read(path).items()
            if "norm" in name
        }
    if case.sample == "phi3-long":
        replaced = {
            f"rope_factors_{name}.weight": one.astype(np.float32)
            for name, one in zip(("long", "short"), _FACTORS, strict=True)
        }
    if replaced:
        path = rewritten(folder / "model.gguf", path, sample, replaced)
    made = folder / "tiny"
    made.mkdir()
    checkpoint_writer.safetensors(made / "model.safetensors", tensors_of(path, case))
    checkpoint_writer.write(made / "config.json", config_of(case, sample.layers))
    checkpoint_writer.write(made / "tokenizer.json", tokenizer())
    return path, made


def rewritten(target: Path, path: Path, sample: tiny_families.Sample, replaced: Mapping[str, np.ndarray]) -> Path:
    """A copy of a file with other tensors in the place of some."""
    writer = tiny_families.GGUFWriter(target, sample.architecture)
    for key, value in tiny_families.metadata(sample).items():
        tiny_families._add(writer, f"{sample.architecture}.{key}", value)
    writer.add_tokenizer_model("no_vocab")
    for name, values in checkpoint_writer.read(path).items():
        writer.add_tensor(name, np.ascontiguousarray(replaced.get(name, values)))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return target


def loaded(path: Path) -> tuple[ModelConfig, Any]:
    with open_model_file(path) as file:
        config = model_config(file)
        return config, load_params(file, config, dtype="float32")


@pytest.mark.parametrize("name", CASES)
def test_a_folder_is_the_model_of_its_gguf_file(name: str, tmp_path: Path) -> None:
    path, folder = write_both(tmp_path, CASES[name])
    (config, params), (found, read) = loaded(path), loaded(folder)
    assert found == config
    assert jax.tree.structure(params) == jax.tree.structure(read)
    for one, other in zip(jax.tree.leaves(params), jax.tree.leaves(read), strict=True):
        np.testing.assert_array_equal(np.asarray(one), np.asarray(other))


@pytest.mark.parametrize("why", FORBIDDEN)
def test_what_a_family_cannot_compute_is_refused_by_its_name(why: str, tmp_path: Path) -> None:
    name, changes, message = FORBIDDEN[why]
    case = CASES[name]
    _, folder = write_both(tmp_path, case)
    checkpoint_writer.write(folder / "config.json", config_of(case, SAMPLES[case.sample].layers) | changes)
    with pytest.raises(UnsupportedModel, match=re.escape(message)), open_model_file(folder):
        pass


def test_a_stack_with_a_hole_is_refused(tmp_path: Path) -> None:
    path, folder = write_both(tmp_path, CASES["mixtral"])
    tensors = tensors_of(path, CASES["mixtral"])
    del tensors["model.layers.1.block_sparse_moe.experts.3.w2.weight"]
    checkpoint_writer.safetensors(folder / "model.safetensors", tensors)
    with (
        pytest.raises(UnsupportedModel, match=r"make 'blk.1.ffn_down_exps.weight' some are missing"),
        open_model_file(folder),
    ):
        pass


def test_every_family_has_a_form_but_these() -> None:
    without = {"internlm2", "gpt-oss", "qwen3next", "qwen35", "qwen35moe"}
    assert {name for name, family in FAMILIES.items() if family.checkpoint is None} == without
