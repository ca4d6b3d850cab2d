"""What the engine compiles around the transformer's layers. State that changes is donated and returned; none syncs.

A step (`step_programs`) is `model.layer_groups.Trunk` followed by one of

finish_prefill          a chunk of a prompt, up to one page
finish_scored_prefill   the same, and the log-probability of every token of it
pool                    after `finish_prefill` of a chunk whose text is embedded
finish_decode           one token for every active row, and more where draft tokens were right: head, memory, sampler

and between steps rows move (`row_moves`); `write_memory` absorbs what has left a window.
"""

from __future__ import annotations

import dataclasses
import functools
import operator
from dataclasses import dataclass

import jax
import jax.numpy as jnp

from atlas_jax.config import PAGE, MemoryConfig, ModelConfig
from atlas_jax.engine.runner.decode_state import DRAFT_CONTEXT, DRAFT_TOKENS, DecodeState
from atlas_jax.kernels.fused_linear import rms_norm
from atlas_jax.kernels.kernel_choice import DEFAULT_KERNELS, KernelChoice
from atlas_jax.kernels.low_rank import RowScales
from atlas_jax.kernels.reductions import row_max, row_sum
from atlas_jax.kernels.sampling import TOP_LOGPROBS, Sample, SamplingState, record, sample
from atlas_jax.kernels.speculative_drafter import NONE, draft_tokens
from atlas_jax.model import kept_pairs
from atlas_jax.model.kept_pairs import Leaving
from atlas_jax.model.kv_cache import KVCache
from atlas_jax.model.params import ModelParams, PairParams
from atlas_jax.model.transformer import logits
from atlas_jax.recall import recall_memory, recall_state
from atlas_jax.recall.adapter import Adapter
from atlas_jax.recall.recall_state import RecallSettings, RecallState, WriteSettings
from atlas_jax.recall.solvers import Optimizer
from atlas_jax.typing import Array, Bool, Float, Int32

REJECTED = -2
"""No token: a draft token was rejected."""

TURN_START = 4
"""Tokens at the beginning of a turn that are kept before other pairs, that which begins it included."""


@dataclass(frozen=True)
class StepConfig:
    """Static facts of every compiled function.

    Attributes:
      kernels: which of our kernels the functions use.
      turn_tokens: tokens that begin a turn of a chat; with what follows them they are kept before other pairs.
      lora: digests of the LoRA adapters that rows may use.
    """

    model: ModelConfig
    memory: MemoryConfig | None
    kernels: KernelChoice = DEFAULT_KERNELS
    turn_tokens: tuple[int, ...] = ()
    lora: tuple[str, ...] = ()

    @property
    def taps(self) -> tuple[int, ...]:
        """Layers whose residual stream the memory reads."""
        return () if self.memory is None else self.memory.layers


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Weights:
    """Arrays every step reads and none changes.

    Attributes:
      adapter: None in an engine without memory.
      successor: what usually follows each token, for the n-gram drafter; `speculative_drafter.NONE` where that is not known.
    """

    params: ModelParams
    adapter: Adapter | None
    successor: Int32[Array, V] | None

    @functools.cached_property
    def ends(self) -> Weights:
        """Those that are used before and after the layers: fewer arrays to hand to a program."""
        return dataclasses.replace(self, params=dataclasses.replace(self.params, layers=(), embed_lora=None))

    @functools.cached_property
    def silent_ends(self) -> Weights:
        """`ends` for steps that guess nothing."""
        return dataclasses.replace(self.ends, successor=None)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class StepOutput:
    """What a step tells the host, in two arrays: [T] tokens of a scored chunk, [B, T] of a decode step.

    Attributes:
      integers: the token, then the alternatives. In a decode step NONE where nothing was fed, REJECTED where a draft
        token was fed that was not drawn; last, where drafts are looked up, those of the row's next step.
      floats: its log-probability, the gate, then the alternatives' log-probabilities.
    """

    integers: Int32[Array, "*rows ints"]
    floats: Float[Array, "*rows floats"]


