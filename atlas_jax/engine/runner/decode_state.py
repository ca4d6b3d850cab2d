"""What the compiled step carries from token to token: one donated pytree for a batch of sequences.

A `Sequences` value with one row is also how a sequence is moved: a prompt is prefilled into a row of its own, the row is
inserted into the decode batch, and taken out again when the session goes to sleep.
"""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp

from atlas_jax.config import PAGE, MemoryConfig, ModelConfig
from atlas_jax.kernels.kv_pages import KVDtype
from atlas_jax.kernels.sampling import SamplingState, init_sampling
from atlas_jax.kernels.speculative_drafter import NONE
from atlas_jax.model.kept_division import KeptDivision
from atlas_jax.model.kv_cache import KVCache, init_kv_cache
from atlas_jax.recall import recall_state
from atlas_jax.recall.recall_state import RecallSettings, RecallState
from atlas_jax.typing import Array, Float, Int32

DRAFT_TOKENS = 2
"""Draft tokens of every row. Tokens per second of one stream with 0, 1, 2, 3 and 5 on two cores with AVX-512 VNNI
(medians of `benchmarks/speed.py`'s texts in turns): SmolLM2-135M chat 156, 173, 178, 162, 138, prose 162, 209, 228, 221, 213;
Gemma 3 270M chat 95, 185, 223, 259, 263, prose 89, 168, 194, 196, 180. A step of the chats takes 6.4, 7.5, 8.0, 9.1, 11.0
and 10.5, 9.9, 10.9, 11.7, 15.2 ms."""
DRAFT_CONTEXT = 4096
"""Latest tokens of every row in which the n-gram drafter looks for a match."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Sequences:
    """Everything that is a sequence's own; `memory` is None in an engine without memory."""

    cache: KVCache
    memory: RecallState | None


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class DecodeState:
    """How a batch of rows draws its tokens.

    Attributes:
      token: the token to feed next.
      drafts: draft tokens after it, `speculative_drafter.NONE` where there are fewer.
      text: the latest tokens, `token` included, position p at p mod its length; `speculative_drafter.NONE` where
        there is none.
    """

    token: Int32[Array, B]
    drafts: Int32[Array, "B drafts"]
    text: Int32[Array, "B text"]
    sampling: SamplingState
    settings: RecallSettings


def init_sequences(
    model: ModelConfig, memory: MemoryConfig | None, batch: int, pages: int, dtype: KVDtype, adapters: int = 0
) -> Sequences:
    """Rows that have read nothing; `adapters` is of LoRA."""
    cache = init_kv_cache(model, batch, pages, dtype, () if memory is None else kept_pages(model, memory), adapters)
    return Sequences(cache, None if memory is None else recall_state.init_state(memory, batch, model.vocab))


def kept_pages(model: ModelConfig, memory: MemoryConfig) -> tuple[int, ...]:
    """Pages of kept pairs that each layer has room for."""
    return KeptDivision.of(model, memory.kept_weights).pages(-(-memory.max_kept // PAGE))


def init_logits_buffer(vocab: int, batch: int, tokens: int) -> Float[Array, "B*T V"]:
    """The logits buffer of a decode step, see `step.draw`."""
    return jnp.zeros((batch * tokens, vocab), jnp.float32)


def init_decode_state(vocab: int, batch: int) -> DecodeState:
    """Idle rows."""
    return DecodeState(
        token=jnp.zeros((batch,), jnp.int32),
        drafts=jnp.full((batch, DRAFT_TOKENS), NONE, jnp.int32),
        text=jnp.full((batch, DRAFT_CONTEXT), NONE, jnp.int32),
        sampling=init_sampling(batch, vocab),
        settings=recall_state.init_settings(batch),
    )
