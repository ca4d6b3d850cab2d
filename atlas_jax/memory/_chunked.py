"""A memory chunk by chunk, each chunk in parallel: what `scan` computes, in matrix products.

Gradients of a chunk are taken at one anchor, so they are known before any of its weights. Where a step is the momentum
itself and retention is a factor, the rest is the dual form of `kernels.omega`; else the weights of every token of a chunk are
formed, or, for Newton–Schulz per chunk, one update. A state may come from the middle of a chunk: tokens are then shifted so
that chunks begin where they would have.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name

from atlas_jax.kernels import omega
from atlas_jax.kernels.omega import Coefficients
from atlas_jax.memory import _exact
from atlas_jax.memory._checks import check_call, check_starts
from atlas_jax.memory._diagnostics import Diagnostics, of_factors, of_read
from atlas_jax.memory._memory import (
    Apply,
    Factors,
    Inputs,
    channel_axis,
    clipped,
    encode,
    forward,
    gradient_factors,
    per_token,
    plain,
)
from atlas_jax.memory._params import Params, Weights, arranged
from atlas_jax.memory._rule import MemoryRule
from atlas_jax.memory._scan import KEPT, checkpointed_scan, over_batch
from atlas_jax.memory._state import MemoryState, has_momentum
from atlas_jax.memory._step import anchor_weights, begin_anew, begin_chunk, direction, retained
from atlas_jax.memory._tokens import Tokens, prepare
from atlas_jax.typing import Array, Bool, Float


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class _Chunk:
    """Tokens of one chunk (or of all, with one axis more), padded.

    Attributes:
      stored: γ of each token, 0 for padding; ones where γ is emitted per window.
      age: γ by age, ones where it is per token.
      valid: 0 for padding.
      starts: whether the anchor moves before the chunk; None: before every one, which leaves nothing to choose.
      anew: whether a document begins with it; None where none does.
    """

    tokens: Tokens
    stored: Float[Array, " b"]
    age: Float[Array, "b c"]
    valid: Float[Array, " b"]
    starts: Bool[Array, ""] | None
    anew: Bool[Array, ""] | None


def chunked(
    rule: MemoryRule,
    params: Params,
    state: MemoryState,
    tokens: Tokens,
    *,
    starts: Bool[Array, "*batch T"] | None = None,
    every: int = 64,
) -> tuple[MemoryState, Float[Array, "*batch T d_v"]]:
    """What `scan` computes, in parallel inside each chunk (ATLAS, equations 16 and 34 to 41).

    Args:
      params: of `init_params`; their heads are the last axes of the batch.
      state: of `init_state` or of a call before.
      tokens: arrays [..., T, d] after the batch of the state.
      starts: tokens before which the memory begins anew, so that texts may stand behind one another in a row. The state
        is then a new one, or at the start of a chunk.
      every: what `starts` are multiples of, itself one of `rule.chunk`. Others are not found.

    Returns:
      The state after the last token, and y [..., T, d_v] with y_t = M_t(φ(q_t)).

    Raises:
      ConfigError: sizes differ, or a part is of another rule; the message names the argument.
    """
    run = _prepared(rule, params, state, tokens, starts, every, partial(_sequence, rule, every, False))
    state, (y, _) = run
    return state, y


def measure(
    rule: MemoryRule,
    params: Params,
    state: MemoryState,
    tokens: Tokens,
    *,
    starts: Bool[Array, "*batch T"] | None = None,
    every: int = 64,
) -> tuple[MemoryState, Float[Array, "*batch T d_v"], Diagnostics]:
    """`chunked`, and what the memory made of each token: its loss, its surprise, what was clipped."""
    run = _prepared(rule, params, state, tokens, starts, every, partial(_sequence, rule, every, True))
    state, (y, found) = run
    return state, y, found


def _prepared(
    rule: MemoryRule,
    params: Params,
    state: MemoryState,
    tokens: Tokens,
    starts: jax.Array | None,
    every: int,
    function: Callable[[Params, MemoryState, Any], tuple[MemoryState, tuple[jax.Array, Any]]],
) -> tuple[MemoryState, tuple[jax.Array, Any]]:
    check_call(rule, params, state, tokens, time=True)
    check_starts(rule, state, tokens, starts, every)
    return over_batch(function)(params, state, (prepare(rule, tokens, state.tail_k.dtype), starts))


def _sequence(
    rule: MemoryRule,
    every: int,
    measured: bool,
    params: Params,
    state: MemoryState,
    inputs: tuple[Tokens, jax.Array | None],
) -> tuple[MemoryState, tuple[jax.Array, Diagnostics | None]]:
    tokens, starts = inputs
    if starts is not None:
        state = dataclasses.replace(state, phase=np.zeros((), np.int32))  # type: ignore[arg-type]
    length = tokens.k.shape[0]
    if length == 0:
        none = jnp.zeros(0, tokens.v.dtype)
        return state, (tokens.v, Diagnostics(none, none, none) if measured else None)
    params = arranged(rule, params)
    aligned = rule.anchored and rule.chunk > 1  # whether chunks have fixed borders
    size = rule.chunk if rule.anchored and not rule.sequential else min(rule.block, length)
    if starts is not None and not (rule.anchored and not rule.sequential):
        size = math.gcd(rule.block, every)
    known = not aligned or isinstance(state.phase, np.ndarray)
    offset = state.phase if aligned else np.zeros((), np.int32)
    count = -(-(length + (int(offset) if known else size - 1)) // size)
    total = count * size

    def place(tail: jax.Array, x: jax.Array) -> jax.Array:
        row = jnp.concatenate([tail, x])
        if known and not offset and total == length:
            return row
        empty = jnp.zeros((total + tail.shape[0], *x.shape[1:]), x.dtype)
        return jax.lax.dynamic_update_slice_in_dim(empty, row, offset, 0)

    def chunks(x: jax.Array) -> jax.Array:
        return x.reshape(count, size, *x.shape[1:])

    position = jnp.arange(total)
    valid = ((position >= offset) & (position < offset + length)).astype(tokens.k.dtype)
    own = tokens.gamma[:, 0] if rule.gates == "token" else jnp.ones_like(tokens.gamma[:, 0])
    tails = (state.tail_k, state.tail_v, state.tail_gate)
    rows = tuple(place(tail, x) for tail, x in zip(tails, (tokens.k, tokens.v, own), strict=True))
    padded = jax.tree.map(lambda x: place(x[:0], x), tokens)
    keep = valid[:, None] > 0  # padding leaves memory and momentum as they are
    padded = dataclasses.replace(
        padded,
        k=rows[0][rule.reach :],
        v=rows[1][rule.reach :],
        alpha=jnp.where(keep, padded.alpha, 1.0),
        theta=jnp.where(keep, padded.theta, 1.0),
    )
    age = padded.gamma if rule.gates == "age" else jnp.ones((total, rule.reach + 1), tokens.k.dtype)
    first = jnp.arange(count) * size
    data = _Chunk(
        tokens=jax.tree.map(chunks, padded),
        stored=chunks(rows[2][rule.reach :]),
        age=chunks(age),
        valid=chunks(valid),
        starts=None if known and not offset else (first > 0) | (offset == 0),
        anew=None if starts is None else jnp.pad(starts, (0, total - length))[first],
    )
    head = [row[: rule.reach] for row in rows]
    start = dataclasses.replace(state, tail_k=head[0], tail_v=head[1], tail_gate=head[2])
    live = None if known else first < offset + length
    carry = start, encode(rule, params, head[0])
    products = rule.linear_retention and not rule.directed and rule.optimizer != "exact"
    (end, _), outputs = checkpointed_scan(
        partial(_chunk, rule, measured, params), carry, data, remat=rule.remat, live=live, products=products
    )
    if starts is not None and rule.reach:  # what stands before the newest document is in no window any more
        document = jnp.cumsum(jnp.pad(starts, (rule.reach, total - length)))
        rows = (*rows[:2], jnp.where(document == document[rule.reach + length - 1], rows[2], 0.0))

    def last(row: jax.Array) -> jax.Array:
        return jax.lax.dynamic_slice_in_dim(row, offset + length, rule.reach)

    end = dataclasses.replace(
        end,
        tail_k=last(rows[0]),
        tail_v=last(rows[1]),
        tail_gate=last(rows[2]),
        phase=(state.phase + length) % rule.chunk if rule.anchored else state.phase,
    )

    def real(y: jax.Array) -> jax.Array:
        return jax.lax.dynamic_slice_in_dim(y.reshape(total, *y.shape[2:]), offset, length)

    return end, jax.tree.map(real, outputs)


def _chunk(
    rule: MemoryRule, measured: bool, params: Params, carry: tuple[MemoryState, Inputs], chunk: _Chunk
) -> tuple[tuple[MemoryState, Inputs], tuple[jax.Array, Diagnostics | None]]:
    """One chunk; carried are the memory and the window's tail as the memory takes it, so no key is encoded twice."""
    (state, tail), tokens = carry, chunk.tokens
    if chunk.anew is not None:
        state = begin_anew(rule, params, state, chunk.anew)
    size = chunk.valid.shape[0]
    both = encode(rule, params, jnp.concatenate([tokens.k, tokens.q]))
    both = jax.tree.map(lambda x: checkpoint_name(x, KEPT), both) if rule.features.compress == "projection" else both
    keys, queries = jax.tree.map(lambda x: x[:size], both), jax.tree.map(lambda x: x[size:], both)
    if rule.optimizer == "exact":
        weight = chunk.stored * chunk.age[:, 0] * chunk.valid
        write = partial(_exact.chunk, rule, params, state, keys.features)
        state, y = write(queries.features, tokens.v, tokens.alpha, weight)
        if not measured:
            return (state, tail), (y, None)
        own = write(keys.features, tokens.v, tokens.alpha, weight)[1]
        return (state, tail), (y, of_read(rule, keys.features, own, tokens.v))
    state = begin_chunk(rule, state, chunk.starts)
    keys = jax.tree.map(lambda *pair: jnp.concatenate(pair), tail, keys)
    v, stored = (jnp.concatenate(pair) for pair in ((state.tail_v, tokens.v), (state.tail_gate, chunk.stored)))
    ones = jnp.ones_like(tokens.eta[:, :1])
    inner, outer = (tokens.eta, ones) if rule.step == "inside" else (ones, tokens.eta)
    band = omega.window_band(chunk.age, stored, chunk.valid)
    theta = tokens.theta if has_momentum(rule) else None
    outer = outer * chunk.valid[:, None]
    coefficients = omega.chunk_coefficients(tokens.alpha, theta, inner, outer, band)
    factors, losses = _factors(rule, state, keys, v, tokens.alpha, coefficients)
    found = None
    if measured:
        found = jax.tree.map(lambda x: x[-size:], of_factors(rule, factors, losses))
    factors = clipped(rule, factors)
    form: Any = _dual
    if rule.ns_per == "chunk":
        form = _directed_chunk
    elif rule.directed or not rule.linear_retention:
        form = partial(_directed_tokens, chunk.valid > 0)
    state, apply = form(rule, state, factors, coefficients, tokens.alpha, outer)
    state = dataclasses.replace(state, tail_v=v[size:], tail_gate=stored[size:])
    return (state, jax.tree.map(lambda x: x[size:], keys)), (forward(rule, apply, queries), found)


