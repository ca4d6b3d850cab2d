"""Tiny models of every architecture: the metadata keys and the tensors that files of it have, with seeded random weights.

They have no tokenizer, and a vocabulary so small that all logits of a text are a few kilobytes: what another runtime makes of
the same files lies in `tests/golden/peer` (`benchmarks/peer/logits_golden.py`).
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGMLQuantizationType, GGUFWriter, quants

VOCAB, EMBED, HEADS, KV_HEADS, DIM, FF, CONTEXT = 32, 64, 4, 2, 16, 48, 4096
WINDOW = 24
TEXT = np.random.default_rng(11).integers(0, VOCAB, 64).tolist()
"""The text that is scored: longer than the models' own windows."""

_RMS, _LAYER = "attention.layer_norm_rms_epsilon", "attention.layer_norm_epsilon"


@dataclass(frozen=True)
class Sample:
    """A file of an architecture.

    Attributes:
      metadata: keys without the architecture in front, beside those that all of them have; None leaves one out.
      layer, whole: shapes of tensors of each layer, and of the model, beside those that all of them have.
      without: tensors of a layer that all others have.
      recurrent: shapes of tensors that three of four layers have in place of attention's.
      peer: llama.cpp knows the architecture, and what it makes of the file lies in `tests/golden/peer`.
    """

    architecture: str
    layers: int = 2
    metadata: Mapping[str, Any] = field(default_factory=dict)
    layer: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    whole: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    without: tuple[str, ...] = ()
    recurrent: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    tied: bool = False
    peer: bool = True


def _biases(**sizes: int) -> dict[str, tuple[int, ...]]:
    return {f"{name}.bias": (size,) for name, size in sizes.items()}


