"""A pretrained model with the recall memory, as the scheduler runs it: weights, rows and the compiled functions."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np

from atlas_jax.aot import AotProgram, shape, shapes
from atlas_jax.config import MAX_DEGREE, MAX_MEMORY_LAYERS, PAGE
from atlas_jax.engine.api import MemoryParams
from atlas_jax.engine.runner import monolithic_step, step
from atlas_jax.engine.runner.base import (
    SCALAR,
    Buckets,
    ModelRunner,
    PrefillStep,
    invalid_memory_setting,
    start_transfer,
)
from atlas_jax.engine.runner.decode_state import Sequences, init_sequences
from atlas_jax.engine.runner.step import StepConfig, StepOutput, Weights
from atlas_jax.engine.runner.step_inputs import CALIBRATED_STEP, MemoryWrite, memory_settings, write_settings
from atlas_jax.engine.sessions.session import SessionShape
from atlas_jax.kernels.attention import KVDtype
from atlas_jax.kernels.cpu import ffi
from atlas_jax.kernels.sampling import allowed_words
from atlas_jax.model.kv_cache import page_start, start_page
from atlas_jax.model.layer_groups import Trunk
from atlas_jax.model.page_schedule import NextPage, PageSchedule, bucket
from atlas_jax.model.transformer import SINKS
from atlas_jax.recall.recall_memory import RecallSettings, RecallState
from atlas_jax.recall.solvers import OPTIMIZERS
from atlas_jax.sharding import ONE_DEVICE, MeshLayout

CHUNKS = (32, PAGE)
"""Lengths a piece of prompt is padded to. Which one never depends on what is compiled yet: programs of different shapes
round differently, and a session must go on after a restart bit for bit as without one."""
MAX_LEARNING_RATE = 2 * CALIBRATED_STEP
"""Where the inner step stops learning: a step of twice the line search's leaves the objective where it was, a longer one
raises it. Omega loss that the gradient writes of a text left (SmolLM2-135M; an empty memory's is 1): 0.13, 0.16 and 0.41 at
0.001, 0.0015 and 0.0019, 2.3 at 0.002, 30 at 0.0025; at 0.003 none was taken."""
MONOLITHIC_ROWS = 2
"""ModelRunner of a batch up to which a decode step is one program, once that is compiled (8 s where stages take 1.5): it saves the
gaps between programs. SmolLM2-135M, one row, greedy, medians of 7 × 100 steps in one run: 13.9 ms against 19.2."""


class PretrainedRunner(ModelRunner):
    """Runs a pretrained model."""

    def __init__(
        self,
        config: StepConfig,
        weights: Weights,
        kv_dtype: KVDtype,
        buckets: Buckets,
        mesh_layout: MeshLayout = ONE_DEVICE,
    ) -> None:
        self.config = config
        self._kv_dtype = kv_dtype
        weights = mesh_layout.weights(weights)
        self._placement = mesh_layout
        self._weights = weights
        self._ends = dataclasses.replace(weights, params=dataclasses.replace(weights.params, layers=()))
        capacity = 0 if config.memory is None else config.memory.features
        super().__init__(config.model.vocab, capacity, buckets, CHUNKS)
        if config.memory is not None:
            self.muon_passes = config.memory.passes
        self._trunk = Trunk(config.model, mesh_layout)
        self._finish_read = self._program(step.finish_prefill, donate=(1,))
        self._finish_score = self._program(functools.partial(step.finish_scored_prefill, config), donate=(1,))
        self._finish_decode = self._program(functools.partial(step.finish_decode, config), donate=(1, 2, 8))
        self._whole = {
            drafts: self._program(functools.partial(monolithic_step.decode, config, drafts=drafts), donate=(1, 2, 5))
            for drafts in (False, True)
        }
        self._write_memory = {
            optimizer: self._program(functools.partial(step.write_memory, config, optimizer), donate=(1,))
            for optimizer in OPTIMIZERS
        }
        self._start_page = self._program(start_page, donate=(0,))
        self._resize_ring = self._program(step.resize_ring, donate=(1,))
        self._insert_kv_cache = self._program(step.insert_kv_cache, donate=(0,))
        self._insert_memory = self._program(step.insert_memory, donate=(0,))
        self._set_position = self._program(step.set_position, donate=(0,))

    def _program(self, function: Callable[..., Any], *, donate: tuple[int, ...] = ()) -> AotProgram:
        return AotProgram(function, donate=donate, mesh_layout=self._placement)

    def _make(self, *, batch: int, pages: int) -> Sequences:
        return init_sequences(self.config.model, self.config.memory, batch, pages, self._kv_dtype)

    def _to_device(self, rows: np.ndarray) -> jax.Array:
        return jax.device_put(self._placement.rows(rows))

    def shape(self, memory: MemoryParams) -> SessionShape:
        """What the request asks for: the memory of a pretrained model is as large as one likes."""
        plan = PageSchedule(memory.window_size // PAGE, memory.update_frequency // PAGE)
        return SessionShape(plan, memory.memory_layers, memory.polynomial_degree)

    def check(self, memory: MemoryParams) -> None:
        """Refuses settings that are out of range; raises InvalidRequest."""
        config = self.config.memory
        assert config is not None
        pages = {"window_size": config.max_window, "update_frequency": config.max_omega_window}
        for name, largest in pages.items():
            value = getattr(memory, name)
            if not PAGE <= value <= largest or value % PAGE:
                raise invalid_memory_setting(name, f"value must be a multiple of {PAGE} between {PAGE} and {largest}")
        if not memory.update_frequency <= memory.omega_window <= config.max_omega_window:
            least = memory.update_frequency
            raise invalid_memory_setting("omega_window", f"value must be between {least} and {config.max_omega_window}")
        if not 1 <= memory.memory_layers <= MAX_MEMORY_LAYERS:
            raise invalid_memory_setting("memory_layers", f"value must be between 1 and {MAX_MEMORY_LAYERS}")
        if not 1 <= memory.polynomial_degree <= MAX_DEGREE:
            raise invalid_memory_setting("polynomial_degree", f"value must be between 1 and {MAX_DEGREE}")
        if not 0 <= memory.blend_ratio <= 1:
            raise invalid_memory_setting("blend_ratio", "value must be between 0 and 1")
        if memory.learning_rate is not None and not 0 < memory.learning_rate < MAX_LEARNING_RATE:
            raise invalid_memory_setting(
                "learning_rate", f"value must be greater than 0 and less than {MAX_LEARNING_RATE}"
            )

    def ring_pages(self, plan: PageSchedule, tokens: int) -> int:
        """Ring slots that a row needs: all of a window's, or for a plain request all of its text's."""
        return plan.ring(tokens) if plan.window is None else plan.window + plan.update - 1

    # --- single rows ----------------------------------------------------------------------------------------------
    def resume_row(self, saved: Sequences, pages: int, position: int, slot: int) -> Sequences:
        """A row that goes on from a saved one at `position`, its memory's figures at 0; the saved one stays as it is."""
        saved = dataclasses.replace(saved, memory=None if saved.memory is None else _no_figures(saved.memory))
        row = self._put(self.new_row(pages), self._whole_ring(saved), 0, with_memory=True)
        return self._set_position(_pages(row), row, np.int32(position), np.int32(slot))

    def _whole_ring(self, row: Sequences) -> Sequences:
        """A row from a file has the pages in use and no others: gives it a ring there are programs for."""
        missing = bucket(_pages(row), self.buckets.pages) - _pages(row)
        if not missing:
            return row

        def pad(leaf: Any, value: int = 0) -> Any:
            return np.pad(leaf, [(0, missing if axis == 1 else 0) for axis in range(leaf.ndim)], constant_values=value)

        cache = row.cache
        kv = tuple(
            dataclasses.replace(layer, k=jax.tree.map(pad, layer.k), v=jax.tree.map(pad, layer.v)) for layer in cache.kv
        )
        return Sequences(dataclasses.replace(cache, kv=kv, page=pad(cache.page, -1)), row.memory)

    def grow_row(self, row: Sequences, pages: int) -> Sequences:
        """The row, in a ring of at least `pages` pages: a prompt starts in a small ring, for attention reads all of it."""
        if _pages(row) >= pages:
            return row
        size = bucket(pages, self.buckets.pages)
        return Sequences(self._resize_ring((_pages(row), size), row.cache, self.new_row(size).cache), row.memory)

    def rewind_row(self, row: Sequences, pages: int, position: int, slot: int) -> Sequences:
        """The same row at an earlier position whose window it still holds, with a ring of the size for `pages` pages.

        The row itself is used up.
        """
        if _pages(row) != bucket(pages, self.buckets.pages):
            return self.resume_row(row, pages, position, slot)
        return self._set_position(_pages(row), row, np.int32(position), np.int32(slot))

    def start_page(self, row: Sequences, turn: NextPage, write: MemoryWrite | None) -> Sequences:
        """Begins a page of a single row."""
        return self._start_page_of(row, 0, turn, write)

    def prefill(self, row: Sequences, settings: RecallSettings, tokens: Sequence[int]) -> Iterator[PrefillStep]:
        """Reads tokens of the current page, a group of layers at a time; uses the row up."""
        padded, count = self._pad(tokens)
        key, memory = _step_key(row, padded.shape[1]), row.memory
        for cache, view, states in self._trunk.parts(key, self._weights.params, row.cache, padded, count):
            done = len(states) == len(self.config.model.layers)
            if done and memory is not None:
                rest = (self._taps(states), padded, view.ring.positions, view.ring.valid)
                memory = self._finish_read(padded.shape, self._ends.adapter, memory, settings, *rest)
            yield PrefillStep(Sequences(cache, memory), states[-1], done)

    def prefill_scored(
        self,
        row: Sequences,
        settings: RecallSettings,
        tokens: Sequence[int],
        following: Sequence[int],
        *,
        alternatives: bool,
    ) -> Iterator[PrefillStep]:
        """Reads tokens of the current page and scores the token that follows each; as `read`."""
        padded, count = self._pad(tokens)
        successors, _ = self._pad(following)
        key = _step_key(row, padded.shape[1])
        whole = None
        for whole in self._trunk.parts(key, self._weights.params, row.cache, padded, count):
            unread = dataclasses.replace(whole[0], position=row.cache.position)
            yield PrefillStep(Sequences(unread, row.memory), whole[2][-1], done=False)
        assert whole is not None
        cache, view, states = whole
        rest = (states[-1], self._taps(states), padded, view.ring.positions, view.ring.valid, successors)
        memory, packed = self._finish_score(
            padded.shape, self._ends, row.memory, settings, *rest, np.bool_(alternatives)
        )
        yield PrefillStep(Sequences(cache, memory), packed.integers, scores=packed)

    def _taps(self, states: list[Any]) -> tuple[Any, ...]:
        return tuple(states[layer] for layer in self.config.taps)

    def _pad(self, tokens: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
        padded = np.zeros((1, bucket(len(tokens), CHUNKS)), np.int32)
        padded[0, : len(tokens)] = tokens
        return padded, np.asarray([len(tokens)], np.int32)

    # --- the decode batch -----------------------------------------------------------------------------------------
    @property
    def rows(self) -> int:
        """ModelRunner of the decode batch."""
        return _rows(self.sequences)

    @property
    def pages(self) -> int:
        """Ring slots of each row of the decode batch."""
        return _pages(self.sequences)

    def _put(self, batch: Sequences, row: Sequences, index: int, *, with_memory: bool) -> Sequences:
        """The batch with a row written over the one at `index`."""
        place, size = np.int32(index), _pages(batch)
        single = row.cache
        if _pages(row) != size:
            single = self._resize_ring((_pages(row), size), single, self.new_row(size).cache)
        cache = self._insert_kv_cache(_shape_key(batch), batch.cache, single, place)
        memory = batch.memory
        if memory is not None and row.memory is not None and with_memory:
            memory = self._insert_memory(_rows(batch), memory, row.memory, place)
        return Sequences(cache, memory)

    def start_page_in_batch(self, index: int, turn: NextPage, write: MemoryWrite | None) -> None:
        """Begins a page of the row at place `index`."""
        self.sequences = self._start_page_of(self.sequences, index, turn, write)

    @property
    def at_once(self) -> bool:
        """Whether the next decode step is one program."""
        return self._whole[self.width > 1].ready(_step_key(self.sequences, self.width))

    def decode(self, wanted: np.ndarray, allowed: np.ndarray | None = None) -> StepOutput:
        """One step; the result is on its way to the host when this returns, not there yet.

        Args:
          wanted: the most tokens to feed to each row; 0 leaves it as it is, 1 leaves its drafts out.
          allowed: which tokens may be drawn, see `allow_all`; None allows all.
        """
        rows, width, wanted, may = self.rows, self.width, wanted.astype(np.int32), self._allowed_on_device(allowed)
        key = _step_key(self.sequences, width)
        if self.at_once:
            self.sequences, self.decode_state, packed, self._logits_buffer = self._whole[width > 1](
                key, self._weights, self.sequences, self.decode_state, wanted, may, self._logits_buffer
            )
        else:
            feed = self.decode_state.token if width == 1 else (self.decode_state.token, self.decode_state.drafts)
            cache, view, states = self._trunk(key, self._weights.params, self.sequences.cache, feed, wanted)
            rest = (states[-1], self._taps(states), view.ring.positions, view.ring.valid, self._logits_buffer)
            memory, self.decode_state, position, packed, self._logits_buffer = self._finish_decode(
                rows, self._ends, self.sequences.memory, self.decode_state, may, *rest
            )
            self.sequences = Sequences(dataclasses.replace(cache, position=position), memory)
        return start_transfer(packed)

    def _start_page_of(self, sequences: Sequences, index: int, turn: NextPage, write: MemoryWrite | None) -> Sequences:
        memory = sequences.memory
        if memory is not None and write is not None and turn.absorb_end is not None:
            settings = write_settings(write, turn.absorb_end)
            absorb = self._write_memory[write.optimizer]
            memory = absorb(_rows(sequences), self._ends.adapter, memory, np.int32(index), settings)
        cache = self._start_page(_shape_key(sequences), sequences.cache, page_start(index, turn))
        return Sequences(cache, memory)

    # --- compiling ahead ------------------------------------------------------------------------------------------
    def compile_prefill(self, pages: int, length: int) -> None:
        """Compiles the reading of pieces of `length` tokens in a ring of `pages` pages."""
        row, tokens, count = self.row_shapes(pages), _integers(1, length), _integers(1)
        self._maker(1, pages).compile(())
        self._start_page.compile((1, pages), row.cache, shapes(page_start(0, PageSchedule(None).turn(0))))
        view, states = self._trunk.compile((1, pages, length), self._weights.params, row.cache, tokens, count)
        if row.memory is not None:
            rest = (self._taps(states), tokens, view.ring.positions, view.ring.valid)
            self._finish_read.compile((1, length), self._ends.adapter, row.memory, self._one_setting(), *rest)

    def compile_scored_prefill(self, length: int) -> None:
        """Compiles the scoring of pieces of `length` tokens, in a ring of any size."""
        row, tokens, valid = self.row_shapes(self.buckets.pages[0]), _integers(1, length), _booleans(1, length)
        state = shape((1, length, self.config.model.embed), np.float32)
        rest = (state, (state,) * len(self.config.taps), tokens, tokens, valid, tokens, _booleans())
        self._finish_score.compile((1, length), self._ends, row.memory, self._one_setting(), *rest)

    def compile_decode(self, rows: int, pages: int) -> None:
        """Compiles what a batch of this size needs while its rows stay."""
        batch, single, decode_state = (
            self._batch_shapes(rows, pages),
            self.row_shapes(pages),
            self._decode_state_shapes(rows),
        )
        self._compile_batch_start(rows, pages)
        self._insert_kv_cache.compile((rows, pages), batch.cache, single.cache, SCALAR)
        self._start_page.compile((rows, pages), batch.cache, shapes(page_start(0, PageSchedule(None).turn(0))))
        width = self.buckets.width(rows)
        key, count = (rows, pages, width), _integers(rows)
        feed = decode_state.token if width == 1 else (decode_state.token, decode_state.drafts)
        view, states = self._trunk.compile(key, self._weights.params, batch.cache, feed, count)
        rest = (states[-1], self._taps(states), view.ring.positions, view.ring.valid, self._logits_buffer_shape(rows))
        allowed = _integers(rows, allowed_words(self.vocab))
        self._finish_decode.compile(rows, self._ends, batch.memory, decode_state, allowed, *rest)

    def compile_monolithic_step(self, rows: int, pages: int) -> None:
        """Compiles the decode step of a small batch as one program, if it is several."""
        head_dim = self.config.model.head_dim
        # XLA's own attention is fused otherwise in one program than in several, and rounds differently
        same = ffi.takes_attention(self.buckets.width(rows), PAGE, head_dim, SINKS)
        if rows > MONOLITHIC_ROWS or self._trunk.programs == 1 or not same:
            return
        batch = self._batch_shapes(rows, pages)
        decode_state = self._decode_state_shapes(rows)
        width = self.buckets.width(rows)
        inputs = _integers(rows), _integers(rows, allowed_words(self.vocab)), self._logits_buffer_shape(rows)
        self._whole[width > 1].compile((rows, pages, width), self._weights, batch, decode_state, *inputs)

    def compile_row_moves(self, rows: int, pages: int) -> None:
        """Compiles what rows need to leave a batch of this size or change to another, and to write their memories."""
        batch, single = self._batch_shapes(rows, pages), self.row_shapes(pages)
        self._compile_row_exit(rows, pages)
        self._set_position.compile(pages, single, SCALAR, SCALAR)
        self._insert_kv_cache.compile((1, pages), single.cache, single.cache, SCALAR)
        for other in self.buckets.pages:
            if other != pages:
                self._resize_ring.compile((other, pages), self.row_shapes(other).cache, single.cache)
        for size, state in ((1, single.memory), (rows, batch.memory)):
            if state is not None:
                self._insert_memory.compile(size, state, single.memory, SCALAR)
                write = shapes(write_settings(MemoryWrite(PAGE, "exact", 1.0, 1), PAGE))
                for program in self._write_memory.values():
                    program.compile(size, self._ends.adapter, state, SCALAR, write)

    def _one_setting(self) -> RecallSettings:
        return shapes(memory_settings(None, 1, 1))


def _no_figures(memory: RecallState) -> RecallState:
    zeros: dict[str, Any] = {"losses": np.zeros(1, np.float32), "skipped": np.zeros(1, np.int32)}
    return dataclasses.replace(memory, **zeros)


def _integers(*sizes: int) -> Any:
    return shape(sizes, np.int32)


def _booleans(*sizes: int) -> Any:
    return shape(sizes, np.bool_)


def _rows(batch: Sequences) -> int:
    return int(batch.cache.page.shape[0])


def _pages(batch: Sequences) -> int:
    return int(batch.cache.page.shape[1])


def _shape_key(batch: Sequences) -> tuple[int, int]:
    return _rows(batch), _pages(batch)


def _step_key(batch: Sequences, tokens: int) -> tuple[int, int, int]:
    return _rows(batch), _pages(batch), tokens
