"""The optimizer `exact`: after every token the ridge regression of all tokens so far (Mesa layer, arXiv 2309.05858).

W_t = (λW₀ + G_t)(λI + H_t)⁻¹ with H_t = α_t H_{t−1} + γ_t φφᵀ and G_t = α_t G_{t−1} + γ_t vφᵀ. For α = 1 that is
recursive least squares. λ is not forgotten, as it would be there: with α < 1 its inverse grows without bound in
directions that no key has touched. H and G are kept instead of the inverse, which loses precision with every update.
A solve's gradient is one more solve with the same factor, not that of a Cholesky factorisation.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from atlas_jax.kernels.omega import decay_products, kept_from_start
from atlas_jax.memory.rules._params import Params
from atlas_jax.memory.rules._rule import MemoryRule
from atlas_jax.memory.rules._state import MemoryState
from atlas_jax.memory.rules._tokens import Tokens
from atlas_jax.typing import Array, Float


def write(state: MemoryState, key: Float[Array, " D"], token: Tokens) -> MemoryState:
    """Adds one token to the sums."""
    alpha, gamma = token.alpha[0], token.gamma[0]
    keys = alpha * state.moments["keys"] + gamma * jnp.einsum("i,j->ij", key, key)
    values = alpha * state.moments["values"] + gamma * jnp.einsum("o,i->oi", token.v, key)
    return dataclasses.replace(state, moments={"keys": keys, "values": values})


def read(
    rule: MemoryRule, params: Params, state: MemoryState, queries: Float[Array, "rows D"]
) -> Float[Array, "rows d_v"]:
    """W·φ(q) of the regression as it stands."""
    moments = state.moments["keys"]
    factor = _factor(rule, jax.lax.stop_gradient(moments))
    solved = jax.lax.custom_linear_solve(
        lambda x: rule.ridge * x + moments @ x, queries.T, lambda _, b: _solve(factor, b), symmetric=True
    ).T
    return jnp.einsum("oi,ti->to", rule.ridge * params.weights["w"] + state.moments["values"], solved)


def chunk(
    rule: MemoryRule,
    params: Params,
    state: MemoryState,
    keys: Float[Array, "b D"],
    queries: Float[Array, "b D"],
    v: Float[Array, "b d_v"],
    alpha: Float[Array, "b 1"],
    weight: Float[Array, " b"],
) -> tuple[MemoryState, Float[Array, "b d_v"]]:
    """Writes and reads a block of tokens: all their systems at once, and values through the dual form.

    Args:
      weight: γ of each token, 0 for padding.
    """
    products = decay_products(alpha)
    kept, mixing = kept_from_start(alpha, products)[:, 0], products[..., 0] * weight

    def times(x: jax.Array) -> jax.Array:
        """(λI + H_t)·x_t, by way of inner products of tokens: so gradients need no matrix per token."""
        from_tokens = jnp.einsum("tn,ni->ti", mixing * jnp.einsum("ti,ni->tn", x, keys), keys)
        return rule.ridge * x + kept[:, None] * jnp.einsum("ij,tj->ti", state.moments["keys"], x) + from_tokens

    start, m, k, gate = jax.lax.stop_gradient((state.moments["keys"], mixing, keys, kept))
    factors = _factor(rule, gate[:, None, None] * start + jnp.einsum("tn,ni,nj->tij", m, k, k))
    solve = jax.vmap(_solve)
    solved = jax.lax.custom_linear_solve(times, queries, lambda _, b: solve(factors, b), symmetric=True)
    overlap = mixing * jnp.einsum("ti,ni->tn", solved, keys)
    y = (
        rule.ridge * jnp.einsum("oi,ti->to", params.weights["w"], solved)
        + kept[:, None] * jnp.einsum("oi,ti->to", state.moments["values"], solved)
        + jnp.einsum("tn,no->to", overlap, v)
    )
    last = {
        "keys": kept[-1] * state.moments["keys"] + jnp.einsum("n,ni,nj->ij", mixing[-1], keys, keys),
        "values": kept[-1] * state.moments["values"] + jnp.einsum("n,no,ni->oi", mixing[-1], v, keys),
    }
    return dataclasses.replace(state, moments=last), y


def _factor(rule: MemoryRule, moments: jax.Array) -> jax.Array:
    """Lower Cholesky factors of λI + H."""
    return jnp.linalg.cholesky(moments + rule.ridge * jnp.eye(moments.shape[-1], dtype=moments.dtype))


def _solve(factor: jax.Array, right: jax.Array) -> jax.Array:
    return jax.scipy.linalg.cho_solve((factor, True), right)
