"""Loops over tokens or chunks, and over a batch: what scan and chunked forms share."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp

from atlas_jax.memory._params import Params
from atlas_jax.memory._placement import placed_alike
from atlas_jax.memory._state import MemoryState

Carry = TypeVar("Carry")
Read = TypeVar("Read")

KEPT = "kept"
"""Name of what a step keeps for its backward pass (`jax.ad_checkpoint.checkpoint_name`): it is small and long to compute."""
_ONE_LEVEL = 80
"""Steps up to which every carry is kept: then each step is computed once more in the backward pass, past it twice."""
_FEW = 16
"""Steps up to which results of matrix products are kept too, if asked (`titans` with backward, 4 steps: 72 500 tokens per
second instead of 63 400; with 32 steps 54 800 instead of 56 900, for fresh memory costs as much as the products)."""


def checkpointed_scan(
    step: Callable[[Carry, Any], tuple[Carry, Any]],
    carry: Carry,
    xs: Any,
    *,
    remat: bool,
    live: jax.Array | None = None,
    products: bool = False,
) -> tuple[Carry, Any]:
    """`lax.scan` whose backward pass keeps about 2√n carries of n steps, and one step's intermediates.

    Args:
      products: whether the results of a step's products are few enough to be kept where there are few steps.
      live: which steps to take; the others return the carry as it came and zeros. Default: all.
    """
    length = jax.tree.leaves(xs)[0].shape[0]
    if length == 0:
        return jax.lax.scan(step, carry, xs)
    inner = length if not remat or length <= _ONE_LEVEL else math.isqrt(length - 1) + 1
    outer = -(-length // inner)
    padding = outer * inner - length
    if padding and live is None:
        live = jnp.ones(length, bool)

    def taken(carry: Carry, x: Any) -> tuple[Carry, Any]:
        if live is None:
            return step(carry, x)
        alive, x = x
        empty = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), jax.eval_shape(step, carry, x)[1])
        return jax.lax.cond(alive, step, lambda carry, _: (carry, empty), carry, x)

    if not remat or length == 1:  # of one step nothing could be computed later than now
        return jax.lax.scan(taken, carry, xs if live is None else (live, xs))
    policies = jax.checkpoint_policies
    policy = policies.save_only_these_names(KEPT)
    if products and length <= _FEW:
        policy = policies.save_from_both_policies(policy, policies.dots_saveable)
    one = jax.checkpoint(taken, prevent_cse=False, policy=policy)
    if live is not None:
        xs = (live, xs)
    if outer == 1:
        return jax.lax.scan(one, carry, xs)
    segments = jax.tree.map(lambda x: _split(x, outer, inner, padding), xs)
    segment = jax.checkpoint(lambda c, x: jax.lax.scan(one, c, x), prevent_cse=False)
    carry, ys = jax.lax.scan(segment, carry, segments)
    return carry, jax.tree.map(lambda y: y.reshape(-1, *y.shape[2:])[:length], ys)


def over_batch(
    function: Callable[[Params, MemoryState, Any], tuple[MemoryState, Read]],
) -> Callable[[Params, MemoryState, Any], tuple[MemoryState, Read]]:
    """Lifts a function of one sequence to the leading axes of its state.

    The last of them are the heads that parameters have; `phase` is one number for the whole batch.
    """

    def lifted(params: Params, state: MemoryState, inputs: Any) -> tuple[MemoryState, Read]:
        heads = next(iter(params.weights.values())).ndim - 2
        axes: Any = MemoryState(0, 0, 0, 0, 0, 0, 0, 0, None)  # type: ignore[arg-type]
        mapped = function
        for depth in range(state.tail_k.ndim - 2):
            mapped = jax.vmap(mapped, in_axes=(0 if depth < heads else None, axes, 0), out_axes=(axes, 0))
        return mapped(params, state, inputs)

    return placed_alike(lifted)


def _split(x: jax.Array, outer: int, inner: int, padding: int) -> jax.Array:
    padded = jnp.pad(x, ((0, padding), *((0, 0),) * (x.ndim - 1)))
    return padded.reshape(outer, inner, *x.shape[1:])
