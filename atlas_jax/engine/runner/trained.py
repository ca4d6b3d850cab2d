"""A trained language model with a memory of its own, as the scheduler runs it.

Its state is what its layers have made of all they have read: the memory is written with every token, and what has been
read cannot be taken back. Prompts are prefilled in chunks of exact length, for a token of padding would be remembered too.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from atlas_jax.aot import AotProgram, shape, shapes
from atlas_jax.engine.api import MemoryParams, StateBytes
from atlas_jax.engine.runner import row_moves, step
from atlas_jax.engine.runner.base import Buckets, Capabilities, NewPage, PrefillStep, invalid_memory_setting
from atlas_jax.engine.runner.compiled import SCALAR, CompiledRunner, start_transfer
from atlas_jax.engine.runner.decode_state import DecodeState, Sequences
from atlas_jax.engine.runner.step import StepOutput
from atlas_jax.engine.sessions.lora import LoraScales
from atlas_jax.engine.sessions.session import SessionShape
from atlas_jax.kernels.kernel_choice import DEFAULT_KERNELS, KernelChoice
from atlas_jax.kernels.sampling import allowed_words
from atlas_jax.model.lm import streaming
from atlas_jax.model.lm.config import LMConfig
from atlas_jax.model.lm.model import LMParams
from atlas_jax.model.lm.streaming import LMState
from atlas_jax.model.page_schedule import PageSchedule
from atlas_jax.recall.recall_state import RecallSettings
from atlas_jax.typing import Array, Bool, Float, Int32

CHUNKS = (64, 8, 1)
"""Lengths of the chunks a prompt is prefilled in, each as often as it fits. More lengths would be more programs to compile,
and 128 tokens at once are no faster a token than 64."""
FIXED_SETTINGS = frozenset(
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
        "memory_budget",
        "kept_pairs",
    }
)
"""Settings of the recall memory that are decided here when a model is trained."""
_WINDOW_KINDS = frozenset("SGL")


def session_shape() -> SessionShape:
    """Shape of every session: the model has decided what its memory is."""
    return SessionShape(PageSchedule(None), layers=1, degree=1, rewinds=False)


def capacity(config: LMConfig) -> int:
    """Independent pairs that one memory of the model can hold, 0 if it has none."""
    return max((rule.feature_dim for rules in config.layer_rules for rule in rules), default=0)


def window(config: LMConfig) -> int:
    """Tokens that its windowed layers attend to, 0 if it has none."""
    return config.window if set(config.pattern) & _WINDOW_KINDS else 0


class TrainedRunner(CompiledRunner):
    """Runs a trained model.

    Args:
      context: tokens that layers which attend to everything have room for.
    """

    def __init__(
        self,
        config: LMConfig,
        params: LMParams,
        context: int,
        rows: tuple[int, ...],
        kernels: KernelChoice = DEFAULT_KERNELS,
    ) -> None:
        self._config, self._params, self._context, self._kernels = config, params, context, kernels
        capabilities = Capabilities(
            rewind=False,
            memory_capacity=capacity(config),
            window=window(config),
            session_context=None if streaming.bounded(config) else context,
        )
        super().__init__(capabilities, config.vocab, config.embed, Buckets(rows, (1,), max_draft_rows=0), CHUNKS)
        self._prefill = self._program(functools.partial(_prefill, config), donate=(1,))
        self._prefill_scored = self._program(functools.partial(_prefill_scored, config), donate=(1,))
        self._pool = self._program(step.pool_states)
        self._decode = self._program(functools.partial(_decode, config), donate=(1, 2, 5))
        self._insert = self._program(row_moves.insert_kv_cache, donate=(0,))

    def _program(self, function: Callable[..., Any], *, donate: tuple[int, ...] = ()) -> AotProgram:
        return AotProgram(function, donate=donate, kernels=self._kernels)

    def _make(self, *, batch: int, pages: int) -> Sequences:
        state = streaming.init_state(self._config, self._params, batch, context=self._context)
        return Sequences(state, None)  # type: ignore[arg-type]

    def check(self, memory: MemoryParams) -> None:
        """Refuses what the client wrote of a memory that is the model's own; raises InvalidRequest."""
        for name in sorted(memory.given & FIXED_SETTINGS):
            raise invalid_memory_setting(name, "this model's memory is part of the model and has no such setting")
        if not memory.read:
            raise invalid_memory_setting("read", "this model cannot answer without its memory")

    def shape(self, memory: MemoryParams, lora: LoraScales = ()) -> SessionShape:
        """The model's own; nothing of it is the request's to choose."""
        return session_shape()

    def state_bytes(self, shape: SessionShape) -> StateBytes:
        """All of it is the model's own memory."""
        leaves = jax.tree.leaves(self.row_shapes(1))
        return StateBytes(memory=sum(leaf.size * leaf.dtype.itemsize for leaf in leaves))

    # --- single rows ----------------------------------------------------------------------------------------------
    def resume_row(self, saved: Sequences, pages: int, position: int, slot: int) -> Sequences:
        """A copy of a saved row, which goes on where it is; its losses are counted anew."""
        kept = Sequences(streaming.forget_losses(saved.cache), saved.memory)
        return self._put(self.new_row(1), kept, 0, with_memory=True)

    def write_losses(self, held: Sequences, index: int) -> tuple[float, float, int]:
        """Inner loss of the newest token and the sum of all since the row was resumed, means over the memories."""
        runs = streaming.runs_of(held.cache)
        both = [[float(np.asarray(part)[index]) for part in (run.loss, run.losses)] for run in runs]
        last, total = np.mean(both, axis=0) if both else (0.0, 0.0)
        return float(last), float(total), 0

    def save_row(self, row: Sequences, pages: int, position: int, slot: int) -> Sequences:
        """The row as it is: `Capabilities.rewind` sees to it that it has read no further."""
        return row

    def prefill(
        self, row: Sequences, settings: RecallSettings, tokens: Sequence[int], page: NewPage | None = None
    ) -> Iterator[PrefillStep]:
        """Prefills a chunk, all in one step: what has been read of it stays read."""
        state: Any = row.cache
        for chunk in chunks(tokens):
            state, made = self._prefill(chunk.shape[1], self._params, state, chunk)
        yield PrefillStep(Sequences(state, None), made)

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
        state: Any = row.cache
        found: list[StepOutput] = []
        for chunk, after in zip(chunks(tokens), chunks(following), strict=True):
            flag = np.bool_(alternatives)
            state, packed = self._prefill_scored(chunk.shape[1], self._params, state, chunk, after, flag)
            found.append(packed)
        both = jax.tree.map(lambda *parts: np.concatenate([np.asarray(part) for part in parts]), *found)
        yield PrefillStep(Sequences(state, None), packed.integers, scores=both)

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
        state: Any = row.cache
        for chunk in chunks(tokens):
            length = chunk.shape[1]
            state, hidden = self._prefill(length, self._params, state, chunk)
            pooled = self._pool(length, pooled, hidden, np.asarray([length], np.int32), np.asarray([mean]))
        assert isinstance(pooled, jax.Array)
        yield PrefillStep(Sequences(state, None), pooled, pooled=pooled)

    # --- the decode batch -----------------------------------------------------------------------------------------
    def _put(self, batch: Sequences, row: Sequences, index: int, *, with_memory: bool) -> Sequences:
        rows = int(jax.tree.leaves(batch.cache)[0].shape[0])
        return Sequences(self._insert(rows, batch.cache, row.cache, np.int32(index)), None)

    def decode(
        self,
        wanted: np.ndarray,
        allowed: np.ndarray | None = None,
        pages: Mapping[int, NewPage] | None = None,
        width: int | None = None,
    ) -> StepOutput:
        """One step, see `ModelRunner.decode`."""
        may = self._allowed_on_device(allowed)
        state, self.decode_state, packed, self._logits_buffers[1] = self._decode(
            self.rows,
            self._params,
            self.sequences.cache,
            self.decode_state,
            wanted.astype(np.int32),
            may,
            self._logits_buffers[1],
        )
        self.sequences = Sequences(state, None)
        return start_transfer(packed)

    # --- compiling ahead ------------------------------------------------------------------------------------------
    def compile_prefill(self, pages: int, length: int) -> None:
        """Compiles the prefill of chunks of `length` tokens."""
        self._maker(1, 1).compile(())
        tokens = shape((1, length), np.int32)
        self._prefill.compile(length, shapes(self._params), self.row_shapes(1).cache, tokens)

    def compile_scored_prefill(self, length: int) -> None:
        """Compiles the scoring of chunks of `length` tokens."""
        tokens, flag = shape((1, length), np.int32), shape((), np.bool_)
        self._prefill_scored.compile(length, shapes(self._params), self.row_shapes(1).cache, tokens, tokens, flag)

    def compile_pooled_prefill(self, length: int) -> None:
        """Compiles the pooling of chunks of `length` tokens."""
        hidden = shape((1, length, self.embed), np.float32)
        pooled, count, mean = shape((1, self.embed), np.float32), shape((1,), np.int32), shape((1,), np.bool_)
        self._pool.compile(length, pooled, hidden, count, mean)

    def compile_decode(self, rows: int, pages: int) -> None:
        """Compiles what a batch of this size needs while its rows stay."""
        self._compile_batch_start(rows, 1)
        batch = self._batch_shapes(rows, 1)
        self._insert.compile(rows, batch.cache, self.row_shapes(1).cache, SCALAR)
        wanted, allowed = shape((rows,), np.int32), shape((rows, allowed_words(self.vocab)), np.int32)
        decode_state, logits_buffer = self._decode_state_shapes(rows), self._logits_buffer_shape(rows, 1)
        self._decode.compile(rows, shapes(self._params), batch.cache, decode_state, wanted, allowed, logits_buffer)

    def compile_row_moves(self, rows: int, pages: int) -> None:
        """Compiles what rows need to leave a batch of this size or to be saved."""
        self._compile_row_exit(rows, 1)
        row = self.row_shapes(1).cache
        self._insert.compile(1, row, row, SCALAR)


