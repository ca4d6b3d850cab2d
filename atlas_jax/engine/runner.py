"""Owns what is on the device: weights, the decode batch, and the compiled functions. No policy: the scheduler decides."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from dataclasses import dataclass

import jax
import numpy as np

from atlas_jax.config import PAGE
from atlas_jax.engine import step
from atlas_jax.engine.settings import MemoryWrite, write_settings
from atlas_jax.engine.state import DecodeState, Sequences, init_decode, init_sequences
from atlas_jax.engine.step import Packed, StepConfig, Weights
from atlas_jax.kernels.attention import KVDtype
from atlas_jax.kernels.sampling import SamplingState
from atlas_jax.memory.recall import MemorySettings
from atlas_jax.model.context import page_turn, turn_page
from atlas_jax.model.window import Turn, bucket

CHUNKS = (8, 32, PAGE)
"""Lengths a piece of prompt is padded to."""


@dataclass(frozen=True)
class Buckets:
    """Shapes there are compiled programs for.

    Attributes:
      rows: sizes of the decode batch.
      pages: sizes of a row's ring of pages.
    """

    rows: tuple[int, ...] = (2, 4, 8, 16, 32)
    pages: tuple[int, ...] = (4, 8, 16, 32, 64)


class Runner:
    """Runs compiled steps for one engine thread; not thread-safe."""

    def __init__(self, config: StepConfig, weights: Weights, kv_dtype: KVDtype, buckets: Buckets) -> None:
        self.config = config
        self.buckets = buckets
        self._weights = weights
        self._kv_dtype = kv_dtype

        self._turn_page = jax.jit(turn_page, donate_argnums=0)
        self._write_memory = jax.jit(functools.partial(step.write_memory, config), donate_argnums=1)
        self._read_chunk = jax.jit(functools.partial(step.read_chunk, config), donate_argnums=1)
        self._score_chunk = jax.jit(functools.partial(step.score_chunk, config), donate_argnums=1)
        self._decode = jax.jit(functools.partial(step.decode, config), donate_argnums=1)
        self._extract = jax.jit(step.extract)
        self._insert_context = jax.jit(step.insert_context, donate_argnums=0)
        self._insert_memory = jax.jit(step.insert_memory, donate_argnums=0)
        self._reposition = jax.jit(step.reposition, donate_argnums=0)
        self._start = jax.jit(step.start, donate_argnums=0)
        self._move = jax.jit(step.insert_row, donate_argnums=0)
        make = functools.partial(init_sequences, config.model, config.memory, dtype=kv_dtype)
        self._new_sequences = jax.jit(make, static_argnames=("batch", "pages"))
        make_batch = functools.partial(init_decode, config.model, config.memory, dtype=kv_dtype)
        self._new_decode = jax.jit(make_batch, static_argnames=("batch", "pages"))
        self.state: DecodeState = self._new_decode(batch=buckets.rows[0], pages=buckets.pages[0])

    # --- single rows ----------------------------------------------------------------------------------------------
    def new_row(self, pages: int) -> Sequences:
        """An empty row with a ring of at least `pages` pages."""
        return self._new_sequences(batch=1, pages=bucket(pages, self.buckets.pages))

    def adopt(self, saved: Sequences, pages: int, position: int, slot: int) -> Sequences:
        """A row that goes on from a saved one at `position`; the saved one stays as it is."""
        row = self.new_row(pages)
        place = np.int32(0)
        context = self._insert_context(row.context, saved.context, place)
        memory = row.memory
        if memory is not None and saved.memory is not None:
            memory = self._insert_memory(memory, saved.memory, place)
        return self._reposition(Sequences(context, memory), np.int32(position), np.int32(slot))

    def set_back(self, row: Sequences, pages: int, position: int, slot: int) -> Sequences:
        """The same row at an earlier position whose window it still holds, with a ring of the size for `pages` pages.

        The row itself is used up.
        """
        if row.context.page.shape[1] != bucket(pages, self.buckets.pages):
            return self.adopt(row, pages, position, slot)
        return self._reposition(row, np.int32(position), np.int32(slot))

    def turn(self, row: Sequences, turn: Turn, write: MemoryWrite | None) -> Sequences:
        """Begins a page of a single row."""
        return self._turn_sequences(row, 0, turn, write)

    def read(self, row: Sequences, settings: MemorySettings, tokens: Sequence[int]) -> Sequences:
        """Reads tokens of the current page."""
        padded, count = self._pad(tokens)
        return self._read_chunk(self._weights, row, settings, padded, count)

    def score(
        self, row: Sequences, settings: MemorySettings, tokens: Sequence[int], following: Sequence[int]
    ) -> tuple[Sequences, Packed]:
        """Reads tokens of the current page and scores the token that follows each."""
        padded, count = self._pad(tokens)
        successors, _ = self._pad(following)
        return self._score_chunk(self._weights, row, settings, padded, count, successors)

    def _pad(self, tokens: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
        padded = np.zeros((1, bucket(len(tokens), CHUNKS)), np.int32)
        padded[0, : len(tokens)] = tokens
        return padded, np.asarray([len(tokens)], np.int32)

    # --- the decode batch -----------------------------------------------------------------------------------------
    @property
    def rows(self) -> int:
        """Rows of the decode batch."""
        return int(self.state.token.shape[0])

    @property
    def pages(self) -> int:
        """Ring slots of each row of the decode batch."""
        return int(self.state.sequences.context.page.shape[1])

    def resize(self, rows: int, pages: int, moves: dict[int, int]) -> None:
        """Makes the batch another size; `moves` maps each row that lives on to its new place."""
        old = self.state
        self.state = self._new_decode(batch=rows, pages=pages)
        for source, target in moves.items():
            self.state = self._move(self.state, self._extract(old, np.int32(source)), np.int32(target))

    def insert(
        self,
        index: int,
        row: Sequences,
        token: int,
        sampling: SamplingState,
        settings: MemorySettings,
        *,
        with_memory: bool,
    ) -> None:
        """Starts decoding a row at place `index`, with `token` as the next to feed."""
        self._insert(row, index, with_memory=with_memory)
        self.state = self._start(self.state, np.int32(index), np.int32(token), sampling, settings)

    def _insert(self, row: Sequences, index: int, *, with_memory: bool) -> None:
        place = np.int32(index)
        sequences = self.state.sequences
        context = self._insert_context(sequences.context, row.context, place)
        memory = sequences.memory
        if memory is not None and row.memory is not None and with_memory:
            memory = self._insert_memory(memory, row.memory, place)
        self.state = dataclasses.replace(self.state, sequences=Sequences(context, memory))

    def extract(self, index: int) -> Sequences:
        """A copy of the row at place `index`."""
        return self._extract(self.state.sequences, np.int32(index))

    def turn_row(self, index: int, turn: Turn, write: MemoryWrite | None) -> None:
        """Begins a page of the row at place `index`."""
        sequences = self._turn_sequences(self.state.sequences, index, turn, write)
        self.state = dataclasses.replace(self.state, sequences=sequences)

    def decode(self, active: np.ndarray) -> Packed:
        """One step; the result is on its way to the host when this returns, not there yet."""
        self.state, packed = self._decode(self._weights, self.state, active)
        packed.integers.copy_to_host_async()
        packed.numbers.copy_to_host_async()
        return packed

    def _turn_sequences(self, sequences: Sequences, index: int, turn: Turn, write: MemoryWrite | None) -> Sequences:
        memory = sequences.memory
        if (
            memory is not None
            and self._weights.adapter is not None
            and write is not None
            and turn.absorb_end is not None
        ):
            memory = self._write_memory(
                self._weights.adapter, memory, np.int32(index), write_settings(write, turn.absorb_end)
            )
        return Sequences(self._turn_page(sequences.context, page_turn(index, turn)), memory)
