"""The memories as functions: forward, and the two factors of each token's rank-one gradient on each weight.

A memory sees its weights only through `apply(name, x)`, the product of a weight with one vector per token. Given plain
weights, weights of every token, or the dual form that never builds them, the same few lines read the memory.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp

from atlas_jax.config import ConfigError
from atlas_jax.kernels.omega import ChannelAxis
from atlas_jax.kernels.reductions import row_max, row_sum
from atlas_jax.memory import parts
from atlas_jax.memory._params import Params, Weights, apply_features, unit_keys
from atlas_jax.memory._placement import varying_as
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


def channel_axis(rule: MemoryRule, name: str) -> ChannelAxis:
    """Side of a weight that the memory's channels lie on: a hidden unit is a column of `w1` and a row of the others."""
    return "column" if name in parts.find("architecture", rule.memory).facts["columns"] else "row"


def encode(rule: MemoryRule, params: Params, x: Float[Array, "rows d_k"]) -> Inputs:
    """Keys or queries, as they came, to what the memory takes."""
    unit = unit_keys(rule, x)
    features = apply_features(rule, params, unit)
    if rule.residual == "none":
        return Inputs(features, jnp.zeros((x.shape[0], 1), x.dtype))
    return Inputs(features, unit if rule.residual == "key" else features)


def forward(rule: MemoryRule, apply: Apply, inputs: Inputs) -> Float[Array, "rows d_v"]:
    """M(φ(x)): what the architecture makes of the features, and the residual."""
    read: jax.Array = parts.find("architecture", rule.memory).function(rule, apply, inputs.features)
    return read if rule.residual == "none" else inputs.residual + read


def plain(weights: Weights) -> Apply:
    """One set of weights for all tokens."""
    return lambda name, x: jnp.einsum("oi,ti->to", weights[name], x)


def per_token(weights: Weights) -> Apply:
    """A set of weights for each token."""
    return lambda name, x: jnp.einsum("toi,ti->to", weights[name], x)


def losses(rule: MemoryRule, y: Float[Array, "rows d_v"], v: Float[Array, "rows d_v"]) -> Float[Array, " rows"]:
    """ℓ of each token."""
    result: jax.Array = jax.vmap(parts.find("objective", rule.objective).function)(y, v)
    return result


def gradient_factors(
    rule: MemoryRule, weights: Weights, inputs: Inputs, v: Float[Array, "rows d_v"]
) -> tuple[dict[str, Factors], Float[Array, " rows"]]:
    """Each token's gradient of the objective on each weight, all at the same weights, not clipped yet; and its loss.

    A weight meets each token once, in W·x, so its gradient is rank one: the slope of the loss at that product, times x.
    """

    def loss(offsets: Weights) -> tuple[jax.Array, tuple[Weights, jax.Array]]:
        right: Weights = {}

        def apply(name: str, x: jax.Array) -> jax.Array:
            if name in right or name not in weights:
                raise ConfigError(f"memory: {rule.memory!r} applies {name!r} twice, or it is not one of its weights")
            right[name] = x
            return jnp.einsum("oi,ti->to", weights[name], x) + offsets[name]

        each = losses(rule, forward(rule, apply, inputs), v)
        if right.keys() != weights.keys():
            raise ConfigError(f"memory: {rule.memory!r} does not apply {sorted(weights.keys() - right.keys())}")
        return jnp.sum(each), (right, each)

    zero = {name: varying_as(jnp.zeros((v.shape[0], w.shape[0]), v.dtype), v) for name, w in weights.items()}
    left, (right, each) = jax.grad(loss, has_aux=True)(zero)
    return {name: Factors(left[name], right[name]) for name in weights}, each


def clipped(rule: MemoryRule, factors: dict[str, Factors]) -> dict[str, Factors]:
    """Gradients within the rule's bound."""
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
