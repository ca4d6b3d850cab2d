"""The recall memory: what a session has read, held in one matrix of fixed size, without training.

Key: the residual stream after a layer, mapped to a few whitened components and to unit length, and the token's context, a
sketch of the words before it (`contexts`). Value: a random code of the token that came next. φ: the monomials of one degree
that join state and context (`kernel`). A page that leaves the attention window is written by
reducing the Omega objective (ATLAS, arXiv 2505.23735, equation 9) over the last `omega_window` tokens that have left,

    min_D  Σᵢ γᵢ ‖(cM + D) φ(kᵢ) − vᵢ‖²,      γᵢ ∈ {0, 1},

to its minimum (exact), by steepest descent (OmegaNet, equation 10) or by orthogonalised momentum (ATLAS with Muon,
equations 32–33), and M becomes M + D. At c = 1 that is the rule to the letter; a smaller `correction` keeps what is old. The
memory is read at the head: s = M φ(k)·code(v) scores every token v the session has seen.

The steps are in `recall.solvers`. Batched states are slices of the same row functions.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from atlas_jax.config import MemoryConfig
from atlas_jax.kernels.cpu import ffi, library
from atlas_jax.kernels.linear import linear, quantize_rows, rows_of
from atlas_jax.kernels.monomials import window_monomials
from atlas_jax.kernels.recall_features import read_out
from atlas_jax.kernels.reductions import row_max, row_sum
from atlas_jax.recall.adapter import (
    AGREED_DECAY,
    AGREED_LENGTH,
    CONTEXT_DECAY,
    CONTEXT_LENGTH,
    Adapter,
)
from atlas_jax.recall.recall_state import Answer, RecallSettings, RecallState, WriteSettings
from atlas_jax.recall.solvers import Optimizer, omega_step, product
from atlas_jax.typing import Array, Bool, Float, Int8, Int32, UInt8

_MIN_SCORE = -2.0


def observe(
    adapter: Adapter,
    state: RecallState,
    settings: RecallSettings,
    tapped: tuple[Float[Array, "B T E"], ...],
    tokens: Int32[Array, "B T"],
    positions: Int32[Array, "B T"],
    valid: Bool[Array, "B T"],
) -> tuple[RecallState, Answer]:
    """Asks the memory after each of a step's tokens, and keeps states and tokens for when they leave the window.

    It is asked while a prompt is read as well: what it says there is compared with what came.

    Args:
      tapped: residual streams of the tapped layers.
      valid: which tokens are real; those that are not come last.
    """
    key, states = keys(adapter, state, settings, tapped, tokens, positions)
    found = jax.lax.cond(
        jnp.any(state.written[:, None] & valid),
        lambda: _read_out(adapter, state, settings, key),
        lambda: jnp.zeros((*positions.shape, adapter.codes.shape[1]), jnp.float32),
    )
    told = jnp.packbits(found > 0, axis=-1)
    best = _unit(linear(adapter.projection[0].T, tapped[0] - adapter.mean[0]))
    agreed = _agreement(adapter, state, told, tokens, positions)
    answer = Answer(found, jnp.concatenate([best, agreed[..., None]], axis=-1))
    return remember(state, states, told, tokens, positions, valid), answer


def _agreement(
    adapter: Adapter,
    state: RecallState,
    told: UInt8[Array, "B T bytes"],
    tokens: Int32[Array, "B T"],
    positions: Int32[Array, "B T"],
) -> Float[Array, "B T"]:
    """How far the memory has been right of the last tokens, from 1 to about 0, later ones counting more.

    It was right of a token as far as the signs of what it said before it are those of the token's value code. Where an
    answer repeats what was said, that is at 0.3 on average, in running text at 0.1, in other answers at 0.02.
    """
    row = jnp.arange(tokens.shape[0])[:, None]
    before = positions[:, :1] - AGREED_LENGTH + jnp.arange(AGREED_LENGTH + 1)  # and the first token of the step
    text = jnp.concatenate([_tokens(state, row, before[:, :-1]), tokens], axis=1)
    said = state.told[row, (before - 1) % state.tokens.shape[1]] * (before >= 1)[..., None]
    said = jnp.concatenate([said, told[:, :-1]], axis=1)
    code = jnp.packbits(adapter.codes.values[jnp.maximum(text, 0)] > 0, axis=-1)
    wrong = jax.lax.population_count(said ^ code).astype(jnp.int32).sum(axis=-1)
    right = 1.0 - wrong.astype(jnp.float32) * (2.0 / adapter.codes.shape[1])
    right = jnp.where((text >= 0) & (said > 0).any(axis=-1), right, 0.0)
    length = tokens.shape[1]
    agreed = jnp.zeros((tokens.shape[0], length), jnp.float32)
    for back in range(AGREED_LENGTH):
        start = AGREED_LENGTH - back
        agreed = agreed + (1 - AGREED_DECAY) * AGREED_DECAY**back * right[:, start : start + length]
    return agreed


def keys(
    adapter: Adapter,
    state: RecallState,
    settings: RecallSettings,
    tapped: tuple[Float[Array, "B T E"], ...],
    tokens: Int32[Array, "B T"],
    positions: Int32[Array, "B T"],
) -> tuple[Float[Array, "B T R"], Int8[Array, "B T Z"]]:
    """Keys of a step's tokens, and the states they are made of in 8 bits, of which a write makes them again.

    A key is two unit vectors: the token's own state in the tapped layers, and its context.
    """
    batch, length = positions.shape
    row = jnp.arange(batch)[:, None]
    taps = [linear(adapter.projection[i].T, h - adapter.mean[i]) for i, h in enumerate(tapped)]
    tables = jnp.concatenate([*taps, jnp.zeros((batch, length, 1))], axis=2)
    z = jnp.take_along_axis(tables, adapter.select[settings.layers, settings.degree][:, None, :], axis=2)
    states = quantize_rows(z)[0]
    before = _tokens(state, row, positions[:, :1] - CONTEXT_LENGTH + jnp.arange(CONTEXT_LENGTH))
    text = jnp.concatenate([before, tokens], axis=1)
    return _joined(states, contexts(adapter, text, _used(adapter, settings.degree))), states


def contexts(
    adapter: Adapter, text: Int32[Array, "*rows extended"], used: Bool[Array, "*rows Z"]
) -> Float[Array, "*rows T Z"]:
    """What has just been talked of, as a sketch of the text before each token: a unit vector.

    Every token has a random code. A context is the sum of those of the last `CONTEXT_LENGTH` tokens, each times its weight
    and what `CONTEXT_DECAY` leaves of it. The words of a question are those of the place where it was answered, whatever
    their order and the grammar around them (docs/experiments/recall_memory.md).

    Args:
      text: the first `CONTEXT_LENGTH` tokens only come before; −1 is none.
      used: which numbers a key of the degree in use has; the others are zero.
    """
    size, length = used.shape[-1], text.shape[-1] - CONTEXT_LENGTH
    token = jnp.maximum(text, 0)
    weight = adapter.token_weight[token] * (text >= 0)
    words = adapter.codes.values[token][..., :size].astype(jnp.float32) * weight[..., None]
    context = jnp.zeros((*text.shape[:-1], length, size))
    for back in range(1, CONTEXT_LENGTH + 1):
        start = CONTEXT_LENGTH - back
        context = context + CONTEXT_DECAY ** (back - 1) * words[..., start : start + length, :]
    return _unit(context * used[..., None, :])


def _unit(part: Float[Array, "*rows Z"]) -> Float[Array, "*rows Z"]:
    return part * jax.lax.rsqrt(jnp.maximum(row_sum(part * part), 1e-12))[..., None]


def _used(adapter: Adapter, degree: Int32[Array, "*rows"]) -> Bool[Array, "*rows Z"]:
    """Which numbers the halves of a key have at a degree, less one."""
    size = adapter.select.shape[2]
    return jnp.arange(size) < jnp.asarray(adapter.halves)[degree][..., None]


def _tokens(state: RecallState, row: Int32[Array, "*rows"], position: Int32[Array, "*rows"]) -> Int32[Array, "*rows"]:
    """Tokens at positions of the text, −1 before its first."""
    return jnp.where(position >= 0, state.tokens[row, position % state.tokens.shape[1]], -1)


def _joined(states: Int8[Array, "*rows Z"], context: Float[Array, "*rows Z"]) -> Float[Array, "*rows R"]:
    """Keys of states and contexts."""
    return jnp.concatenate([_unit(states.astype(jnp.float32)), context], axis=-1)


def kernel(
    a: Float[Array, "*rows n R"], b: Float[Array, "*rows m R"], degree: Int32[Array, ""]
) -> Float[Array, "*rows n m"]:
    """φ(a)·φ(b): (s·s′)ᵖ⁻¹(t·t′) for keys of states s and contexts t, and their mean (s·s′ + t·t′)/2 at p = 1.

    A product asks for both, where all monomials of the joined key would be content with either. With as many features,
    facts asked for 2 000 tokens later were found again for 0.97 of their digits instead of 0.87 in the same words, 0.75
    instead of 0.65 in others, and documents gained as much or more (12 contexts, 4 documents, in simulation, with a
    decaying mean of states as t).

    Args:
      degree: p − 1.
    """
    size = a.shape[-1] // 2
    state = jnp.einsum("...nz,...mz->...nm", a[..., :size], b[..., :size])
    context = jnp.einsum("...nz,...mz->...nm", a[..., size:], b[..., size:])
    joined = jnp.where(degree == 2, state * state, state) * context
    return jnp.where(degree == 0, (state + context) / 2, joined)


def remember(
    state: RecallState,
    states: Int8[Array, "B T Z"],
    told: UInt8[Array, "B T bytes"],
    tokens: Int32[Array, "B T"],
    positions: Int32[Array, "B T"],
    valid: Bool[Array, "B T"],
) -> RecallState:
    """Keeps a step's states and tokens for when they leave the window, and what the memory said after them."""
    row = jnp.arange(tokens.shape[0])[:, None]
    ring = state.tokens.shape[1]
    place = jnp.where(valid, positions % ring, ring)
    return dataclasses.replace(
        state,
        states=state.states.at[row, place].set(states, mode="drop"),
        told=state.told.at[row, place].set(told, mode="drop"),
        tokens=state.tokens.at[row, place].set(tokens, mode="drop"),
    )


