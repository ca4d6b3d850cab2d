"""A memory chunk by chunk, each chunk in parallel: what `scan` computes, in matrix products.

Gradients of a chunk are taken at one anchor, so they are known before any of its weights. Without Newton–Schulz the
rest is the dual form of `kernels.omega`; with it, the weights of every token of a chunk are formed, or one update per
chunk. A state may come from the middle of a chunk: tokens are then shifted so that chunks begin where they would have.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name

from atlas_jax.kernels import omega
from atlas_jax.kernels.omega import Coefficients
from atlas_jax.memory import _exact
from atlas_jax.memory._checks import check_call
from atlas_jax.memory._memory import (
    Apply,
    Factors,
    Inputs,
    channel_axis,
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
from atlas_jax.memory._step import anchor_weights, begin_chunk, direction
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
    """

    tokens: Tokens
    stored: Float[Array, " b"]
    age: Float[Array, "b c"]
    valid: Float[Array, " b"]
    starts: Bool[Array, ""] | None


def chunked(
    rule: MemoryRule, params: Params, state: MemoryState, tokens: Tokens
) -> tuple[MemoryState, Float[Array, "*batch T d_v"]]:
    """What `scan` computes, in parallel inside each chunk (ATLAS, equations 16 and 34 to 41).

    Raises:
      ConfigError: sizes differ, or a part is of another rule; the message names the argument.
    """
    check_call(rule, params, state, tokens, time=True)
    return over_batch(partial(_sequence, rule))(params, state, prepare(rule, tokens, state.tail_k.dtype))


def _sequence(rule: MemoryRule, params: Params, state: MemoryState, tokens: Tokens) -> tuple[MemoryState, jax.Array]:
    length = tokens.k.shape[0]
    if length == 0:
        return state, tokens.v
    params = arranged(rule, params)
    aligned = rule.anchored and rule.chunk > 1  # whether chunks have fixed borders
    size = rule.chunk if rule.anchored and not rule.sequential else min(rule.block, length)
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
    )
    head = [row[: rule.reach] for row in rows]
    start = dataclasses.replace(state, tail_k=head[0], tail_v=head[1], tail_gate=head[2])
    live = None if known else first < offset + length
    carry = start, encode(rule, params, head[0])
    products = rule.optimizer not in ("muon", "exact")
    (end, _), outputs = checkpointed_scan(
        partial(_chunk, rule, params), carry, data, remat=rule.remat, live=live, products=products
    )

    def last(row: jax.Array) -> jax.Array:
        return jax.lax.dynamic_slice_in_dim(row, offset + length, rule.reach)

    end = dataclasses.replace(
        end,
        tail_k=last(rows[0]),
        tail_v=last(rows[1]),
        tail_gate=last(rows[2]),
        phase=(state.phase + length) % rule.chunk if rule.anchored else state.phase,
    )
    return end, jax.lax.dynamic_slice_in_dim(outputs.reshape(total, rule.d_v), offset, length)


