"""Parameters of a transformer as a pytree of frozen dataclasses; every matrix is stored [out, in]."""

from __future__ import annotations

from dataclasses import dataclass

import jax

from atlas_jax.kernels.linear import Weight
from atlas_jax.kernels.rope import RopeTable
from atlas_jax.typing import Array, Float


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class LayerParams:
    """One transformer layer; fields a family does not have are None.

    Attributes:
      qkv: query, key and value projections, one matrix [(H + 2K)·D, E]; for each KV head its queries, then key and value.
        Heads of queries and keys are in the order that rotates (i, i + dims/2), and so are their norms.
      gate_up: gate and up projections of the MLP, one matrix [2F, E]; a block of gates, then the same block of ups, …
        (`ModelConfig.ff_block`). In this order a device's share of either matrix is a range of its rows.
    """

    attn_norm: Float[Array, E]
    qkv: Weight
    q_norm: Float[Array, D] | None
    k_norm: Float[Array, D] | None
    out: Weight
    attn_post_norm: Float[Array, E] | None
    ff_norm: Float[Array, E]
    gate_up: Weight
    down: Weight
    ff_post_norm: Float[Array, E] | None


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class ModelParams:
    """A whole transformer.

    Attributes:
      embed: token embeddings [V, E]; also the head when `head` is None.
      ropes: one table per rotary embedding of the configuration.
    """

    embed: Weight
    layers: tuple[LayerParams, ...]
    final_norm: Float[Array, E]
    head: Weight | None
    ropes: tuple[RopeTable, ...]
