"""What the runners share: rows and the decode batch as arrays that AOT-compiled programs make, move and take out."""

from __future__ import annotations

import functools
from abc import abstractmethod
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from atlas_jax.aot import AotProgram, shape
from atlas_jax.engine.runner import row_moves
from atlas_jax.engine.runner.base import Buckets, Capabilities, ModelRunner
from atlas_jax.engine.runner.decode_state import (
    DRAFT_TOKENS,
    DecodeState,
    Sequences,
    init_decode_state,
    init_logits_buffer,
)
from atlas_jax.engine.runner.step import StepOutput
from atlas_jax.engine.sessions.lora import LoraScales
from atlas_jax.kernels.sampling import SamplingState, allowed_words
from atlas_jax.kernels.speculative_drafter import NONE
from atlas_jax.model.page_schedule import bucket
from atlas_jax.recall.recall_state import RecallSettings

SCALAR = shape((), np.int32)


class CompiledRunner(ModelRunner):
    """A runner whose decode batch is `sequences` and `decode_state`, changed by compiled programs."""

    def __init__(
        self, capabilities: Capabilities, vocab: int, embed: int, buckets: Buckets, chunks: tuple[int, ...]
    ) -> None:
        super().__init__(capabilities, vocab, embed, buckets, chunks)
        self._allow_all: dict[int, jax.Array] = {}
        self._new_allow_all: dict[int, AotProgram] = {}
        self._new: dict[tuple[int, int], AotProgram] = {}
        self._new_decode_state: dict[int, AotProgram] = {}
        self._extract = self._program(row_moves.extract)
        self._extract_decode_state = self._program(row_moves.extract)
        self._insert_decode_state = self._program(row_moves.insert_decode_state, donate=(0,))
        rows, pages = buckets.rows[0], buckets.pages[0]
        self.sequences = self._sequences(rows, pages)
        self.decode_state: DecodeState
        self.decode_state, self._logits_buffers = self._idle(rows)

    # --- a model's own --------------------------------------------------------------------------------------------
    @abstractmethod
    def _program(self, function: Callable[..., Any], *, donate: tuple[int, ...] = ()) -> AotProgram:
        """A compiled function of this model."""

    @abstractmethod
    def _make(self, *, batch: int, pages: int) -> Sequences:
        """Empty rows."""

    @abstractmethod
    def _put(self, batch: Sequences, row: Sequences, index: int, *, with_memory: bool) -> Sequences:
        """The batch with a row written over the one at `index`."""

    # --- rows and the decode batch --------------------------------------------------------------------------------
    def new_row(self, pages: int, lora: LoraScales = ()) -> Sequences:
        """An empty row with a ring of at least `pages` pages; LoRA adapters are pretrained models' alone."""
        return self._sequences(1, bucket(pages, self.buckets.pages))

    def row_shapes(self, pages: int) -> Sequences:
        """Shapes and types of a row with a ring of `pages` pages."""
        return self._batch_shapes(1, pages)

    @property
    def rows(self) -> int:
        """Rows of the decode batch."""
        return int(self.decode_state.token.shape[0])

    def resize(self, rows: int, pages: int, moves: dict[int, int]) -> None:
        """Makes the batch another size; `moves` maps each row that stays to its new index."""
        key = self.rows, self.pages
        sequences = self._sequences(rows, pages)
        decode_state, logits_buffers = self._idle(rows)
        for source, target in moves.items():
            index = np.int32(source)
            sequences = self._put(sequences, self._extract(key, self.sequences, index), target, with_memory=True)
            single = self._extract_decode_state(key[0], self.decode_state, index)
            decode_state = self._insert_decode_state(rows, decode_state, single, np.int32(target))
        # all at once: if there was no memory for it, the batch is as it was
        self.sequences, self.decode_state, self._logits_buffers = sequences, decode_state, logits_buffers

    def insert(
        self,
        index: int,
        row: Sequences,
        token: int,
        text: np.ndarray,
        sampling: SamplingState,
        settings: RecallSettings,
        *,
        with_memory: bool,
    ) -> None:
        """Starts decoding a row at `index`, with `token` as the next to feed; `text` is of `step_inputs.recent_text`."""
        self.sequences = self._put(self.sequences, row, index, with_memory=with_memory)
        first, none = np.asarray([token], np.int32), np.full((1, DRAFT_TOKENS), NONE, np.int32)
        single = DecodeState(first, none, text, sampling, settings)  # type: ignore[arg-type]
        self.decode_state = self._insert_decode_state(self.rows, self.decode_state, single, np.int32(index))

    def extract(self, index: int) -> Sequences:
        """A copy of the row at `index`."""
        row: Sequences = self._extract((self.rows, self.pages), self.sequences, np.int32(index))
        return row

    def _allowed_on_device(self, allowed: np.ndarray | None) -> Any:
        """`allowed`, or where it is None all tokens, on the device."""
        if allowed is not None:
            return allowed
        rows = self.rows
        if rows not in self._allow_all:
            self._allow_all[rows] = self._allow_all_maker(rows)(())
        return self._allow_all[rows]

    def _allow_all_maker(self, rows: int) -> AotProgram:
        words = allowed_words(self.vocab)
        return self._new_allow_all.setdefault(rows, self._program(lambda: jnp.full((rows, words), -1, jnp.int32)))

    def _sequences(self, rows: int, pages: int) -> Sequences:
        sequences: Sequences = self._maker(rows, pages)(())
        return sequences

    def _maker(self, rows: int, pages: int) -> AotProgram:
        return self._new.setdefault(
            (rows, pages), self._program(functools.partial(self._make, batch=rows, pages=pages))
        )

    def _idle(self, rows: int) -> tuple[DecodeState, dict[int, jax.Array]]:
        """Idle rows, and a logits buffer for every width of their steps."""
        decode_state, logits_buffers = self._idle_maker(rows)(())
        return decode_state, logits_buffers

    def _idle_maker(self, rows: int) -> AotProgram:
        vocab, widths = self.vocab, {1, self.buckets.width(rows)}
        return self._new_decode_state.setdefault(
            rows,
            self._program(
                lambda: (init_decode_state(vocab, rows), {n: init_logits_buffer(vocab, rows, n) for n in widths})
            ),
        )

    def _batch_shapes(self, rows: int, pages: int) -> Sequences:
        return jax.eval_shape(functools.partial(self._make, batch=rows, pages=pages))

    def _decode_state_shapes(self, rows: int) -> DecodeState:
        return jax.eval_shape(functools.partial(init_decode_state, self.vocab, rows))

    def _logits_buffer_shape(self, rows: int, width: int) -> jax.Array:
        return jax.eval_shape(lambda: init_logits_buffer(self.vocab, rows, width))

    # --- compiling ahead --------------------------------------------------------------------------------------------
    def _compile_batch_start(self, rows: int, pages: int) -> None:
        """Compiles how a batch of this size begins, and how its rows start to decode."""
        self._maker(rows, pages).compile(())
        self._idle_maker(rows).compile(())
        self._allow_all_maker(rows).compile(())
        self._insert_decode_state.compile(rows, self._decode_state_shapes(rows), self._decode_state_shapes(1), SCALAR)

    def _compile_row_exit(self, rows: int, pages: int) -> None:
        """Compiles how rows leave a batch of this size."""
        self._extract.compile((rows, pages), self._batch_shapes(rows, pages), SCALAR)
        self._extract_decode_state.compile(rows, self._decode_state_shapes(rows), SCALAR)


def start_transfer(packed: StepOutput) -> StepOutput:
    """A step's result, on its way to the host."""
    packed.integers.copy_to_host_async()
    packed.floats.copy_to_host_async()
    return packed
