"""Test-time memories as pure functions: a rule, its parameters, its state, and two ways to run it.

    rule = presets.atlas(64, 64)
    params = init_params(rule, jax.random.key(0))
    state = init_state(rule, params, batch=(8,))
    learn = jax.jit(chunked, static_argnums=0)
    state, y = learn(rule, params, state, make_tokens(rule, q, k, v, alpha=0.99))

`step` and `scan` are the definition, token by token; `chunked` computes the same in parallel. A rule is hashable: make
it static under `jit`, without which each call compiles its loop anew. Everything is differentiable, through the inner loop,
and runs divided over devices by `jax.shard_map`, `pmap` or a mesh: a new state is placed as the tokens are.
"""

from atlas_jax.memory import parts, presets
from atlas_jax.memory._chunked import chunked, measure
from atlas_jax.memory._diagnostics import Diagnostics
from atlas_jax.memory._params import Params, init_params
from atlas_jax.memory._rule import Features, MemoryRule
from atlas_jax.memory._state import MemoryState, init_state
from atlas_jax.memory._step import read, scan, step
from atlas_jax.memory._tokens import Tokens, make_tokens
from atlas_jax.memory.presets import PRESETS

__all__ = [
    "PRESETS",
    "Diagnostics",
    "Features",
    "MemoryRule",
    "MemoryState",
    "Params",
    "Tokens",
    "chunked",
    "init_params",
    "init_state",
    "make_tokens",
    "measure",
    "parts",
    "presets",
    "read",
    "scan",
    "step",
]