def write(
    config: MemoryConfig,
    optimizer: Optimizer,
    adapter: Adapter,
    state: RecallState,
    row: Int32[Array, ""],
    settings: WriteSettings,
) -> RecallState:
    """Absorbs the tokens before `settings.end` into the memory of one row: one Omega step.

    Args:
      row: which session of the batch.

    Returns:
      The state with that row's weights, momentum, seen tokens and figures of loss replaced; everything else untouched.
    """
    width = config.max_omega_window
    offset = jnp.arange(width) - width
    position = settings.end + offset  # of the values: what follows the last of them may not have been read yet
    gamma = ((position >= 1) & (offset >= -settings.window)).astype(jnp.float32)
    needed = settings.end - width - 1 - CONTEXT_LENGTH + jnp.arange(CONTEXT_LENGTH + width + 1)
    text = _tokens(state, row, needed)
    token = jnp.maximum(text[CONTEXT_LENGTH + 1 :], 0)
    context = contexts(adapter, text[:-1], _used(adapter, settings.degree))
    key = _joined(state.states[row, (position - 1) % state.tokens.shape[1]], context) * gamma[:, None]

    features = _window_features(adapter, key, settings.degree)  # [W, M]; γ = 0 makes a row zero
    code = rows_of(adapter.codes, token).T * gamma
    gram = kernel(key, key, settings.degree)
    weights, scale = state.weights[row], state.scale[row][:, None]
    residual = code - config.correction * scale * product("cm,wm->cw", weights, features)
    momentum = _moved_on(state.momentum[row], settings.end - state.momentum_end[row]) * gamma
    dual, momentum, loss, taken = omega_step(config, optimizer, settings.step, momentum, gram, gamma, residual)
    moved, moved_scale = quantize_rows(weights * scale + product("cw,wm->cm", dual, features))
    written = jnp.where((gamma > 0) & taken, token, state.seen.shape[1])

    def put(whole: jax.Array, part: jax.Array) -> jax.Array:
        return jax.lax.dynamic_update_index_in_dim(whole, part, row, 0)  # `at` would copy, to allow for a row too many

    return dataclasses.replace(
        state,
        weights=put(state.weights, jnp.where(taken, moved, weights)),
        scale=put(state.scale, jnp.where(taken, moved_scale, scale)[:, 0]),
        momentum=put(state.momentum, momentum.astype(state.momentum.dtype)),
        momentum_end=state.momentum_end.at[row].set(settings.end),
        seen=state.seen.at[row, written].set(1, mode="drop"),
        loss=state.loss.at[row].set(jnp.where(taken, loss, state.loss[row])),
        losses=state.losses.at[row].add(jnp.where(taken, loss, 0.0)),
        skipped=state.skipped.at[row].add(jnp.where(taken, 0, 1)),
        written=state.written.at[row].set(state.written[row] | taken),
    )


