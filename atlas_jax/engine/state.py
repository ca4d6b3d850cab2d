"""What the compiled step carries from token to token: one donated pytree for a batch of sequences.

A `Sequences` value with one row is also how a sequence is moved: a prompt is read into a row of its own, the row is
inserted into the decode batch, and taken out again when the session goes to sleep.
"""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp

from atlas_jax.config import MemoryConfig, ModelConfig
from atlas_jax.kernels.attention import KVDtype, LayerKV, RingView
from atlas_jax.kernels.sampling import SamplingState, init_sampling
from atlas_jax.memory import recall
from atlas_jax.memory.recall import MemorySettings, MemoryState
from atlas_jax.model.transformer import init_kv
from atlas_jax.typing import Array, Float, Int32


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Context:
    """Attention state of a batch of rows.

    Attributes:
      page: page of the text in each ring slot, −1 where there is none.
      slot: ring slot of the page being filled.
      first_page: pages before it have left the window.
      position: position of the next token.
    """

    kv: tuple[LayerKV, ...]
    page: Int32[Array, "B N"]
    slot: Int32[Array, B]
    first_page: Int32[Array, B]
    position: Int32[Array, B]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Sequences:
    """Everything that is a sequence's own; `memory` is None in an engine without memory."""

    context: Context
    memory: MemoryState | None


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class DecodeState:
    """A batch that decodes.

    Attributes:
      token: the token to feed next.
      gate_sum, gate_count: of the memory's gate, since the row was inserted.
    """

    sequences: Sequences
    token: Int32[Array, B]
    sampling: SamplingState
    settings: MemorySettings
    gate_sum: Float[Array, B]
    gate_count: Int32[Array, B]


def init_sequences(
    model: ModelConfig, memory: MemoryConfig | None, batch: int, pages: int, dtype: KVDtype
) -> Sequences:
    """Rows that have read nothing."""

    def zeros() -> jax.Array:  # never one array twice: the state is donated
        return jnp.zeros((batch,), jnp.int32)

    context = Context(
        kv=init_kv(model, batch, pages, dtype),
        page=jnp.full((batch, pages), -1, jnp.int32),
        slot=zeros(),
        first_page=zeros(),
        position=zeros(),
    )
    return Sequences(context, None if memory is None else recall.init_state(memory, batch, model.vocab))


def init_decode(model: ModelConfig, memory: MemoryConfig | None, batch: int, pages: int, dtype: KVDtype) -> DecodeState:
    """A batch of idle rows."""
    return DecodeState(
        sequences=init_sequences(model, memory, batch, pages, dtype),
        token=jnp.zeros((batch,), jnp.int32),
        sampling=init_sampling(batch, model.vocab),
        settings=recall.init_settings(batch),
        gate_sum=jnp.zeros((batch,), jnp.float32),
        gate_count=jnp.zeros((batch,), jnp.int32),
    )


def ring_view(context: Context, tokens: int, count: Int32[Array, B]) -> RingView:
    """Where the next `count` of up to `tokens` tokens of each row go; all of them lie in the row's current page."""
    offset = jnp.arange(tokens)[None]
    return RingView(
        page=context.page,
        slot=context.slot,
        positions=context.position[:, None] + offset,
        valid=offset < count[:, None],
        first_page=context.first_page,
    )
