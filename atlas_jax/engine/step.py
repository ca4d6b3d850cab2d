"""The compiled functions of the engine. Each takes the state it changes by donation and returns it; none syncs.

turn_page      makes room for a row's next page and, when a page leaves the window, writes the memory
read_chunk     reads up to one page of a prompt
score_chunk    the same, and the log-probability of every token of it
decode         one token for every active row: trunk, head, memory, sampler
insert, extract, start   rows in and out of a batch
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import TypeVar

import jax
import jax.numpy as jnp

from atlas_jax.config import MemoryConfig, ModelConfig
from atlas_jax.engine.state import DecodeState, Sequences
from atlas_jax.kernels import attention
from atlas_jax.kernels.reduce import row_max, row_sum
from atlas_jax.kernels.sampling import TOP_LOGPROBS, SamplingState, record, sample
from atlas_jax.memory import recall
from atlas_jax.memory.adapter import Adapter
from atlas_jax.memory.recall import MemorySettings, WriteSettings
from atlas_jax.model.context import Context, ring_view
from atlas_jax.model.params import ModelParams
from atlas_jax.model.transformer import logits, trunk
from atlas_jax.typing import Array, Bool, Float, Int32

State = TypeVar("State", Sequences, DecodeState)


@dataclass(frozen=True)
class StepConfig:
    """Static facts of every compiled function."""

    model: ModelConfig
    memory: MemoryConfig | None

    @property
    def taps(self) -> tuple[int, ...]:
        """Layers whose residual stream the memory reads."""
        return () if self.memory is None else self.memory.layers


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Weights:
    """Arrays every step reads and none changes; `adapter` is None in an engine without memory."""

    params: ModelParams
    adapter: Adapter | None


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Packed:
    """What a decode step tells the host, in two arrays.

    Attributes:
      integers: [B, 1 + TOP]: the token, then the alternatives.
      numbers: [B, 2 + TOP]: its log-probability, the gate, then the alternatives' log-probabilities.
    """

    integers: Int32[Array, "B ints"]
    numbers: Float[Array, "B numbers"]


def write_memory(
    config: StepConfig, adapter: Adapter, memory: recall.MemoryState, row: Int32[Array, ""], settings: WriteSettings
) -> recall.MemoryState:
    """Absorbs what has left a row's window; see `recall.write`."""
    assert config.memory is not None
    return recall.write(config.memory, adapter, memory, row, settings)


def read_chunk(
    config: StepConfig,
    weights: Weights,
    sequences: Sequences,
    settings: MemorySettings,
    tokens: Int32[Array, "B T"],
    count: Int32[Array, B],
) -> Sequences:
    """Reads `count` tokens of each row; they must lie in the row's current page."""
    return _advance(config, weights, sequences, settings, tokens, count)[0]


def score_chunk(
    config: StepConfig,
    weights: Weights,
    sequences: Sequences,
    settings: MemorySettings,
    tokens: Int32[Array, "B T"],
    count: Int32[Array, B],
    following: Int32[Array, "B T"],
) -> tuple[Sequences, Packed]:
    """Reads like `read_chunk` and tells how likely each token's successor in `following` was.

    Returns:
      The sequences, and a `Packed` with a row per token: the successor, its log-probability and the alternatives.
    """
    sequences, mixed, gate = _predict(config, weights, sequences, settings, tokens, count)
    flat = mixed.reshape(-1, mixed.shape[-1])
    best = row_max(flat)
    flat = flat - (best + jnp.log(row_sum(jnp.exp(flat - best[:, None]))))[:, None]
    successor = following.reshape(-1, 1)
    top, index = jax.lax.top_k(flat, TOP_LOGPROBS)
    return sequences, Packed(
        integers=jnp.concatenate([successor, index], axis=1),
        numbers=jnp.concatenate([jnp.take_along_axis(flat, successor, axis=1), gate.reshape(-1, 1), top], axis=1),
    )


def decode(
    config: StepConfig, weights: Weights, state: DecodeState, active: Bool[Array, B]
) -> tuple[DecodeState, Packed]:
    """Feeds every active row its token and draws the next one; idle rows stay as they are."""
    sequences, mixed, gate = _predict(
        config, weights, state.sequences, state.settings, state.token[:, None], active.astype(jnp.int32)
    )
    drawn = sample(state.sampling, mixed[:, 0], sequences.context.position)
    state = DecodeState(
        sequences=sequences,
        token=jnp.where(active, drawn.token, state.token),
        sampling=record(state.sampling, drawn.token, active),
        settings=state.settings,
    )
    return state, Packed(
        integers=jnp.concatenate([drawn.token[:, None], drawn.top_token], axis=1),
        numbers=jnp.concatenate([drawn.logprob[:, None], gate, drawn.top_logprob], axis=1),
    )


