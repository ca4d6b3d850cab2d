"""Capacity: how many associations a memory can hold exactly (ATLAS propositions 1 and 2).

The `exact` rule gives the least-squares memory, whatever the optimiser would be, so its error is that of the
architecture: a matrix on keys of d components holds d pairs, on all monomials up to degree p as many as they have
independent directions: C(d + p, p), less those that unit length makes dependent.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from atlas_jax.experiments._pairs import one_pass, random_pairs
from atlas_jax.experiments._report import Options, Report, run_command
from atlas_jax.memory import Features, presets
from atlas_jax.typing import Array, Float

_RIDGE = 1e-8


def expected_rank(dim: int, degree: int) -> int:
    """Independent monomials of unit keys: |x|² = 1 makes every monomial of degree ≤ p − 2 a sum of higher ones."""
    lower = math.comb(dim + degree - 2, degree - 2) if degree >= 2 else 0
    constant = 1 if degree == 1 else 0  # degree 1 is the identity here, without a constant
    return math.comb(dim + degree, degree) - lower - constant


def experiment(options: Options) -> Sequence[Report]:
    """Error of the best fit against the number of pairs."""
    dim = 4 if options.quick else 8
    report = Report("capacity", "Exact fit against number of pairs", "pairs", "relative squared error", log_x=True)
    with jax.enable_x64(True):
        for degree in (1, 2) if options.quick else (1, 2, 3):
            rank = expected_rank(dim, degree)
            features = Features() if degree == 1 else Features(kind="polynomial", degree=degree)
            rule = presets.mesa(dim, dim, features=features, ridge=_RIDGE)
            curve = f"degree {degree} (rank {rank})"
            counts = {rank // 2, rank - 1, rank, rank + 1, rank + max(2, rank // 8), 2 * rank, 4 * rank}
            for count in (rank, 2 * rank) if options.quick else sorted(counts):
                pairs = [random_pairs(jax.random.key(seed), count, dim, dim) for seed in range(options.seeds)]
                keys, values = (jnp.stack(part).astype(jnp.float64) for part in zip(*pairs, strict=True))
                error, _ = one_pass(rule, keys, values, jnp.asarray(0.0), jnp.asarray(0.0))
                report.add(curve, count, np.asarray(error))
    hidden = 4 * dim
    for count in (dim,) if options.quick else (8, 16, 32, 64, 128, 256):
        errors = [float(_fit_mlp(jax.random.key(s), count, dim, hidden)) for s in range(options.seeds)]
        report.add(f"MLP {hidden} hidden, {2 * dim * hidden} weights", count, errors)
    report.notes.append("Degrees: ridge 1e-8, float64. MLP: W1·gelu(W2·k) fitted by 3000 full-batch Adam steps.")
    return [report]


def _fit_mlp(key: Array, count: int, dim: int, hidden: int) -> Float[Array, ""]:
    pair_key, first, second = jax.random.split(key, 3)
    keys, values = random_pairs(pair_key, count, dim, dim)
    weights = (
        jax.random.normal(first, (hidden, dim)),
        jax.random.normal(second, (dim, hidden)) * hidden**-0.5,
    )
    return _train_mlp(weights, keys, values)


@jax.jit
def _train_mlp(weights: tuple[jax.Array, jax.Array], keys: jax.Array, values: jax.Array) -> jax.Array:
    optimizer = optax.adam(optax.cosine_decay_schedule(2e-2, 3000))

    def error(weights: tuple[jax.Array, jax.Array]) -> jax.Array:
        w2, w1 = weights
        hidden = jax.nn.gelu(jnp.einsum("hd,nd->nh", w2, keys))
        return jnp.sum((jnp.einsum("dh,nh->nd", w1, hidden) - values) ** 2) / jnp.sum(values**2)

    def step(carry: Any, _: None) -> tuple[Any, None]:
        weights, state = carry
        updates, state = optimizer.update(jax.grad(error)(weights), state)
        return (optax.apply_updates(weights, updates), state), None

    (weights, _), _ = jax.lax.scan(step, (weights, optimizer.init(weights)), length=3000)
    return error(weights)


if __name__ == "__main__":
    run_command("capacity", experiment, seeds=5)
