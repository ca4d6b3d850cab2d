"""A pretrained model's steps, each written once: prefill of a chunk, the same scored, and a decode step.

A step is a function of how it calls its programs (`aot.Mode`), so what it is made of is said in one place for all that is
done with it:

RUN      one program after the other, as the runner prefills and decodes
COMPILE  the same from the shapes of its arguments, ahead of time
INLINE   one function of arrays: the monolithic step of small batches, and what is exported to other platforms
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np

from atlas_jax.aot import INLINE, RUN, AotProgram, Mode, shape, shapes
from atlas_jax.engine.runner import step
from atlas_jax.engine.runner.base import PrefillStep
from atlas_jax.engine.runner.decode_state import (
    DRAFT_TOKENS,
    DecodeState,
    Sequences,
    init_decode_state,
    init_logits_buffer,
    init_sequences,
)
from atlas_jax.engine.runner.step import StepConfig, StepOutput, Weights
from atlas_jax.engine.runner.step_inputs import memory_settings
from atlas_jax.kernels.kv_pages import KVDtype
from atlas_jax.kernels.low_rank import RowScales
from atlas_jax.kernels.sampling import allowed_words
from atlas_jax.model.layer_groups import Trunk
from atlas_jax.model.loading import WeightDtype, param_shapes
from atlas_jax.model.transformer import StepView
from atlas_jax.recall.adapter import GATE_FEATURES, Adapter, make_adapter
from atlas_jax.recall.recall_state import RecallSettings
from atlas_jax.typing import Array, Bool, Float, Int32

Decoded = tuple[Sequences, DecodeState, StepOutput, Any]
"""What a decode step returns; last the logits buffer, None where there is none."""


class StepPrograms:
    """The steps of a model."""

    def __init__(self, config: StepConfig, program: Callable[..., AotProgram] = AotProgram) -> None:
        """Compiles nothing yet.

        Args:
          program: makes a program of a function.
        """
        self._config = config
        self._trunk = Trunk(config.model, program)
        self._finish_prefill = program(step.finish_prefill, donate=(1,))
        self._finish_scored_prefill = program(functools.partial(step.finish_scored_prefill, config), donate=(1,))
        self._pool = program(functools.partial(step.pool, config))
        self._finish_decode = program(functools.partial(step.finish_decode, config), donate=(1, 2, 8))
        self._monolithic = {
            (drafts, guess): program(
                functools.partial(self.decode, INLINE, drafts=drafts, guess=guess), donate=(1, 2, 5)
            )
            for drafts, guess in ((False, False), (False, True), (True, True))
        }

    @property
    def layer_programs(self) -> int:
        """How many programs a step that is not monolithic runs between its first and its last layer."""
        return self._trunk.programs

    # --- decode ---------------------------------------------------------------------------------------------------
    def decode(
        self,
        call: Mode,
        weights: Weights,
        sequences: Sequences,
        decode_state: DecodeState,
        wanted: Int32[Array, B],
        allowed: Int32[Array, "B words"],
        logits_buffer: Float[Array, "B*T V"] | None = None,
        *,
        drafts: bool = False,
        guess: bool = False,
    ) -> Decoded:
        """One token for every active row, and more where its draft tokens were right.

        Args:
          wanted: the most tokens to feed to each row; 0 leaves it as it is, 1 leaves its draft tokens out.
          allowed, logits_buffer: as for `step.draw`, which returns the next buffer.
          drafts: feed every row its draft tokens too.
          guess: look up the draft tokens of the next step, as one that feeds them always does. Batches of a size all do
            or none does.
        """
        key = decode_key(sequences, drafts)
        fed = (decode_state.token, decode_state.drafts) if drafts else decode_state.token
        *_, (cache, view, states) = self._trunk.parts(call, key, weights.params, sequences.cache, fed, wanted)
        place = view.ring.positions, view.ring.valid
        rest = states[-1], self._tapped(states), *place, logits_buffer, _of_head(weights, view)
        ends = weights.ends if drafts or guess else weights.silent_ends
        memory, decode_state, position, output, logits_buffer = call(
            self._finish_decode, (key[0], drafts), ends, sequences.memory, decode_state, allowed, *rest
        )
        return Sequences(dataclasses.replace(cache, position=position), memory), decode_state, output, logits_buffer

    def run_decode(self, *inputs: Any, drafts: bool, guess: bool) -> Decoded:
        """Runs `decode`, as one program if that is compiled for a batch of this size."""
        key, monolithic = decode_key(inputs[1], drafts), self._monolithic[drafts, guess]
        decoded: Decoded = (
            monolithic(key, *inputs) if monolithic.ready(key) else self.decode(RUN, *inputs, drafts=drafts, guess=guess)
        )
        return decoded

    def compile_monolithic(self, *inputs: Any, drafts: bool, guess: bool) -> None:
        """Compiles `decode` as one program."""
        self._monolithic[drafts, guess].compile(decode_key(inputs[1], drafts), *inputs)

    def is_monolithic(self, sequences: Sequences, *, drafts: bool, guess: bool) -> bool:
        """Whether `run_decode` runs one program."""
        return self._monolithic[drafts, guess].ready(decode_key(sequences, drafts))

    # --- prefill --------------------------------------------------------------------------------------------------
    def prefill(
        self,
        call: Mode,
        weights: Weights,
        row: Sequences,
        settings: RecallSettings,
        tokens: Int32[Array, "B T"] | np.ndarray,
        count: Int32[Array, B] | np.ndarray,
    ) -> Iterator[PrefillStep]:
        """Reads a chunk, up to one page, a group of layers at a time; uses the row up."""
        memory = row.memory
        key = (*batch_key(row), tokens.shape[1])
        for cache, view, states in self._trunk.parts(call, key, weights.params, row.cache, tokens, count):
            done = len(states) == len(self._config.model.layers)
            if done and memory is not None:
                rest = self._tapped(states), tokens, view.ring.positions, view.ring.valid
                memory = call(self._finish_prefill, tokens.shape, weights.adapter, memory, settings, *rest)
            yield PrefillStep(Sequences(cache, memory), states[-1], done)

    def scored_prefill(
        self,
        call: Mode,
        weights: Weights,
        row: Sequences,
        settings: RecallSettings,
        tokens: Int32[Array, "B T"] | np.ndarray,
        count: Int32[Array, B] | np.ndarray,
        following: Int32[Array, "B T"] | np.ndarray,
        alternatives: Bool[Array, ""] | np.bool_,
    ) -> Iterator[PrefillStep]:
        """The same, and last the log-probability of the token that follows each; see `step.finish_scored_prefill`."""
        key = (*batch_key(row), tokens.shape[1])
        for whole in self._trunk.parts(call, key, weights.params, row.cache, tokens, count):
            unread = dataclasses.replace(whole[0], position=row.cache.position)
            yield PrefillStep(Sequences(unread, row.memory), whole[2][-1], done=False)
        cache, view, states = whole
        place = view.ring.positions, view.ring.valid
        rest = states[-1], self._tapped(states), tokens, *place, following, alternatives, _of_head(weights, view)
        memory, output = call(self._finish_scored_prefill, tokens.shape, weights.ends, row.memory, settings, *rest)
        yield PrefillStep(Sequences(cache, memory), output.integers, scores=output)

    def pool(
        self,
        call: Mode,
        weights: Weights,
        pooled: Float[Array, "B E"] | np.ndarray,
        hidden: Float[Array, "B T E"],
        count: Int32[Array, B] | np.ndarray,
        mean: Bool[Array, B] | np.ndarray,
    ) -> jax.Array:
        """Adds what `prefill` has made of a chunk to the embedding of its text."""
        added: jax.Array = call(self._pool, hidden.shape, weights.params.final_norm, pooled, hidden, count, mean)
        return added

    def _tapped(self, states: list[jax.Array]) -> tuple[jax.Array, ...]:
        return tuple(states[layer] for layer in self._config.taps)


def batch_key(sequences: Sequences) -> tuple[int, int]:
    """What decides the shapes of a batch: rows, ring pages."""
    rows, pages = sequences.cache.page.shape
    return rows, pages


def decode_key(sequences: Sequences, drafts: bool) -> tuple[int, int, int]:
    """What decides the shapes of a decode step: rows, ring pages, tokens per row."""
    return (*batch_key(sequences), 1 + DRAFT_TOKENS if drafts else 1)


# --- shapes -------------------------------------------------------------------------------------------------------
def _of_head(weights: Weights, view: StepView) -> RowScales | None:
    """How far rows use LoRA adapters of the head; where none has any, the last program is the one without adapters."""
    return None if weights.params.head_lora is None else view.lora


def decode_inputs(
    config: StepConfig, weights: Weights, rows: int, pages: int, kv_dtype: KVDtype, *, drafts: bool = False
) -> tuple[Any, ...]:
    """What `StepPrograms.decode` takes after its mode: the weights as they are, and shapes."""
    vocab, width = config.model.vocab, 1 + DRAFT_TOKENS if drafts else 1

    def state() -> tuple[Sequences, DecodeState]:
        sequences = init_sequences(config.model, config.memory, rows, pages, kv_dtype, len(config.lora))
        return sequences, init_decode_state(vocab, rows)

    wanted, allowed = shape((rows,), np.int32), shape((rows, allowed_words(vocab)), np.int32)
    logits_buffer = jax.eval_shape(functools.partial(init_logits_buffer, vocab, rows, width))
    return weights, *jax.eval_shape(state), wanted, allowed, logits_buffer


def prefill_inputs(
    config: StepConfig, weights: Weights, pages: int, tokens: int, kv_dtype: KVDtype, *, scored: bool = False
) -> tuple[Any, ...]:
    """What `StepPrograms.prefill`, or `scored_prefill`, of a chunk of `tokens` takes after its mode; as `decode_inputs`."""
    make = functools.partial(init_sequences, config.model, config.memory, 1, pages, kv_dtype, len(config.lora))
    chunk = shape((1, tokens), np.int32)
    inputs = weights, jax.eval_shape(make), shapes(memory_settings(None, 1, 1)), chunk, shape((1,), np.int32)
    return (*inputs, chunk, shape((), np.bool_)) if scored else inputs


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
        make_adapter(
            memory,
            config.model.vocab,
            mean,
            projection,
            np.zeros(config.model.vocab, np.float32),
            np.zeros(GATE_FEATURES, np.float32),
            np.zeros(memory.components + 1, np.float32),
        )
    )
    return found