def _factors(
    rule: MemoryRule,
    state: MemoryState,
    keys: Inputs,
    v: jax.Array,
    alpha: jax.Array,
    coefficients: Coefficients,
) -> tuple[dict[str, Factors], Float[Array, " m"]]:
    if not rule.sequential:
        return gradient_factors(rule, anchor_weights(rule, state, alpha[0]), keys, v)
    gain = alpha if rule.gradient_at == "decayed" else jnp.ones_like(alpha)
    momentum = state.momentum["w"] if has_momentum(rule) else None
    errors = omega.sequential_errors(keys.features, v, state.weights["w"], momentum, coefficients, gain)
    return {"w": Factors(2.0 * errors, keys.features)}, jnp.sum(errors * errors, axis=-1)


def _dual(
    rule: MemoryRule,
    state: MemoryState,
    factors: dict[str, Factors],
    coefficients: Coefficients,
    alpha: jax.Array,
    outer: jax.Array,
) -> tuple[MemoryState, Apply]:
    """Memories linear in their gradients: nothing per token is formed."""
    weights, momentum = {}, {}
    for name, f in factors.items():
        old = state.momentum.get(name)
        weights[name], new = omega.chunk_end(
            state.weights[name], old, f.left, f.right, coefficients, channel_axis(rule, name)
        )
        if new is not None:
            momentum[name] = new

    def apply(name: str, x: jax.Array) -> jax.Array:
        f = factors[name]
        start, old = state.weights[name], state.momentum.get(name)
        return omega.dual_product(x, start, old, f.left, f.right, coefficients, channel_axis(rule, name))

    return dataclasses.replace(state, weights=weights, momentum=momentum), apply


