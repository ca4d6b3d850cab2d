"""A memory token by token: the definition that every faster form must reproduce."""

from __future__ import annotations

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp

from atlas_jax.config import ConfigError
from atlas_jax.kernels.newton_schulz import orthogonalize
from atlas_jax.kernels.omega import scale, window_gradient
from atlas_jax.memory import _exact, parts
from atlas_jax.memory._checks import check_call, check_memory, check_starts
from atlas_jax.memory._diagnostics import Diagnostics, of_factors, of_read
from atlas_jax.memory._memory import channel_axis, clipped, encode, forward, gradient_factors, plain
from atlas_jax.memory._params import Params, Weights
from atlas_jax.memory._rule import MemoryRule
from atlas_jax.memory._scan import checkpointed_scan, over_batch
from atlas_jax.memory._state import MemoryState, has_momentum, init_state, keeps_anchor
from atlas_jax.memory._tokens import Tokens, prepare
from atlas_jax.typing import Array, Bool, Float


def step(
    rule: MemoryRule, params: Params, state: MemoryState, token: Tokens
) -> tuple[MemoryState, Float[Array, "*batch d_v"]]:
    """Writes one token, then reads its query: y_t = M_t(φ(q_t)) (ATLAS, equations 9, 32, 33, 26).

    Args:
      token: arrays without a time axis, [..., d].

    Raises:
      ConfigError: sizes differ, or a part is of another rule; the message names the argument.
    """
    state, (y, _) = measured_step(rule, params, state, token)
    return state, y


def measured_step(
    rule: MemoryRule, params: Params, state: MemoryState, token: Tokens
) -> tuple[MemoryState, tuple[Float[Array, "*batch d_v"], Diagnostics]]:
    """`step`, and what the memory made of the token."""
    check_call(rule, params, state, token, time=False)
    return over_batch(partial(_step, rule))(params, state, prepare(rule, token, state.tail_k.dtype))


def scan(
    rule: MemoryRule,
    params: Params,
    state: MemoryState,
    tokens: Tokens,
    *,
    starts: Bool[Array, "*batch T"] | None = None,
) -> tuple[MemoryState, Float[Array, "*batch T d_v"]]:
    """`step` on each token in turn, with a backward pass whose memory grows with √T states.

    Args:
      tokens: arrays [..., T, d] after the batch of the state.
      starts: tokens before which the memory begins anew, at multiples of `rule.chunk`; the state is then a new one.

    Returns:
      The state after the last token, and y [..., T, d_v], each read after its own token's write.

    Raises:
      ConfigError: sizes differ, or a part is of another rule; the message names the argument.
    """
    check_call(rule, params, state, tokens, time=True)
    check_starts(rule, state, tokens, starts, rule.chunk)

    def sequence(
        params: Params, state: MemoryState, inputs: tuple[Tokens, jax.Array | None]
    ) -> tuple[MemoryState, jax.Array]:
        def one(s: MemoryState, x: tuple[Tokens, jax.Array | None]) -> tuple[MemoryState, jax.Array]:
            s, (y, _) = _step(rule, params, s if x[1] is None else begin_anew(rule, params, s, x[1]), x[0])
            return s, y

        return checkpointed_scan(one, state, inputs, remat=rule.remat)

    return over_batch(sequence)(params, state, (prepare(rule, tokens, state.tail_k.dtype), starts))


def read(
    rule: MemoryRule, params: Params, state: MemoryState, q: Float[Array, "*batch d_k"]
) -> Float[Array, "*batch d_v"]:
    """M(φ(q)) of the memory as it is, without writing.

    Args:
      q: the batch of the state, then any axes of queries, then d_k.

    Raises:
      ConfigError: sizes differ, or a part is of another rule; the message names the argument.
    """
    lead = check_memory(rule, params, state)
    if jnp.ndim(q) <= len(lead) or jnp.shape(q)[-1] != rule.d_k or jnp.shape(q)[: len(lead)] != lead:
        raise ConfigError(
            f"q: has shape {jnp.shape(q)}; the state asks for a batch of {lead}, the rule for {rule.d_k} components"
        )
    q = jnp.asarray(q, state.tail_k.dtype)

    def one(params: Params, state: MemoryState, q: jax.Array) -> tuple[MemoryState, jax.Array]:
        inputs = encode(rule, params, q.reshape(-1, rule.d_k))
        if rule.optimizer == "exact":
            y = _exact.read(rule, params, state, inputs.features)
        else:
            current = begin_chunk(rule, state, state.phase == 0) if rule.ns_per == "chunk" else state
            y = forward(rule, plain(current.weights), inputs)
        return state, y.reshape(*q.shape[:-1], rule.d_v)

    return over_batch(one)(params, state, q)[1]


def begin_chunk(rule: MemoryRule, state: MemoryState, starts: jax.Array | None) -> MemoryState:
    """Where a chunk starts: moves the anchor to the memory, or the memory by what its last chunk has gathered.

    Args:
      starts: whether one does; None where it is known that one does.
    """
    if rule.ns_per == "chunk":
        if starts is None:
            return _settle(rule, state)
        return jax.lax.cond(starts, partial(_settle, rule), lambda s: s, state)
    if not keeps_anchor(rule):
        return state
    anchor = state.weights
    if starts is not None:
        anchor = jax.tree.map(lambda new, old: jnp.where(starts, new, old), anchor, state.anchor)
    return dataclasses.replace(state, anchor=anchor)


