"""A pretrained model with the recall memory, as the scheduler runs it: weights, rows and AOT-compiled programs."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from atlas_jax.aot import COMPILE, RUN, AotProgram, shape, shapes
from atlas_jax.config import MAX_DEGREE, MAX_MEMORY_LAYERS, PAGE
from atlas_jax.engine.api import MemoryParams, StateBytes
from atlas_jax.engine.memory_budget import session_bytes
from atlas_jax.engine.runner import row_moves, step
from atlas_jax.engine.runner.base import Buckets, Capabilities, NewPage, PrefillStep, invalid_memory_setting
from atlas_jax.engine.runner.compiled import SCALAR, CompiledRunner, start_transfer
from atlas_jax.engine.runner.decode_state import Sequences, init_sequences
from atlas_jax.engine.runner.row_moves import whole_ring
from atlas_jax.engine.runner.step import StepConfig, StepOutput, Weights
from atlas_jax.engine.runner.step_inputs import CALIBRATED_STEP, MemoryWrite, write_settings
from atlas_jax.engine.runner.step_programs import StepPrograms, batch_key, decode_inputs, prefill_inputs
from atlas_jax.engine.sessions.lora import LoraScales, scales_of
from atlas_jax.engine.sessions.session import SessionShape
from atlas_jax.kernels.attention import uses_cpu_kernel
from atlas_jax.kernels.kv_pages import KVDtype
from atlas_jax.kernels.linear import PackedArray, QuantArray
from atlas_jax.model.kept_division import KeptDivision
from atlas_jax.model.kept_pairs import leaving
from atlas_jax.model.kv_cache import page_start, start_page
from atlas_jax.model.page_schedule import NextPage, PageSchedule, bucket
from atlas_jax.model.transformer import SINKS
from atlas_jax.recall.recall_state import RecallSettings, RecallState
from atlas_jax.recall.solvers import OPTIMIZERS
from atlas_jax.sharding import ONE_DEVICE, MeshLayout

CHUNKS = (32, PAGE)
"""Lengths a chunk of a prompt is padded to. Which one never depends on what is compiled yet: programs of different shapes
round differently, and a session must go on after a restart bit for bit as without one."""
MAX_LEARNING_RATE = 2 * CALIBRATED_STEP
"""Where the inner step stops learning: a step of twice the line search's leaves the objective where it was, a longer one
raises it. Omega loss that the gradient writes of a text left (SmolLM2-135M; an empty memory's is 1): 0.13, 0.16 and 0.41 at
0.001, 0.0015 and 0.0019, 2.3 at 0.002, 30 at 0.0025; at 0.003 none was taken."""
MONOLITHIC_ROWS = 2
"""Rows of a batch up to which a decode step is one program, once that is compiled (8 s where stages take 1.5): it saves the
gaps between programs. SmolLM2-135M, one row, greedy, medians of 7 × 100 steps in one run: 13.9 ms against 19.2."""


_PAGE_START = shapes(page_start(0, PageSchedule(None).next_page(0)))


class PretrainedRunner(CompiledRunner):
    """Runs a pretrained model."""

    def __init__(
        self,
        config: StepConfig,
        weights: Weights,
        kv_dtype: KVDtype,
        buckets: Buckets,
        mesh_layout: MeshLayout = ONE_DEVICE,
        memory_budget: int = 0,
    ) -> None:
        """Compiles nothing yet.

        Args:
          memory_budget: the most bytes that a request may ask for as its session's; what requests get that do not ask.
        """
        self.config = config
        self._memory_budget = memory_budget
        self._kv_dtype = kv_dtype
        self._mesh_layout = mesh_layout
        self._weights = mesh_layout.weights(weights)
        memory = config.memory
        self._division = KeptDivision.of(config.model, () if memory is None else memory.kept_weights)
        if memory is not None:
            self._sizes = session_bytes(config.model, memory, kv_dtype)
        capabilities = Capabilities(
            rewind=not config.model.recurrent,
            memory_capacity=0 if memory is None else memory.features,
            muon_passes=0 if memory is None else memory.passes,
        )
        super().__init__(capabilities, config.model.vocab, config.model.embed, buckets, CHUNKS)
        self._steps = StepPrograms(config, self._program)
        self._plain: set[tuple[int, int]] = set()
        self._write_memory = {
            optimizer: self._program(functools.partial(step.write_memory, config, optimizer), donate=(1,))
            for optimizer in OPTIMIZERS
        }
        self._keep_pairs = self._program(functools.partial(step.keep_pairs, config), donate=(1,))
        self._start_page = self._program(start_page, donate=(0,))
        self._resize_ring = self._program(row_moves.resize_ring, donate=(1,))
        self._insert_kv_cache = self._program(row_moves.insert_kv_cache, donate=(0,))
        self._insert_memory = self._program(row_moves.insert_memory, donate=(0,))
        self._set_position = self._program(row_moves.set_position, donate=(0,))

    def _program(self, function: Callable[..., Any], *, donate: tuple[int, ...] = ()) -> AotProgram:
        return AotProgram(function, donate=donate, mesh_layout=self._mesh_layout, kernels=self.config.kernels)

    @property
    def _max_kept(self) -> int:
        return 0 if self.config.memory is None else self.config.memory.max_kept

    def _make(self, *, batch: int, pages: int) -> Sequences:
        config = self.config
        return init_sequences(config.model, config.memory, batch, pages, self._kv_dtype, len(config.lora))

    @property
    def mesh_layout(self) -> MeshLayout:
        """Where its arrays lie."""
        return self._mesh_layout

    def successors(self) -> np.ndarray:
        """The bigram table that drafts fall back on; empty where there is none."""
        table = self._weights.successor
        return np.zeros(0, np.int32) if table is None else np.asarray(table)

    def shape(self, memory: MemoryParams, lora: LoraScales = ()) -> SessionShape:
        """What the request asks for: the memory of a pretrained model is as large as one likes."""
        kept = self._most_kept(memory) if memory.kept_pairs is None else memory.kept_pairs
        plan, budget = _plan(memory), self._budget(memory)
        memories = memory.memory_layers, memory.polynomial_degree
        capacities, rewinds = self._division.capacities(kept), self.capabilities.rewind
        return SessionShape(plan, *memories, kept, budget, capacities, rewinds, lora)

    def state_bytes(self, shape: SessionShape) -> StateBytes:
        """What the window, the kept pairs and the recall memory of a session of this shape take."""
        return self._sizes.parts(shape.plan.room * PAGE, shape.kept, shape.budget)

    def _budget(self, memory: MemoryParams) -> int:
        return self._memory_budget if memory.memory_budget is None else memory.memory_budget

    def _most_kept(self, memory: MemoryParams) -> int:
        """Pairs that a request's budget has room for."""
        return min(self._sizes.kept(self._budget(memory), _plan(memory).room * PAGE), self._max_kept)

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
        self._check_budget(memory)
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

    def _check_budget(self, memory: MemoryParams) -> None:
        if memory.memory_budget is not None:
            least, most = self._sizes.total(_plan(memory).room * PAGE, 0), self._memory_budget
            if memory.memory_budget > most:
                raise invalid_memory_setting("memory_budget", f"value must be at most {most}, this server's")
            if memory.memory_budget < least:
                raise invalid_memory_setting(
                    "memory_budget", f"value must be at least {least}, which this window and the recall memory take"
                )
        most = self._most_kept(memory)
        if not 0 <= (memory.kept_pairs or 0) <= most:
            raise invalid_memory_setting(
                "kept_pairs", f"value must be between 0 and {most}, as many as fit beside this window"
            )

    def ring_pages(self, plan: PageSchedule, tokens: int) -> int:
        """Ring slots that a row needs: all of a window's, or for a plain request all of its text's."""
        return plan.ring(tokens) if plan.window is None else plan.room

    # --- single rows ----------------------------------------------------------------------------------------------
    def new_row(self, pages: int, lora: LoraScales = ()) -> Sequences:
        """An empty row with a ring of at least `pages` pages, which uses LoRA adapters so."""
        row = super().new_row(pages)
        if not lora:
            return row
        scales = self._mesh_layout.rows(jnp.asarray(scales_of(lora, self.config.lora)))
        return dataclasses.replace(row, cache=dataclasses.replace(row.cache, lora=scales))

    def resume_row(self, saved: Sequences, pages: int, position: int, slot: int) -> Sequences:
        """A row that goes on from a saved one at `position`, its memory's figures at 0; the saved one stays as it is."""
        saved = dataclasses.replace(saved, memory=None if saved.memory is None else _no_figures(saved.memory))
        row = self._put(
            self.new_row(pages), whole_ring(saved, bucket(_pages(saved), self.buckets.pages)), 0, with_memory=True
        )
        return self._set_position(_pages(row), row, np.int32(position), np.int32(slot))

    def _grow_row(self, row: Sequences, pages: int) -> Sequences:
        """The row, in a ring of at least `pages` pages: a prompt starts in a small ring, for attention reads all of it."""
        if _pages(row) >= pages:
            return row
        size = bucket(pages, self.buckets.pages)
        return Sequences(self._resize_ring((_pages(row), size), row.cache, self.new_row(size).cache), row.memory)

    def save_row(self, row: Sequences, pages: int, position: int, slot: int) -> Sequences:
        """The same row rewound to `position`, whose window it still holds, in a ring of the size for `pages` pages.

        The row itself is used up.
        """
        if _pages(row) != bucket(pages, self.buckets.pages):
            return self.resume_row(row, pages, position, slot)
        return self._set_position(_pages(row), row, np.int32(position), np.int32(slot))

    def start_page(self, row: Sequences, page: NextPage, write: MemoryWrite | None) -> Sequences:
        """Begins a page of a single row."""
        return self._start_page_of(row, 0, page, write)

    def _begin_chunk(self, row: Sequences, page: NewPage | None) -> Generator[PrefillStep, None, Sequences]:
        """The row as a chunk finds it: a page may begin with it, and writing the memory for that is a step of its own."""
        if page is None:
            return row
        row = self.start_page(self._grow_row(row, page.ring_pages), page.place, page.write)
        if row.memory is not None and page.writes:
            yield PrefillStep(row, row.memory.loss, done=False)
        return row

    def prefill(
        self, row: Sequences, settings: RecallSettings, tokens: Sequence[int], page: NewPage | None = None
    ) -> Iterator[PrefillStep]:
        """Prefills a chunk, a group of layers at a time; uses the row up."""
        row = yield from self._begin_chunk(row, page)
        yield from self._steps.prefill(RUN, self._weights, row, settings, *self._pad(tokens))

    def prefill_scored(
        self,
        row: Sequences,
        settings: RecallSettings,
        tokens: Sequence[int],
        following: Sequence[int],
        page: NewPage | None = None,
        *,
        alternatives: bool,
    ) -> Iterator[PrefillStep]:
        """Prefills a chunk and scores the token that follows each of its tokens; otherwise as `prefill`."""
        row = yield from self._begin_chunk(row, page)
        padded, count = self._pad(tokens)
        scored = self._pad(following)[0], np.bool_(alternatives)
        yield from self._steps.scored_prefill(RUN, self._weights, row, settings, padded, count, *scored)

    def prefill_pooled(
        self,
        row: Sequences,
        settings: RecallSettings,
        tokens: Sequence[int],
        pooled: np.ndarray | jax.Array,
        page: NewPage | None = None,
        *,
        mean: bool,
    ) -> Iterator[PrefillStep]:
        """Prefills a chunk and adds it to the prompt's embedding; otherwise as `prefill`."""
        count, kind = np.asarray([len(tokens)], np.int32), np.asarray([mean])
        for made in self.prefill(row, settings, tokens, page):
            if not made.done:
                yield made
                continue
            pooled = self._steps.pool(RUN, self._weights, pooled, made.made, count, kind)
            yield dataclasses.replace(made, made=pooled, pooled=pooled)

    def _pad(self, tokens: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
        padded = np.zeros((1, bucket(len(tokens), CHUNKS)), np.int32)
        padded[0, : len(tokens)] = tokens
        return padded, np.asarray([len(tokens)], np.int32)

    # --- the decode batch -----------------------------------------------------------------------------------------
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
        cache = self._insert_kv_cache(batch_key(batch), batch.cache, single, place)
        memory = batch.memory
        if memory is not None and row.memory is not None and with_memory:
            memory = self._insert_memory(_rows(batch), memory, row.memory, place)
        return Sequences(cache, memory)

    def start_page_in_batch(self, index: int, page: NextPage, write: MemoryWrite | None) -> None:
        """Begins a page of the row at place `index`."""
        self.sequences = self._start_page_of(self.sequences, index, page, write)

    @property
    def is_monolithic(self) -> bool:
        """Whether the next decode step is one program."""
        guess = self.width > 1
        return all(self._steps.is_monolithic(self.sequences, drafts=width > 1, guess=guess) for width in self.widths)

    @property
    def widths(self) -> tuple[int, ...]:
        """One token, or also the drafts, of what is compiled; both only where they give the same bits."""
        compiled = batch_key(self.sequences) in self._plain
        return (1, self.width) if compiled and self.width > 1 else (self.width,)

    def decode(
        self,
        wanted: np.ndarray,
        allowed: np.ndarray | None = None,
        pages: Mapping[int, NewPage] | None = None,
        width: int | None = None,
    ) -> StepOutput:
        """One step, see `ModelRunner.decode`."""
        for index, page in (pages or {}).items():
            self.start_page_in_batch(index, page.place, page.write)
        inputs = self.sequences, self.decode_state, wanted.astype(np.int32), self._allowed_on_device(allowed)
        width = width or self.width
        self.sequences, self.decode_state, output, self._logits_buffers[width] = self._steps.run_decode(
            self._weights, *inputs, self._logits_buffers[width], drafts=width > 1, guess=self.width > 1
        )
        return start_transfer(output)

    def _start_page_of(self, sequences: Sequences, index: int, page: NextPage, write: MemoryWrite | None) -> Sequences:
        memory = sequences.memory
        if memory is not None and write is not None and page.absorb_end is not None:
            settings = write_settings(write, page.absorb_end)
            absorb = self._write_memory[write.optimizer]
            memory = absorb(_rows(sequences), self._weights.adapter, memory, np.int32(index), settings)
        key, cache = batch_key(sequences), sequences.cache
        if memory is not None and write is not None and write.kept:
            for slot in page.leaves:
                first = slot == page.leaves[0]
                capacity = self._division.capacities(write.kept)
                leaves = leaving(index, slot, first=first, decay=write.decay, capacity=capacity)
                cache = self._keep_pairs(key, self._weights.params.pairs, cache, memory.tokens, leaves)
        return Sequences(self._start_page(key, cache, page_start(index, page)), memory)

    # --- compiling ahead ------------------------------------------------------------------------------------------
    def compile_prefill(self, pages: int, length: int) -> None:
        """Compiles the prefill of chunks of `length` tokens in a ring of `pages` pages."""
        inputs = prefill_inputs(self.config, self._weights, pages, length, self._kv_dtype)
        self._maker(1, pages).compile(())
        self._compile_page_start((1, pages), inputs[1])
        _run_out(self._steps.prefill(COMPILE, *inputs))

    def _compile_page_start(self, key: tuple[int, int], batch: Sequences) -> None:
        self._start_page.compile(key, batch.cache, _PAGE_START)
        if batch.memory is not None and self._max_kept:
            leaves = shapes(leaving(0, 0, first=True, decay=1.0, capacity=self._division.capacities(0)))
            self._keep_pairs.compile(key, self._weights.params.pairs, batch.cache, batch.memory.tokens, leaves)

    def compile_scored_prefill(self, length: int) -> None:
        """Compiles the scoring of chunks of `length` tokens, in a ring of any size."""
        inputs = prefill_inputs(self.config, self._weights, self.buckets.pages[0], length, self._kv_dtype, scored=True)
        _run_out(self._steps.scored_prefill(COMPILE, *inputs))

    def compile_pooled_prefill(self, length: int) -> None:
        """Compiles the pooling of chunks of `length` tokens."""
        inputs = prefill_inputs(self.config, self._weights, self.buckets.pages[0], length, self._kv_dtype)
        (*_, last) = self._steps.prefill(COMPILE, *inputs)
        pooled = shape((1, self.embed), np.float32)
        count, mean = shape((1,), np.int32), shape((1,), np.bool_)
        self._steps.pool(COMPILE, self._weights, pooled, last.made, count, mean)

    def _decode_inputs(self, rows: int, pages: int, width: int) -> tuple[Any, ...]:
        return decode_inputs(self.config, self._weights, rows, pages, self._kv_dtype, drafts=width > 1)

    def _same_bits(self, rows: int) -> bool:
        """Whether steps of all widths and forms give the same bits: XLA fuses and rounds its own attention otherwise."""
        with self.config.kernels.scope():
            return uses_cpu_kernel(self.buckets.width(rows), self.config.model.head_dim, SINKS)

    def compile_decode(self, rows: int, pages: int) -> None:
        """Compiles what a batch of this size needs while its rows stay."""
        drafts = self.buckets.width(rows) > 1
        inputs = self._decode_inputs(rows, pages, self.buckets.width(rows))
        batch = inputs[1].cache
        self._compile_batch_start(rows, pages)
        self._insert_kv_cache.compile((rows, pages), batch, self.row_shapes(pages).cache, SCALAR)
        self._compile_page_start((rows, pages), inputs[1])
        self._steps.decode(COMPILE, *inputs, drafts=drafts, guess=drafts)

    def compile_plain_decode(self, rows: int, pages: int) -> None:
        """Compiles the decode step without drafts of a batch that has one with drafts, if there is the choice."""
        exact = self._kv_dtype == "int8" and isinstance(self._weights.params.layers[0].out, QuantArray | PackedArray)
        if self.buckets.width(rows) > 1 and exact and self._same_bits(rows):
            self._steps.decode(COMPILE, *self._decode_inputs(rows, pages, 1), guess=True)
            self._plain.add((rows, pages))

    def compile_monolithic_step(self, rows: int, pages: int) -> None:
        """Compiles the decode step of a small batch as one program, if it is several."""
        if rows <= MONOLITHIC_ROWS and self._steps.layer_programs > 1 and self._same_bits(rows):
            guess = self.buckets.width(rows) > 1
            widths = [self.buckets.width(rows)] + [1] * ((rows, pages) in self._plain)
            for width in widths:
                inputs = self._decode_inputs(rows, pages, width)
                self._steps.compile_monolithic(*inputs, drafts=width > 1, guess=guess)

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
                    program.compile(size, self._weights.adapter, state, SCALAR, write)


def _no_figures(memory: RecallState) -> RecallState:
    zeros: dict[str, Any] = {"losses": np.zeros(1, np.float32), "skipped": np.zeros(1, np.int32)}
    return dataclasses.replace(memory, **zeros)


def _run_out(steps: Iterator[PrefillStep]) -> None:
    for _ in steps:
        pass


def _plan(memory: MemoryParams) -> PageSchedule:
    return PageSchedule(memory.window_size // PAGE, memory.update_frequency // PAGE)


def _rows(batch: Sequences) -> int:
    return int(batch.cache.page.shape[0])


def _pages(batch: Sequences) -> int:
    return int(batch.cache.page.shape[1])