_QKV_BIASES = _biases(attn_q=HEADS * DIM, attn_k=KV_HEADS * DIM, attn_v=KV_HEADS * DIM)
_HEAD_NORMS = {"attn_q_norm.weight": (DIM,), "attn_k_norm.weight": (DIM,)}
_POST_NORMS = {"post_attention_norm.weight": (EMBED,), "post_ffw_norm.weight": (EMBED,)}
_KEY_LENGTHS = {"attention.key_length": DIM, "attention.value_length": DIM}
_YARN = {"rope.scaling.type": "yarn", "rope.scaling.factor": 4.0, "rope.scaling.original_context_length": 1024}
_LONG_ROPE = {"rope_factors_long.weight": (DIM // 2,), "rope_factors_short.weight": (DIM // 2,)}
_LAYER_NORM = {_RMS: None, _LAYER: 1e-5}
_OLMO = Sample(
    "olmo2",
    layer={**_POST_NORMS, "attn_q_norm.weight": (HEADS * DIM,), "attn_k_norm.weight": (KV_HEADS * DIM,)},
    without=("attn_norm.weight", "ffn_norm.weight"),
)
_PHI = Sample(
    "phi3",
    metadata={"attention.sliding_window": WINDOW, "rope.dimension_count": DIM - 4, "rope.scaling.attn_factor": 1.19},
    layer={"attn_qkv.weight": ((HEADS + 2 * KV_HEADS) * DIM, EMBED), "ffn_up.weight": (2 * FF, EMBED)},
    without=("attn_q.weight", "attn_k.weight", "attn_v.weight", "ffn_gate.weight"),
)
_EXPERTS, _USED, _EXPERT_FF, _SHARED_FF = 8, 3, 32, 40
_EXPERT_KEYS = {"expert_count": _EXPERTS, "expert_used_count": _USED}
_EXPERT_LENGTHS = {"expert_feed_forward_length": _EXPERT_FF, "expert_shared_feed_forward_length": _SHARED_FF}


def _expert_tensors(ff: int) -> dict[str, tuple[int, ...]]:
    return {
        "ffn_gate_inp.weight": (_EXPERTS, EMBED),
        "ffn_gate_exps.weight": (_EXPERTS, ff, EMBED),
        "ffn_up_exps.weight": (_EXPERTS, ff, EMBED),
        "ffn_down_exps.weight": (_EXPERTS, EMBED, ff),
    }


def _expert_biases(ff: int) -> dict[str, tuple[int, ...]]:
    return {
        "ffn_gate_inp.bias": (_EXPERTS,),
        "ffn_gate_exps.bias": (_EXPERTS, ff),
        "ffn_up_exps.bias": (_EXPERTS, ff),
        "ffn_down_exps.bias": (_EXPERTS, EMBED),
    }


_SHARED_TENSORS = {
    "ffn_gate_inp_shexp.weight": (EMBED,),
    "ffn_gate_shexp.weight": (_SHARED_FF, EMBED),
    "ffn_up_shexp.weight": (_SHARED_FF, EMBED),
    "ffn_down_shexp.weight": (EMBED, _SHARED_FF),
}
_DELTA_KEY_HEADS, _DELTA_HEADS, _DELTA_DIM, _CONV = 2, 6, 16, 4
_DELTA_QKV, _DELTA_V = (2 * _DELTA_KEY_HEADS + _DELTA_HEADS) * _DELTA_DIM, _DELTA_HEADS * _DELTA_DIM
_DELTA_KEYS = {
    **{"ssm.conv_kernel": _CONV, "ssm.state_size": _DELTA_DIM, "ssm.group_count": _DELTA_KEY_HEADS},
    **{"ssm.time_step_rank": _DELTA_HEADS, "ssm.inner_size": _DELTA_V},
    **{"rope.freq_base": 1e6, "rope.dimension_count": DIM // 2, **_KEY_LENGTHS},
}
_DELTA_TENSORS = {
    "attn_qkv.weight": (_DELTA_QKV, EMBED),
    "attn_gate.weight": (_DELTA_V, EMBED),
    "ssm_conv1d.weight": (_DELTA_QKV, _CONV),
    "ssm_dt.bias": (_DELTA_HEADS,),
    "ssm_a": (_DELTA_HEADS,),
    "ssm_norm.weight": (_DELTA_DIM,),
    "ssm_out.weight": (EMBED, _DELTA_V),
}
_HYBRID = {"attn_q.weight": (2 * HEADS * DIM, EMBED), **_HEAD_NORMS, "post_attention_norm.weight": (EMBED,)}
_QWEN35_TENSORS = {
    **_DELTA_TENSORS,
    **{"ssm_beta.weight": (_DELTA_HEADS, EMBED), "ssm_alpha.weight": (_DELTA_HEADS, EMBED)},
}
_DRAFTING_TENSORS = {
    **{"attn_norm.weight": (EMBED,), **_HYBRID, "attn_output.weight": (EMBED, HEADS * DIM)},
    **{f"attn_{name}.weight": (KV_HEADS * DIM, EMBED) for name in ("k", "v")},
    **{f"ffn_{name}.weight": (FF, EMBED) for name in ("gate", "up")},
    **{"ffn_down.weight": (EMBED, FF), "nextn.eh_proj.weight": (EMBED, 2 * EMBED)},
    **{"nextn.enorm.weight": (EMBED,), "nextn.hnorm.weight": (EMBED,)},
}
_SECTIONS = {"rope.dimension_sections": [2, 1, 1, 0]}


_NO_MLP = ("ffn_gate.weight", "ffn_up.weight", "ffn_down.weight")
_PARTIAL_LONG_ROPE = dict.fromkeys(_LONG_ROPE, (DIM // 2 - 2,))

SAMPLES: Mapping[str, Sample] = {
    "llama": Sample("llama", metadata={"rope.dimension_count": DIM, "attention.sliding_window": WINDOW}),
    "llama-linear": Sample("llama", metadata={"rope.scaling.type": "linear", "rope.scaling.factor": 4.0}),
    "llama-yarn": Sample("llama", metadata={**_YARN, "rope.scaling.attn_factor": 1.1}),
    "llama-3.1": Sample("llama", whole={"rope_freqs.weight": (DIM // 2,)}, tied=True),
    "llama-biases": Sample(
        "llama",
        layer={
            **_QKV_BIASES,
            **_biases(attn_output=EMBED, ffn_gate=FF, ffn_up=FF, ffn_down=EMBED),
        },
    ),
    "llama-longrope": Sample(
        "llama",
        metadata={"rope.scaling.type": "longrope", "rope.scaling.original_context_length": 128},
        whole=_LONG_ROPE,
    ),
    "llama-experts": Sample("llama", metadata=_EXPERT_KEYS, layer=_expert_tensors(FF), without=_NO_MLP),
    "qwen2moe": Sample(
        "qwen2moe",
        metadata={**_EXPERT_KEYS, **_EXPERT_LENGTHS},
        layer={
            **_QKV_BIASES,
            **_expert_tensors(_EXPERT_FF),
            **_SHARED_TENSORS,
        },
        without=_NO_MLP,
    ),
    "qwen3moe": Sample(
        "qwen3moe",
        metadata={**_EXPERT_KEYS, **_KEY_LENGTHS, "expert_feed_forward_length": _EXPERT_FF},
        layer={**_HEAD_NORMS, **_expert_tensors(_EXPERT_FF)},
        without=_NO_MLP,
    ),
    "qwen2": Sample("qwen2", metadata={"rope.freq_base": 1e6, **_YARN}, layer=_QKV_BIASES, tied=True),
    "qwen3": Sample("qwen3", metadata={"rope.freq_base": 1e6, **_KEY_LENGTHS}, layer=_HEAD_NORMS, tied=True),
    "qwen3next": Sample(
        "qwen3next",
        layers=4,
        metadata={**_DELTA_KEYS, **_EXPERT_KEYS, **_EXPERT_LENGTHS},
        layer={**_HYBRID, **_expert_tensors(_EXPERT_FF), **_SHARED_TENSORS},
        without=(*_NO_MLP, "ffn_norm.weight"),
        recurrent={**_DELTA_TENSORS, "ssm_ba.weight": (2 * _DELTA_HEADS, EMBED)},
    ),
    "qwen3next-joined": Sample(
        "qwen3next",
        layers=4,
        metadata={**_DELTA_KEYS, **_EXPERT_KEYS, **_EXPERT_LENGTHS},
        layer={**_HYBRID, **_expert_tensors(_EXPERT_FF), **_SHARED_TENSORS},
        without=(*_NO_MLP, "ffn_norm.weight"),
        recurrent={
            **{name: shape for name, shape in _DELTA_TENSORS.items() if name[:5] != "attn_"},
            **{"ssm_in.weight": (_DELTA_QKV + _DELTA_V, EMBED), "ssm_ba.weight": (2 * _DELTA_HEADS, EMBED)},
        },
    ),
    "qwen35": Sample(
        "qwen35",
        layers=5,
        metadata={**_DELTA_KEYS, **_SECTIONS, "full_attention_interval": 4},
        layer=_HYBRID,
        without=("ffn_norm.weight",),
        recurrent=_QWEN35_TENSORS,
        tied=True,
    ),
    "qwen35-drafting": Sample(
        "qwen35",
        layers=4,
        metadata={**_DELTA_KEYS, **_SECTIONS, "block_count": 5, "nextn_predict_layers": 1},
        layer=_HYBRID,
        without=("ffn_norm.weight",),
        recurrent=_QWEN35_TENSORS,
        whole={f"blk.4.{name}": shape for name, shape in _DRAFTING_TENSORS.items()},
    ),
    "qwen35moe": Sample(
        "qwen35moe",
        layers=4,
        metadata={"feed_forward_length": None, **_DELTA_KEYS, **_SECTIONS, **_EXPERT_KEYS, **_EXPERT_LENGTHS},
        layer={**_HYBRID, **_expert_tensors(_EXPERT_FF), **_SHARED_TENSORS},
        without=(*_NO_MLP, "ffn_norm.weight"),
        recurrent=_QWEN35_TENSORS,
    ),
    "gemma": Sample("gemma", metadata={"rope.freq_base": None, **_KEY_LENGTHS}, tied=True),
    "gemma2": Sample(
        "gemma2",
        metadata={
            **{"rope.freq_base": None, **_KEY_LENGTHS, "attention.sliding_window": WINDOW},
            **{"attn_logit_softcapping": 3.0, "final_logit_softcapping": 4.0},
        },
        layer=_POST_NORMS,
        tied=True,
    ),
    "gemma3": Sample(
        "gemma3",
        layers=6,
        metadata={"rope.freq_base": 1e6, **_KEY_LENGTHS, "attention.sliding_window": WINDOW},
        layer={**_HEAD_NORMS, **_POST_NORMS},
        tied=True,
    ),
    "phi3": _PHI,
    "phi3-short": Sample(
        "phi3",
        metadata={**_PHI.metadata, "rope.scaling.original_context_length": CONTEXT},
        layer=_PHI.layer,
        whole=_PARTIAL_LONG_ROPE,
        without=_PHI.without,
    ),
    "phi3-long": Sample(
        "phi3",
        metadata={**_PHI.metadata, "rope.scaling.original_context_length": 128},
        layer=_PHI.layer,
        whole=_PARTIAL_LONG_ROPE,
        without=_PHI.without,
    ),
    "smollm3": Sample("smollm3", layers=4, metadata={"rope.freq_base": 5e6, "rope.dimension_count": DIM}, tied=True),
    "olmo2": _OLMO,
    "olmo3": Sample(
        "olmo2",
        layers=4,
        metadata={
            **{"attention.sliding_window": WINDOW, "attention.sliding_window_pattern": [True, True, True, False]},
            **_YARN,
        },
        layer=_OLMO.layer,
        without=_OLMO.without,
    ),
    "granite": Sample(
        "granite",
        metadata={
            **{"attention.scale": 0.05, "embedding_scale": 12.0, "residual_scale": 0.22, "logit_scale": 3.0},
            "rope.dimension_count": DIM,
        },
        tied=True,
    ),
    "internlm2": Sample("internlm2", metadata={"rope.freq_base": 1e6}),
    "stablelm": Sample(
        "stablelm",
        metadata={
            **_LAYER_NORM,
            "rope.freq_base": None,
            "rope.dimension_count": DIM // 4,
            "use_parallel_residual": True,
        },
        layer={**_QKV_BIASES, **_biases(attn_norm=EMBED, ffn_norm=EMBED)},
        whole=_biases(output_norm=EMBED),
    ),
    "stablelm-parallel": Sample(
        "stablelm",
        metadata={**_LAYER_NORM, "rope.dimension_count": DIM // 4, "use_parallel_residual": True},
        layer={
            **{"attn_q_norm.weight": (HEADS, DIM), "attn_k_norm.weight": (KV_HEADS, DIM)},
            **_biases(attn_norm=EMBED),
        },
        whole=_biases(output_norm=EMBED),
        without=("ffn_norm.weight",),
    ),
    "starcoder2": Sample(
        "starcoder2",
        metadata=_LAYER_NORM,
        layer={
            **_QKV_BIASES,
            **_biases(attn_output=EMBED, ffn_up=FF, ffn_down=EMBED, attn_norm=EMBED, ffn_norm=EMBED),
        },
        whole=_biases(output_norm=EMBED),
        without=("ffn_gate.weight",),
        tied=True,
    ),
    "gpt-oss": Sample(
        "gpt-oss",
        layers=4,
        metadata={
            **{"rope.freq_base": 150_000.0, **_KEY_LENGTHS, **_YARN, "attention.sliding_window": WINDOW},
            **{**_EXPERT_KEYS, "expert_feed_forward_length": 64},
        },
        layer={
            **_QKV_BIASES,
            **_biases(attn_output=EMBED),
            **{"attn_sinks.weight": (HEADS,), "post_attention_norm.weight": (EMBED,)},
            **_expert_tensors(64),
            **_expert_biases(64),
        },
        without=(*_NO_MLP, "ffn_norm.weight"),
    ),
    "command-r": Sample(
        "command-r",
        metadata={**_LAYER_NORM, "logit_scale": 0.0625, "rope.scaling.type": "none"},
        without=("ffn_norm.weight",),
        tied=True,
    ),
}


def metadata(sample: Sample) -> dict[str, Any]:
    """All keys, without the architecture in front."""
    keys = {
        "vocab_size": VOCAB,
        "block_count": sample.layers,
        "context_length": CONTEXT,
        "embedding_length": EMBED,
        "feed_forward_length": FF,
        "attention.head_count": HEADS,
        "attention.head_count_kv": KV_HEADS,
        _RMS: 1e-5,
        "rope.freq_base": 10_000.0,
        **sample.metadata,
    }
    return {key: value for key, value in keys.items() if value is not None}


def shapes(sample: Sample) -> dict[str, tuple[int, ...]]:
    """All tensors."""
    q, kv = HEADS * DIM, KV_HEADS * DIM
    common = {
        "attn_norm.weight": (EMBED,),
        "attn_q.weight": (q, EMBED),
        "attn_k.weight": (kv, EMBED),
        "attn_v.weight": (kv, EMBED),
        "attn_output.weight": (EMBED, q),
        "ffn_norm.weight": (EMBED,),
        "ffn_gate.weight": (FF, EMBED),
        "ffn_up.weight": (FF, EMBED),
        "ffn_down.weight": (EMBED, FF),
    }
    layer = {name: shape for name, shape in {**common, **sample.layer}.items() if name not in sample.without}
    without_attention = {name: shape for name, shape in layer.items() if name not in _ATTENTION} | sample.recurrent

    def of_layer(index: int) -> Mapping[str, tuple[int, ...]]:
        return without_attention if sample.recurrent and (index + 1) % 4 else layer

    return {
        "token_embd.weight": (VOCAB, EMBED),
        **{f"blk.{index}.{name}": shape for index in range(sample.layers) for name, shape in of_layer(index).items()},
        "output_norm.weight": (EMBED,),
        **({} if sample.tied else {"output.weight": (VOCAB, EMBED)}),
        **sample.whole,
    }


_ATTENTION = {f"attn_{name}.weight" for name in ("q", "k", "v", "output", "q_norm", "k_norm")}


def write_sample(
    path: Path, sample: Sample, *, seed: int = 0, experts: GGMLQuantizationType = GGMLQuantizationType.F32
) -> Path:
    """Writes a model, its experts in a type; the same arguments give the same bytes."""
    random = np.random.default_rng(seed)
    writer = GGUFWriter(path, sample.architecture)
    for key, value in metadata(sample).items():
        _add(writer, f"{sample.architecture}.{key}", value)
    writer.add_tokenizer_model("no_vocab")
    for name, shape in shapes(sample).items():
        numbers = random.standard_normal(shape)
        if name.startswith("rope_"):
            values = 1.0 + np.abs(numbers)
        elif name.endswith(".bias"):
            values = 0.3 * numbers
        elif name.endswith("ssm_a"):  # what is left after a token is between a tenth and nearly all
            values = -np.exp(numbers)
        elif "norm" in name:
            values = 1.0 + 0.2 * numbers
        else:  # attention that is neither flat nor a copy
            values = numbers * ((1.5 if ".attn" in name else 1.0) / np.sqrt(shape[-1]))
        kind = experts if name.endswith("exps.weight") else GGMLQuantizationType.F32
        writer.add_tensor(name, quants.quantize(values.astype(np.float32), kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _add(writer: GGUFWriter, key: str, value: Any) -> None:
    """Adds a key of the kind that converters write."""
    kinds = ((bool, writer.add_bool), (int, writer.add_uint32), (float, writer.add_float32), (str, writer.add_string))
    add = next((add for kind, add in kinds if isinstance(value, kind)), writer.add_array)
    add(key, value)


def main() -> None:
    """Writes every sample into a folder, for a runtime that is to score them."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args().folder
    folder.mkdir(parents=True, exist_ok=True)
    for name, sample in SAMPLES.items():
        write_sample(folder / f"{name}.gguf", sample)


if __name__ == "__main__":
    main()