def _chunk(
    rule: MemoryRule, params: Params, carry: tuple[MemoryState, Inputs], chunk: _Chunk
) -> tuple[tuple[MemoryState, Inputs], jax.Array]:
    """One chunk; carried are the memory and the window's tail as the memory takes it, so no key is encoded twice."""
    (state, tail), tokens = carry, chunk.tokens
    size = chunk.valid.shape[0]
    both = encode(rule, params, jnp.concatenate([tokens.k, tokens.q]))
    both = jax.tree.map(lambda x: checkpoint_name(x, KEPT), both) if rule.features.compress == "projection" else both
    keys, queries = jax.tree.map(lambda x: x[:size], both), jax.tree.map(lambda x: x[size:], both)
    if rule.optimizer == "exact":
        weight = chunk.stored * chunk.age[:, 0] * chunk.valid
        state, y = _exact.chunk(rule, params, state, keys.features, queries.features, tokens.v, tokens.alpha, weight)
        return (state, tail), y
    state = begin_chunk(rule, state, chunk.starts)
    keys = jax.tree.map(lambda *pair: jnp.concatenate(pair), tail, keys)
    v, stored = (jnp.concatenate(pair) for pair in ((state.tail_v, tokens.v), (state.tail_gate, chunk.stored)))
    ones = jnp.ones_like(tokens.eta[:, :1])
    inner, outer = (tokens.eta, ones) if rule.step == "inside" else (ones, tokens.eta)
    band = omega.window_band(chunk.age, stored, chunk.valid)
    theta = tokens.theta if has_momentum(rule) else None
    outer = outer * chunk.valid[:, None]
    coefficients = omega.chunk_coefficients(tokens.alpha, theta, inner, outer, band)
    factors = _factors(rule, params, state, keys, v, tokens.alpha, coefficients)
    form = {"token": _orthogonal_tokens, "chunk": _orthogonal_chunk}[rule.ns_per] if rule.optimizer == "muon" else _dual
    state, apply = form(rule, state, factors, coefficients, tokens.alpha, outer)
    state = dataclasses.replace(state, tail_v=v[size:], tail_gate=stored[size:])
    return (state, jax.tree.map(lambda x: x[size:], keys)), forward(rule, apply, queries)


def _factors(
    rule: MemoryRule,
    params: Params,
    state: MemoryState,
    keys: Inputs,
    v: jax.Array,
    alpha: jax.Array,
    coefficients: Coefficients,
) -> dict[str, Factors]:
    if not rule.sequential:
        return gradient_factors(rule, anchor_weights(rule, state, alpha[0]), keys, v)
    gain = alpha if rule.gradient_at == "decayed" else jnp.ones_like(alpha)
    momentum = state.momentum["w"] if has_momentum(rule) else None
    errors = omega.sequential_errors(keys.features, v, state.weights["w"], momentum, coefficients, gain)
    return {"w": Factors(2.0 * errors, keys.features)}


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
            state.weights[name], old, f.left, f.right, coefficients, channel_axis(name)
        )
        if new is not None:
            momentum[name] = new

    def apply(name: str, x: jax.Array) -> jax.Array:
        f = factors[name]
        start, old = state.weights[name], state.momentum.get(name)
        return omega.dual_product(x, start, old, f.left, f.right, coefficients, channel_axis(name))

    return dataclasses.replace(state, weights=weights, momentum=momentum), apply


def _orthogonal_tokens(
    rule: MemoryRule,
    state: MemoryState,
    factors: dict[str, Factors],
    coefficients: Coefficients,
    alpha: jax.Array,
    outer: jax.Array,
) -> tuple[MemoryState, Apply]:
    """Newton–Schulz of every token's momentum, batched over the chunk; then one gated running sum."""
    each: Weights = {}
    momentum: Weights = {}
    for name, f in factors.items():
        axis = channel_axis(name)
        steps = omega.momenta(state.momentum[name], f.left, f.right, coefficients, axis)
        each[name] = omega.accumulate(state.weights[name], direction(rule, steps), alpha, outer, axis)
        momentum[name] = steps[-1]
    weights = {name: w[-1] for name, w in each.items()}
    return dataclasses.replace(state, weights=weights, momentum=momentum), per_token(each)


def _orthogonal_chunk(
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
        axis = channel_axis(name)
        kept = omega.scale(state.momentum[name], coefficients.momentum_left[-1], axis)
        added = omega.window_gradient(f.left, f.right, coefficients.momentum_tokens[-1], axis)
        momentum[name] = kept + added
    kept = coefficients.weights[-1]
    pending = {
        "retention": state.pending["retention"] * kept,
        "step": state.pending["step"] * kept + jnp.sum(omega.decay_products(alpha)[-1] * outer, axis=0),
    }
    return dataclasses.replace(state, momentum=momentum, pending=pending), plain(state.weights)