def anchor_weights(rule: MemoryRule, state: MemoryState, alpha: Float[Array, " h"]) -> Weights:
    """Where gradients are taken.

    Args:
      alpha: retention of the token, for rules that take gradients at the decayed memory.
    """
    weights = state.anchor if keeps_anchor(rule) else state.weights
    if rule.gradient_at == "memory":
        return weights
    return {name: scale(w, alpha, channel_axis(rule, name)) for name, w in weights.items()}


def direction(rule: MemoryRule, momentum: Float[Array, "*batch o i"]) -> Float[Array, "*batch o i"]:
    """U(S): Newton–Schulz for Muon, with the rule's own steps and coefficients."""
    if rule.optimizer == "muon":
        return orthogonalize(momentum, steps=rule.ns_steps, table=rule.ns_table)
    moved: jax.Array = parts.find("optimizer", rule.optimizer).function(momentum)
    return moved


def retained(
    rule: MemoryRule, name: str, weight: Float[Array, "o i"], alpha: Float[Array, " h"], step: Float[Array, "o i"]
) -> Float[Array, "o i"]:
    """R(W, α, step) of one weight."""
    gate = alpha[:, None] if channel_axis(rule, name) == "row" else alpha[None, :]
    new: jax.Array = parts.find("retention", rule.retention).function(weight, gate, step)
    return new


def begin_anew(rule: MemoryRule, params: Params, state: MemoryState, begins: Bool[Array, ""]) -> MemoryState:
    """The state of one sequence, or a new one where a document begins; the phase is that of a chunk's start anyway."""
    new = init_state(rule, params)
    chosen = jax.tree.map(
        lambda a, b: jnp.where(begins, a.astype(b.dtype), b),
        dataclasses.replace(new, phase=None),  # type: ignore[arg-type]
        dataclasses.replace(state, phase=None),  # type: ignore[arg-type]
    )
    return dataclasses.replace(chosen, phase=state.phase)


def _step(
    rule: MemoryRule, params: Params, state: MemoryState, token: Tokens
) -> tuple[MemoryState, tuple[jax.Array, Diagnostics]]:
    queries = encode(rule, params, token.q[None])
    if rule.optimizer == "exact":
        keys = encode(rule, params, token.k[None]).features
        state = _exact.write(state, keys[0], token)
        both = _exact.read(rule, params, state, jnp.concatenate([queries.features, keys]))
        return state, (both[0], jax.tree.map(lambda x: x[0], of_read(rule, keys, both[1:], token.v[None])))
    state = begin_chunk(rule, state, state.phase == 0)

    k = jnp.concatenate([state.tail_k, token.k[None]])
    v = jnp.concatenate([state.tail_v, token.v[None]])
    own = token.gamma if rule.gates == "token" else jnp.ones_like(token.gamma[:1])
    stored = jnp.concatenate([state.tail_gate, own])
    gamma = stored if rule.gates == "token" else stored * token.gamma[::-1]
    one = jnp.ones_like(token.eta[:1])
    inner, outer = (token.eta, one) if rule.step == "inside" else (one, token.eta)

    anchor = anchor_weights(rule, state, token.alpha)
    factors, losses = gradient_factors(rule, anchor, encode(rule, params, k), v)
    found = jax.tree.map(lambda x: x[-1], of_factors(rule, factors, losses))
    momentum = {}
    for name, factor in clipped(rule, factors).items():
        axis = channel_axis(rule, name)
        momentum[name] = scale(window_gradient(factor.left, factor.right, gamma[:, None]), inner, axis)
        if has_momentum(rule):
            momentum[name] = momentum[name] + scale(state.momentum[name], token.theta, axis)

    weights, pending = state.weights, state.pending
    if rule.ns_per == "chunk":
        pending = {
            "retention": pending["retention"] * token.alpha,
            "step": pending["step"] * token.alpha + outer,
        }
    else:
        steps = {name: scale(direction(rule, s), outer, channel_axis(rule, name)) for name, s in momentum.items()}
        weights = {name: retained(rule, name, w, token.alpha, steps[name]) for name, w in weights.items()}
    state = dataclasses.replace(
        state,
        weights=weights,
        momentum=momentum if has_momentum(rule) else {},
        tail_k=k[1:],
        tail_v=v[1:],
        tail_gate=stored[1:],
        pending=pending,
        phase=(state.phase + 1) % rule.chunk if rule.anchored else state.phase,
    )
    return state, (forward(rule, plain(weights), queries)[0], found)


def _settle(rule: MemoryRule, state: MemoryState) -> MemoryState:
    retention, moved = state.pending["retention"], state.pending["step"]
    weights = {
        name: scale(w, retention, channel_axis(rule, name))
        - scale(direction(rule, state.momentum[name]), moved, channel_axis(rule, name))
        for name, w in state.weights.items()
    }
    pending = {"retention": jnp.ones_like(retention), "step": jnp.zeros_like(moved)}
    return dataclasses.replace(state, weights=weights, pending=pending)
