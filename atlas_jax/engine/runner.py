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
from atlas_jax.engine.state import DecodeState, Sequences, init_decode, init_sequences
from atlas_jax.engine.step import Packed, PageTurn, StepConfig, Weights
from atlas_jax.engine.window import Turn, bucket
from atlas_jax.kernels.attention import KVDtype
from atlas_jax.kernels.sampling import BIAS_SLOTS, SamplingState
from atlas_jax.memory.recall import MemorySettings, WriteSettings

CHUNKS = (8, 32, PAGE)
"""Lengths a piece of prompt is padded to."""


@dataclass(frozen=True)
class Buckets:
    """Shapes there are compiled programs for.

    Attributes:
      rows: sizes of the decode batch.
      pages: sizes of a row's ring of pages.
    """

    rows: tuple[int, ...] = (1, 2, 4, 8, 16, 32)
    pages: tuple[int, ...] = (4, 8, 16, 32, 64)


@dataclass(frozen=True)
class MemoryWrite:
    """How a sequence's memory is written.

    Attributes:
      window: tokens in the Omega objective.
      optimizer: `recall.EXACT`, `GRADIENT` or `MUON`.
      step: factor on the calibrated inner step.
      degree: polynomial degree, less one.
    """

    window: int
    optimizer: int
    step: float
    degree: int


class Runner:
    """Runs compiled steps for one engine thread; not thread-safe."""

    def __init__(self, config: StepConfig, weights: Weights, kv_dtype: KVDtype, buckets: Buckets) -> None:
        self.config = config
        self.buckets = buckets
        self._weights = weights
        self._kv_dtype = kv_dtype

        self._turn_page = jax.jit(step.turn_page, donate_argnums=0)
        self._write_memory = jax.jit(functools.partial(step.write_memory, config), donate_argnums=1)
        self._read_chunk = jax.jit(functools.partial(step.read_chunk, config), donate_argnums=1)
        self._score_chunk = jax.jit(functools.partial(step.score_chunk, config), donate_argnums=1)
        self._decode = jax.jit(functools.partial(step.decode, config), donate_argnums=1)
        self._extract = jax.jit(step.extract)
        self._insert_context = jax.jit(step.insert_context, donate_argnums=0)
        self._insert_memory = jax.jit(step.insert_memory, donate_argnums=0)
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
            settings = WriteSettings(
                end=np.int32(turn.absorb_end),
                window=np.int32(write.window),
                optimizer=np.int32(write.optimizer),
                step=np.float32(write.step),
                degree=np.int32(write.degree),
            )
            memory = self._write_memory(self._weights.adapter, memory, np.int32(index), settings)
        page_turn = PageTurn(
            row=np.int32(index),
            slot=np.int32(turn.slot),
            page=np.int32(turn.page),
            first_page=np.int32(turn.first_page),
            sink_slot=np.int32(turn.sink_slot),
        )
        return Sequences(self._turn_page(sequences.context, page_turn), memory)


def sampling_row(
    vocab: int,
    *,
    temperature: float,
    top_k: int,
    top_p: float,
    min_p: float,
    typical_p: float,
    repeat_penalty: float,
    presence_penalty: float,
    frequency_penalty: float,
    seed: int,
    logit_bias: dict[int, float],
    prompt: Sequence[int],
    logprobs: bool,
) -> SamplingState:
    """A request's sampling settings as a batch of one, made on the host."""

    def number(value: float) -> np.ndarray:
        return np.asarray([value], np.float32)

    bias_token = np.full((1, BIAS_SLOTS), vocab, np.int32)
    bias = np.zeros((1, BIAS_SLOTS), np.float32)
    bias_token[0, : len(logit_bias)] = list(logit_bias.keys())
    bias[0, : len(logit_bias)] = list(logit_bias.values())
    present = np.zeros((1, vocab), np.int8)
    if repeat_penalty != 1.0:
        present[0, np.asarray(prompt, np.int64)] = 1
    return SamplingState(
        temperature=number(temperature),
        top_k=np.asarray([min(top_k, vocab)], np.int32),
        top_p=number(top_p),
        min_p=number(min_p),
        typical_p=number(typical_p),
        repeat_penalty=number(repeat_penalty),
        presence_penalty=number(presence_penalty),
        frequency_penalty=number(frequency_penalty),
        seed=np.asarray([[seed & 0xFFFFFFFF, (seed >> 32) & 0xFFFFFFFF]], np.uint32),
        bias_token=bias_token,
        bias=bias,
        generated=np.zeros((1, vocab), np.int16),
        present=present,
        logprobs=np.asarray([int(logprobs)], np.int32),
    )


def memory_settings(*, layers: int, degree: int, read: bool, read_from: int, blend_ratio: float) -> MemorySettings:
    """A request's memory settings as a batch of one, made on the host."""
    odds = np.float32(np.clip(np.log(max(blend_ratio, 1e-12)) - np.log(max(1 - blend_ratio, 1e-12)), -30, 30))
    return MemorySettings(
        layers=np.asarray([layers - 1], np.int32),
        degree=np.asarray([degree - 1], np.int32),
        read=np.asarray([read and blend_ratio > 0], bool),
        read_from=np.asarray([read_from], np.int32),
        log_odds=odds[None],
    )
