"""What a memory needs to know of a model: key map, features, value codes, gate. Made by calibration, shared by sessions."""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from atlas_jax.config import MAX_DEGREE, MemoryConfig
from atlas_jax.kernels.features import feature_count, monomial_table
from atlas_jax.typing import Array, Float, Int8, Int32

GATE_FEATURES = 4
TRAIL_DECAY = 0.75
TRAIL_LENGTH = 16
"""The trail of a token is the mean of the states before it with weights 1, 0.75, 0.75², … 0.75¹⁵."""
_CODE_SEED = 0x41544C4153


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Adapter:
    """Arrays the compiled step reads.

    Attributes:
      mean, projection: the key map of each tapped layer, z = (h − mean)·projection.
      trail_scale: factor on each layer's trail, see `recall.observe`.
      select: for each number of layers in use and each degree, which of the concatenated z and trails make up the key
        (the last index: none, a zero).
      factors, feature_weight: monomials of each degree over a key's components (see `MonomialTable`).
      codes: ±1; token v's value code is codes[v] / √C.
      gate: weights of the gate's features, see `recall.gate_features`.
    """

    mean: Float[Array, "A E"]
    projection: Float[Array, "A E R"]
    trail_scale: Float[Array, A]
    select: Int32[Array, "A degree R"]
    factors: Int32[Array, "degree M 3"]
    feature_weight: Float[Array, "degree M"]
    codes: Int8[Array, "V C"]
    gate: Float[Array, features]


def key_components(config: MemoryConfig, degree: int) -> int:
    """Components of a key at a degree: as many as the features allow, for the state has one size whatever the degree."""
    dim = config.components
    coefficients = _homogeneous(degree)
    while dim > 1 and feature_count(dim, coefficients) > config.features:
        dim -= 1
    return dim


def make_adapter(
    config: MemoryConfig,
    vocab: int,
    mean: np.ndarray,
    projection: np.ndarray,
    trail_scale: np.ndarray,
    gate: np.ndarray,
) -> Adapter:
    """Completes the calibrated numbers with the tables that follow from the configuration.

    Args:
      mean: float32 [A, E].
      projection: float32 [A, E, R].
      trail_scale: float32 [A].
      gate: float32 [GATE_FEATURES].
    """
    layers, _, components = projection.shape
    nothing = layers * (components + config.trail)
    select = np.full((layers, MAX_DEGREE, components), nothing, np.int32)
    factors = np.full((MAX_DEGREE, config.features, MAX_DEGREE), components, np.int32)
    weight = np.zeros((MAX_DEGREE, config.features), np.float32)
    for degree in range(1, MAX_DEGREE + 1):
        dim = key_components(config, degree)
        table = monomial_table(dim, _homogeneous(degree))
        count = len(table.weight)
        factors[degree - 1, :count, :degree] = table.factors
        weight[degree - 1, :count] = table.weight
        for used in range(1, layers + 1):
            # the leading components of every layer in use, as even a share as goes; the same of the trails
            trail = dim * config.trail // components
            chosen = [layer * components + np.arange(share) for layer, share in enumerate(_shares(dim - trail, used))]
            chosen += [
                layers * components + layer * config.trail + np.arange(share)
                for layer, share in enumerate(_shares(trail, used))
            ]
            select[used - 1, degree - 1, :dim] = np.concatenate(chosen)
    return Adapter(
        mean=jnp.asarray(mean, jnp.float32),
        projection=jnp.asarray(projection, jnp.float32),
        trail_scale=jnp.asarray(trail_scale, jnp.float32),
        select=jnp.asarray(select),
        factors=jnp.asarray(factors),
        feature_weight=jnp.asarray(weight),
        codes=jnp.asarray(value_codes(vocab, config.code_dim)),
        gate=jnp.asarray(gate, jnp.float32),
    )


def value_codes(vocab: int, dim: int) -> np.ndarray:
    """Random signs, the same everywhere: int8 [vocab, dim]. Token embeddings are not orthogonal enough to be codes."""
    bits = np.random.Generator(np.random.PCG64(_CODE_SEED)).bytes((vocab * dim + 7) // 8)
    signs = np.unpackbits(np.frombuffer(bits, np.uint8))[: vocab * dim]
    return (signs.astype(np.int8) * 2 - 1).reshape(vocab, dim)


def _shares(total: int, parts: int) -> list[int]:
    return [total // parts + (part < total % parts) for part in range(parts)]


def _homogeneous(degree: int) -> tuple[float, ...]:
    """Kernel (x·y)^degree. Keys have unit norm, so lower degrees are in the span already (|x|² = 1) or wash out."""
    return (0.0,) * degree + (1.0,)
