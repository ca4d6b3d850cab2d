"""The optimizer `exact`: after every token the ridge regression of all tokens so far (Mesa layer, arXiv 2309.05858).

W_t = (λW₀ + G_t)(λI + H_t)⁻¹ with H_t = α_t H_{t−1} + γ_t φφᵀ and G_t = α_t G_{t−1} + γ_t vφᵀ. For α = 1 that is
recursive least squares. λ is not forgotten, as it would be there: with α < 1 its inverse grows without bound in
directions that no key has touched. H and G are kept instead of the inverse, which loses precision with every update.

A block's systems are solved together by conjugate gradients (as MesaNet does, arXiv 2506.05233), preconditioned by what
recursive least squares would make of the block: one factorisation instead of one per token, and nearly always right to
rounding after 3 to 5 iterations. What they leave unsolved, Cholesky factors of every token's matrix solve.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name

from atlas_jax.kernels.cholesky import cholesky, solve_lower
from atlas_jax.kernels.omega import decay_products, kept_from_start
from atlas_jax.memory._params import Params
from atlas_jax.memory._rule import MemoryRule
from atlas_jax.memory._scan import KEPT
from atlas_jax.memory._state import MemoryState
from atlas_jax.memory._tokens import Tokens
from atlas_jax.typing import Array, Float

MAX_ITERATIONS = 24
"""Past which conjugate gradients would take as long as Cholesky factors of every token's matrix (64 × 64, CPU)."""
_LEAST_KEPT = 1e-2
"""Where the preconditioner stops following the gates: beyond it float32 would cancel."""

