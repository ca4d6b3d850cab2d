"""One step on the Omega objective of a write, by one of three inner optimisers.

All three start from one residual and one Gram matrix.
"""

from __future__ import annotations

from typing import Literal, get_args

import jax
import jax.numpy as jnp

from atlas_jax.config import MemoryConfig
from atlas_jax.kernels.newton_schulz import gram_polynomial
from atlas_jax.typing import Array, Bool, Float

_MAX_LOSS = 100.0
"""Mean squared error that no write may leave; codes are unit vectors, so that of an empty memory is one."""
_MAX_MOMENTUM = 6e4
"""Largest number of a momentum that is kept: float16 holds 65 504."""

Optimizer = Literal["exact", "gradient", "muon"]
OPTIMIZERS: tuple[Optimizer, ...] = get_args(Optimizer)


def omega_step(
    config: MemoryConfig,
    optimizer: Optimizer,
    step: Float[Array, ""],
    momentum: Float[Array, "C W"],
    gram: Float[Array, "W W"],
    gamma: Float[Array, W],
    residual: Float[Array, "C W"],
) -> tuple[Float[Array, "C W"], Float[Array, "C W"], Float[Array, ""], Bool[Array, ""]]:
    """How to move one memory towards the values of a window (ATLAS, equations 9, 10, 32 and 33), all in the dual.

    A step that diverges, as one of a learning rate too large for the text can, is not taken: the weights stay, and momentum
    starts anew.

    Args:
      step: factor on the line search of gradient and Muon.
      momentum: A in S = AΦ, Φ the features of the window's keys, zero where γ is.
      gram: φ(kᵢ)·φ(kⱼ), zero where γ is.
      residual: values less what the memory says, zero where γ is.

    Returns:
      D of the change DΦ of the weights, zero where the step is not taken; the momentum; the mean squared error that is
      left; and whether the step was taken.
    """
    if optimizer == "muon":
        dual, moved, left = _muon(config, step, momentum, gram, residual)
    else:
        dual, left = _exact(config, gram, residual) if optimizer == "exact" else _descend(config, step, gram, residual)
        moved = momentum
    loss = jnp.sum(left * left) / jnp.maximum(gamma.sum(), 1.0)
    taken = (loss <= _MAX_LOSS) & jnp.isfinite(jnp.sum(dual * dual)) & (jnp.abs(moved).max() <= _MAX_MOMENTUM)
    return jnp.where(taken, dual, 0.0), jnp.where(taken, moved, 0.0), loss, taken


def product(subscripts: str, a: Float[Array, ...], b: Float[Array, ...]) -> Float[Array, ...]:
    """The big products of a write as an einsum in bfloat16 with float32 sums: 3–4 times faster on CPU, 8 on accelerators.

    On CPU that is so for factors that lie as they are named, the summed axis last in both or first in the second; a factor
    that was transposed is multiplied in float32. The barrier keeps two products from sharing a factor as float32.

    A write corrects the residual the rounded weights leave, so rounding does not build up.
    """
    a, b = jax.lax.optimization_barrier((a.astype(jnp.bfloat16), b.astype(jnp.bfloat16)))
    return jnp.einsum(subscripts, a, b, preferred_element_type=jnp.float32)


def _exact(config: MemoryConfig, gram: jax.Array, residual: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The minimum-norm change that solves the ridge problem, ΔM = R(ΦΦᵀ + ρI)⁻¹Φ: its dual, and what it leaves of R."""
    factor = jax.lax.linalg.cholesky(gram + config.ridge * jnp.eye(gram.shape[0]), symmetrize_input=False)
    half = jax.lax.linalg.triangular_solve(factor, residual, lower=True, transpose_a=True)
    dual = jax.lax.linalg.triangular_solve(factor, half, lower=True)
    return dual, config.ridge * dual


def _descend(
    config: MemoryConfig, step: jax.Array, gram: jax.Array, residual: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Steepest descent with exact line search, in the dual: the residual moves by −t·R·G, the weights by t·R·Φ."""

    def one(_: int, carry: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        left, dual = carry
        change = left @ gram
        best = jnp.sum(left * change) / jnp.maximum(jnp.sum(change * change), 1e-30)
        return left - step * best * change, dual + step * best * left

    left, dual = jax.lax.fori_loop(0, config.passes, one, (residual, jnp.zeros_like(residual)))
    return dual, left


def _muon(
    config: MemoryConfig, step: jax.Array, momentum: jax.Array, gram: jax.Array, residual: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """S ← θS + RΦ, M ← M + t·NS(S), with t from an exact line search: a constant step would never settle.

    S = AΦ, and the Gram form of Newton–Schulz has NS(S) = P·S with P a polynomial of SSᵀ = A(ΦΦᵀ)Aᵀ: no matrix of the
    weights' size is needed, and none is kept between writes.
    """

    def one(_: int, carry: tuple[jax.Array, jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array, jax.Array]:
        dual, momentum, left = carry
        momentum = config.momentum * momentum + left
        outer = momentum @ gram @ momentum.T
        norm = jax.lax.rsqrt(jnp.trace(outer) + 1e-30)
        direction = gram_polynomial(outer * (norm * norm)) @ (momentum * norm)
        change = direction @ gram
        best = jnp.sum(left * change) / jnp.maximum(jnp.sum(change * change), 1e-30)
        best = step * jnp.maximum(best, 0.0)  # stale momentum may point uphill; then only the momentum is updated
        return dual + best * direction, momentum, left - best * change

    moved: tuple[jax.Array, jax.Array, jax.Array] = jax.lax.fori_loop(
        0, config.passes, one, (jnp.zeros_like(residual), momentum, residual)
    )
    return moved
