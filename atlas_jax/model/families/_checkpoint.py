"""How Hugging Face ships a family's models: its config.json and tensor names, as those of the family's GGUF files.

A family says it in its own module with a `Checkpoint`. What is made of a configuration is checked afterwards as the
metadata of any GGUF file is, so a `Config` looks at types alone, and at whether anything is left over.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

import numpy as np

from atlas_jax.model.families._family import UnsupportedModel

Metadata = dict[str, Any]

# Of the library's base class, or about training, files and generation: nothing that a forward pass computes with.
_SAID_ONLY = frozenset(
    {"architectures", "model_type", "torch_dtype", "dtype", "transformers_version", "_name_or_path", "name_or_path"}
    | {"use_cache", "initializer_range", "pretraining_tp", "cache_implementation", "return_dict", "use_return_dict"}
    | {"bos_token_id", "eos_token_id", "pad_token_id", "unk_token_id", "sep_token_id", "decoder_start_token_id"}
    | {"attention_dropout", "hidden_dropout", "resid_pdrop", "embd_pdrop", "attn_pdrop", "dropout", "output_attentions"}
    | {
        "output_hidden_states",
        "torchscript",
        "id2label",
        "label2id",
        "problem_type",
        "finetuning_task",
        "tokenizer_class",
    }
    | {
        "task_specific_params",
        "_attn_implementation",
        "_attn_implementation_autoset",
        "attn_implementation",
        "auto_map",
    }
    | {"is_llama_config", "transformers.js_config", "chunk_size_feed_forward", "is_decoder", "prefix", "language"}
    | {"router_aux_loss_coef", "router_jitter_noise", "residual_dropout", "embedding_dropout", "output_router_logits"}
    | {"num_labels", "max_window_layers", "unsloth_version", "unsloth_fixed"}
)
_SAMPLING = ("do_sample", "temperature", "top_k", "top_p", "typical_p", "repetition_penalty", "num_beams", "max_length")
"""Generation settings that old configurations have; those of generation_config.json are what counts."""


class Config:
    """A config.json (or its part about the text): every key is taken by somebody, empty, or says nothing."""

    def __init__(self, values: Mapping[str, Any]) -> None:
        self._values = values
        self._taken: set[str] = set()

    def get(self, key: str) -> Any:
        """A value, or None."""
        self._taken.add(key)
        return self._values.get(key)

    def integer(self, key: str, default: int | None = None) -> int:
        """A whole number; raises UnsupportedModel where it is missing without a default, or something else."""
        value = self._value(key, default)
        if type(value) is not int:
            raise refused(key, f"must be a whole number, found {type(value).__name__}")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        """A number as a GGUF file would hold it, in 32 bits; otherwise as `integer`."""
        return as_float(key, self._value(key, default))

    def same(self, key: str, *allowed: Any) -> None:
        """Takes a value that may be absent, or must be one of `allowed`."""
        value = self.get(key)
        if value is not None and value not in allowed:
            raise refused(key, f"has unsupported value {str(value)[:60]!r}, not {' or '.join(map(repr, allowed))}")

    def finish(self) -> None:
        """Refuses what nobody has taken and might change the result."""
        for key in sorted(set(self._values) - self._taken - _SAID_ONLY):
            value = self._values[key]
            if value is None or value is False or value in ({}, [], "") or key in _SAMPLING:
                continue
            if key in ("quantization_config", "quantization", "compression_config"):
                raise refused(key, "says that the weights are quantised: BF16, F16 and F32 are read")
            raise refused(key, "is not understood")

    def _value(self, key: str, default: Any) -> Any:
        value = self.get(key)
        if value is None:
            value = default
        if value is None:
            raise refused(key, "is missing")
        return value


def refused(key: str, why: str) -> UnsupportedModel:
    """The error of a value of config.json."""
    return UnsupportedModel(f"config.json: '{key[:80]}' {why}")


def as_float(key: str, value: Any) -> float:
    """A finite number in 32 bits; raises UnsupportedModel."""
    if type(value) not in (int, float):
        raise refused(key, f"must be a number, found {type(value).__name__}")
    try:
        with np.errstate(over="ignore"):
            rounded = float(np.float32(value))
    except OverflowError:
        rounded = math.inf
    if not math.isfinite(rounded):
        raise refused(key, f"is {str(value)[:40]}, which is no finite number of 32 bits")
    return rounded


@dataclass(frozen=True)
class Described:
    """What a configuration says, in the words of GGUF.

    Attributes:
      metadata: without the architecture in front.
      tensors: those that a GGUF file has and a folder has not.
      tied: whether the embeddings are the head, whatever the files hold.
    """

    metadata: Metadata
    tensors: Mapping[str, np.ndarray] = field(default_factory=dict)
    tied: bool = False


@dataclass(frozen=True)
class Checkpoint:
    """The form of a family's folders.

    Attributes:
      classes: names in `architectures` of config.json.
      describe: reads a configuration.
      layer: names of a layer's tensors (`self_attn.q_proj`) to those of GGUF (`attn_q`). Those with a `*` in the place of a
        number are stacked (`mlp.experts.*.up_proj`).
      interleaved: of those, whose rows are rotated in pairs (i, i + d/2) here and (2i, 2i + 1) in GGUF.
      norms_plus_one: norms are stored without the 1 that is added to them.
      text: key of config.json under which the text model's part lies, in classes that have others.
      beside: beginnings of the names of tensors that are no part of the text model.
    """

    classes: tuple[str, ...]
    describe: Callable[[Config], Described]
    layer: Mapping[str, str]
    interleaved: frozenset[str] = frozenset()
    norms_plus_one: bool = False
    text: str | None = None
    beside: tuple[str, ...] = ()


LAYER: Mapping[str, str] = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
"""What all families call alike; the norms around the MLP differ."""


_NONE: Mapping[str, int] = MappingProxyType({})
EXPERTS: Mapping[str, str] = {
    "mlp.gate": "ffn_gate_inp",
    "mlp.experts.*.gate_proj": "ffn_gate_exps",
    "mlp.experts.*.up_proj": "ffn_up_exps",
    "mlp.experts.*.down_proj": "ffn_down_exps",
}
"""A mixture of experts as Qwen's models have it."""


