"""What a family module provides, and how it reads metadata without letting any value pass unseen."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from atlas_jax.config import ExpertsConfig, LayerConfig, ModelConfig, RopeConfig
from atlas_jax.model.families import _yarn
from atlas_jax.model.families._neutral import IGNORED_PREFIXES, NEUTRAL, WITHOUT_EXPERTS, WITHOUT_WINDOW

if TYPE_CHECKING:
    from atlas_jax.model.families._checkpoint import Checkpoint

_MAX_LAYERS = 1024
_MAX_HEADS = 1 << 16
_MAX_HEAD_DIM = 1 << 13
_MAX_SIZE = 1 << 24
_MAX_CONTEXT = (1 << 31) - 1
_MAX_ROPE_BASE = 1e15
_LEAST_EPS, _MAX_EPS = 1e-30, 0.1
_MAX_ROPE_FACTOR = 1e6
_MAX_SCALE = 1e6
_MAX_BETA = 1e4
_BIASES = {
    "qkv_bias": ("attn_q", "attn_k", "attn_v", "attn_qkv"),
    "out_bias": ("attn_output",),
    "gate_up_bias": ("ffn_gate", "ffn_up"),
    "down_bias": ("ffn_down",),
    "norm_bias": ("attn_norm", "ffn_norm"),
}
"""Fields of `ModelConfig` and the tensors that have the bias: where a file has any of them, it means one thing."""


class UnsupportedModel(ValueError):
    """A GGUF that is well formed but asks for something this library does not compute; the message names it."""


@dataclass(frozen=True)
class Family:
    """A family of models.

    Attributes:
      architecture: `general.architecture` of its GGUF files, and the prefix of its metadata keys.
      models: which models are meant, for people.
      config: makes the model's configuration from its metadata and the sizes of its vocabulary.
      frequency_factors: whether tensors divide its rotary frequencies: `rope_freqs`, or those of LongRoPE.
      checkpoint: how Hugging Face ships its models; None reads GGUF files alone.
    """

    architecture: str
    models: str
    config: Callable[[Fields, Vocabulary], ModelConfig]
    frequency_factors: bool = False
    checkpoint: Checkpoint | None = None


@dataclass(frozen=True)
class Vocabulary:
    """How many tokens there are, and how many rows the embeddings have for them: as many, or some to pad."""

    tokens: int
    rows: int


class Fields:
    """Metadata of one architecture; every key must be taken by somebody or have a value that changes nothing.

    Any other key would be a model property silently ignored, so `finish` refuses it.
    """

    def __init__(self, metadata: Mapping[str, Any], family: Family, tensors: Collection[str]) -> None:
        """Takes nothing yet.

        Args:
          tensors: names of the file's tensors.
        """
        self._family = family
        self._tensors = tensors
        self._prefix = f"{family.architecture}."
        self._values = {k.removeprefix(self._prefix): v for k, v in metadata.items() if k.startswith(self._prefix)}
        self._taken: set[str] = set()
        self.layers = self.integer("block_count", 1, _MAX_LAYERS)

    def integer(self, key: str, low: int, high: int = _MAX_SIZE, default: int | None = None) -> int:
        """A whole number from `low` to `high`; a list of one number for every layer is that number.

        Args:
          default: the value where the key is absent; None where it must be there.

        Raises:
          UnsupportedModel: it is missing, of another type, out of its range, or differs from layer to layer.
        """
        value = self._scalar(key)
        if value is None:
            return self._absent(key, default)
        if not isinstance(value, int) or isinstance(value, bool):
            raise self._refused(key, f"must be int, found {type(value).__name__}")
        if not low <= value <= high:
            raise self._refused(key, f"is {value}, not between {low} and {high}")
        return value

    def divisor(self, key: str, whole: int) -> int:
        """A whole number that divides another; otherwise as `integer`."""
        value = self.integer(key, 1, whole)
        if whole % value:
            raise self._refused(key, f"is {value}, which does not divide {whole}")
        return value

    def number(self, key: str, low: float, high: float, default: float | None = None) -> float:
        """A finite number from `low` to `high`; otherwise as `integer`."""
        value = self._scalar(key)
        if value is None:
            return self._absent(key, default)
        if not isinstance(value, int | float) or isinstance(value, bool):
            raise self._refused(key, f"must be float, found {type(value).__name__}")
        if not low <= value <= high:  # nor is NaN
            raise self._refused(key, f"is {value:g}, not between {low:g} and {high:g}")
        return float(value)

    def truth(self, key: str, *, default: bool) -> bool:
        """A truth value; otherwise as `integer`."""
        value = self._scalar(key)
        if value is None:
            return default
        if not isinstance(value, bool):
            raise self._refused(key, f"must be bool, found {type(value).__name__}")
        return value

    def factor(self, key: str, default: float | None = 1.0) -> float:
        """A positive factor; 0 is what files write where there is none."""
        return self.number(key, 0.0, _MAX_SCALE, default) or 1.0

    def has(self, tensor: str) -> bool:
        """Whether the layers have this tensor, a weight or a bias."""
        return f"blk.0.{tensor}" in self._tensors

    def sliding(self, period: int) -> list[bool]:
        """Which layers have a window: all but every `period`th, or as the file says (one period, or a flag for each)."""
        pattern = self.flags("attention.sliding_window_pattern")
        if isinstance(pattern, list):
            return pattern
        period = period if pattern is None else pattern
        return [period == 0 or index % period < period - 1 for index in range(self.layers)]

    def recurrent(self, period: int) -> list[bool]:
        """Which layers have a state in place of attention: all but every `period`th, or as the file says.

        Layers behind those, which do no more than draft the next tokens, are none of the model's.
        """
        layers = self.layers - self.integer("nextn_predict_layers", 0, self.layers - 1, default=0)
        interval = self.integer("full_attention_interval", 1, _MAX_LAYERS, default=period)
        given = self.flags("attention.recurrent_layers")
        if isinstance(given, int) and given is not None:
            raise self._refused("attention.recurrent_layers", f"must have {self.layers} truth values")
        return [(index + 1) % interval != 0 for index in range(layers)] if given is None else given[:layers]

    def text_sections(self, dims: int) -> None:
        """Takes the sections of a rotary embedding that images divide: in text all of the first three have one position.

        A pair of a head that lies in none of them, which text would not rotate, is refused.
        """
        key = "rope.dimension_sections"
        self._taken.add(key)
        given = self._values.get(key)
        if given is None:
            return
        sizes = given.tolist() if isinstance(given, np.ndarray) else list(given) if isinstance(given, list) else [given]
        if len(sizes) not in (3, 4) or any(type(size) is not int or not 0 <= size <= _MAX_HEAD_DIM for size in sizes):
            raise self._refused(key, "must be three or four whole numbers")
        in_turn = (sum(sizes) and pair % sum(sizes) for pair in range(dims // 2))
        if any(place >= 3 * sizes[place % 3] for place in in_turn):
            raise self._refused(key, f"has unsupported value {sizes}: it leaves out a part of {dims} dimensions")

    def experts(self, *, normalised: bool, shared: bool = False, biases: bool = False) -> ExpertsConfig | None:
        """The mixture of experts that the layers have, if they have one.

        Args:
          normalised: whether the chosen experts' probabilities are made to sum to 1.
          shared: whether a further expert is used by all tokens.
          biases: whether router and experts have biases.
        """
        count = self.integer("expert_count", 0, default=0)
        if not count:
            return None
        used = self.integer("expert_used_count", 1, count)
        ff = self._feed_forward_length()
        # 1: softmax over all; 3: over the chosen ones, which is the same where they are made to sum to 1
        self.same("expert_gating_func", 0.0, 1.0, *((3.0,) if normalised else ()))
        for key in ("expert_weights_scale", "expert_group_count", "expert_group_used_count"):
            self.same(key, 0.0, 1.0)
        return ExpertsConfig(
            count=count,
            used=used,
            # of Mixtral every expert is as wide as an MLP; the others name their width
            ff=self.integer("expert_feed_forward_length", 0, default=0) or ff,
            normalised=normalised,
            biases=biases,
            shared_ff=(self.integer("expert_shared_feed_forward_length", 0, default=0) or ff) if shared else 0,
        )

    def no_window(self) -> None:
        """Takes the keys of sliding windows, where the architecture's runtimes attend to everything all the same."""
        self.integer("attention.sliding_window", 0, default=0)
        self._taken.update(WITHOUT_WINDOW)

    def flags(self, key: str) -> list[bool] | int | None:
        """One truth value for every layer, or a whole number (a period); None where the key is absent."""
        self._taken.add(key)
        value = self._values.get(key)
        if isinstance(value, np.ndarray):
            if value.shape != (self.layers,) or value.dtype != np.bool_:
                raise self._refused(key, f"must have {self.layers} truth values, one for every layer")
            return [bool(one) for one in value]
        if value is None or (isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= _MAX_LAYERS):
            return value
        raise self._refused(key, f"must be a period or {self.layers} truth values")

    def head_dim(self, embed: int, heads: int, scale: float | None = None) -> int:
        """Numbers in a head: as the file says, or the width divided by the heads; even, for they are rotated in pairs.

        Args:
          scale: the factor on q·k of this family, if that is not the usual one.
        """
        divided = None if embed % heads else embed // heads
        dim = self.integer("attention.key_length", 1, _MAX_HEAD_DIM, default=divided or -1)
        if dim < 0:
            raise self._refused("attention.head_count", f"is {heads}, which does not divide embedding_length {embed}")
        if dim % 2:
            key = "attention.key_length" if "attention.key_length" in self._values else "attention.head_count"
            raise self._refused(key, f"makes heads of {dim} numbers, which are not pairs")
        self.same("attention.value_length", dim)
        self.same("attention.scale", 0.0, dim**-0.5 if scale is None else scale)
        return dim

    def rotated(self, head_dim: int, key: str = "rope.dimension_count", *, whole: bool = False) -> int:
        """Numbers of a head that rotate: all, or an even part of them unless that is `whole`."""
        dims = self.integer(key, 2, _MAX_HEAD_DIM, default=head_dim)
        if dims % 2 or dims > head_dim or (whole and dims != head_dim):
            raise self._refused(key, f"is {dims}, with heads of {head_dim} numbers")
        return dims

    def heads(self) -> tuple[int, int]:
        """Query heads, and the key heads that they share evenly."""
        heads = self.integer("attention.head_count", 1, _MAX_HEADS)
        shared = self.integer("attention.head_count_kv", 1, _MAX_HEADS, default=heads)
        if heads % shared:
            raise self._refused("attention.head_count_kv", f"is {shared}, which does not divide head_count {heads}")
        return heads, shared

    def context_length(self) -> int:
        """Tokens the model was trained on."""
        return self.integer("context_length", 1, _MAX_CONTEXT)

    def original_context_length(self) -> int:
        """Tokens it was trained on before its rotary embedding was scaled."""
        return self.integer("rope.scaling.original_context_length", 1, _MAX_CONTEXT, default=self.context_length())

    def norm_eps(self, *, layer_norm: bool = False) -> float:
        """What keeps a norm from dividing by zero, and must not outweigh what it divides."""
        key = "attention.layer_norm_epsilon" if layer_norm else "attention.layer_norm_rms_epsilon"
        return self.number(key, _LEAST_EPS, _MAX_EPS)

    def rope_base(self, *keys: str, default: float | None = None) -> float:
        """Wavelength base of a rotary embedding, under the first of some keys that is there."""
        found = [self.number(key, 1.0, _MAX_ROPE_BASE) for key in keys if key in self._values]
        self._taken.update(keys)
        return found[0] if found else self._absent(keys[0], default)

    def rope_scaling_type(self) -> str | None:
        """How rotary embeddings are scaled for a longer context: None, "none", "linear", "yarn" or "longrope"."""
        kind = self._scalar("rope.scaling.type")
        longer = ("longrope",) if self._family.frequency_factors else ()
        if kind not in (None, "none", "linear", "yarn", *longer):
            raise self._refused("rope.scaling.type", f"has unsupported value {kind!r}")
        return kind

    def rope(
        self, head_dim: int, *, interleaved: bool, base: float | None = None, scaled: bool = True, whole: bool = False
    ) -> RopeConfig:
        """The rotary embedding, with its scaling.

        Args:
          base: of its wavelengths; None for what the file says.
          scaled: whether the file's scaling is that of this embedding.
          whole: whether all of a head must rotate.
        """
        base = self.rope_base("rope.freq_base") if base is None else base
        dims = self.rotated(head_dim, whole=whole)
        if not scaled:
            return RopeConfig(base=base, dims=dims, interleaved=interleaved)
        scale, magnitude = self.rope_scale(), self.number("rope.scaling.attn_factor", 1e-3, 1e3, default=1.0)
        yarn = self.rope_scaling_type() == "yarn" and scale != 1.0
        self.same("rope.scaling.yarn_ext_factor", -1.0, 1.0 if yarn else 0.0)
        if not yarn:
            return RopeConfig(base=base, dims=dims, position_scale=scale, interleaved=interleaved, magnitude=magnitude)
        betas = (
            self.number("rope.scaling.yarn_beta_fast", 0.0, _MAX_BETA, default=_yarn.BETA_FAST) or _yarn.BETA_FAST,
            self.number("rope.scaling.yarn_beta_slow", 0.0, _MAX_BETA, default=_yarn.BETA_SLOW) or _yarn.BETA_SLOW,
        )
        return RopeConfig(
            base=base,
            dims=dims,
            interleaved=interleaved,
            frequency_factors=_yarn.divisors(base, dims, 1.0 / scale, self.original_context_length(), *betas),
            magnitude=magnitude * _yarn.magnitude(1.0 / scale),
        )

    def rope_scale(self) -> float:
        """What positions are multiplied by: the inverse of a scaling factor."""
        factor = self.number("rope.scaling.factor", 0.0, _MAX_ROPE_FACTOR, default=0.0)
        # the key's name before there were types of scaling; read only without the new one
        old = self.number("rope.scale_linear", 0.0, _MAX_ROPE_FACTOR, default=0.0)
        factor = factor or old or 1.0
        if self.rope_scaling_type() == "none" and factor != 1.0:
            raise self._refused("rope.scaling.factor", f"is {factor:g}, but rope.scaling.type is 'none'")
        return 1.0 / factor

    def same(self, key: str, *allowed: float) -> None:
        """Takes a number that may be absent, or must be one of `allowed`."""
        value = self._scalar(key)
        if value is None:
            return
        known = isinstance(value, int | float) and not isinstance(value, bool)
        if not known or not any(math.isclose(value, same, rel_tol=1e-6) for same in allowed):
            raise self._refused(
                key, f"has unsupported value {value!r}, not {' or '.join(f'{one:g}' for one in allowed)}"
            )

    def vocabulary(self, vocabulary: Vocabulary) -> int:
        """The number of tokens, after a look at whether the file contradicts itself."""
        self.integer("vocab_size", vocabulary.tokens, vocabulary.rows, default=vocabulary.tokens)
        return vocabulary.tokens

    def model(
        self,
        vocabulary: Vocabulary,
        *,
        interleaved: bool = False,
        rope_base: float | None = None,
        layers: Sequence[LayerConfig] | None = None,
        ropes: Sequence[RopeConfig] | None = None,
        **values: Any,
    ) -> ModelConfig:
        """The configuration of a model with the sizes that every family names alike; nothing else may be left to take.

        Args:
          interleaved, rope_base: of its rotary embedding, if it has one and that is not in `ropes`; see `rope`.
          layers: what differs from layer to layer, if anything does.
          values: further fields of `ModelConfig`. Biases, and whether the head is that of the embeddings, follow from the
            file's tensors.
        """
        embed = self.integer("embedding_length", 1)
        heads, kv_heads = self.heads()
        head_dim = self.head_dim(embed, heads, values.get("attention_scale"))
        if ropes is None:
            ropes = (self.rope(head_dim, interleaved=interleaved, base=rope_base),)
        biases: dict[str, Any] = {
            field: any(self.has(f"{name}.bias") for name in names) for field, names in _BIASES.items()
        }
        config = ModelConfig(
            family=self._family.architecture,
            vocab=self.vocabulary(vocabulary),
            embed=embed,
            heads=heads,
            kv_heads=kv_heads,
            head_dim=head_dim,
            ff=self._feed_forward_length(),
            layers=tuple(layers or (LayerConfig(),) * self.layers),
            ropes=tuple(ropes),
            context_length=self.context_length(),
            norm_eps=self.norm_eps(layer_norm=values.get("norm") == "layer"),
            tied_head="output.weight" not in self._tensors,
            **biases,
            **values,
        )
        self.finish()
        return config

    def _feed_forward_length(self) -> int:
        """Columns of an MLP; files of some models whose layers have experts alone tell their columns only."""
        experts = self.integer("expert_feed_forward_length", 0, default=0) if self._plain("expert_count", 0) else 0
        return self.integer("feed_forward_length", 1, default=experts or None)

    def finish(self) -> None:
        """Refuses metadata of this architecture that nothing has taken and that would change the result."""
        experts, window = self._plain("expert_count", 0), self._plain("attention.sliding_window", 0)
        for key in sorted(set(self._values) - self._taken):
            if key.startswith(IGNORED_PREFIXES):
                continue
            if key == "expert_count" or (key in WITHOUT_EXPERTS and not experts):
                if key == "expert_count" and experts != 0:
                    raise self._refused(key, f"has unsupported value {experts!r}: this architecture's are not computed")
                continue
            if key in WITHOUT_WINDOW and not window and "attention.sliding_window" not in self._taken:
                continue
            if key not in NEUTRAL:
                raise self._refused(key, "is not understood")
            value = self._values[key]
            parts = value.tolist() if isinstance(value, np.ndarray) else [value]
            if not all(map(NEUTRAL[key], parts)):
                raise self._refused(key, f"has unsupported value {_short(value)}")

    def _plain(self, key: str, default: Any) -> Any:
        value = self._values.get(key, default)
        return (
            value.tolist()[0] if isinstance(value, np.ndarray) and value.size and (value == value[0]).all() else value
        )

    def _scalar(self, key: str) -> Any:
        """A value, or the one value that a list with an entry for every layer repeats."""
        self._taken.add(key)
        value = self._values.get(key)
        if not isinstance(value, list | np.ndarray):
            return value
        layers = 1 if key == "block_count" else self.layers
        if len(value) != layers:
            raise self._refused(key, f"is a list of {len(value)} values for {layers} layers")
        first = value[0] if isinstance(value, list) else value[0].item()
        if any(one != value[0] for one in value):
            raise self._refused(key, "differs from layer to layer, which is not supported")
        return first

    def _absent(self, key: str, default: Any) -> Any:
        if default is None:
            raise UnsupportedModel(f"metadata key '{self._prefix}{key}' is missing")
        return default

    def _refused(self, key: str, why: str) -> UnsupportedModel:
        return UnsupportedModel(f"metadata key '{self._prefix}{key}' {why}")


def _short(value: Any) -> str:
    text = repr(value.tolist() if isinstance(value, np.ndarray) else value)
    return text if len(text) <= 60 else text[:57] + "..."
