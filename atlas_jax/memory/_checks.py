"""Whether the arguments of a call belong together: else the first error would be one of some product deep inside."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from atlas_jax.config import ConfigError
from atlas_jax.memory._params import Params, feature_shapes
from atlas_jax.memory._rule import MemoryRule
from atlas_jax.memory._state import MemoryState, state_shapes
from atlas_jax.memory._tokens import Tokens, check_tokens
from atlas_jax.typing import Array, Bool


def check_call(rule: MemoryRule, params: Params, state: MemoryState, tokens: Tokens, *, time: bool) -> None:
    """Compares what a rule is run with.

    Args:
      time: whether tokens have a time axis.

    Raises:
      ConfigError: sizes differ; the message names the argument and its field.
    """
    check_tokens(rule, tokens)
    lead = check_memory(rule, params, state)
    rows = jnp.shape(tokens.k)[:-1]
    if rows[: len(lead)] != lead or len(rows) != len(lead) + time:
        wanted = f"{lead}, then tokens, then components" if time else f"{lead}, then components: one token"
        raise ConfigError(f"tokens.k: has shape {jnp.shape(tokens.k)}; the state asks for a batch of {wanted}")


def check_memory(rule: MemoryRule, params: Params, state: MemoryState) -> tuple[int, ...]:
    """Compares parameters and state with their rule, and returns the batch.

    Raises:
      ConfigError: they are of another rule; the message names the argument and its field.
    """
    first = next(iter(params.weights.values()), None)
    heads = jnp.shape(first)[:-2] if first is not None else ()
    _compare("params.weights", params.weights, rule.weight_shapes, heads)
    _compare("params.features", params.features, feature_shapes(rule), heads)
    lead = jnp.shape(state.tail_gate)[:-1]
    for field, shapes in state_shapes(rule).items():
        _compare(f"state.{field}", getattr(state, field), shapes, lead)
    if lead[len(lead) - len(heads) :] != heads:
        raise ConfigError(f"state: has a batch of {lead}; the parameters have heads {heads}, its last axes")
    return lead


def check_starts(
    rule: MemoryRule, state: MemoryState, tokens: Tokens, starts: Bool[Array, "*batch T"] | None, every: int
) -> None:
    """Raises ConfigError where documents cannot begin where `starts` says; the message names the argument."""
    if starts is None:
        return
    if jnp.shape(starts) != jnp.shape(tokens.k)[:-1]:
        raise ConfigError(f"starts: has shape {jnp.shape(starts)}; tokens.k asks for {jnp.shape(tokens.k)[:-1]}")
    if rule.anchored and every % rule.chunk:
        raise ConfigError(f"every: documents begin at multiples of {every}, which must be one of chunk, {rule.chunk}")
    if isinstance(state.phase, np.ndarray) and state.phase != 0:
        raise ConfigError("starts: the state must be at the start of a chunk, as a new one is")


def _compare(name: str, held: Any, shapes: Any, lead: tuple[int, ...]) -> None:
    found = jax.tree.map(jnp.shape, held)
    wanted = {part: (*lead, *shape) for part, shape in shapes.items()} if isinstance(shapes, dict) else (*lead, *shapes)
    if found != wanted:
        raise ConfigError(f"{name}: has shape {found}; the rule and its batch ask for {wanted}")