def write_memory(
    config: StepConfig,
    optimizer: Optimizer,
    adapter: Adapter,
    memory: recall_state.RecallState,
    row: Int32[Array, ""],
    settings: WriteSettings,
) -> recall_state.RecallState:
    """Absorbs what has left a row's window; see `recall_memory.write`."""
    assert config.memory is not None
    return recall_memory.write(config.memory, optimizer, adapter, memory, row, settings)


def keep_pairs(
    config: StepConfig,
    params: PairParams,
    cache: KVCache,
    tokens: Int32[Array, "B ring"],
    page: Leaving,
) -> KVCache:
    """Keeps pairs of a page that leaves a row's window; see `kept_pairs.keep_pairs`.

    Args:
      tokens: of the text, position p at p mod ring.
    """
    start = cache.page[page.row, page.slot] * PAGE
    positions = start - TURN_START + 1 + jnp.arange(PAGE + TURN_START - 1)
    begins = jnp.isin(tokens[page.row, positions % tokens.shape[1]], jnp.asarray(config.turn_tokens, jnp.int32))
    begins &= positions >= 0
    protected = functools.reduce(operator.or_, (begins[i : i + PAGE] for i in range(TURN_START)))
    return kept_pairs.keep_pairs(config.model, params, cache, page, protected)


def finish_prefill(
    adapter: Adapter,
    memory: RecallState,
    settings: RecallSettings,
    tapped: tuple[Float[Array, "B T E"], ...],
    tokens: Int32[Array, "B T"],
    positions: Int32[Array, "B T"],
    valid: Bool[Array, "B T"],
) -> RecallState:
    """Ends a prefill step: the memory takes note of what was read."""
    return recall_memory.observe(adapter, memory, settings, tapped, tokens, positions, valid)[0]


def finish_scored_prefill(
    config: StepConfig,
    weights: Weights,
    memory: RecallState | None,
    settings: RecallSettings,
    hidden: Float[Array, "B T E"],
    tapped: tuple[Float[Array, "B T E"], ...],
    tokens: Int32[Array, "B T"],
    positions: Int32[Array, "B T"],
    valid: Bool[Array, "B T"],
    following: Int32[Array, "B T"],
    alternatives: Bool[Array, ""],
    lora: RowScales | None = None,
) -> tuple[RecallState | None, StepOutput]:
    """Ends a prefill step and tells how likely each token's successor in `following` was.

    Returns:
      The memory, and a `StepOutput` with a row per token: the successor, its log-probability and, where `alternatives` are
      wanted, the best ones (zeros otherwise: finding them takes longer than the model).
    """
    memory, mixed, gate = _predict(config, weights, memory, settings, hidden, tapped, tokens, positions, valid, lora)
    return memory, scored(mixed, gate, following, alternatives)


def scored(
    scores: Float[Array, "B T V"],
    gate: Float[Array, "B T"],
    following: Int32[Array, "B T"],
    alternatives: Bool[Array, ""],
) -> StepOutput:
    """How likely each token's successor was, [B·T] rows; see `finish_scored_prefill`."""
    flat = scores.reshape(-1, scores.shape[-1])
    best = row_max(flat)
    flat = flat - (best + jnp.log(row_sum(jnp.exp(flat - best[:, None]))))[:, None]
    successor = following.reshape(-1, 1)
    shape = (flat.shape[0], TOP_LOGPROBS)
    top, index = jax.lax.cond(
        alternatives,
        lambda: tuple(jax.lax.top_k(flat, TOP_LOGPROBS)),
        lambda: (jnp.zeros(shape, flat.dtype), jnp.zeros(shape, jnp.int32)),
    )
    return StepOutput(
        integers=jnp.concatenate([successor, index], axis=1),
        floats=jnp.concatenate([jnp.take_along_axis(flat, successor, axis=1), gate.reshape(-1, 1), top], axis=1),
    )


