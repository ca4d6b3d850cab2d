"""Frozen, validated settings of the model, the memory and the engine. Hashable: they are static under `jit`."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Literal

PAGE = 128
"""Tokens per KV page: the unit of the attention window, of prefill, and of memory writes."""

WeightDtype = Literal["int8", "float32"]
KVDtype = Literal["int8", "float32"]

MAX_LOGIT_BIAS = 300
"""Entries of `logit_bias` a request may have, as in OpenAI's API."""


class ConfigError(ValueError):
    """A setting out of its range; the message names it."""


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ConfigError(message)


@dataclass(frozen=True, kw_only=True)
class RopeConfig:
    """One rotary embedding.

    Attributes:
      base: wavelength base (theta).
      dims: leading head dimensions that rotate; the rest pass through.
      position_scale: positions are multiplied by it (1 / linear scaling factor); 0 rotates nothing.
      interleaved: pairs are (0,1),(2,3),… as GGUF's `llama` family stores them; otherwise (i, i + dims/2).
      frequency_factors: divisors of the inverse frequencies, one per pair (GGUF `rope_freqs`, YaRN, LongRoPE), or None.
      magnitude: cosines and sines are multiplied by it: the attention factor of YaRN and LongRoPE.
    """

    base: float
    dims: int
    position_scale: float = 1.0
    interleaved: bool = True
    frequency_factors: tuple[float, ...] | None = None
    magnitude: float = 1.0

    def __post_init__(self) -> None:
        _require(self.base > 0 and math.isfinite(self.base), f"rope base must be positive, got {self.base}")
        _require(self.dims > 0 and self.dims % 2 == 0, f"rope dims must be even and positive, got {self.dims}")
        _require(self.position_scale >= 0, f"rope position_scale must not be negative, got {self.position_scale}")
        _require(self.magnitude > 0, f"rope magnitude must be positive, got {self.magnitude}")
        factors = self.frequency_factors
        _require(factors is None or len(factors) == self.dims // 2, "rope frequency_factors must have dims/2 entries")


@dataclass(frozen=True, kw_only=True)
class LayerConfig:
    """What differs from layer to layer.

    Attributes:
      kind: how it mixes tokens: by attention, or by `ModelConfig.delta_net`, whose state has one size.
      sliding_window: tokens this layer attends (itself included), or None for all.
      rope: which of the model's rotary embeddings it uses.
    """

    kind: Literal["attention", "delta_net"] = "attention"
    sliding_window: int | None = None
    rope: int = 0


@dataclass(frozen=True, kw_only=True)
class DeltaNetConfig:
    """Gated DeltaNet layers (arXiv 2412.06464): a linear memory per head, corrected and forgotten with every token.

    Attributes:
      heads, key_heads: heads of values, each with a memory of its own, and those of queries and keys, which they share.
      dim: numbers in a head of either.
      conv: latest inputs that the convolution before them sees, a token's own included.
      tiled: value head h reads key head h mod key_heads, as files of `qwen35` have it; otherwise heads that share one
        lie side by side.
    """

    heads: int
    key_heads: int
    dim: int
    conv: int
    tiled: bool = False

    def __post_init__(self) -> None:
        for name in ("heads", "key_heads", "dim"):
            _require(getattr(self, name) > 0, f"delta_net {name} must be positive, got {getattr(self, name)}")
        _require(self.conv > 1, f"delta_net conv must be at least 2, got {self.conv}")
        _require(
            self.heads % self.key_heads == 0,
            f"delta_net heads ({self.heads}) must be a multiple of key_heads ({self.key_heads})",
        )

    @property
    def channels(self) -> int:
        """Numbers that go through the convolution: queries, keys and values."""
        return (2 * self.key_heads + self.heads) * self.dim


@dataclass(frozen=True, kw_only=True)
class ExpertsConfig:
    """A mixture of experts in place of every layer's MLP.

    Attributes:
      count, used: experts, and how many of them each token uses: those that the router finds most probable.
      ff: columns of an expert.
      normalised: whether the probabilities of the experts that a token uses are scaled to sum to 1.
      shared_ff: columns of a further expert that all tokens use, times a sigmoid of its own; 0 for none.
      biases: whether the router and the experts' matrices have biases on their outputs.
    """

    count: int
    used: int
    ff: int
    normalised: bool
    shared_ff: int = 0
    biases: bool = False

    def __post_init__(self) -> None:
        _require(0 < self.used <= self.count, f"experts used ({self.used}) must be at most their count, {self.count}")
        _require(self.ff > 0, f"ff of experts must be positive, got {self.ff}")


def columns_together(ff: int) -> int:
    """Columns of an MLP's gate that lie together, before as many of its up."""
    return math.gcd(ff, 128)


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """A decoder-only transformer of the Llama family, as data: families differ in values, not in code paths of their own.

    Attributes:
      family: GGUF architecture name.
      activation: of the MLP: of its gate, or of its only input matrix where it has no gate; `kernels.fused_linear` defines
        them.
      gated: whether the MLP multiplies activation(gate) with up; otherwise it is down(activation(up)).
      norm: "rms" or "layer" (mean taken away first), before each sublayer, at the end, and of queries and keys.
      norm_bias: whether those of the residual stream add a bias.
      pre_norms: whether a sublayer reads the normed residual stream.
      post_norms: RMSNorm on each sublayer's output before the residual add.
      experts: the mixture of experts that is its MLP, if it is one.
      delta_net: what layers of that kind are, if there are any.
      attention_gate: whether attention's output is multiplied by the sigmoid of a further projection, number by number.
      parallel: the MLP reads what attention reads, and both are added to the residual stream together.
      qk_norm: norm on queries and keys before RoPE: of each "head" with a gain that all share, of each of the "heads" with
        a gain of its own, or over the whole "width"; None for no norm.
      qkv_bias, out_bias, gate_up_bias, down_bias: whether these matrices have a bias on their outputs.
      embed_scale: factor on token embeddings.
      residual_scale: factor on what a sublayer adds to the residual stream.
      attention_scale: factor on q·k.
      attention_softcap: scores of attention become cap·tanh(score / cap), or None.
      null_logits: whether each head of a layer has one more score in its softmax, a parameter, of a key without a value:
        what it weighs is taken from the others (the attention sinks of gpt-oss).
      logit_scale: factor on logits.
      final_softcap: logits then become cap·tanh(logits / cap), or None.
    """

    family: str
    vocab: int
    embed: int
    heads: int
    kv_heads: int
    head_dim: int
    ff: int
    layers: tuple[LayerConfig, ...]
    ropes: tuple[RopeConfig, ...]
    context_length: int
    norm_eps: float
    activation: Literal["silu", "gelu_tanh", "swiglu_oai"] = "silu"
    gated: bool = True
    norm: Literal["rms", "layer"] = "rms"
    norm_bias: bool = False
    pre_norms: bool = True
    post_norms: bool = False
    experts: ExpertsConfig | None = None
    delta_net: DeltaNetConfig | None = None
    attention_gate: bool = False
    parallel: bool = False
    qk_norm: Literal["head", "heads", "width"] | None = None
    qkv_bias: bool = False
    out_bias: bool = False
    gate_up_bias: bool = False
    down_bias: bool = False
    embed_scale: float = 1.0
    residual_scale: float = 1.0
    attention_scale: float | None = None
    attention_softcap: float | None = None
    null_logits: bool = False
    tied_head: bool = True
    logit_scale: float = 1.0
    final_softcap: float | None = None

    def __post_init__(self) -> None:
        for name in ("vocab", "embed", "heads", "kv_heads", "head_dim", "ff", "context_length"):
            _require(getattr(self, name) > 0, f"{name} must be positive, got {getattr(self, name)}")
        _require(
            self.heads % self.kv_heads == 0, f"heads ({self.heads}) must be a multiple of kv_heads ({self.kv_heads})"
        )
        _require(len(self.layers) > 0, "a model needs at least one layer")
        _require(self.norm_eps > 0, f"norm_eps must be positive, got {self.norm_eps}")
        _require(
            self.experts is None or (self.gated and not self.parallel), "experts have a gate, and come after attention"
        )
        _require(self.gated or self.activation != "swiglu_oai", "activation swiglu_oai needs a gate")
        _require(
            self.delta_net is None or (self.pre_norms and not self.parallel and not self.post_norms),
            "delta_net layers have norms before their parts, which follow one another",
        )
        for index, layer in enumerate(self.layers):
            _require(
                layer.kind == "attention" or self.delta_net is not None,
                f"layer {index} is of kind {layer.kind}, which is not described",
            )
            _require(0 <= layer.rope < len(self.ropes), f"layer {index} names rope {layer.rope}, which does not exist")
            _require(
                layer.sliding_window is None or layer.sliding_window > 0,
                f"layer {index}: sliding_window must be positive",
            )
        for rope in self.ropes:
            _require(rope.dims <= self.head_dim, f"rope dims {rope.dims} exceed head_dim {self.head_dim}")

    @property
    def scale(self) -> float:
        """Factor on q·k: `attention_scale`, or 1/√head_dim."""
        return self.head_dim**-0.5 if self.attention_scale is None else self.attention_scale

    @property
    def groups(self) -> int:
        """Query heads per KV head."""
        return self.heads // self.kv_heads

    @property
    def balances_keys(self) -> bool:
        """Whether keys have a bias and no norm after it: a few channels may then be far larger than all others."""
        return self.qkv_bias and self.qk_norm is None

    @property
    def recurrent(self) -> bool:
        """Whether some layers keep a state in place of what was read: it cannot be set back to an earlier token."""
        return any(layer.kind != "attention" for layer in self.layers)

    @property
    def qkv_heads(self) -> int:
        """Heads that attention projects to: queries, keys, values, and gates of its output."""
        return (2 if self.attention_gate else 1) * self.heads + 2 * self.kv_heads

    @property
    def ff_block(self) -> int:
        """Columns of the MLP that lie together in `LayerParams.gate_up`."""
        return columns_together(self.ff)

    @property
    def windows(self) -> tuple[int | None, ...]:
        """The different attention windows of its layers."""
        attending = (layer for layer in self.layers if layer.kind == "attention")
        return tuple(dict.fromkeys(layer.sliding_window for layer in attending))

    def replace(self, **changes: object) -> ModelConfig:
        """A copy with some fields changed; validated again."""
        return dataclasses.replace(self, **changes)  # type: ignore[arg-type]


MAX_MEMORY_LAYERS = 10
MIN_MEMORY_DIM, MAX_MEMORY_DIM, MEMORY_DIM_STEP = 8, 128, 8
MAX_DEGREE = 3


def check_memory_dim(dim: int) -> None:
    """Raises ConfigError for a dimension of keys that no memory is fitted with."""
    _require(
        MIN_MEMORY_DIM <= dim <= MAX_MEMORY_DIM and dim % MEMORY_DIM_STEP == 0,
        f"memory_dim must be a multiple of {MEMORY_DIM_STEP} between {MIN_MEMORY_DIM} and {MAX_MEMORY_DIM}, got {dim}",
    )


@dataclass(frozen=True, kw_only=True)
class MemoryConfig:
    """Shape of the recall memory of every session of an engine.

    Attributes:
      layers: layers whose output may be tapped, best-ranked first; a request uses the first `memory_layers` of them.
      components: numbers kept of a tapped state; a memory key is that many of the state and as many of a sketch
        of the words before it.
      features: polynomial features, the pairs one memory can hold exactly.
      code_dim: dimensions of a token's value code.
      max_window: most tokens any request may attend exactly.
      max_omega_window: most tokens in the objective of one write.
      max_kept: most pairs that a request may keep of what has left its window, per KV head and on average per layer.
      kept_weights: shares of them of the model's layers; empty where all keep as many.
      ridge: ρ of the exact solve; features have unit norm.
      correction: how much of what the memory says of a window's keys a write corrects. 1 is the Omega rule to the letter: a
        write takes from what is old what speaks along its keys, and after as many tokens as there are features nothing old
        is left. 0 never forgets, and what is frequent grows without bound. With 1, 0.3 and 0.1, facts stated 8 000 tokens
        before were found in the same words for 0.70, 0.90 and 0.90, in others for 0.32, 0.54 and 0.70.
      passes: inner steps of the gradient and Muon writes.
      momentum: θ of the Muon write.
    """

    layers: tuple[int, ...]
    components: int = 96
    features: int = 9216
    code_dim: int = 256
    max_window: int = 4096
    max_omega_window: int = 512
    max_kept: int = 0
    kept_weights: tuple[float, ...] = ()
    ridge: float = 0.3
    correction: float = 0.1
    passes: int = 4
    momentum: float = 0.5

    def __post_init__(self) -> None:
        _require(0 < len(self.layers) <= MAX_MEMORY_LAYERS, f"layers must name 1 to {MAX_MEMORY_LAYERS} layers")
        _require(len(set(self.layers)) == len(self.layers), f"layers must not repeat, got {self.layers}")
        for name in ("components", "features", "code_dim", "passes"):
            _require(getattr(self, name) > 0, f"{name} must be positive, got {getattr(self, name)}")
        _require(
            all(0.01 <= weight <= 100 for weight in self.kept_weights), "kept_weights must be between 0.01 and 100"
        )
        least = self.components
        _require(self.code_dim >= least, f"code_dim must be at least {least}, the components, got {self.code_dim}")
        for name in ("max_window", "max_omega_window"):
            value = getattr(self, name)
            _require(value >= PAGE and value % PAGE == 0, f"{name} must be a positive multiple of {PAGE}, got {value}")
        _require(
            self.max_kept >= 0 and self.max_kept % PAGE == 0,
            f"max_kept must be a multiple of {PAGE}, got {self.max_kept}",
        )
        _require(self.ridge > 0, f"ridge must be positive, got {self.ridge}")
        _require(0 < self.correction <= 1, f"correction must be in (0, 1], got {self.correction}")
        _require(0 <= self.momentum < 1, f"momentum must be in [0, 1), got {self.momentum}")

    @classmethod
    def of_dim(cls, dim: int, layers: tuple[int, ...]) -> MemoryConfig:
        """A memory whose keys keep `dim` numbers of a state, with all the features that degree 2 then has.

        Raises:
          ConfigError: the dimension is out of range.
        """
        check_memory_dim(dim)
        return cls(layers=layers, components=dim, features=dim * dim)

    @property
    def key_size(self) -> int:
        """Numbers in a memory key: a state, and a sketch of the words before it."""
        return 2 * self.components

    @property
    def ring(self) -> int:
        """Tokens whose keys a session keeps: the window, what waits to leave it, and the Omega window before that."""
        return self.max_window + 2 * self.max_omega_window