def decoder(
    config: Config, defaults: Mapping[str, int] = _NONE, *, layer_norm: str | None = None, partial: bool = False
) -> Metadata:
    """The sizes that every configuration has.

    Args:
      defaults: of the class, by their names in config.json.
      layer_norm: the key of a LayerNorm's epsilon; None is a model with RMSNorm.
      partial: whether only a part of a head may rotate.
    """
    heads = config.integer("num_attention_heads", defaults.get("num_attention_heads"))
    found: Metadata = {
        "block_count": config.integer("num_hidden_layers", defaults.get("num_hidden_layers")),
        "context_length": config.integer("max_position_embeddings", defaults.get("max_position_embeddings")),
        "embedding_length": config.integer("hidden_size", defaults.get("hidden_size")),
        "feed_forward_length": config.integer("intermediate_size", defaults.get("intermediate_size")),
        "attention.head_count": heads,
        "attention.head_count_kv": config.integer("num_key_value_heads", defaults.get("num_key_value_heads", heads)),
    }
    if layer_norm is None:
        found["attention.layer_norm_rms_epsilon"] = config.number("rms_norm_eps", 1e-6)
    else:
        found["attention.layer_norm_epsilon"] = config.number(layer_norm, 1e-5)
    config.get("vocab_size")  # the rows of the embeddings say it
    head_dim = config.get("head_dim") or defaults.get("head_dim")
    if head_dim is not None:
        if type(head_dim) is not int:
            raise refused("head_dim", f"must be a whole number, found {type(head_dim).__name__}")
        found |= {"attention.key_length": head_dim, "attention.value_length": head_dim}
    if partial:
        parameters = config.get("rope_parameters")
        inside = parameters.get("partial_rotary_factor") if isinstance(parameters, dict) else None
        share = config.number("partial_rotary_factor", 1.0) if inside is None else as_float("rope_parameters", inside)
        found["rope.dimension_count"] = int(share * (head_dim or found["embedding_length"] // max(1, heads)))
    else:
        config.same("partial_rotary_factor", 1)
    return found


def whole_attention(config: Config, context: int) -> None:
    """Refuses a configuration whose layers have windows: this architecture's attend to everything."""
    types, window = config.get("layer_types"), config.get("sliding_window")
    if isinstance(types, list) and any(one != "full_attention" for one in types):
        raise refused("layer_types", "has layers with a window, which this architecture has not")
    if config.get("use_sliding_window") is not False and type(window) is int and window < context:
        raise refused("sliding_window", f"is {window}, less than the context: not supported here")


def rope(
    config: Config, default_base: float, layer_type: str | None = None, kinds: tuple[str, ...] = ("linear", "yarn")
) -> tuple[float, Mapping[str, Any]]:
    """Base of the rotary embedding, and its scaling with a `rope_type`; of one type of layers where they differ.

    Args:
      kinds: of scaling that the family's files can say.
    """
    parameters = config.get("rope_parameters")
    if isinstance(parameters, dict) and layer_type is not None and isinstance(parameters.get(layer_type), dict):
        parameters = parameters[layer_type]
    scaling = config.get("rope_scaling")
    if scaling is None:
        scaling = parameters or {}
    if not isinstance(scaling, dict):
        raise refused("rope_scaling", f"must be an object, found {type(scaling).__name__}")
    base = config.get("rope_theta")
    if isinstance(parameters, dict) and "rope_theta" in parameters:
        base = parameters["rope_theta"]
    kind = scaling.get("rope_type", scaling.get("type")) or "default"
    if kind != "default" and kind not in kinds:
        known = " or ".join(map(repr, kinds))
        raise refused("rope_scaling", f"is of unsupported type {str(kind)[:40]!r}, not {known}")
    return as_float("rope_theta", default_base if base is None else base), {**scaling, "rope_type": kind}


def scaled(scaling: Mapping[str, Any], context: int) -> Metadata:
    """Linear scaling, or YaRN's, as metadata; nothing where there is neither."""
    kind = scaling["rope_type"]
    if kind not in ("linear", "yarn"):
        return {}
    factor = as_float("rope_scaling.factor", scaling.get("factor"))
    found: Metadata = {"rope.scaling.type": kind, "rope.scaling.factor": factor}
    if kind == "yarn":
        found["rope.scaling.original_context_length"] = _whole(scaling, "original_max_position_embeddings", context)
        for name in ("beta_fast", "beta_slow"):
            if scaling.get(name) is not None:
                found[f"rope.scaling.yarn_{name}"] = as_float(f"rope_scaling.{name}", scaling[name])
        usual, magnitude = 0.1 * math.log(max(factor, 1.0)) + 1.0, scaling.get("attention_factor")
        if magnitude is not None and not math.isclose(as_float("rope_scaling", magnitude), usual, rel_tol=1e-5):
            raise refused("rope_scaling.attention_factor", f"is {magnitude}, not {usual:g} as usual: not supported")
        for name in ("mscale", "mscale_all_dim", "truncate"):
            if scaling.get(name) not in (None, True):
                raise refused(f"rope_scaling.{name}", f"is {str(scaling[name])[:40]}, which is not supported")
    return found


def _whole(values: Mapping[str, Any], key: str, default: int) -> int:
    value = values.get(key)
    if value is None:
        return default
    if type(value) is not int:
        raise refused(f"rope_scaling.{key}", f"must be a whole number, found {type(value).__name__}")
    return value


def llama3_factors(base: float, dims: int, scaling: Mapping[str, Any]) -> np.ndarray:
    """What Llama 3.1 divides its frequencies by: 1 for short wavelengths, the factor for long ones, smooth between."""
    names = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
    factor, low, high, trained = (as_float(f"rope_scaling.{name}", scaling.get(name)) for name in names)
    if not (factor > 0 and 0 < low < high and trained > 0):
        raise refused("rope_scaling", "has factors of llama3 that contradict each other")
    wavelength = 2 * np.pi * base ** (np.arange(0, dims, 2, dtype=np.float64) / dims)
    smooth = np.clip((trained / wavelength - low) / (high - low), 0.0, 1.0)
    return (1.0 / ((1.0 - smooth) / factor + smooth)).astype(np.float32)