def _directed_tokens(
    valid: Bool[Array, " b"],
    rule: MemoryRule,
    state: MemoryState,
    factors: dict[str, Factors],
    coefficients: Coefficients,
    alpha: jax.Array,
    outer: jax.Array,
) -> tuple[MemoryState, Apply]:
    """Directions of every token's momentum, batched over the chunk; then one gated running sum, or R token by token."""
    each: Weights = {}
    momentum: Weights = {}
    for name, f in factors.items():
        axis = channel_axis(rule, name)
        old = state.momentum.get(name)
        start = jnp.zeros_like(state.weights[name]) if old is None else old
        gathered = omega.momenta(start, f.left, f.right, coefficients, axis)
        steps, weight = direction(rule, gathered), state.weights[name]
        if rule.linear_retention:
            each[name] = omega.accumulate(weight, steps, alpha, outer, axis)
        else:
            each[name] = _retained_tokens(rule, name, weight, steps, alpha, outer, valid)
        if old is not None:
            momentum[name] = gathered[-1]
    weights = {name: w[-1] for name, w in each.items()}
    return dataclasses.replace(state, weights=weights, momentum=momentum), per_token(each)


def _retained_tokens(
    rule: MemoryRule,
    name: str,
    weight: jax.Array,
    steps: jax.Array,
    alpha: jax.Array,
    outer: jax.Array,
    valid: jax.Array,
) -> Float[Array, "b o i"]:
    """The weight after every token, one after the other: what a retention without a closed form asks for."""

    def token(w: jax.Array, row: tuple[jax.Array, ...]) -> tuple[jax.Array, jax.Array]:
        step, a, o, real = row
        w = jnp.where(real, retained(rule, name, w, a, omega.scale(step, o, channel_axis(rule, name))), w)
        return w, w

    return jax.lax.scan(token, weight, (steps, alpha, outer, valid))[1]


def _directed_chunk(
    rule: MemoryRule,
    state: MemoryState,
    factors: dict[str, Factors],
    coefficients: Coefficients,
    alpha: jax.Array,
    outer: jax.Array,
) -> tuple[MemoryState, Apply]:
    """Gathers momentum and step; the memory moves when the next chunk begins."""
    momentum = {}
    for name, f in factors.items():
        axis = channel_axis(rule, name)
        kept = omega.scale(state.momentum[name], coefficients.momentum_left[-1], axis)
        added = omega.window_gradient(f.left, f.right, coefficients.momentum_tokens[-1], axis)
        momentum[name] = kept + added
    kept = coefficients.weights[-1]
    pending = {
        "retention": state.pending["retention"] * kept,
        "step": state.pending["step"] * kept + jnp.sum(omega.decay_products(alpha)[-1] * outer, axis=0),
    }
    return dataclasses.replace(state, momentum=momentum, pending=pending), plain(state.weights)
