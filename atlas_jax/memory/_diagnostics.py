"""What a memory makes of the tokens it is fed, token by token: how wrong it was, how far it would move, what was clipped."""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp

from atlas_jax.memory._memory import Factors, losses
from atlas_jax.memory._rule import MemoryRule
from atlas_jax.typing import Array, Float


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Diagnostics:
    """Of each token; no axis T for a single one.

    Attributes:
      loss: ℓ of the token's own key and value, where its gradient is taken: at the anchor, before it is written; for the
        optimizer `exact`, after its write.
      surprise: Frobenius norm of the token's gradient on all weights, before `clip` (what Titans calls surprise).
      clipped: share of the weights on which that gradient was clipped.
    """

    loss: Float[Array, "*batch T"]
    surprise: Float[Array, "*batch T"]
    clipped: Float[Array, "*batch T"]


def of_factors(rule: MemoryRule, factors: dict[str, Factors], loss: Float[Array, " rows"]) -> Diagnostics:
    """From gradients that are not clipped yet, and losses."""
    norms = jnp.stack([_length(f.left) * _length(f.right) for f in factors.values()])
    over = norms > (jnp.inf if rule.clip is None else rule.clip)
    return Diagnostics(loss, _length(norms.T), jnp.mean(over.astype(loss.dtype), axis=0))


def of_read(
    rule: MemoryRule, key: Float[Array, "rows D"], y: Float[Array, "rows d_v"], v: Float[Array, "rows d_v"]
) -> Diagnostics:
    """From what a matrix reads for its own keys."""
    return of_factors(rule, {"w": Factors(2.0 * (y - v), key)}, losses(rule, y, v))


def _length(x: jax.Array) -> jax.Array:
    square = jnp.sum(x * x, axis=-1)
    some = square > 0
    return jnp.where(some, jnp.sqrt(jnp.where(some, square, 1.0)), 0.0)  # no slope of a root that is not taken
