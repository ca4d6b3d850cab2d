"""Mixtures of experts: an MLP of which every token uses a few parts, those that a router chooses for it."""

from __future__ import annotations

from typing import TypeVar

import jax
import jax.numpy as jnp

from atlas_jax.config import ExpertsConfig, ModelConfig, columns_together
from atlas_jax.kernels.fused_linear import gated_linear
from atlas_jax.kernels.linear import linear
from atlas_jax.kernels.reductions import row_sum
from atlas_jax.model.params import ExpertParams
from atlas_jax.typing import Array, Float

T = TypeVar("T")

_LEAST_SUM = 2.0**-14
"""What the chosen probabilities are divided by at least; llama.cpp's."""


def mixture(
    model: ModelConfig, config: ExpertsConfig, params: ExpertParams, x: Float[Array, "*rows E"]
) -> Float[Array, "*rows E"]:
    """Each row's chosen experts, weighted by the router, and the one that all rows use.

    Experts that some row has chosen compute all rows, one expert after the other, so that each is read once; the others are
    not read. They are added in their own order, so a row's sum does not depend on its neighbours.
    """
    rows = x.reshape(-1, x.shape[-1])
    share = _shares(config, _biased(linear(params.router, rows), params.router_bias))
    used = (share > 0).any(axis=0)
    (order,) = jnp.nonzero(used, size=min(config.count, rows.shape[0] * config.used), fill_value=0)
    block = columns_together(config.ff)

    def add(index: jax.Array, total: jax.Array) -> jax.Array:
        expert = order[index]
        gate_up = _biased(linear(_one(params.expert_gate_up, expert), rows), _one(params.expert_gate_up_bias, expert))
        out = gated_linear(_one(params.expert_down, expert), gate_up, block, model.activation)
        return total + share[:, expert, None] * _biased(out, _one(params.expert_down_bias, expert))

    total = jax.lax.fori_loop(0, used.sum(), add, jnp.zeros_like(rows))
    if params.shared_gate is not None and params.shared_gate_up is not None and params.shared_down is not None:
        gate_up = linear(params.shared_gate_up, rows)
        out = gated_linear(params.shared_down, gate_up, columns_together(config.shared_ff), model.activation)
        total = total + jax.nn.sigmoid(row_sum(rows * params.shared_gate))[:, None] * out
    return total.reshape(x.shape)


def _shares(config: ExpertsConfig, scores: Float[Array, "rows X"]) -> Float[Array, "rows X"]:
    """The weight of every expert for each row; 0 for those that it does not use."""
    best, expert = jax.lax.top_k(jax.nn.softmax(scores, axis=-1), config.used)
    if config.normalised:
        best = best / jnp.maximum(best.sum(axis=-1, keepdims=True), _LEAST_SUM)
    return jnp.zeros_like(scores).at[jnp.arange(scores.shape[0])[:, None], expert].set(best)


def _biased(x: jax.Array, bias: jax.Array | None) -> jax.Array:
    return x if bias is None else x + bias


def _one(weights: T, expert: jax.Array) -> T:
    """One expert's matrix or bias."""
    one: T = jax.tree.map(lambda leaf: leaf[expert], weights)
    return one
