"""One session: its text and its state at the ends of its last turns."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from atlas_jax.config import PAGE
from atlas_jax.engine.api import SessionKey
from atlas_jax.engine.runner.decode_state import Sequences
from atlas_jax.engine.sessions.history import History
from atlas_jax.engine.sessions.host_arrays import held_bytes
from atlas_jax.engine.sessions.journal import Reading
from atlas_jax.engine.sessions.lora import LoraScales
from atlas_jax.model.kept_pairs import kept_count
from atlas_jax.model.page_schedule import PageSchedule

_CHECKPOINTS = 3
"""States a session keeps to be rolled back to, the present one included."""


@dataclass(frozen=True)
class SessionShape:
    """What a session keeps from its first request to its end.

    Attributes:
      plan: its window; none where the memory is the model's own.
      layers: tapped layers in use.
      degree: polynomial degree.
      kept: the most pairs it keeps per layer and KV head of what has left its window, on average.
      budget: bytes that its parts had to fit into.
      capacities: the most pairs of each layer; empty where all keep as many.
      rewinds: whether a state can be set back within its window: not where the model itself keeps a state of what it read.
      lora: the LoRA adapters that its text is read with.
    """

    plan: PageSchedule
    layers: int
    degree: int
    kept: int = 0
    budget: int = 0
    capacities: tuple[int, ...] = ()
    rewinds: bool = True
    lora: LoraScales = ()

    def held(self, page: int) -> int:
        """Pairs kept per layer and KV head, on average, of a text whose last page is `page`."""
        left = self.plan.left(max(page, 0))
        counts = [kept_count(left, most) for most in self.capacities if most] or [kept_count(left, self.kept)]
        return sum(counts) // len(counts)


@dataclass(frozen=True)
class Checkpoint:
    """A session's state at one position; immutable.

    Attributes:
      position: tokens read.
      page: the last page that has begun, −1 before the first.
      row: the state, on the device or on the host.
      absorbed: tokens written to the memory so far.
    """

    position: int
    page: int
    row: Sequences
    absorbed: int

    @property
    def bytes(self) -> int:
        """Size of the arrays; what was never written takes none (`Layout.rest`)."""
        return held_bytes(self.row)

    def kept(self, shape: SessionShape) -> int:
        """Pairs kept per layer and KV head, on average."""
        return shape.held(self.page)

    def at(self, position: int) -> Checkpoint:
        """The same state rolled back to a position it reaches, where it stands for none of the text after that."""
        if position >= self.position:
            return self
        return replace(self, position=position, page=min(self.page, position // PAGE))

    def reachable(self, shape: SessionShape) -> int:
        """The earliest position this state can be rolled back to for nothing: the window still holds what was seen."""
        plan = shape.plan
        if not shape.rewinds:
            return self.position
        if self.page < 0:
            return 0
        page = self.page
        while page > 0 and plan.left(page - 1) == plan.left(self.page):
            page -= 1
        return page * PAGE


@dataclass
class SessionStats:
    """Counters of one session."""

    updates: int = 0
    muon_iterations: int = 0
    omega_loss: float = 0.0
    last_update: float | None = None


@dataclass(frozen=True)
class Appended:
    """New text a turn brought: where the session was before it, and what was read from there."""

    prompt: list[int]
    position: int
    tokens: list[int]


@dataclass(frozen=True)
class Unread:
    """Text that belongs to a session and that its state has not read yet, as a journal gives it back.

    Attributes:
      reading: how it is to be read.
      replies: where in the session's whole text the model's words in it are.
    """

    tokens: Sequence[int]
    reading: Reading
    replies: Sequence[tuple[int, int]] = ()

    def first(self, count: int, end: int) -> Unread:
        """Its first `count` tokens, which end at position `end`."""
        if count >= len(self.tokens):
            return self
        kept = tuple((start, min(stop, end)) for start, stop in self.replies if start <= end)
        return Unread(self.tokens[:count], self.reading, kept)


@dataclass
class Session:
    """A named conversation of one owner; not changed any more once it has been committed.

    Attributes:
      history: the text its state has read.
      unread: the text after that.
      checkpoints: states of this text at the ends of turns, oldest first; the last is the present one.
      preamble: of its whole text, see `History.preamble`.
      pending: the last token the model drew, not read yet: it precedes new text that is appended.
      appended: the last turn, if it brought only new text: further choices of the same request answer it too.
      state: JSON text a caller stored with it, or None.
      generation: orders what was ever done to it; see `snapshot.Listing`.
      after: the newest generation before it that the store has had.
    """

    key: SessionKey
    shape: SessionShape
    history: History = field(default_factory=History)
    unread: tuple[Unread, ...] = ()
    preamble: tuple[int, bytes] | None = None
    checkpoints: list[Checkpoint] = field(default_factory=list)
    stats: SessionStats = field(default_factory=SessionStats)
    pending: int | None = None
    appended: Appended | None = None
    state: bytes | None = None
    created: float = field(default_factory=time.time)
    last_used: float = field(default_factory=time.time)
    generation: int = 0
    after: int = 0

    @property
    def tokens(self) -> int:
        """Length of its text."""
        return self.history.length + sum(len(part.tokens) for part in self.unread)

    @property
    def size(self) -> int:
        """Bytes it takes of host memory."""
        return sum(checkpoint.bytes for checkpoint in self.checkpoints) + len(self.state or b"")

    def text(self) -> History:
        """Its whole text."""
        if not self.unread:
            return self.history
        whole = self.history.copy()
        for part in self.unread:
            for reply in part.replies:
                whole.answered(*reply)
            whole.extend(part.tokens)
        whole.preamble = self.preamble
        return whole

    def between(self, start: int, end: int) -> list[int] | None:
        """The text from position `start`, which its state has read, to `end`; None if it is not known."""
        if start < self.history.tail_start and start < min(end, self.history.length):
            return None
        read = min(end, self.history.length)
        out = self.history.tokens(start, read) if start < read else []
        for part in self.unread:
            out.extend(part.tokens[: max(0, end - read)])
            read += len(part.tokens)
        return out

    def resume(self, keep: int) -> tuple[Checkpoint | None, int]:
        """The state from which to read on after the first `keep` tokens, and the position it will be at.

        A checkpoint at or after `keep` serves if it can be rolled back that far; else the latest before it; else none,
        which is the empty state at position 0. What has not been read yet is never before that position.
        """
        keep = min(keep, self.history.length)
        best: tuple[Checkpoint | None, int] = (None, 0)
        for checkpoint in self.checkpoints:
            if checkpoint.position <= keep:
                position = checkpoint.position
            elif checkpoint.reachable(self.shape) <= keep:
                position = keep
            else:
                continue
            if position >= best[1] and (position == 0 or position >= self.history.tail_start):
                best = (checkpoint, position)
        return best

    def state_at(self, position: int) -> Checkpoint | None:
        """A state that has read the text up to exactly this position, or can be rolled back to it; None is the empty one."""
        shape = self.shape
        reaching = (one for one in reversed(self.checkpoints) if one.reachable(shape) <= position <= one.position)
        return next(reaching, None) if position else None

    def roll_back(self, checkpoint: Checkpoint, position: int) -> None:
        """Keeps of the states what they have read up to `position`, from where `checkpoint` goes on."""
        self.checkpoints = [
            one.at(position) for one in self.checkpoints if one.position <= position or one is checkpoint
        ]

    def advance(self, checkpoint: Checkpoint) -> None:
        """Makes a state the present one, and keeps of the earlier ones the last that it cannot be rolled back to itself."""
        start = checkpoint.reachable(self.shape)
        earlier = [one for one in self.checkpoints if one.reachable(self.shape) < start]
        self.checkpoints = [*earlier[-(_CHECKPOINTS - 1) :], checkpoint]

    def floor(self) -> int:
        """The earliest position the present state can be rolled back to."""
        if not self.checkpoints:
            return 0
        return max(self.checkpoints[-1].reachable(self.shape), self.history.tail_start)
