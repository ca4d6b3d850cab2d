"""Language models chunk by chunk: a prompt read in parts, then token by token, with a state.

    state = init_state(config, params, batch=4)
    state, hidden = extend(config, params, state, tokens, active)  # compile it, and donate the state
    scores = logits(config, params, hidden[:, -1])

`extend` computes what the training form computes of the whole text. Without layers of kind A or D (`bounded`) the state
has one size however long the text is, and so has the work for a token.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from atlas_jax.config import RopeConfig
from atlas_jax.kernels.rope import rope_table
from atlas_jax.model.lm import _streaming_layers as layers
from atlas_jax.model.lm._streaming_layers import MAX_CHUNK, Chunk, forget_losses, runs_of
from atlas_jax.model.lm.blocks import Block, MemoryAsLayer
from atlas_jax.model.lm.config import LMConfig
from atlas_jax.model.lm.model import LanguageModel, LMParams, create
from atlas_jax.typing import Array, Bool, Float, Int32

__all__ = ["MAX_CHUNK", "LMState", "bounded", "extend", "forget_losses", "init_state", "logits", "runs_of"]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class LMState:
    """What a model keeps of the texts it has read; every leaf has a leading axis of rows, which need nothing of each other.

    Attributes:
      position: tokens read so far, at most 2³⁰.
      layers: what each layer keeps, one per letter of the pattern.
    """

    position: Int32[Array, " B"]
    layers: tuple[Any, ...]


def bounded(config: LMConfig) -> bool:
    """Whether the state has one size however long the text is: no layer attends to everything (A, D)."""
    return not set(config.pattern) & set("AD")


def init_state(config: LMConfig, params: LMParams, batch: int, *, context: int | None = None) -> LMState:
    """Rows that have read nothing.

    Args:
      context: tokens that layers of kinds A and D have room for, `config.context_length` if not given. Tokens past it
        are read, but no token sees them.

    Raises:
      ValueError: batch or context is not positive.
    """
    slots = config.context_length if context is None else context
    if batch < 1 or slots < 1:
        raise ValueError(f"batch and context must be positive, got {batch} and {slots}")
    model, dtype = _model(config, params), params["embed"].dtype

    def layer(kind: str, block: Any) -> Any:
        match kind:
            case "A":
                return layers.init_cache(config, batch, slots, dtype)
            case "S":
                return layers.init_cache(config, batch, layers.window_slots(config), dtype)
            case "M":
                return layers.init_runs(block.mixer, config, batch, dtype)
            case "C":
                return layers.init_segment(block.mixer, config, batch, dtype)
            case "D":
                return layers.init_deep(config, batch, slots, dtype)
        memory = block.mixer.memory if kind == "G" else block.first.mixer
        ring = layers.init_cache(config, batch, layers.window_slots(config), dtype)
        return layers.Mixed(layers.init_runs(memory, config, batch, dtype), ring)

    states = tuple(layer(kind, block) for kind, block in zip(config.pattern, model.blocks, strict=True))
    return LMState(jnp.zeros(batch, jnp.int32), states)


def extend(
    config: LMConfig,
    params: LMParams,
    state: LMState,
    tokens: Int32[Array, "B T"],
    active: Bool[Array, " B"],
) -> tuple[LMState, Float[Array, "B T E"]]:
    """Reads a chunk of text in every active row; the others keep their state bit for bit.

    Returns:
      The state, and what the head takes for each token; of rows that are not active, anything finite.

    Raises:
      ValueError: a chunk of no tokens, or of more than `MAX_CHUNK`.
    """
    length = tokens.shape[1]
    if not 1 <= length <= MAX_CHUNK:
        raise ValueError(f"a chunk has 1 to {MAX_CHUNK} tokens, got {length}")
    model = _model(config, params)
    table = rope_table(RopeConfig(base=config.rope_base, dims=config.dim))
    chunk = Chunk(state.position[:, None] + jnp.arange(length), active, table)
    x = jnp.take(model.embed[...], tokens, axis=0)
    found = []
    for kind, block, old in zip(config.pattern, model.blocks, state.layers, strict=True):
        new, x = _extend_layer(config, kind, block, old, x, chunk)
        found.append(new)
    position = state.position + jnp.where(active, length, 0)
    return LMState(position, tuple(found)), model.final_norm(x)


def logits(config: LMConfig, params: LMParams, hidden: Float[Array, "*rows E"]) -> Float[Array, "*rows V"]:
    """Scores of the token after each."""
    return jnp.einsum("...e,ve->...v", hidden, params["embed" if config.tied_head else "head"])


def _extend_layer(
    config: LMConfig, kind: str, block: Any, state: Any, x: Float[Array, "B T E"], chunk: Chunk
) -> tuple[Any, Float[Array, "B T E"]]:
    if isinstance(block, MemoryAsLayer):
        memory, x = _extend_block(config, "M", block.first, state.memory, x, chunk)
        cache, x = _extend_block(config, "S", block.second, state.cache, x, chunk)
        return layers.Mixed(memory, cache), x
    return _extend_block(config, kind, block, state, x, chunk)


def _extend_block(
    config: LMConfig, kind: str, block: Block, state: Any, x: Float[Array, "B T E"], chunk: Chunk
) -> tuple[Any, Float[Array, "B T E"]]:
    mixer: Any = block.mixer
    normed = block.mixer_norm(x)
    match kind:
        case "A" | "S":
            window = config.window if kind == "S" else None
            state, mixed = layers.extend_attention(mixer, state, normed, chunk, window)
        case "M":
            state, read = layers.extend_memory(mixer, state, normed, chunk.active)
            mixed = mixer.project(mixer.gated(read, normed))
        case "C":
            state, mixed = layers.extend_segments(mixer, state, normed, chunk)
        case "G":
            state, mixed = layers.extend_gate(mixer, state, normed, chunk, config.window)
        case _:
            state, mixed = layers.extend_deep(mixer, state, normed, chunk)
    return state, block.after(x, mixed)


def _model(config: LMConfig, params: LMParams) -> LanguageModel:
    model: LanguageModel = nnx.merge(_graph(config), params)
    return model


@functools.lru_cache(maxsize=16)
def _graph(config: LMConfig) -> nnx.GraphDef[LanguageModel]:
    """How a model is put together; no array of it is made."""
    return nnx.split(nnx.eval_shape(lambda: create(config, 0)), nnx.Param)[0]