def _moved_on(momentum: Float[Array, "C W"], tokens: Int32[Array, ""]) -> Float[Array, "C W"]:
    """Momentum over a window that ends so many tokens later: those that have left it have none any more."""
    width = momentum.shape[1]
    padded = jnp.concatenate([momentum, jnp.zeros_like(momentum)], axis=1).astype(jnp.float32)
    return jax.lax.dynamic_slice_in_dim(padded, jnp.clip(tokens, 0, width), width, axis=1)


def read(
    adapter: Adapter,
    state: RecallState,
    settings: RecallSettings,
    answer: Answer,
    logits: Float[Array, "B T V"],
    positions: Int32[Array, "B T"],
    valid: Bool[Array, "B T"],
) -> tuple[Float[Array, "B T V"], Float[Array, "B T"]]:
    """What comes after each token: `blend` of the model's logits and the memory's next-token distribution by its scores.

    Where the memory takes no part, or nothing has been written yet, the logits come back as they are and the gate is 0.
    """
    active = (settings.read & state.written)[:, None] & (positions >= settings.read_from[:, None]) & valid
    odds = settings.log_odds[:, None] + row_sum(answer.cues * adapter.cue)
    codes = adapter.codes
    if codes.shape[1] % 64 or not library.usable():  # the C kernel takes codes of whole vectors
        mixed: tuple[jax.Array, jax.Array] = jax.lax.cond(
            jnp.any(active),
            lambda: blend(adapter, odds, logits, scores_of(adapter, state, answer.found), active),
            lambda: (logits, jnp.zeros(positions.shape, jnp.float32)),
        )
        return mixed
    return ffi.blend(logits, answer.found, codes.values, codes.scale, state.seen, active, odds, adapter.gate)


