"""What is learned outside the memory: its initial weights and its feature map."""

from __future__ import annotations

import math
from dataclasses import dataclass

import jax
import jax.numpy as jnp

from atlas_jax.kernels import feature_maps
from atlas_jax.kernels.reductions import row_max, row_sum
from atlas_jax.memory import parts
from atlas_jax.memory._rule import MemoryRule
from atlas_jax.typing import Array, Float

Weights = dict[str, jax.Array]
"""Matrices [..., outputs, inputs] of one memory, by the names its architecture has for them."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Params:
    """Learnable parameters of a memory.

    Attributes:
      weights: W₀, the memory every sequence starts from.
      features: of φ: `scale` √aᵢ of each degree, `projection` [monomials, width]; empty for a fixed map.
    """

    weights: Weights
    features: dict[str, jax.Array]


def init_params(rule: MemoryRule, key: Array, heads: tuple[int, ...] = ()) -> Params:
    """Draws parameters: zero for a matrix memory, variance 1/fan-in for others, aᵢ = 1/i! for monomials.

    Args:
      key: a `jax.random` key.
      heads: leading axes of every parameter; they match the last axes of the batch of state and tokens.
    """
    shapes, zero = rule.weight_shapes, parts.find("architecture", rule.memory).facts["zero"]
    *keys, projection_key = jax.random.split(key, len(shapes) + 1)
    weights = {}
    for (name, shape), weight_key in zip(shapes.items(), keys, strict=True):
        drawn = jax.random.normal(weight_key, (*heads, *shape)) * shape[1] ** -0.5
        weights[name] = jnp.zeros_like(drawn) if zero else drawn
    return Params(weights, _init_features(rule, projection_key, heads))


def feature_shapes(rule: MemoryRule) -> dict[str, tuple[int, ...]]:
    """Shapes of what φ learns."""
    features, shapes = rule.features, dict[str, tuple[int, ...]]()
    if features.kind == "polynomial":
        shapes["scale"] = (features.degree + 1,)
    if features.kind == "elementwise":
        shapes["scale"] = (features.degree,)
    if features.compress == "projection":
        shapes["projection"] = (feature_maps.monomial_count(rule.d_k, features.degree), features.width)
    return shapes


def _init_features(rule: MemoryRule, key: jax.Array, heads: tuple[int, ...]) -> dict[str, jax.Array]:
    features, params = rule.features, dict[str, jax.Array]()
    for name, shape in feature_shapes(rule).items():
        if name == "projection":
            params[name] = jax.random.normal(key, (*heads, *shape)) * features.width**-0.5
            continue
        powers = [1 / math.factorial(i) for i in range(1, features.degree + 1)]
        start = feature_maps.exponential_scale(features.degree) if features.kind == "polynomial" else powers
        params[name] = jnp.broadcast_to(jnp.asarray(start, jnp.float32), (*heads, *shape))
    return params


def unit_keys(rule: MemoryRule, x: Float[Array, "*rows d_k"]) -> Float[Array, "*rows d_k"]:
    """Keys or queries at unit length where the rule asks for it; zero, with a finite gradient, stays zero."""
    if not rule.normalize:
        return x
    # scaled by the largest entry first, so that no square leaves the range; the result does not depend on that scale
    peak = row_max(jnp.abs(jax.lax.stop_gradient(x)))[..., None]
    x = x / jnp.where(peak > 0, peak, 1.0)
    return x * jax.lax.rsqrt(jnp.where(peak > 0, row_sum(x * x)[..., None], 1.0))


def apply_features(rule: MemoryRule, params: Params, x: Float[Array, "*rows d_k"]) -> Float[Array, "*rows D"]:
    """φ of normalised keys or queries."""
    features, learned = rule.features, params.features
    if features.kind == "identity":
        return x
    if features.kind == "random_exponential":
        return feature_maps.random_exponential(x, features.width, features.seed)
    if features.kind == "elementwise":
        return feature_maps.elementwise(x, learned["scale"].astype(x.dtype))
    if features.compress == "projection":
        blocks = arranged(rule, params).features["blocks"].astype(x.dtype)
        return jnp.einsum("...n,nf->...f", feature_maps.polynomial_blocks(x, features.degree), blocks)
    scale = _scale(rule, params, x.dtype)
    if features.compress == "sketch":
        return feature_maps.polynomial_sketch(x, scale, features.width, features.seed)
    return feature_maps.polynomial(x, scale)


def arranged(rule: MemoryRule, params: Params) -> Params:
    """Parameters with a projection as `feature_maps.projection_blocks`: to be done once, before a loop over tokens."""
    if rule.features.compress != "projection" or "blocks" in params.features:
        return params
    projection = params.features["projection"]
    blocks = feature_maps.projection_blocks(projection, _scale(rule, params, projection.dtype), rule.d_k)
    return Params(params.weights, {"blocks": blocks})


def _scale(rule: MemoryRule, params: Params, dtype: jnp.dtype) -> jax.Array:
    if rule.features.kind == "polynomial":
        return params.features["scale"].astype(dtype)
    return jnp.asarray(feature_maps.exponential_scale(rule.features.degree), dtype)
