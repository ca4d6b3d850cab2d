"""What a memory is fed: keys, values, queries and gates."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import jax
import jax.numpy as jnp

from atlas_jax.memory._rule import MemoryRule
from atlas_jax.typing import Array, Float


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Tokens:
    """A run of tokens; for a single token the axis T is missing. All leading axes are the batch of the state.

    Attributes:
      q, k: queries and keys, [..., T, d_k].
      v: values, [..., T, d_v].
      eta: step size η ≥ 0, [..., T, 1], or [..., T, channels] for a gate that is per channel.
      alpha: retention α in 0 … 1, 1 keeps everything; shape as `eta`.
      theta: momentum θ in 0 … 1; shape as `eta`.
      gamma: window gates γ in 0 … 1, [..., T, rule.window_gates].
    """

    q: Float[Array, "*batch d_k"]
    k: Float[Array, "*batch d_k"]
    v: Float[Array, "*batch d_v"]
    eta: Float[Array, "*batch channels"]
    alpha: Float[Array, "*batch channels"]
    theta: Float[Array, "*batch channels"]
    gamma: Float[Array, "*batch gates"]


def make_tokens(
    rule: MemoryRule,
    q: Float[Array, "*batch d_k"],
    k: Float[Array, "*batch d_k"],
    v: Float[Array, "*batch d_v"],
    *,
    eta: Float[Array, "*batch channels"] | float = 0.1,
    alpha: Float[Array, "*batch channels"] | float = 1.0,
    theta: Float[Array, "*batch channels"] | float = 0.0,
    gamma: Float[Array, "*batch gates"] | float = 1.0,
) -> Tokens:
    """Tokens whose gates may be given as numbers, or as arrays that broadcast to a rule's shapes.

    Raises:
      ValueError: an array does not have the rule's sizes.
    """
    batch = k.shape[:-1]

    def gate(value: Float[Array, "*batch channels"] | float, size: int) -> jax.Array:
        return jnp.broadcast_to(jnp.asarray(value, k.dtype), (*batch, size))

    tokens = Tokens(
        q=q,
        k=k,
        v=v,
        eta=gate(eta, rule.gate_dim("eta")),
        alpha=gate(alpha, rule.gate_dim("alpha")),
        theta=gate(theta, rule.gate_dim("theta")),
        gamma=gate(gamma, rule.window_gates),
    )
    check_tokens(rule, tokens)
    return tokens


def check_tokens(rule: MemoryRule, tokens: Tokens) -> None:
    """Compares the last axes with the rule, and the leading ones with each other.

    Raises:
      ValueError: they differ; the message names the field.
    """
    sizes = {
        "q": rule.d_k,
        "k": rule.d_k,
        "v": rule.d_v,
        "eta": rule.gate_dim("eta"),
        "alpha": rule.gate_dim("alpha"),
        "theta": rule.gate_dim("theta"),
        "gamma": rule.window_gates,
    }
    for field, size in sizes.items():
        wanted = (*tokens.k.shape[:-1], size)
        shape = getattr(tokens, field).shape
        if shape != wanted:
            raise ValueError(f"tokens.{field} has shape {shape}; the rule and tokens.k ask for {wanted}")


def prepare(rule: MemoryRule, tokens: Tokens, dtype: jnp.dtype) -> Tokens:
    """The gates as the rule uses them, and everything in the state's type."""
    tokens = jax.tree.map(lambda x: jnp.asarray(x, dtype), tokens)
    return tokens if rule.retention else dataclasses.replace(tokens, alpha=jnp.ones_like(tokens.alpha))
