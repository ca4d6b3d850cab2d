"""Owns what is on the device: weights, the decode batch, and the compiled functions. No policy: the scheduler decides."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from atlas_jax.config import PAGE
from atlas_jax.engine import step, whole
from atlas_jax.engine.settings import MemoryWrite, memory_settings, write_settings
from atlas_jax.engine.state import DRAFTS, Drawing, Sequences, init_drawing, init_room, init_sequences
from atlas_jax.engine.step import Packed, StepConfig, Weights
from atlas_jax.kernels import native
from atlas_jax.kernels.attention import KVDtype
from atlas_jax.kernels.lookup import NONE
from atlas_jax.kernels.sampling import SamplingState, allowed_words
from atlas_jax.memory.inner_step import OPTIMIZERS
from atlas_jax.memory.recall import MemorySettings
from atlas_jax.model.context import page_turn, turn_page
from atlas_jax.model.stages import Trunk
from atlas_jax.model.transformer import SINKS
from atlas_jax.model.window import Turn, WindowPlan, bucket
from atlas_jax.placement import ONE_DEVICE, Placement
from atlas_jax.program import Program, shape, shapes

CHUNKS = (32, PAGE)
"""Lengths a piece of prompt is padded to. Which one never depends on what is compiled yet: programs of different shapes
round differently, and a session must go on after a restart bit for bit as without one."""
DRAFTING = 2
"""Rows of a batch up to which drafts pay on a CPU; with more, a row pays for its neighbours' wrong guesses. SmolLM2-135M on
two cores with the native kernels, layers alone, least of 20 in two runs: 13 and 15 ms for one row of one token, 19 and 20 for
one of four, 28 and 35 for four of four."""
WHOLE = 2
"""Rows of a batch up to which a decode step is one program, once that is compiled (8 s where stages take 1.5): it saves the
gaps between programs. SmolLM2-135M, one row, greedy, medians of 7 × 100 steps in one run: 13.9 ms against 19.2."""


@dataclass(frozen=True)
class Buckets:
    """Shapes there are compiled programs for.

    Attributes:
      rows: sizes of the decode batch.
      pages: sizes of a row's ring of pages.
      drafting: rows of the largest batch whose decode step also feeds every row its drafts.
    """

    rows: tuple[int, ...] = (1, 2, 4, 8, 16, 32)
    pages: tuple[int, ...] = (4, 8, 16, 32, 64)
    drafting: int = DRAFTING

    def width(self, rows: int) -> int:
        """Tokens per row of a decode step. It depends on nothing else: steps of different shapes round differently."""
        return 1 + DRAFTS if rows <= self.drafting else 1


class Runner:
    """Runs compiled steps for one engine thread; not thread-safe, but for `compile_*`."""

    def __init__(
        self,
        config: StepConfig,
        weights: Weights,
        kv_dtype: KVDtype,
        buckets: Buckets,
        placement: Placement = ONE_DEVICE,
    ) -> None:
        self.config = config
        self.buckets = buckets
        weights = placement.weights(weights)
        self._placement = placement
        self._program = functools.partial(Program, placement=placement)
        self._weights = weights
        self._ends = dataclasses.replace(weights, params=dataclasses.replace(weights.params, layers=()))
        self._make = functools.partial(init_sequences, config.model, config.memory, dtype=kv_dtype)
        self._trunk = Trunk(config.model, placement)
        self._finish_read = self._program(step.finish_read, donate=(1,))
        self._finish_score = self._program(functools.partial(step.finish_score, config), donate=(1,))
        self._finish_decode = self._program(functools.partial(step.finish_decode, config), donate=(1, 2, 8))
        self._whole = {
            drafts: self._program(functools.partial(whole.decode, config, drafts=drafts), donate=(1, 2, 5))
            for drafts in (False, True)
        }
        self._write_memory = {
            optimizer: self._program(functools.partial(step.write_memory, config, optimizer), donate=(1,))
            for optimizer in OPTIMIZERS
        }
        self._turn_page = self._program(turn_page, donate=(0,))
        self._extract = self._program(step.extract)
        self._extract_drawing = self._program(step.extract)
        self._fit = self._program(step.fit, donate=(1,))
        self._insert_context = self._program(step.insert_context, donate=(0,))
        self._insert_memory = self._program(step.insert_memory, donate=(0,))
        self._start = self._program(step.start, donate=(0,))
        self._reposition = self._program(step.reposition, donate=(0,))
        self._all_allowed: dict[int, jax.Array] = {}
        self._new: dict[tuple[int, int], Program] = {}
        self._new_drawing: dict[int, Program] = {}
        rows, pages = buckets.rows[0], buckets.pages[0]
        self.sequences: Sequences = self._sequences(rows, pages)
        self.drawing: Drawing
        self.drawing, self._room = self._idle(rows)

    def _sequences(self, rows: int, pages: int) -> Sequences:
        return self._maker(rows, pages)(())

    def _maker(self, rows: int, pages: int) -> Program:
        return self._new.setdefault(
            (rows, pages), self._program(functools.partial(self._make, batch=rows, pages=pages))
        )

    def _idle(self, rows: int) -> tuple[Drawing, jax.Array]:
        drawing, room = self._idle_maker(rows)(())
        return drawing, room

    def _idle_maker(self, rows: int) -> Program:
        model, width = self.config.model, self.buckets.width(rows)
        return self._new_drawing.setdefault(
            rows, self._program(lambda: (init_drawing(model, rows), init_room(model, rows, width)))
        )

    # --- single rows ----------------------------------------------------------------------------------------------
    def new_row(self, pages: int) -> Sequences:
        """An empty row with a ring of at least `pages` pages."""
        return self._sequences(1, bucket(pages, self.buckets.pages))

    def row_shapes(self, pages: int) -> Sequences:
        """Shapes and types of a row with a ring of `pages` pages."""
        return self._batch_shapes(1, pages)

    def adopt(self, saved: Sequences, pages: int, position: int, slot: int) -> Sequences:
        """A row that goes on from a saved one at `position`; the saved one stays as it is."""
        row = self._put(self.new_row(pages), self._whole_ring(saved), 0, with_memory=True)
        return self._reposition(_pages(row), row, np.int32(position), np.int32(slot))

    def _whole_ring(self, row: Sequences) -> Sequences:
        """A row from a file has the pages in use and no others: gives it a ring there are programs for."""
        missing = bucket(_pages(row), self.buckets.pages) - _pages(row)
        if not missing:
            return row

        def pad(leaf: Any, value: int = 0) -> Any:
            return np.pad(leaf, [(0, missing if axis == 1 else 0) for axis in range(leaf.ndim)], constant_values=value)

        context = row.context
        kv = tuple(
            dataclasses.replace(layer, k=jax.tree.map(pad, layer.k), v=jax.tree.map(pad, layer.v))
            for layer in context.kv
        )
        return Sequences(dataclasses.replace(context, kv=kv, page=pad(context.page, -1)), row.memory)

    def at_least(self, row: Sequences, pages: int) -> Sequences:
        """The row, in a ring of at least `pages` pages: a prompt starts in a small ring, for attention reads all of it."""
        if _pages(row) >= pages:
            return row
        size = bucket(pages, self.buckets.pages)
        return Sequences(self._fit((_pages(row), size), row.context, self.new_row(size).context), row.memory)

    def set_back(self, row: Sequences, pages: int, position: int, slot: int) -> Sequences:
        """The same row at an earlier position whose window it still holds, with a ring of the size for `pages` pages.

        The row itself is used up.
        """
        if _pages(row) != bucket(pages, self.buckets.pages):
            return self.adopt(row, pages, position, slot)
        return self._reposition(_pages(row), row, np.int32(position), np.int32(slot))

    def turn(self, row: Sequences, turn: Turn, write: MemoryWrite | None) -> Sequences:
        """Begins a page of a single row."""
        return self._turn_sequences(row, 0, turn, write)

    def read(self, row: Sequences, settings: MemorySettings, tokens: Sequence[int]) -> Sequences:
        """Reads tokens of the current page."""
        padded, count = self._pad(tokens)
        context, view, states = self._trunk(
            _step_key(row, padded.shape[1]), self._weights.params, row.context, padded, count
        )
        memory, ring = row.memory, view.ring
        if memory is not None:
            rest = (self._taps(states), padded, ring.positions, ring.valid)
            memory = self._finish_read(padded.shape, self._ends.adapter, memory, settings, *rest)
        return Sequences(context, memory)

    def score(
        self,
        row: Sequences,
        settings: MemorySettings,
        tokens: Sequence[int],
        following: Sequence[int],
        *,
        alternatives: bool,
    ) -> tuple[Sequences, Packed]:
        """Reads tokens of the current page and scores the token that follows each."""
        padded, count = self._pad(tokens)
        successors, _ = self._pad(following)
        context, view, states = self._trunk(
            _step_key(row, padded.shape[1]), self._weights.params, row.context, padded, count
        )
        rest = (states[-1], self._taps(states), padded, view.ring.positions, view.ring.valid, successors)
        memory, packed = self._finish_score(
            padded.shape, self._ends, row.memory, settings, *rest, np.bool_(alternatives)
        )
        return Sequences(context, memory), packed

    def _taps(self, states: list[Any]) -> tuple[Any, ...]:
        return tuple(states[layer] for layer in self.config.taps)

    def _pad(self, tokens: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
        padded = np.zeros((1, bucket(len(tokens), CHUNKS)), np.int32)
        padded[0, : len(tokens)] = tokens
        return padded, np.asarray([len(tokens)], np.int32)

    # --- the decode batch -----------------------------------------------------------------------------------------
    @property
    def rows(self) -> int:
        """Rows of the decode batch."""
        return _rows(self.sequences)

    @property
    def pages(self) -> int:
        """Ring slots of each row of the decode batch."""
        return _pages(self.sequences)

    def resize(self, rows: int, pages: int, moves: dict[int, int]) -> None:
        """Makes the batch another size; `moves` maps each row that lives on to its new place."""
        old, drawing = self.sequences, self.drawing
        self.sequences = self._sequences(rows, pages)
        self.drawing, self._room = self._idle(rows)
        for source, target in moves.items():
            index = np.int32(source)
            row = self._extract(_shape_key(old), old, index)
            self.sequences = self._put(self.sequences, row, target, with_memory=True)
            single = self._extract_drawing(_rows(old), drawing, index)
            self.drawing = self._start(rows, self.drawing, single, np.int32(target))

    def insert(
        self,
        index: int,
        row: Sequences,
        token: int,
        text: np.ndarray,
        sampling: SamplingState,
        settings: MemorySettings,
        *,
        with_memory: bool,
    ) -> None:
        """Starts decoding a row at place `index`, with `token` as the next to feed; `text` is of `settings.recent_text`."""
        self.sequences = self._put(self.sequences, row, index, with_memory=with_memory)
        first, none = np.asarray([token], np.int32), np.full((1, DRAFTS), NONE, np.int32)
        single = Drawing(first, none, text, sampling, settings)  # type: ignore[arg-type]
        self.drawing = self._start(self.rows, self.drawing, single, np.int32(index))

    def _put(self, batch: Sequences, row: Sequences, index: int, *, with_memory: bool) -> Sequences:
        """The batch with a row written over the one at `index`."""
        place, size = np.int32(index), _pages(batch)
        single = row.context
        if _pages(row) != size:
            single = self._fit((_pages(row), size), single, self.new_row(size).context)
        context = self._insert_context(_shape_key(batch), batch.context, single, place)
        memory = batch.memory
        if memory is not None and row.memory is not None and with_memory:
            memory = self._insert_memory(_rows(batch), memory, row.memory, place)
        return Sequences(context, memory)

    def extract(self, index: int) -> Sequences:
        """A copy of the row at place `index`."""
        return self._extract(_shape_key(self.sequences), self.sequences, np.int32(index))

    def turn_row(self, index: int, turn: Turn, write: MemoryWrite | None) -> None:
        """Begins a page of the row at place `index`."""
        self.sequences = self._turn_sequences(self.sequences, index, turn, write)

    @property
    def width(self) -> int:
        """The most tokens a row can gain in one decode step."""
        return self.buckets.width(self.rows)

    @property
    def at_once(self) -> bool:
        """Whether the next decode step is one program."""
        return self._whole[self.width > 1].ready(_step_key(self.sequences, self.width))

    def all_allowed(self) -> np.ndarray:
        """A bit for every row and token, all set: int32 [rows, words]."""
        return np.full((self.rows, allowed_words(self.config.model.vocab)), -1, np.int32)

    def decode(self, wanted: np.ndarray, allowed: np.ndarray | None = None) -> Packed:
        """One step; the result is on its way to the host when this returns, not there yet.

        Args:
          wanted: the most tokens to feed to each row; 0 leaves it as it is, 1 leaves its drafts out.
          allowed: which tokens may be drawn, see `all_allowed`; None allows all.
        """
        rows, width, wanted = self.rows, self.width, wanted.astype(np.int32)
        if rows not in self._all_allowed:
            self._all_allowed[rows] = jax.device_put(self._placement.rows(self.all_allowed()))
        may = self._all_allowed[rows] if allowed is None else allowed
        key = _step_key(self.sequences, width)
        if self.at_once:
            self.sequences, self.drawing, packed, self._room = self._whole[width > 1](
                key, self._weights, self.sequences, self.drawing, wanted, may, self._room
            )
        else:
            feed = self.drawing.token if width == 1 else (self.drawing.token, self.drawing.drafts)
            context, view, states = self._trunk(key, self._weights.params, self.sequences.context, feed, wanted)
            rest = (states[-1], self._taps(states), view.ring.positions, view.ring.valid, self._room)
            memory, self.drawing, position, packed, self._room = self._finish_decode(
                rows, self._ends, self.sequences.memory, self.drawing, may, *rest
            )
            self.sequences = Sequences(dataclasses.replace(context, position=position), memory)
        packed.integers.copy_to_host_async()
        packed.numbers.copy_to_host_async()
        return packed

    def _turn_sequences(self, sequences: Sequences, index: int, turn: Turn, write: MemoryWrite | None) -> Sequences:
        memory = sequences.memory
        if memory is not None and write is not None and turn.absorb_end is not None:
            settings = write_settings(write, turn.absorb_end)
            absorb = self._write_memory[write.optimizer]
            memory = absorb(_rows(sequences), self._ends.adapter, memory, np.int32(index), settings)
        context = self._turn_page(_shape_key(sequences), sequences.context, page_turn(index, turn))
        return Sequences(context, memory)

    # --- compiling ahead ------------------------------------------------------------------------------------------
    def compile_reading(self, pages: int, length: int) -> None:
        """Compiles the reading of pieces of `length` tokens in a ring of `pages` pages."""
        row, tokens, count = self.row_shapes(pages), _integers(1, length), _integers(1)
        self._maker(1, pages).compile(())
        self._turn_page.compile((1, pages), row.context, shapes(page_turn(0, WindowPlan(None).turn(0))))
        view, states = self._trunk.compile((1, pages, length), self._weights.params, row.context, tokens, count)
        if row.memory is not None:
            rest = (self._taps(states), tokens, view.ring.positions, view.ring.valid)
            self._finish_read.compile((1, length), self._ends.adapter, row.memory, self._one_setting(), *rest)

    def compile_scoring(self, length: int) -> None:
        """Compiles the scoring of pieces of `length` tokens, in a ring of any size."""
        row, tokens, valid = self.row_shapes(self.buckets.pages[0]), _integers(1, length), _booleans(1, length)
        state = shape((1, length, self.config.model.embed), np.float32)
        rest = (state, (state,) * len(self.config.taps), tokens, tokens, valid, tokens, _booleans())
        self._finish_score.compile((1, length), self._ends, row.memory, self._one_setting(), *rest)

    def compile_decoding(self, rows: int, pages: int) -> None:
        """Compiles what a batch of this size needs while its rows stay."""
        batch, single = self._batch_shapes(rows, pages), self.row_shapes(pages)
        idle = functools.partial(init_drawing, self.config.model)
        drawing, one = jax.eval_shape(functools.partial(idle, rows)), jax.eval_shape(functools.partial(idle, 1))
        self._maker(rows, pages).compile(())
        self._idle_maker(rows).compile(())
        self._insert_context.compile((rows, pages), batch.context, single.context, _SCALAR)
        self._start.compile(rows, drawing, one, _SCALAR)
        self._turn_page.compile((rows, pages), batch.context, shapes(page_turn(0, WindowPlan(None).turn(0))))
        width = self.buckets.width(rows)
        key, count = (rows, pages, width), _integers(rows)
        feed = drawing.token if width == 1 else (drawing.token, drawing.drafts)
        view, states = self._trunk.compile(key, self._weights.params, batch.context, feed, count)
        rest = (states[-1], self._taps(states), view.ring.positions, view.ring.valid, self._room_shape(rows))
        allowed = _integers(rows, allowed_words(self.config.model.vocab))
        self._finish_decode.compile(rows, self._ends, batch.memory, drawing, allowed, *rest)

    def compile_whole(self, rows: int, pages: int) -> None:
        """Compiles the decode step of a small batch as one program, if it is several."""
        head_dim = self.config.model.head_dim
        # XLA's own attention is fused otherwise in one program than in several, and rounds differently
        same = native.takes_attention(self.buckets.width(rows), PAGE, head_dim, SINKS)
        if rows > WHOLE or self._trunk.programs == 1 or not same:
            return
        batch = self._batch_shapes(rows, pages)
        drawing = jax.eval_shape(functools.partial(init_drawing, self.config.model, rows))
        width = self.buckets.width(rows)
        inputs = _integers(rows), _integers(rows, allowed_words(self.config.model.vocab)), self._room_shape(rows)
        self._whole[width > 1].compile((rows, pages, width), self._weights, batch, drawing, *inputs)

    def compile_moves(self, rows: int, pages: int) -> None:
        """Compiles what rows need to leave a batch of this size or change to another, and to write their memories."""
        batch, single = self._batch_shapes(rows, pages), self.row_shapes(pages)
        drawing = jax.eval_shape(functools.partial(init_drawing, self.config.model, rows))
        self._extract.compile((rows, pages), batch, _SCALAR)
        self._extract_drawing.compile(rows, drawing, _SCALAR)
        self._reposition.compile(pages, single, _SCALAR, _SCALAR)
        self._insert_context.compile((1, pages), single.context, single.context, _SCALAR)
        for other in self.buckets.pages:
            if other != pages:
                self._fit.compile((other, pages), self.row_shapes(other).context, single.context)
        for size, state in ((1, single.memory), (rows, batch.memory)):
            if state is not None:
                self._insert_memory.compile(size, state, single.memory, _SCALAR)
                write = shapes(write_settings(MemoryWrite(PAGE, "exact", 1.0, 1), PAGE))
                for program in self._write_memory.values():
                    program.compile(size, self._ends.adapter, state, _SCALAR, write)

    def _batch_shapes(self, rows: int, pages: int) -> Sequences:
        return jax.eval_shape(functools.partial(self._make, batch=rows, pages=pages))

    def _room_shape(self, rows: int) -> jax.Array:
        return jax.eval_shape(lambda: init_room(self.config.model, rows, self.buckets.width(rows)))

    def _one_setting(self) -> MemorySettings:
        return shapes(memory_settings(None, 1, 1))


_SCALAR = shape((), np.int32)


def _integers(*sizes: int) -> Any:
    return shape(sizes, np.int32)


def _booleans(*sizes: int) -> Any:
    return shape(sizes, np.bool_)


def _rows(batch: Sequences) -> int:
    return int(batch.context.page.shape[0])


def _pages(batch: Sequences) -> int:
    return int(batch.context.page.shape[1])


def _shape_key(batch: Sequences) -> tuple[int, int]:
    return _rows(batch), _pages(batch)


def _step_key(batch: Sequences, tokens: int) -> tuple[int, int, int]:
    return _rows(batch), _pages(batch), tokens
