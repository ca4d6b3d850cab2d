"""One step on the Omega objective of a write, by one of three inner optimisers.

All three start from one residual and one Gram matrix.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from atlas_jax.config import MemoryConfig
from atlas_jax.kernels.newton_schulz import gram_polynomial
from atlas_jax.typing import Array, Float, Int32

EXACT, GRADIENT, MUON = 0, 1, 2
"""Inner optimisers."""


def omega_step(
    config: MemoryConfig,
    optimizer: Int32[Array, ""],
    step: Float[Array, ""],
    weights: Float[Array, "M C"],
    momentum: Float[Array, "M C"],
    features: Float[Array, "M W"],
    gram: Float[Array, "W W"],
    gamma: Float[Array, W],
    residual: Float[Array, "W C"],
) -> tuple[Float[Array, "M C"], Float[Array, "M C"], Float[Array, "W C"]]:
    """Moves one memory towards the values of a window (ATLAS, equations 9, 10, 32 and 33).

    Args:
      optimizer: EXACT, GRADIENT or MUON.
      step: factor on the line search of the last two.
      weights: M, transposed.
      features: φ of the window's keys, zero where γ is.
      gram: φ(kᵢ)·φ(kⱼ).
      residual: values less what the memory says, zero where γ is.

    Returns:
      The weights, the momentum, and the residual that is left.
    """
    branches = [lambda *args, solve=solve: solve(config, step, *args) for solve in (_exact, _descend, _muon)]
    moved: tuple[jax.Array, jax.Array, jax.Array] = jax.lax.switch(
        optimizer, branches, weights, momentum, features, gram, gamma, residual
    )
    return moved


def product(subscripts: str, a: Float[Array, ...], b: Float[Array, ...]) -> Float[Array, ...]:
    """The big products of a write as an einsum in bfloat16 with float32 sums: 3–4 times faster on CPU, 8 on accelerators.

    A write corrects the residual the rounded weights leave, so rounding does not build up.
    """
    return jnp.einsum(subscripts, a.astype(jnp.bfloat16), b.astype(jnp.bfloat16), preferred_element_type=jnp.float32)


def _exact(
    config: MemoryConfig,
    step: jax.Array,
    weights: jax.Array,
    momentum: jax.Array,
    features: jax.Array,
    gram: jax.Array,
    gamma: jax.Array,
    residual: jax.Array,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The minimum-norm change that solves the ridge problem: ΔM = Φᵀ(ΦΦᵀ + ρI)⁻¹R."""
    del step, gamma
    system = gram + config.ridge * jnp.eye(gram.shape[0])
    dual = jax.scipy.linalg.cho_solve(jax.scipy.linalg.cho_factor(system, lower=True), residual)
    return weights + product("mw,wc->mc", features, dual), momentum, config.ridge * dual


def _descend(
    config: MemoryConfig,
    step: jax.Array,
    weights: jax.Array,
    momentum: jax.Array,
    features: jax.Array,
    gram: jax.Array,
    gamma: jax.Array,
    residual: jax.Array,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Steepest descent with exact line search, in the dual: the residual moves by −t·G·R, the weights by t·ΦᵀR."""
    del gamma

    def one(_: int, carry: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        left, dual = carry
        change = gram @ left
        best = jnp.sum(left * change) / jnp.maximum(jnp.sum(change * change), 1e-30)
        return left - step * best * change, dual + step * best * left

    left, dual = jax.lax.fori_loop(0, config.passes, one, (residual, jnp.zeros_like(residual)))
    return weights + product("mw,wc->mc", features, dual), momentum, left


def _muon(
    config: MemoryConfig,
    step: jax.Array,
    weights: jax.Array,
    momentum: jax.Array,
    features: jax.Array,
    gram: jax.Array,
    gamma: jax.Array,
    residual: jax.Array,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """S ← θS + ΦᵀR, M ← M + t·NS(S), with t from an exact line search: a constant step would never settle."""
    del gram

    def one(_: int, carry: tuple[jax.Array, jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array, jax.Array]:
        weights, momentum, left = carry
        momentum = config.momentum * momentum + product("mw,wc->mc", features, left)
        norm = jax.lax.rsqrt(jnp.sum(momentum * momentum) + 1e-30)
        unit = momentum * norm
        direction = product("mi,ij->mj", unit, gram_polynomial(product("mi,mj->ij", unit, unit)))
        change = product("mw,mc->wc", features, direction)
        best = jnp.sum(left * change) / jnp.maximum(jnp.sum(change * change), 1e-30)
        best = step * jnp.maximum(best, 0.0)  # stale momentum may point uphill; then only the momentum is updated
        return weights + best * direction, momentum, left - best * change * (gamma[:, None] > 0)

    return jax.lax.fori_loop(0, config.passes, one, (weights, momentum, residual))
