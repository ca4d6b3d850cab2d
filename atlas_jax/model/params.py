"""Parameters of a transformer as a pytree of frozen dataclasses; every matrix is stored [out, in]."""

from __future__ import annotations

from dataclasses import dataclass

import jax

from atlas_jax.kernels.linear import Weight
from atlas_jax.kernels.low_rank import LowRank
from atlas_jax.kernels.rope import RopeTable
from atlas_jax.typing import Array, Float


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class ExpertParams:
    """The experts of a layer.

    Attributes:
      router: scores of the experts.
      expert_gate_up, expert_down: each expert's matrices as `LayerParams` has them, on a leading axis of experts.
      shared_gate, shared_gate_up, shared_down: of the expert that all tokens use, if there is one.
      router_bias, expert_gate_up_bias, expert_down_bias: on the outputs of the router and of each expert's matrices, if
        they have them.
    """

    router: Float[Array, "X E"]
    expert_gate_up: Weight
    expert_down: Weight
    shared_gate: Float[Array, E] | None
    shared_gate_up: Weight | None
    shared_down: Weight | None
    router_bias: Float[Array, X] | None
    expert_gate_up_bias: Float[Array, "X 2*F"] | None
    expert_down_bias: Float[Array, "X E"] | None


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class DeltaParams:
    """What a Gated DeltaNet layer has in place of attention, as `config.DeltaNetConfig` says.

    Attributes:
      project: queries, keys and values, then the gates of the output, one matrix [C + V·D, E].
      gates: shares β of all heads, then what their decay follows from. In float32: errors of a decay add up.
      conv: weights of the convolution, the token's own input last.
      decay, decay_bias: ln α is decay · softplus(gate + decay_bias).
      norm: gain of the norm of each head.
    """

    project: Weight
    gates: Float[Array, "2*V E"]
    conv: Float[Array, "C width"]
    decay: Float[Array, V]
    decay_bias: Float[Array, V]
    norm: Float[Array, D]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class LayerLora:
    """What LoRA adapters add to the weights of a layer, by the names that those have in `LayerParams` and `DeltaParams`."""

    qkv: LowRank | None = None
    out: LowRank | None = None
    gate_up: LowRank | None = None
    down: LowRank | None = None
    project: LowRank | None = None


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class LayerParams:
    """One transformer layer; fields a family does not have are None.

    Attributes:
      qkv: query, key and value projections, one matrix [(H + 2K)·D, E]; for each KV head its queries, then key and value,
        then the gates of its queries' outputs if there are any (`ModelConfig.qkv_heads`). Heads of queries and keys are in
        the order that rotates (i, i + dims/2), and so are their norms. None in layers without attention.
      null_logit: a score of every head of a key without a value (`ModelConfig.null_logits`).
      delta: in layers that have this in place of attention; `out` is the output projection of either.
      key_balance: factors of queries, keys and values after the biases (`model.key_balance`); None where keys have none.
      q_norm, k_norm: gains, [D] for all heads or [H, D] and [K, D] for each (`ModelConfig.qk_norm`).
      out, down: with their biases, times `ModelConfig.residual_scale`, unless the norms after them have it.
      gate_up: gate and up projections of the MLP, one matrix [2F, E]; a block of gates, then the same block of ups, …
        (`ModelConfig.ff_block`). In this order a device's share of either matrix is a range of its rows. Without a gate,
        up alone.
      lora: what adapters add; None where no adapter is loaded.
    """

    attn_norm: Float[Array, E] | None
    attn_norm_bias: Float[Array, E] | None
    qkv: Weight | None
    qkv_bias: Float[Array, QKV] | None
    q_norm: Float[Array, "*heads D"] | None
    k_norm: Float[Array, "*heads D"] | None
    null_logit: Float[Array, H] | None
    out: Weight
    out_bias: Float[Array, E] | None
    attn_post_norm: Float[Array, E] | None
    ff_norm: Float[Array, E] | None
    ff_norm_bias: Float[Array, E] | None
    gate_up: Weight | None
    gate_up_bias: Float[Array, GU] | None
    down: Weight | None
    down_bias: Float[Array, E] | None
    ff_post_norm: Float[Array, E] | None
    experts: ExpertParams | None
    delta: DeltaParams | None = None
    key_balance: Float[Array, "K G+2 D"] | None = None
    lora: LayerLora | None = None


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class PairParams:
    """What of a transformer kept pairs are chosen with.

    Attributes:
      ropes: as in `ModelParams`.
      null_logits: those of every layer.
    """

    ropes: tuple[RopeTable, ...]
    null_logits: tuple[Float[Array, H] | None, ...]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class ModelParams:
    """A whole transformer.

    Attributes:
      embed: token embeddings [V, E]; also the head when `head` is None.
      final_norm: with its bias, times `ModelConfig.logit_scale`.
      ropes: one table per rotary embedding of the configuration.
      embed_lora, head_lora: what LoRA adapters add to the embeddings and to the head.
    """

    embed: Weight
    layers: tuple[LayerParams, ...]
    final_norm: Float[Array, E]
    final_norm_bias: Float[Array, E] | None
    head: Weight | None
    ropes: tuple[RopeTable, ...]
    embed_lora: LowRank | None = None
    head_lora: LowRank | None = None

    @property
    def pairs(self) -> PairParams:
        """Those that kept pairs are chosen with."""
        return PairParams(self.ropes, tuple(layer.null_logit for layer in self.layers))
