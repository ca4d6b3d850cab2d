"""What a memory is fed: keys, values, queries and gates."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Literal

import jax
import jax.numpy as jnp

from atlas_jax.config import ConfigError
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
    eta: Float[Array, "*batch channels"] | float | None = None,
    alpha: Float[Array, "*batch channels"] | float | None = None,
    theta: Float[Array, "*batch channels"] | float | None = None,
    gamma: Float[Array, "*batch gates"] | float = 1.0,
) -> Tokens:
    """Tokens whose gates may be given as numbers, or as arrays that broadcast to a rule's shapes. Gates are float32 at least.

    Args:
      eta: step size; default `rule.eta_max`, times 1 − θ under momentum: errors of keys of unit length then never grow.
      alpha: retention; default 1.
      theta: momentum; default 0.
      gamma: window gates.

    Raises:
      ConfigError: an array does not have the rule's sizes, or the rule has no use for a gate; the message names it.
    """
    rows = jnp.shape(k)[:-1]
    dtype = jnp.promote_types(jnp.result_type(k), jnp.float32)  # 0.999 is 1 in bfloat16, 0.1 is 0 in whole numbers
    given = {"eta": eta, "alpha": alpha, "theta": theta, "gamma": gamma}
    for name, value in given.items():
        if value is not None and not rule.uses(name) and name != "gamma":
            raise ConfigError(
                f"{name}: this rule has none (optimizer {rule.optimizer!r}, retention {rule.retention!r})"
            )

    def gate(name: str, default: jax.Array | float, size: int) -> jax.Array:
        value = jnp.asarray(default if given[name] is None else given[name], dtype)
        try:
            return jnp.broadcast_to(value, (*rows, size))
        except ValueError:
            raise ConfigError(f"{name}: shape {value.shape} does not broadcast to {(*rows, size)}") from None

    found = {name: gate(name, default, rule.gate_dim(name)) for name, default in _NEUTRAL.items()}
    step: jax.Array | float = rule.eta_max
    if rule.optimizer == "momentum":  # one entry of θ has to do for a step that is not per channel
        step = step * (
            1 - (found["theta"] if "eta" in rule.per_channel else found["theta"].max(axis=-1, keepdims=True))
        )
    tokens = Tokens(
        q=jnp.asarray(q),
        k=jnp.asarray(k),
        v=jnp.asarray(v),
        eta=gate("eta", step, rule.gate_dim("eta")),
        gamma=gate("gamma", 1.0, rule.window_gates),
        **found,
    )
    check_tokens(rule, tokens)
    return tokens


_NEUTRAL: dict[Literal["alpha", "theta"], float] = {"alpha": 1.0, "theta": 0.0}


def check_tokens(rule: MemoryRule, tokens: Tokens) -> None:
    """Compares the last axes with the rule, and the leading ones with each other.

    Raises:
      ConfigError: they differ; the message names the field.
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
            raise ConfigError(f"tokens.{field}: has shape {shape}; the rule and tokens.k ask for {wanted}")


def prepare(rule: MemoryRule, tokens: Tokens, dtype: jnp.dtype) -> Tokens:
    """The gates as the rule uses them, and everything in the state's type."""
    tokens = jax.tree.map(lambda x: jnp.asarray(x, dtype), tokens)
    return tokens if rule.uses("alpha") else dataclasses.replace(tokens, alpha=jnp.ones_like(tokens.alpha))