_Iteration = tuple[jax.Array, jax.Array, jax.Array, jax.Array, jax.Array]
"""Of conjugate gradients: x, residual and direction [b, D], residual·P·residual [b], how many have been."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class _System:
    """The matrices A_t = λI + kept_t·H₀ + Σₙ mixing[t, n] kₙkₙᵀ of a block, as what they are made of.

    Attributes:
      weight: γ of each token.
    """

    start: Float[Array, "D D"]
    keys: Float[Array, "b D"]
    kept: Float[Array, " b"]
    mixing: Float[Array, "b b"]
    weight: Float[Array, " b"]


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
    solved = _solve_block(rule, _System(state.moments["keys"], keys, kept, mixing, weight), queries)
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


@partial(jax.custom_jvp, nondiff_argnums=(0,))
def _solve_block(rule: MemoryRule, system: _System, right: Float[Array, "b D"]) -> Float[Array, "b D"]:
    """A_t⁻¹·right_t of every token, bit for bit the same whatever comes after it."""
    peak = jnp.max(jnp.abs(right), axis=-1, keepdims=True)  # so that no square leaves the range
    peak = jnp.where(peak > 0, peak, 1.0)
    right = right / peak
    x = _conjugate_gradients(partial(_times, rule, system), _preconditioner(rule, system), right)
    residual = _norm(right - _times(rule, system, x))
    size = rule.ridge + system.kept * jnp.trace(system.start) + system.mixing @ _dot(system.keys, system.keys)
    rounding = 4 * np.finfo(x.dtype).eps * (size * _norm(x) + _norm(right))  # what a solve by factors may leave
    solved = residual <= rounding

    def factored(carry: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        late, (x, _) = jax.lax.optimization_barrier((system, carry))  # or XLA would compute it before the loop, always
        return jnp.where(solved[:, None], x, _solve_by_factors(rule, late, right)), ~carry[1]

    # a loop of one step or none: over a batch, a conditional would always take both ways
    x, _ = jax.lax.while_loop(lambda carry: ~carry[1], factored, (x, jnp.all(solved)))
    return x * peak


@_solve_block.defjvp
def _solve_block_jvp(
    rule: MemoryRule, primals: tuple[_System, jax.Array], tangents: tuple[_System, jax.Array]
) -> tuple[jax.Array, jax.Array]:
    """A·∂x = ∂right − ∂A·x: one more solve, and gradients by way of inner products of tokens, no matrix per token."""
    system, right = primals
    x = checkpoint_name(_solve_block(rule, system, right), KEPT)
    moved = jax.jvp(lambda s: _times(rule, s, x), (system,), tangents[:1])[1]
    fixed = jax.lax.stop_gradient(system)
    change = jax.lax.custom_linear_solve(
        partial(_times, rule, system), tangents[1] - moved, lambda _, b: _solve_block(rule, fixed, b), symmetric=True
    )
    return x, change


def _times(rule: MemoryRule, system: _System, x: Float[Array, "b D"]) -> Float[Array, "b D"]:
    """A_t·x_t of every token."""
    overlap = system.mixing * jnp.einsum("ti,ni->tn", x, system.keys)
    from_start = system.kept[:, None] * jnp.einsum("ti,ij->tj", x, system.start)
    return rule.ridge * x + from_start + jnp.einsum("tn,ni->ti", overlap, system.keys)


def _preconditioner(rule: MemoryRule, system: _System) -> Callable[[Float[Array, "b D"]], Float[Array, "b D"]]:
    """x_t ↦ P_t·x_t, recursive least squares from the block's start: P_t = B⁻¹ − Σ_{n ≤ t} uₙuₙᵀ.

    A_t/kept_t = (λ/kept_t)I + H₀ + Σ_{n ≤ t} (γₙ/keptₙ)kₙkₙᵀ: every token adds one outer product to the token before, but
    for the first term. With what kept_t would be at the block's middle if all gates were like its first, P_t is the
    inverse up to a factor.
    """
    system = jax.lax.stop_gradient(system)  # the root of a weight of zero, which padding has, has no slope
    kept = jnp.maximum(system.kept, _LEAST_KEPT)
    middle = jnp.maximum(kept[0] ** (kept.shape[0] // 2), _LEAST_KEPT)
    identity = jnp.eye(system.start.shape[0], dtype=system.start.dtype)
    factor = cholesky(system.start + rule.ridge / middle * identity)
    half = solve_lower(factor, identity)
    inverse = jnp.einsum("ki,kj->ij", half, half)
    keys = jnp.sqrt(system.weight / kept)[:, None] * system.keys
    seen = jnp.einsum("ti,ij->tj", keys, inverse)
    inner = cholesky(jnp.eye(keys.shape[0], dtype=keys.dtype) + jnp.einsum("ti,ni->tn", seen, keys))
    rows = solve_lower(inner, seen)

    def apply(x: jax.Array) -> jax.Array:
        overlap = jnp.tril(jnp.einsum("ti,ni->tn", x, rows))
        return jnp.einsum("ti,ij->tj", x, inverse) - jnp.einsum("tn,ni->ti", overlap, rows)

    return apply


def _conjugate_gradients(
    times: Callable[[jax.Array], jax.Array], precondition: Callable[[jax.Array], jax.Array], right: Float[Array, "b D"]
) -> Float[Array, "b D"]:
    """Rows of x with times(x) = right; a row stands still when its residual is a rounding error."""
    goal = np.finfo(right.dtype).eps ** 2 * _dot(right, right)

    def moving(carry: _Iteration) -> jax.Array:
        return _dot(carry[1], carry[1]) > goal

    def iterate(carry: _Iteration) -> _Iteration:
        x, residual, direction, slope, count = carry
        image = times(direction)
        step = jnp.where(moving(carry), slope / _dot(direction, image), 0.0)[:, None]
        x, residual = x + step * direction, residual - step * image
        ahead = precondition(residual)
        new = _dot(residual, ahead)
        direction = ahead + jnp.where(new > 0, new / slope, 0.0)[:, None] * direction
        return x, residual, direction, new, count + 1

    first = precondition(right)
    start = (jnp.zeros_like(right), right, first, _dot(right, first), jnp.zeros((), jnp.int32))
    return jax.lax.while_loop(lambda carry: jnp.any(moving(carry)) & (carry[-1] < MAX_ITERATIONS), iterate, start)[0]


def _solve_by_factors(rule: MemoryRule, system: _System, right: Float[Array, "b D"]) -> Float[Array, "b D"]:
    outer = jnp.einsum("tn,ni,nj->tij", system.mixing, system.keys, system.keys)
    factors = _factor(rule, system.kept[:, None, None] * system.start + outer)
    return jax.vmap(_solve)(factors, right)


def _factor(rule: MemoryRule, moments: jax.Array) -> jax.Array:
    """Lower Cholesky factors of λI + H."""
    return cholesky(moments + rule.ridge * jnp.eye(moments.shape[-1], dtype=moments.dtype))


def _solve(factor: jax.Array, right: jax.Array) -> jax.Array:
    """A·x = right, by the Cholesky factor of A; of [D] or [D, rows]."""
    columns = right.reshape(right.shape[0], -1)
    return solve_lower(factor, solve_lower(factor, columns), transposed=True).reshape(right.shape)


def _dot(x: jax.Array, y: jax.Array) -> jax.Array:
    return jnp.sum(x * y, axis=-1)


def _norm(x: jax.Array) -> jax.Array:
    return jnp.sqrt(_dot(x, x))
