"""A trained language model with a memory of its own, as the scheduler runs it.

Its state is what its layers have made of all they have read: the memory is written with every token, and what has been
read cannot be taken back. PrefillQueue are read in pieces of exact length, for a token of padding would be remembered too.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from atlas_jax.aot import AotProgram, shape, shapes
from atlas_jax.engine.api import MemoryParams
from atlas_jax.engine.runner import step
from atlas_jax.engine.runner.base import (
    SCALAR,
    Buckets,
    ModelRunner,
    PrefillStep,
    invalid_memory_setting,
    start_transfer,
)
from atlas_jax.engine.runner.decode_state import DecodeState, Sequences
from atlas_jax.engine.runner.step import StepOutput
from atlas_jax.engine.runner.step_inputs import MemoryWrite
from atlas_jax.engine.sessions.session import SessionShape
from atlas_jax.kernels.sampling import allowed_words
from atlas_jax.model.lm import streaming
from atlas_jax.model.lm.config import MEMORY_KINDS, LMConfig
from atlas_jax.model.lm.model import LMParams
from atlas_jax.model.lm.streaming import LMState
from atlas_jax.model.page_schedule import NextPage, PageSchedule
from atlas_jax.recall.recall_memory import RecallSettings
from atlas_jax.typing import Array, Bool, Float, Int32

PIECES = (64, 8, 1)
"""Lengths of the pieces a prompt is read in, each as often as it fits. More lengths would be more programs to compile, and
128 tokens at once are no faster a token than 64."""
OWN = frozenset(
    {
        "memory_layers",
        "window_size",
        "blend_ratio",
        "learning_rate",
        "polynomial_degree",
        "memory_dim",
        "use_muon",
        "warmup_tokens",
        "update_frequency",
        "omega_window",
    }
)
"""Settings of the recall memory that are decided here when a model is trained."""
_WINDOW_KINDS = frozenset("SGL")


def session_shape() -> SessionShape:
    """Shape of every session: the model has decided what its memory is."""
    return SessionShape(PageSchedule(None), layers=1, degree=1)


def capacity(config: LMConfig) -> int:
    """Independent pairs that one memory of the model can hold, 0 if it has none."""
    return config.rule.feature_dim if config.rule is not None and set(config.pattern) & MEMORY_KINDS else 0


def window(config: LMConfig) -> int:
    """Tokens that its windowed layers attend to, 0 if it has none."""
    return config.window if set(config.pattern) & _WINDOW_KINDS else 0


class TrainedRunner(ModelRunner):
    """Runs a trained model.

    Args:
      context: tokens that layers which attend to everything have room for.
    """

    can_rewind = False

    def __init__(self, config: LMConfig, params: LMParams, context: int, rows: tuple[int, ...]) -> None:
        self._config, self._params, self._context = config, params, context
        super().__init__(config.vocab, capacity(config), Buckets(rows, (1,), max_draft_rows=0), PIECES)
        self.window = window(config)
        self.session_context = None if streaming.bounded(config) else context
        self._read = self._program(functools.partial(_read, config), donate=(1,))
        self._score = self._program(functools.partial(_score, config), donate=(1,))
        self._decode = self._program(functools.partial(_decode, config), donate=(1, 2, 5))
        self._insert = self._program(step.insert_kv_cache, donate=(0,))

    def _program(self, function: Callable[..., Any], *, donate: tuple[int, ...] = ()) -> AotProgram:
        return AotProgram(function, donate=donate)

    def _make(self, *, batch: int, pages: int) -> Sequences:
        state = streaming.init_state(self._config, self._params, batch, context=self._context)
        return Sequences(state, None)  # type: ignore[arg-type]

    def check(self, memory: MemoryParams) -> None:
        """Refuses what the client wrote of a memory that is the model's own; raises InvalidRequest."""
        for name in sorted(memory.given & OWN):
            raise invalid_memory_setting(name, "this model's memory is part of the model and has no such setting")
        if not memory.read:
            raise invalid_memory_setting("read", "this model cannot answer without its memory")

    def shape(self, memory: MemoryParams) -> SessionShape:
        """The model's own; nothing of it is the request's to choose."""
        return session_shape()

    def ring_pages(self, plan: PageSchedule, tokens: int) -> int:
        """A row has one size."""
        return 1

    # --- single rows ----------------------------------------------------------------------------------------------
    def new_row(self, pages: int) -> Sequences:
        """An empty row."""
        return self._sequences(1, 1)

    def resume_row(self, saved: Sequences, pages: int, position: int, slot: int) -> Sequences:
        """A copy of a saved row, which goes on where it is."""
        return self._put(self.new_row(1), saved, 0, with_memory=True)

    def grow_row(self, row: Sequences, pages: int) -> Sequences:
        """The row as it is."""
        return row

    def rewind_row(self, row: Sequences, pages: int, position: int, slot: int) -> Sequences:
        """The row as it is: the scheduler takes out no row that has read further."""
        return row

    def start_page(self, row: Sequences, turn: NextPage, write: MemoryWrite | None) -> Sequences:
        """The row as it is: it has no pages."""
        return row

    def start_page_in_batch(self, index: int, turn: NextPage, write: MemoryWrite | None) -> None:
        """Nothing: rows have no pages."""

    def prefill(self, row: Sequences, settings: RecallSettings, tokens: Sequence[int]) -> Iterator[PrefillStep]:
        """Reads tokens, all in one part: what has been read of them stays read."""
        state: Any = row.cache
        for piece in pieces(tokens):
            state, made = self._read(piece.shape[1], self._params, state, piece)
        yield PrefillStep(Sequences(state, None), made)

    def prefill_scored(
        self,
        row: Sequences,
        settings: RecallSettings,
        tokens: Sequence[int],
        following: Sequence[int],
        *,
        alternatives: bool,
    ) -> Iterator[PrefillStep]:
        """Reads tokens and scores the token that follows each; as `read`."""
        state: Any = row.cache
        found: list[StepOutput] = []
        for piece, after in zip(pieces(tokens), pieces(following), strict=True):
            state, packed = self._score(piece.shape[1], self._params, state, piece, after, np.bool_(alternatives))
            found.append(packed)
        both = jax.tree.map(lambda *parts: np.concatenate([np.asarray(part) for part in parts]), *found)
        yield PrefillStep(Sequences(state, None), packed.integers, scores=both)

    # --- the decode batch -----------------------------------------------------------------------------------------
    @property
    def rows(self) -> int:
        """ModelRunner of the decode batch."""
        return int(self.decode_state.token.shape[0])

    @property
    def pages(self) -> int:
        """One: a row has one size."""
        return 1

    def _put(self, batch: Sequences, row: Sequences, index: int, *, with_memory: bool) -> Sequences:
        rows = int(jax.tree.leaves(batch.cache)[0].shape[0])
        return Sequences(self._insert(rows, batch.cache, row.cache, np.int32(index)), None)

    def decode(self, wanted: np.ndarray, allowed: np.ndarray | None = None) -> StepOutput:
        """One step, see `ModelRunner.decode`."""
        may = self._allowed_on_device(allowed)
        state, self.decode_state, packed, self._logits_buffer = self._decode(
            self.rows,
            self._params,
            self.sequences.cache,
            self.decode_state,
            wanted.astype(np.int32),
            may,
            self._logits_buffer,
        )
        self.sequences = Sequences(state, None)
        return start_transfer(packed)

    # --- compiling ahead ------------------------------------------------------------------------------------------
    def compile_prefill(self, pages: int, length: int) -> None:
        """Compiles the reading of pieces of `length` tokens."""
        self._maker(1, 1).compile(())
        tokens = shape((1, length), np.int32)
        self._read.compile(length, shapes(self._params), self.row_shapes(1).cache, tokens)

    def compile_scored_prefill(self, length: int) -> None:
        """Compiles the scoring of pieces of `length` tokens."""
        tokens, flag = shape((1, length), np.int32), shape((), np.bool_)
        self._score.compile(length, shapes(self._params), self.row_shapes(1).cache, tokens, tokens, flag)

    def compile_decode(self, rows: int, pages: int) -> None:
        """Compiles what a batch of this size needs while its rows stay."""
        self._compile_batch_start(rows, 1)
        batch = self._batch_shapes(rows, 1)
        self._insert.compile(rows, batch.cache, self.row_shapes(1).cache, SCALAR)
        wanted, may = shape((rows,), np.int32), shape((rows, allowed_words(self.vocab)), np.int32)
        decode_state, room = self._decode_state_shapes(rows), self._logits_buffer_shape(rows)
        self._decode.compile(rows, shapes(self._params), batch.cache, decode_state, wanted, may, room)

    def compile_monolithic_step(self, rows: int, pages: int) -> None:
        """Nothing: a step is one program."""

    def compile_row_moves(self, rows: int, pages: int) -> None:
        """Compiles what rows need to leave a batch of this size or to be saved."""
        self._compile_row_exit(rows, 1)
        row = self.row_shapes(1).cache
        self._insert.compile(1, row, row, SCALAR)


