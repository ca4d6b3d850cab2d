"""A step of the engine as one function of arrays: for small batches, and for other platforms and runtimes."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import numpy as np

from atlas_jax.aot import shape, shapes
from atlas_jax.engine.runner import step
from atlas_jax.engine.runner.decode_state import DecodeState, Sequences, init_decode_state, init_sequences
from atlas_jax.engine.runner.step import StepConfig, StepOutput, Weights
from atlas_jax.engine.runner.step_inputs import memory_settings
from atlas_jax.kernels.attention import KVDtype
from atlas_jax.kernels.sampling import allowed_words
from atlas_jax.model.layer_groups import trunk
from atlas_jax.model.loading import WeightDtype, param_shapes
from atlas_jax.recall.adapter import GATE_FEATURES, Adapter, make_adapter
from atlas_jax.recall.recall_memory import RecallSettings
from atlas_jax.sharding import ONE_DEVICE, MeshLayout
from atlas_jax.typing import Array, Float, Int32


def decode(
    config: StepConfig,
    weights: Weights,
    sequences: Sequences,
    decode_state: DecodeState,
    wanted: Int32[Array, B],
    allowed: Int32[Array, "B words"],
    room: Float[Array, "B*T V"] | None = None,
    *,
    drafts: bool = False,
) -> tuple[Sequences, DecodeState, StepOutput, Float[Array, "B*T V"] | None]:
    """A decode step, what `PretrainedRunner.decode` runs as several programs.

    Args:
      wanted, allowed: as for `PretrainedRunner.decode`.
      room: as for `step.draw`, which returns the next one.
      drafts: feed every row its drafts too.
    """
    feed = (decode_state.token, decode_state.drafts) if drafts else decode_state.token
    cache, view, states = trunk(config.model, weights.params, sequences.cache, feed, wanted)
    tapped = tuple(states[layer] for layer in config.taps)
    rest = states[-1], tapped, view.ring.positions, view.ring.valid, room
    memory, decode_state, position, packed, room = step.finish_decode(
        config, weights, sequences.memory, decode_state, allowed, *rest
    )
    return Sequences(dataclasses.replace(cache, position=position), memory), decode_state, packed, room


def read(
    config: StepConfig,
    weights: Weights,
    row: Sequences,
    settings: RecallSettings,
    tokens: Int32[Array, "B T"],
    count: Int32[Array, B],
) -> Sequences:
    """Reads a piece of a prompt, what `PretrainedRunner.read` runs as several programs."""
    cache, view, states = trunk(config.model, weights.params, row.cache, tokens, count)
    memory, tapped = row.memory, tuple(states[layer] for layer in config.taps)
    if memory is not None and weights.adapter is not None:
        rest = tapped, tokens, view.ring.positions, view.ring.valid
        memory = step.finish_prefill(weights.adapter, memory, settings, *rest)
    return Sequences(cache, memory)


def decode_shapes(
    config: StepConfig, weights: Weights, rows: int, pages: int, kv_dtype: KVDtype, mesh_layout: MeshLayout = ONE_DEVICE
) -> tuple[Any, ...]:
    """Shapes of the arguments of `decode` after its configuration."""
    make = functools.partial(init_sequences, config.model, config.memory, dtype=kv_dtype)
    state = jax.eval_shape(lambda: (make(batch=rows, pages=pages), init_decode_state(config.model.vocab, rows)))
    step_inputs = shape((rows,), np.int32), shape((rows, allowed_words(config.model.vocab)), np.int32)
    return mesh_layout.weights(shapes(weights)), *mesh_layout.rows((*state, *step_inputs))


def read_shapes(
    config: StepConfig,
    weights: Weights,
    tokens: int,
    pages: int,
    kv_dtype: KVDtype,
    mesh_layout: MeshLayout = ONE_DEVICE,
) -> tuple[Any, ...]:
    """Shapes of the arguments of `read` after its configuration, for a piece of `tokens` tokens."""
    make = functools.partial(init_sequences, config.model, config.memory, batch=1, pages=pages, dtype=kv_dtype)
    rest = shapes(memory_settings(None, 1, 1)), shape((1, tokens), np.int32), shape((1,), np.int32)
    return mesh_layout.weights(shapes(weights)), *mesh_layout.rows((jax.eval_shape(make), *rest))


def weight_shapes(config: StepConfig, dtype: WeightDtype = "int8") -> Weights:
    """Shapes of all a step's weights."""
    adapter = None if config.memory is None else _adapter_shapes(config)
    return Weights(param_shapes(config.model, dtype), adapter, shape((config.model.vocab,), np.int32))


def _adapter_shapes(config: StepConfig) -> Adapter:
    memory, embed = config.memory, config.model.embed
    assert memory is not None
    mean = np.zeros((len(memory.layers), embed), np.float32)
    projection = np.zeros((*mean.shape, memory.components), np.float32)
    found: Adapter = shapes(
        make_adapter(memory, config.model.vocab, mean, projection, np.zeros(GATE_FEATURES, np.float32))
    )
    return found
