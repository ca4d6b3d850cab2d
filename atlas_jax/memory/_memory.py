"""The memories as functions: forward, and the two factors of each token's rank-one gradient on each weight.

A memory sees its weights only through `apply(name, x)`, the product of a weight with one vector per token. Given plain
weights, weights of every token, or the dual form that never builds them, the same few lines read the memory.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp

from atlas_jax.kernels.omega import ChannelAxis
from atlas_jax.kernels.reductions import row_max, row_sum
from atlas_jax.memory._params import Params, Weights, apply_features, unit_keys
from atlas_jax.memory._rule import MemoryRule
from atlas_jax.typing import Array, Float

Apply = Callable[[str, jax.Array], jax.Array]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Inputs:
    """A key or query as a memory takes it.

    Attributes:
      features: φ(x).
      residual: what an MLP adds to its output; zeros of width 1 where it adds nothing.
    """

    features: Float[Array, "rows D"]
    residual: Float[Array, "rows r"]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Factors:
    """∂ℓ/∂W of every token, left·rightᵀ."""

    left: Float[Array, "rows o"]
    right: Float[Array, "rows i"]


def channel_axis(name: str) -> ChannelAxis:
    """Side of a weight that the memory's channels lie on: a hidden unit is a column of `w1` and a row of the others."""
    return "column" if name == "w1" else "row"


def encode(rule: MemoryRule, params: Params, x: Float[Array, "rows d_k"]) -> Inputs:
    """Keys or queries, as they came, to what the memory takes."""
    unit = unit_keys(rule, x)
    features = apply_features(rule, params, unit)
    if rule.residual == "none":
        return Inputs(features, jnp.zeros((x.shape[0], 1), x.dtype))
    return Inputs(features, unit if rule.residual == "key" else features)


def forward(rule: MemoryRule, apply: Apply, inputs: Inputs) -> Float[Array, "rows d_v"]:
    """M(φ(x)) (equations 42 and 43)."""
    if rule.memory == "matrix":
        return apply("w", inputs.features)
    hidden = _activation(rule, apply("w2", inputs.features))
    if rule.memory == "gated_mlp":
        hidden = hidden * apply("w3", inputs.features)
    return inputs.residual + apply("w1", hidden)


def plain(weights: Weights) -> Apply:
    """One set of weights for all tokens."""
    return lambda name, x: jnp.einsum("oi,ti->to", weights[name], x)


def per_token(weights: Weights) -> Apply:
    """A set of weights for each token."""
    return lambda name, x: jnp.einsum("toi,ti->to", weights[name], x)


def gradient_factors(
    rule: MemoryRule, weights: Weights, inputs: Inputs, v: Float[Array, "rows d_v"]
) -> dict[str, Factors]:
    """Each token's gradient of the objective on each weight, all at the same weights."""
    apply, z = plain(weights), inputs.features
    if rule.memory == "matrix":
        factors = {"w": Factors(output_gradient(rule, apply("w", z) if rule.objective == "l2" else v, v), z)}
        return _clipped(rule, factors)
    before = apply("w2", z)
    activated, slope = jax.jvp(lambda a: _activation(rule, a), (before,), (jnp.ones_like(before),))
    gate = apply("w3", z) if rule.memory == "gated_mlp" else jnp.ones((), z.dtype)
    hidden = activated * gate
    output = output_gradient(rule, inputs.residual + apply("w1", hidden), v)
    back = jnp.einsum("oh,to->th", weights["w1"], output)
    factors = {"w1": Factors(output, hidden), "w2": Factors(back * gate * slope, z)}
    if rule.memory == "gated_mlp":
        factors["w3"] = Factors(back * activated, z)
    return _clipped(rule, factors)


def output_gradient(rule: MemoryRule, y: Float[Array, "rows d_v"], v: Float[Array, "rows d_v"]) -> jax.Array:
    """∂ℓ/∂M(φ(k)): 2(y − v) for ‖y − v‖², −v for −⟨y, v⟩."""
    return 2.0 * (y - v) if rule.objective == "l2" else -v


def _activation(rule: MemoryRule, x: jax.Array) -> jax.Array:
    return jax.nn.gelu(x) if rule.activation == "gelu" else jax.nn.silu(x)


def _clipped(rule: MemoryRule, factors: dict[str, Factors]) -> dict[str, Factors]:
    if rule.clip is None:
        return factors
    bound = rule.clip
    return {name: Factors(_clip_left(f.left, f.right, bound), f.right) for name, f in factors.items()}


def _clip_left(left: jax.Array, right: jax.Array, bound: float) -> jax.Array:
    """Scales `left` so that the norm of left·rightᵀ, the product of theirs, is at most `bound`."""
    direction, length = _polar(left)
    other = _polar(right)[1]
    over = length * other > bound
    return direction * jnp.where(
        over, bound / jnp.where(over, other, 1.0), length
    )  # no slope of a division that is not taken


def _polar(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    peak = row_max(jnp.abs(jax.lax.stop_gradient(x)))[..., None]
    peak = jnp.where(peak > 0, peak, 1.0)
    scaled = x / peak
    square = row_sum(scaled * scaled)[..., None]
    root = jnp.sqrt(jnp.where(square > 0, square, 1.0))
    return scaled / root, jnp.where(square > 0, root * peak, 0.0)