def scores(
    adapter: Adapter, state: RecallState, settings: RecallSettings, key: Float[Array, "B T R"]
) -> Float[Array, "B T V"]:
    """s = M φ(k)·code(v) for every token v seen in the session; −2 for the others (a real score is near 0 … 1)."""
    return scores_of(adapter, state, _read_out(adapter, state, settings, key))


def scores_of(adapter: Adapter, state: RecallState, found: Float[Array, "B T C"]) -> Float[Array, "B T V"]:
    """`scores` of what has been read out of the memory already."""
    return jnp.where(state.seen[:, None, :] > 0, linear(adapter.codes, found), _MIN_SCORE)


def _read_out(adapter: Adapter, state: RecallState, settings: RecallSettings, key: jax.Array) -> jax.Array:
    """M φ(k): [B, T, C]."""
    tables = adapter.factors, adapter.feature_weight, adapter.halves
    return read_out(key, settings.degree, state.weights, state.scale, *tables)


def gate_features(score: Float[Array, "*rows V"], entropy: Float[Array, "*rows"]) -> Float[Array, "*rows features"]:
    """What the gate looks at: 1, the best score, its lead over the second, and the model's entropy in nats."""
    best = row_max(score)
    second = row_max(jnp.where(score == best[..., None], _MIN_SCORE, score))
    return jnp.stack([jnp.ones_like(best), best, best - second, entropy], axis=-1)


def memory_distribution(score: Float[Array, "*rows V"]) -> Float[Array, "*rows V"]:
    """p_mem ∝ max(s, 0)⁶. The sixth power sets scores of value codes' chance overlap (≈ 1/√C) to nothing."""
    positive = jnp.maximum(score, 0.0)
    cube = positive * positive * positive
    weight = cube * cube
    return weight / jnp.maximum(row_sum(weight), 1e-30)[..., None]


def blend(
    adapter: Adapter,
    log_odds: Float[Array, "B T"],
    logits: Float[Array, "B T V"],
    score: Float[Array, "B T V"],
    active: Bool[Array, "B T"],
) -> tuple[Float[Array, "B T V"], Float[Array, "B T"]]:
    """p = (1 − g)·p_model + g·p_mem, as logits, and g.

    The gate's log odds are a linear function of `gate_features`, plus `log_odds`, those of the cues and of the
    request. Where the memory is not active or has nothing to say, g is 0 and the logits are returned as they came, bit
    for bit.
    """
    peak = row_max(logits)
    shifted = logits - peak[..., None]
    weight = jnp.exp(shifted)
    mass = row_sum(weight)
    entropy = jnp.log(mass) - row_sum(weight * shifted) / mass
    odds = jnp.einsum("btf,f->bt", gate_features(score, entropy), adapter.gate) + log_odds
    heard = active & (row_max(score) > 0)
    g = jnp.where(heard, jax.nn.sigmoid(odds), 0.0)
    mixed = (1.0 - g)[..., None] * (weight / mass[..., None]) + g[..., None] * memory_distribution(score)
    return jnp.where(heard[..., None], jnp.log(jnp.maximum(mixed, 1e-37)), logits), g


def _window_features(adapter: Adapter, key: Float[Array, "W R"], degree: Int32[Array, ""]) -> Float[Array, "W M"]:
    """φ of one row's window, in the precision of `solvers.product`."""
    return window_monomials(key, adapter.factors, adapter.feature_weight, degree)