def pool(
    config: StepConfig,
    gain: Float[Array, E],
    pooled: Float[Array, "B E"],
    hidden: Float[Array, "B T E"],
    count: Int32[Array, B],
    mean: Bool[Array, B],
) -> Float[Array, "B E"]:
    """Adds a chunk to the embedding of its text; `gain` is that of the norm before the head, the rest as `pool_states`."""
    return pool_states(pooled, rms_norm(hidden, gain, config.model.norm_eps), count, mean)


def pool_states(
    pooled: Float[Array, "B E"], states: Float[Array, "B T E"], count: Int32[Array, B], mean: Bool[Array, B]
) -> Float[Array, "B E"]:
    """The sum of the chunks' first `count` states where the mean is wanted, else the last of them."""
    place = jnp.arange(states.shape[1])
    used = jnp.where(mean[:, None], place < count[:, None], place == count[:, None] - 1)
    chunk = jnp.where(used[..., None], states, 0).sum(axis=1)
    return jnp.where(mean[:, None], pooled + chunk, chunk)


def finish_decode(
    config: StepConfig,
    weights: Weights,
    memory: RecallState | None,
    decode_state: DecodeState,
    allowed: Int32[Array, "B words"],
    hidden: Float[Array, "B T E"],
    tapped: tuple[Float[Array, "B T E"], ...],
    positions: Int32[Array, "B T"],
    valid: Bool[Array, "B T"],
    logits_buffer: Float[Array, "B*T V"] | None = None,
    lora: RowScales | None = None,
) -> tuple[RecallState | None, DecodeState, Int32[Array, B], StepOutput, Float[Array, "B*T V"] | None]:
    """Ends a step that fed every active row its token and T − 1 or fewer draft tokens; idle rows stay as they are.

    What a rejected draft token left in the cache and in the memory's rings lies at positions that are read only after they
    have been written again.

    Args:
      allowed, logits_buffer: as for `draw`.

    Returns:
      The memory, and what `draw` returns.
    """
    fed = _fed(decode_state, positions.shape[1])
    memory, mixed, gate = _predict(
        config, weights, memory, decode_state.settings, hidden, tapped, jnp.maximum(fed, 0), positions, valid, lora
    )
    return memory, *draw(decode_state, weights.successor, mixed, gate, positions, valid, allowed, logits_buffer)


def draw(
    decode_state: DecodeState,
    successor: Int32[Array, V] | None,
    scores: Float[Array, "B T V"],
    gate: Float[Array, "B T"],
    positions: Int32[Array, "B T"],
    valid: Bool[Array, "B T"],
    allowed: Int32[Array, "B words"],
    logits_buffer: Float[Array, "B*T V"] | None = None,
) -> tuple[DecodeState, Int32[Array, B], StepOutput, Float[Array, "B*T V"] | None]:
    """Draws what comes after each fed token.

    Speculative decoding: the next token is drawn as if it had come alone, from the row's seed and the token's position. As
    long as the draft token was what is drawn, the following draw counts too. So tokens and their distribution are those of
    a step without draft tokens.

    Args:
      successor: as `Weights.successor`; None where no draft tokens are looked up, and none can be fed.
      allowed: which tokens a row may draw, see `sampling.sample`; the same after its draft tokens, so a row for which
        that would be wrong comes without any.
      logits_buffer: memory for this step's logits, donated: those of the step before. With a new allocation instead a
        step of 16 rows over 262 144 tokens met 4 000 to 6 000 page faults and took 46 ms instead of 40.

    Returns:
      What to draw from next, the position of each row's next token, a `StepOutput` [B, T], and the next step's
      `logits_buffer`.
    """
    batch, width = positions.shape
    fed = _fed(decode_state, width)
    flat = scores.reshape(batch * width, -1)
    drawn = sample(
        _after_drafts(decode_state.sampling, fed),
        flat,
        positions.reshape(-1) + 1,
        jnp.repeat(allowed, width, axis=0),
    )
    token = drawn.token.reshape(batch, width)
    right = (token[:, :-1] == fed[:, 1:]) & valid[:, 1:]
    counts = valid & jnp.concatenate([jnp.ones((batch, 1), bool), jnp.cumprod(right, axis=1).astype(bool)], axis=1)
    count = counts.sum(axis=1, dtype=jnp.int32)
    last = positions[:, 0] + count  # position of the latest token drawn, which is fed next
    row = jnp.arange(batch)[:, None]
    latest = jnp.take_along_axis(token, jnp.maximum(count - 1, 0)[:, None], axis=1)[:, 0]
    text = decode_state.text.at[row, jnp.where(counts, (positions + 1) % DRAFT_CONTEXT, DRAFT_CONTEXT)].set(
        token, mode="drop"
    )
    decode_state = DecodeState(
        token=jnp.where(count > 0, latest, decode_state.token),
        # a batch too large for draft tokens does not look any up either
        drafts=jnp.full_like(decode_state.drafts, NONE)
        if successor is None
        else draft_tokens(text, last, successor, DRAFT_TOKENS),
        text=text,
        sampling=record(decode_state.sampling, token, counts),
        settings=decode_state.settings,
    )
    drafts = None if successor is None else decode_state.drafts
    output = _decode_output(drawn, jnp.where(counts, token, jnp.where(valid, REJECTED, NONE)), gate, drafts)
    return decode_state, last, output, None if logits_buffer is None else flat