def _advance(
    config: StepConfig,
    weights: Weights,
    sequences: Sequences,
    settings: MemorySettings,
    tokens: jax.Array,
    count: jax.Array,
) -> tuple[Sequences, jax.Array, jax.Array | None]:
    """Trunk and key map: the sequences one step on, the last layer's output, and the tokens' memory keys."""
    context, memory = sequences.context, sequences.memory
    view = ring_view(context, tokens.shape[1], count)
    hidden, kv, tapped = trunk(config.model, weights.params, context.kv, tokens, view, config.taps)
    context = dataclasses.replace(context, kv=kv, position=context.position + count)
    key = None
    if memory is not None and weights.adapter is not None:
        key = recall.keys(weights.adapter, settings, tapped)
        memory = recall.remember(memory, key, tokens, view.positions, view.valid)
    return Sequences(context, memory), hidden, key


def _predict(
    config: StepConfig,
    weights: Weights,
    sequences: Sequences,
    settings: MemorySettings,
    tokens: jax.Array,
    count: jax.Array,
) -> tuple[Sequences, jax.Array, jax.Array]:
    """One step on, with the logits of what comes next, the memory blended in where a row wants it, and its gate."""
    positions = ring_view(sequences.context, tokens.shape[1], count).positions
    sequences, hidden, key = _advance(config, weights, sequences, settings, tokens, count)
    scores = logits(config.model, weights.params, hidden)
    memory, adapter = sequences.memory, weights.adapter
    if memory is None or adapter is None or key is None:
        return sequences, scores, jnp.zeros(tokens.shape, jnp.float32)

    def with_memory() -> tuple[jax.Array, jax.Array]:
        found = recall.scores(adapter, memory, settings, key)
        return recall.blend(adapter, settings, scores, found, positions)

    def without_memory() -> tuple[jax.Array, jax.Array]:
        return scores, jnp.zeros(tokens.shape, jnp.float32)

    mixed, gate = jax.lax.cond(jnp.any(settings.read & (count > 0)), with_memory, without_memory)
    return sequences, mixed, gate


def extract(batch: State, row: Int32[Array, ""]) -> State:
    """A copy of one row as a batch of one."""
    return jax.tree.map(lambda leaf: jax.lax.dynamic_slice_in_dim(leaf, row, 1, axis=0), batch)


def reposition(sequences: Sequences, position: Int32[Array, ""], slot: Int32[Array, ""]) -> Sequences:
    """Sets a single row back (or leaves it) at a position whose window the row still holds; nothing else moves."""
    context = sequences.context
    context = dataclasses.replace(
        context, position=jnp.full_like(context.position, position), slot=jnp.full_like(context.slot, slot)
    )
    return dataclasses.replace(sequences, context=context)


def insert_row(batch: DecodeState, single: DecodeState, row: Int32[Array, ""]) -> DecodeState:
    """Puts a row taken from one decode batch into another, as it was."""
    memory = batch.sequences.memory
    if memory is not None and single.sequences.memory is not None:
        memory = insert_memory(memory, single.sequences.memory, row)
    sequences = Sequences(insert_context(batch.sequences.context, single.sequences.context, row), memory)
    return DecodeState(
        sequences=sequences,
        token=_put_row(batch.token, single.token, row),
        sampling=jax.tree.map(lambda whole, part: _put_row(whole, part, row), batch.sampling, single.sampling),
        settings=jax.tree.map(lambda whole, part: _put_row(whole, part, row), batch.settings, single.settings),
    )


def insert_context(batch: Context, single: Context, row: Int32[Array, ""]) -> Context:
    """Puts a row's attention state into a batch. Rings of different sizes: the slots in use fit the smaller one."""
    pages = min(batch.page.shape[1], single.page.shape[1])
    cropped = dataclasses.replace(
        single,
        kv=tuple(
            dataclasses.replace(layer, k=_first_pages(layer.k, pages), v=_first_pages(layer.v, pages))
            for layer in single.kv
        ),
        page=single.page[:, :pages],
    )
    emptied = dataclasses.replace(batch, page=batch.page.at[row].set(-1))
    return jax.tree.map(lambda whole, part: _put_row(whole, part, row), emptied, cropped)


def _first_pages(pages: attention.Pages, count: int) -> attention.Pages:
    return jax.tree.map(lambda leaf: leaf[:, :count], pages)


def _put_row(whole: jax.Array, part: jax.Array, row: jax.Array) -> jax.Array:
    start = (row,) + (jnp.zeros_like(row),) * (part.ndim - 1)
    return jax.lax.dynamic_update_slice(whole, part, start)


def insert_memory(batch: recall.MemoryState, single: recall.MemoryState, row: Int32[Array, ""]) -> recall.MemoryState:
    """Puts a row's memory into a batch."""
    return jax.tree.map(lambda whole, part: _put_row(whole, part, row), batch, single)


def start(
    state: DecodeState,
    row: Int32[Array, ""],
    token: Int32[Array, ""],
    sampling: SamplingState,
    settings: MemorySettings,
) -> DecodeState:
    """Gives a row that has been inserted its next token and its settings (each a batch of one)."""
    return dataclasses.replace(
        state,
        token=state.token.at[row].set(token),
        sampling=jax.tree.map(lambda whole, part: _put_row(whole, part, row), state.sampling, sampling),
        settings=jax.tree.map(lambda whole, part: _put_row(whole, part, row), state.settings, settings),
    )