def chunks(tokens: Sequence[int]) -> list[Int32[np.ndarray, "1 T"]]:
    """A run of tokens in the lengths of `CHUNKS`, longest first."""
    found, start = [], 0
    for length in CHUNKS:
        while len(tokens) - start >= length:
            found.append(np.asarray([tokens[start : start + length]], np.int32))
            start += length
    return found


def _prefill(
    config: LMConfig, params: LMParams, state: LMState, tokens: Int32[Array, "B T"]
) -> tuple[LMState, Float[Array, "B T E"]]:
    """The state, and what the head would read: an array that the next chunk does not use up."""
    return streaming.extend(config, params, state, tokens, jnp.ones(tokens.shape[:1], bool))


def _prefill_scored(
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
    logits_buffer: Float[Array, "B V"],
) -> tuple[LMState, DecodeState, StepOutput, Float[Array, "B V"] | None]:
    """One token for every row that wants one."""
    active = wanted > 0
    positions = state.position[:, None]
    state, hidden = streaming.extend(config, params, state, decode_state.token[:, None], active)
    scores = streaming.logits(config, params, hidden)
    gate = jnp.zeros(positions.shape, scores.dtype)
    decode_state, _, packed, left = step.draw(
        decode_state, None, scores, gate, positions, active[:, None], allowed, logits_buffer
    )
    return state, decode_state, packed, left
