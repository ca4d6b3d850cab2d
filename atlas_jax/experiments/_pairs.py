"""Associations to be memorised, and how well a memory holds them."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from atlas_jax.memory import MemoryRule, Tokens, chunked, init_params, init_state, make_tokens, read
from atlas_jax.typing import Array, Float


def random_pairs(key: Array, count: int, d_k: int, d_v: int) -> tuple[Float[Array, "N d_k"], Float[Array, "N d_v"]]:
    """Keys uniform on the unit sphere, values N(0, 1/d_v), so that a memory that says nothing has error 1."""
    first, second = jax.random.split(key)
    keys = jax.random.normal(first, (count, d_k))
    values = jax.random.normal(second, (count, d_v)) * d_v**-0.5
    return keys / jnp.linalg.norm(keys, axis=1, keepdims=True), values


@functools.partial(jax.jit, static_argnums=0)
def one_pass(
    rule: MemoryRule,
    keys: Float[Array, "S N d_k"],
    values: Float[Array, "S N d_v"],
    eta: Float[Array, ""],
    theta: Float[Array, ""],
) -> tuple[Float[Array, S], Float[Array, S]]:
    """Writes every pair once, in order, then reads every key.

    Args:
      keys, values: one set of pairs per seed.
      eta, theta: constant gates; retention is 1.

    Returns:
      Per seed, Σ‖M(k) − v‖² / Σ‖v‖², and the share of keys whose read is nearest to their own value.
    """
    params = init_params(rule, jax.random.key(0))
    tokens: Tokens = make_tokens(
        rule,
        keys,
        keys,
        values,
        eta=eta if rule.uses("eta") else None,
        theta=theta if rule.uses("theta") else None,
    )
    state, _ = chunked(rule, params, init_state(rule, params, (keys.shape[0],)), tokens)
    found = read(rule, params, state, keys)
    error = jnp.sum((found - values) ** 2, axis=(1, 2)) / jnp.sum(values**2, axis=(1, 2))
    closeness = jnp.einsum("snd,smd->snm", found, values) - 0.5 * jnp.sum(values**2, axis=-1)[:, None]
    right = jnp.argmax(closeness, axis=-1) == jnp.arange(keys.shape[1])
    return error, jnp.mean(right, axis=-1)


def best_step(
    rule: MemoryRule,
    keys: Float[Array, "S N d_k"],
    values: Float[Array, "S N d_v"],
    steps: tuple[float, ...],
    theta: float = 0.0,
) -> float:
    """The step size with the least mean error on pairs kept for that purpose."""
    errors = [float(one_pass(rule, keys, values, eta, theta)[0].mean()) for eta in steps]
    finite = [error if error == error else float("inf") for error in errors]
    return steps[finite.index(min(finite))]