def pieces(tokens: Sequence[int]) -> list[Int32[np.ndarray, "1 T"]]:
    """A run of tokens in the lengths of `PIECES`, longest first."""
    found, start = [], 0
    for length in PIECES:
        while len(tokens) - start >= length:
            found.append(np.asarray([tokens[start : start + length]], np.int32))
            start += length
    return found


def _read(
    config: LMConfig, params: LMParams, state: LMState, tokens: Int32[Array, "B T"]
) -> tuple[LMState, Int32[Array, ""]]:
    """The state, and how many tokens have been read: an array that the next piece does not use up."""
    state = streaming.extend(config, params, state, tokens, jnp.ones(tokens.shape[:1], bool))[0]
    return state, state.position.sum()


def _score(
    config: LMConfig,
    params: LMParams,
    state: LMState,
    tokens: Int32[Array, "B T"],
    following: Int32[Array, "B T"],
    alternatives: Bool[Array, ""],
) -> tuple[LMState, StepOutput]:
    state, hidden = streaming.extend(config, params, state, tokens, jnp.ones(tokens.shape[:1], bool))
    scores = streaming.logits(config, params, hidden)
    return state, step.scored(scores, jnp.zeros(tokens.shape, scores.dtype), following, alternatives)


def _decode(
    config: LMConfig,
    params: LMParams,
    state: LMState,
    decode_state: DecodeState,
    wanted: Int32[Array, B],
    allowed: Int32[Array, "B words"],
    room: Float[Array, "B V"],
) -> tuple[LMState, DecodeState, StepOutput, Float[Array, "B V"] | None]:
    """One token for every row that wants one."""
    active = wanted > 0
    positions = state.position[:, None]
    state, hidden = streaming.extend(config, params, state, decode_state.token[:, None], active)
    scores = streaming.logits(config, params, hidden)
    gate = jnp.zeros(positions.shape, scores.dtype)
    decode_state, _, packed, left = step.draw(
        decode_state, None, scores, gate, positions, active[:, None], allowed, room
    )
    return state, decode_state, packed, left
