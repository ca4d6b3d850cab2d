"""What the scheduler needs of a model: rows that prompts are prefilled into, and a decode batch they move in and out of.

`pretrained.PretrainedRunner` pages its KV cache and has the recall memory; the rows of `trained.TrainedRunner` have one size,
and the model's own memory in them. No policy here: the scheduler decides.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import jax
import numpy as np

from atlas_jax.engine.api import InvalidRequest, MemoryParams, StateBytes
from atlas_jax.engine.runner.decode_state import DRAFT_TOKENS, Sequences
from atlas_jax.engine.runner.step import StepOutput
from atlas_jax.engine.runner.step_inputs import MemoryWrite
from atlas_jax.engine.sessions.kept_layout import without_kept
from atlas_jax.engine.sessions.lora import LoraScales
from atlas_jax.engine.sessions.session import SessionShape
from atlas_jax.kernels.sampling import SamplingState, allowed_words
from atlas_jax.model.page_schedule import NextPage, PageSchedule
from atlas_jax.recall.recall_state import RecallSettings

MAX_DRAFT_ROWS = 2
"""Rows of a batch up to which drafts pay on a CPU; with more, a row pays for its neighbours' rejected drafts. SmolLM2-135M on
two cores with the native kernels, layers alone, least of 20 in two runs: 13 and 15 ms for one row of one token, 19 and 20 for
one of four, 28 and 35 for four of four."""


@dataclass(frozen=True)
class Buckets:
    """Shapes there are compiled programs for.

    Attributes:
      rows: sizes of the decode batch.
      pages: sizes of a row's ring of pages.
      max_draft_rows: rows of the largest batch whose decode step also feeds every row its drafts.
    """

    rows: tuple[int, ...] = (1, 2, 4, 8, 16, 32)
    pages: tuple[int, ...] = (4, 8, 16, 32, 64)
    max_draft_rows: int = MAX_DRAFT_ROWS

    def width(self, rows: int) -> int:
        """The most tokens per row of a decode step."""
        return 1 + DRAFT_TOKENS if rows <= self.max_draft_rows else 1


@dataclass(frozen=True)
class Capabilities:
    """What a model can do, and how much it can hold.

    Attributes:
      rewind: whether a row can be set back to a position that its window still holds. If not, what a row has read stays read:
        beside a session a decode step is launched only when the result of the one before is known, and no prefix is shared.
      memory_capacity: independent pairs that a session's memory can hold; 0 without a memory.
      window: tokens attended exactly by sessions that have no window of their own; 0 where all have one.
      muon_passes: Newton–Schulz steps of one memory write with momentum.
      session_context: tokens that a session can have at most, or None.
    """

    rewind: bool
    memory_capacity: int = 0
    window: int = 0
    muon_passes: int = 0
    session_context: int | None = None


@dataclass(frozen=True)
class NewPage:
    """A page that begins with the next token of a row. A model whose state has one size has no use for it.

    Attributes:
      place: where it goes in the row's ring of pages, and what leaves the window for it.
      ring_pages: pages of the ring that are in use from now on.
      write: how the memory is written with what leaves, or None.
    """

    place: NextPage
    ring_pages: int
    write: MemoryWrite | None

    @property
    def writes(self) -> bool:
        """Whether the memory is written when it begins."""
        return self.write is not None and self.place.absorb_end is not None


@dataclass(frozen=True)
class PrefillStep:
    """What one of the programs that prefill a chunk leaves.

    Attributes:
      row: the row. Before the chunk has been prefilled it is where it was, and can be kept as such.
      made: an array that is there when the program has run.
      done: whether the chunk has been prefilled.
      scores: those of a chunk that is scored, with its last step.
      pooled: the embedding so far, with the last step of a chunk that is pooled.
    """

    row: Sequences
    made: jax.Array
    done: bool = True
    scores: StepOutput | None = None
    pooled: jax.Array | None = None


class ModelRunner(ABC):
    """A model as the scheduler sees it, for one engine thread; not thread-safe, but for `compile_*`.

    Attributes:
      capabilities: what the model can do.
      buckets: shapes there are programs for.
      chunks: lengths of the chunks that prompts are prefilled in.
      vocab: tokens of the vocabulary.
      embed: numbers of a hidden state.
      sequences: the decode batch.
    """

    sequences: Sequences

    def __init__(
        self, capabilities: Capabilities, vocab: int, embed: int, buckets: Buckets, chunks: tuple[int, ...]
    ) -> None:
        self.capabilities = capabilities
        self.vocab = vocab
        self.embed = embed
        self.buckets = buckets
        self.chunks = chunks

    # --- sessions -------------------------------------------------------------------------------------------------
    @abstractmethod
    def check(self, memory: MemoryParams) -> None:
        """Refuses settings of the memory that this model cannot use; raises InvalidRequest."""

    @abstractmethod
    def shape(self, memory: MemoryParams, lora: LoraScales = ()) -> SessionShape:
        """The shape of a session that begins with this request."""

    @abstractmethod
    def state_bytes(self, shape: SessionShape) -> StateBytes:
        """What the parts of a session of this shape take."""

    # --- rows -----------------------------------------------------------------------------------------------------
    @abstractmethod
    def new_row(self, pages: int, lora: LoraScales = ()) -> Sequences:
        """An empty row with a ring of at least `pages` pages, which uses LoRA adapters so."""

    @abstractmethod
    def row_shapes(self, pages: int) -> Sequences:
        """Shapes and types of a row with a ring of `pages` pages."""

    def ring_pages(self, plan: PageSchedule, tokens: int) -> int:
        """Pages of KV cache that a row needs for a text of so many tokens; 1 where all rows have one size."""
        return 1

    @abstractmethod
    def resume_row(self, saved: Sequences, pages: int, position: int, slot: int) -> Sequences:
        """A row that goes on from a saved one, which stays as it is.

        Args:
          pages: what `ring_pages` says of the text up to `position`.
          position: where it goes on; an earlier one than the saved row's only where rows can be rewound.
          slot: ring slot of the page that `position` is in.
        """

    def write_losses(self, held: Sequences, index: int) -> tuple[float, float, int]:
        """Of a row's writes: the Omega loss of the last, the sum of all, and how many were not taken."""
        memory = held.memory
        if memory is None:
            return 0.0, 0.0, 0
        loss, losses, skipped = (np.asarray(part)[index] for part in (memory.loss, memory.losses, memory.skipped))
        return float(loss), float(losses), int(skipped)

    @abstractmethod
    def save_row(self, row: Sequences, pages: int, position: int, slot: int) -> Sequences:
        """A row to be resumed later, as it is after `position` tokens; uses the row up. Arguments as for `resume_row`."""

    def prefix_row(self, row: Sequences) -> Sequences:
        """A row of a plain request to go on from with other requests; nobody may use up `row` afterwards."""
        return Sequences(without_kept(row.cache, queries=True), None)

    @abstractmethod
    def prefill(
        self, row: Sequences, settings: RecallSettings, tokens: Sequence[int], page: NewPage | None = None
    ) -> Iterator[PrefillStep]:
        """Prefills a chunk, launching one program after the other; uses the row up.

        Args:
          tokens: of one page.
          page: the page that begins with them, if one does.
        """

    @abstractmethod
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

    @abstractmethod
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
        """Prefills a chunk and adds it to the prompt's embedding; otherwise as `prefill`.

        Args:
          pooled: of the chunks before, [1, E]; zeros before the first.
          mean: sum up all states; else the embedding is the last one.
        """

    # --- the decode batch -----------------------------------------------------------------------------------------
    @property
    @abstractmethod
    def rows(self) -> int:
        """Rows of the decode batch."""

    @property
    def pages(self) -> int:
        """Pages of the ring of each row of the decode batch; 1 where all rows have one size."""
        return 1

    @property
    def width(self) -> int:
        """The most tokens a row can gain in one decode step."""
        return self.buckets.width(self.rows)

    @property
    def widths(self) -> tuple[int, ...]:
        """Tokens per row that the next decode step can have, ascending: what is drawn is the same with each."""
        return (self.width,)

    @abstractmethod
    def resize(self, rows: int, pages: int, moves: dict[int, int]) -> None:
        """Makes the batch another size; `moves` maps each row that stays to its new index."""

    @abstractmethod
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

    @abstractmethod
    def extract(self, index: int) -> Sequences:
        """A copy of the row at `index`."""

    def allow_all(self) -> np.ndarray:
        """A bit for every row and token, all set: int32 [rows, words]."""
        return np.full((self.rows, allowed_words(self.vocab)), -1, np.int32)

    @abstractmethod
    def decode(
        self,
        wanted: np.ndarray,
        allowed: np.ndarray | None = None,
        pages: Mapping[int, NewPage] | None = None,
        width: int | None = None,
    ) -> StepOutput:
        """One step; the result is on its way to the host when this returns, not there yet.

        Args:
          wanted: the most tokens to feed to each row; 0 leaves it as it is, 1 leaves its drafts out.
          allowed: which tokens may be drawn, see `allow_all`; None allows all.
          pages: the pages that begin, by row.
          width: one of `widths`; None is the largest.
        """

    # --- compiling ahead ------------------------------------------------------------------------------------------
    @abstractmethod
    def compile_prefill(self, pages: int, length: int) -> None:
        """Compiles the prefill of chunks of `length` tokens in a ring of `pages` pages."""

    @abstractmethod
    def compile_scored_prefill(self, length: int) -> None:
        """Compiles the scoring of chunks of `length` tokens, in a ring of any size."""

    @abstractmethod
    def compile_pooled_prefill(self, length: int) -> None:
        """Compiles the pooling of chunks of `length` tokens."""

    @abstractmethod
    def compile_decode(self, rows: int, pages: int) -> None:
        """Compiles what a batch of this size needs while its rows stay."""

    def compile_plain_decode(self, rows: int, pages: int) -> None:  # noqa: B027 - few models need it
        """Compiles the decode step without drafts of a batch that has one with drafts, if there is the choice."""

    def compile_monolithic_step(self, rows: int, pages: int) -> None:  # noqa: B027 - few models need it
        """Compiles the decode step of a small batch as one program, for models of which it is several otherwise."""

    @abstractmethod
    def compile_row_moves(self, rows: int, pages: int) -> None:
        """Compiles what rows need to leave a batch of this size or change to another, and to write their memories."""


def invalid_memory_setting(name: str, message: str) -> InvalidRequest:
    """The error of a setting of the memory."""
    return InvalidRequest(f"Validation error in field 'atlas.{name}': {message}", param=f"atlas.{name}")
