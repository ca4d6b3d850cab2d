"""Three memories side by side: how much of what was written once comes back, as more is written.

    python examples/memory_rules.py

The delta rule looks at the last token, the Omega rule at the last 16, the exact rule at all; the last one has features of
degree 2 as well. Compiles and runs in seconds on a CPU.
"""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp

import atlas_jax
from atlas_jax import Features, MemoryRule, presets

DIM = 16
RULES: dict[str, tuple[MemoryRule, float]] = {  # each with the step that suits it
    "delta": (presets.deltanet(DIM, DIM), 0.35),
    "omega": (presets.deltanet(DIM, DIM, window=16), 0.25),
    "exact": (presets.mesa(DIM, DIM, ridge=1e-5), 0.0),
    "exact, degree 2": (presets.mesa(DIM, DIM, ridge=1e-5, features=Features(kind="polynomial", degree=2)), 0.0),
}


@partial(jax.jit, static_argnames=("rule", "pairs"))
def error(rule: MemoryRule, pairs: int, eta: float) -> jax.Array:
    """Writes random pairs once each; the error of reading them all, relative to the values."""
    keys, values = jax.random.normal(jax.random.key(0), (2, pairs, DIM))
    params = atlas_jax.init_params(rule, jax.random.key(1))
    tokens = atlas_jax.make_tokens(rule, keys, keys, values, eta=eta if rule.uses("eta") else None)
    state, _ = atlas_jax.chunked(rule, params, atlas_jax.init_state(rule, params), tokens)
    found = atlas_jax.read(rule, params, state, keys)
    return jnp.sum((found - values) ** 2) / jnp.sum(values**2)


def main() -> None:
    print(f"{'pairs':<16}" + "".join(f"{pairs:>8}" for pairs in (8, 16, 48, 96)))
    for name, (rule, eta) in RULES.items():
        print(f"{name:<16}" + "".join(f"{float(error(rule, pairs, eta)):8.3f}" for pairs in (8, 16, 48, 96)))


if __name__ == "__main__":
    main()