def _decode_output(
    drawn: Sample, token: Int32[Array, "B T"], gate: Float[Array, "B T"], drafts: Int32[Array, "B drafts"] | None
) -> StepOutput:
    def packed(first: jax.Array, *rest: jax.Array) -> jax.Array:
        return jnp.concatenate([first[..., None], *(part.reshape(*token.shape, -1) for part in rest)], axis=-1)

    return StepOutput(
        integers=packed(token, drawn.top_token, *(() if drafts is None else (_to_all(drafts, token),))),
        floats=packed(drawn.logprob.reshape(token.shape), gate, drawn.top_logprob),
    )


def _to_all(drafts: Int32[Array, "B drafts"], token: Int32[Array, "B T"]) -> Int32[Array, "B T drafts"]:
    return jnp.broadcast_to(drafts[:, None], (*token.shape, drafts.shape[1]))


def _fed(decode_state: DecodeState, width: int) -> Int32[Array, "B T"]:
    """Tokens of a step: each row's own, then its draft tokens."""
    return jnp.concatenate([decode_state.token[:, None], decode_state.drafts[:, : width - 1]], axis=1)


def _after_drafts(state: SamplingState, fed: Int32[Array, "B T"]) -> SamplingState:
    """The settings of every row T times, the t-th with the first t draft tokens in its history."""
    batch, width = fed.shape
    if width == 1:
        return state
    state = jax.tree.map(lambda leaf: jnp.repeat(leaf, width, axis=0), state)
    place = jnp.arange(width)
    drafted = jnp.where((place[None, :, None] >= place) & (place > 0), fed[:, None], NONE)
    return record(state, drafted.reshape(batch * width, width), drafted.reshape(batch * width, width) != NONE)


def _predict(
    config: StepConfig,
    weights: Weights,
    memory: RecallState | None,
    settings: RecallSettings,
    hidden: jax.Array,
    tapped: tuple[jax.Array, ...],
    tokens: jax.Array,
    positions: jax.Array,
    valid: jax.Array,
    lora: RowScales | None,
) -> tuple[RecallState | None, jax.Array, jax.Array]:
    """The memory one step on; logits of what comes next with the memory blended in where a row wants it; its gate."""
    scores = logits(config.model, weights.params, hidden, lora)
    adapter = weights.adapter
    if memory is None or adapter is None:
        return None, scores, jnp.zeros(positions.shape, jnp.float32)
    memory, answer = recall_memory.observe(adapter, memory, settings, tapped, tokens, positions, valid)
    return memory, *recall_memory.read(adapter, memory, settings, answer, scores, positions, valid)
