"""One session: its text, its state at the end of the last turns, and both as a snapshot and a journal keep them."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import jax
import msgspec
import numpy as np

from atlas_jax.config import PAGE
from atlas_jax.engine.api import MemoryInfo, SessionKey, SnapshotInvalid
from atlas_jax.engine.runner.decode_state import Sequences
from atlas_jax.engine.sessions import snapshot
from atlas_jax.engine.sessions.history import History
from atlas_jax.engine.sessions.journal import Reading, Turn
from atlas_jax.engine.sessions.snapshot import Head, Listing
from atlas_jax.model.page_schedule import PageSchedule


@dataclass(frozen=True)
class SessionShape:
    """What a session keeps from its first request to its end.

    Attributes:
      plan: its window; none where the memory is the model's own.
      layers: tapped layers in use.
      degree: polynomial degree.
    """

    plan: PageSchedule
    layers: int
    degree: int


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
        """Size of the arrays."""
        return sum(leaf.nbytes for leaf in jax.tree.leaves(self.row))

    def reachable(self, plan: PageSchedule) -> int:
        """The earliest position this state can be rolled back to for nothing: the window still holds what was seen."""
        if plan.window is None:  # what a model's own memory has read cannot be taken back
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
    """A named conversation of one owner; not changed any more once it has been given to the table.

    Attributes:
      history: the text its state has read.
      unread: the text after that.
      checkpoints: states at the ends of turns, oldest first; the last is the present one.
      preamble: of its whole text, see `History.preamble`.
      pending: the last token the model drew, not read yet: it precedes new text that is appended.
      appended: the last turn, if it brought only new text: further choices of the same request answer it too.
      state: JSON text a caller stored with it, or None.
      generation: orders what was ever done to it; see `snapshot.Listing`.
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

    @property
    def tokens(self) -> int:
        """Length of its text."""
        return self.history.length + sum(len(part.tokens) for part in self.unread)

    @property
    def size(self) -> int:
        """Bytes it takes of main memory."""
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
        """The text from position `insert_decode_state`, which is not after what its state has read, to `end`; None if not known."""
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
            elif checkpoint.reachable(self.shape.plan) <= keep:
                position = keep
            else:
                continue
            if position >= best[1] and (position == 0 or position >= self.history.tail_start):
                best = (checkpoint, position)
        return best

    def floor(self) -> int:
        """The earliest position the present state can be set back to."""
        if not self.checkpoints:
            return 0
        return max(self.checkpoints[-1].reachable(self.shape.plan), self.history.tail_start)


def to_host(row: Sequences) -> Sequences:
    """The same row as NumPy arrays."""
    return jax.tree.map(np.asarray, row)


class Layout(Protocol):
    """What a snapshot must match to be loaded by an engine, and how the state of its sessions becomes arrays."""

    @property
    def fingerprint(self) -> str:
        """Identifies the model."""

    @property
    def vocab(self) -> int:
        """Tokens of the vocabulary."""

    @property
    def default_shape(self) -> SessionShape:
        """Shape of a session that has read nothing yet; its first request replaces it."""

    @property
    def capacity(self) -> int:
        """Independent pairs that one session's memory can hold."""

    @property
    def largest_window(self) -> int:
        """Tokens of the largest window this engine has room for."""

    @property
    def largest_snapshot(self) -> int:
        """Bytes of the largest snapshot this engine could write, a little rounded up."""

    def header(self) -> dict[str, Any]:
        """The part of a snapshot's header that binds it to this engine; its keys are those of `BOUND`."""

    def shape(self, header: Mapping[str, Any]) -> SessionShape:
        """The shape a header describes; raises SnapshotInvalid."""

    def arrays(self, shape: SessionShape, checkpoint: Checkpoint) -> dict[str, np.ndarray]:
        """A state as arrays."""

    def row(self, shape: SessionShape, position: int, page: int, arrays: Mapping[str, np.ndarray]) -> Sequences:
        """The state again, on the host; raises SnapshotInvalid for an array this engine would not have made."""

    def describe(self, sessions: list[Session]) -> MemoryInfo:
        """What the memories of some sessions hold, together."""


def listing_of(session: Session) -> Listing:
    """What can be said of a session without reading its state."""
    last = session.checkpoints[-1] if session.checkpoints else None
    plan = session.shape.plan
    fill = 0
    if last is not None and plan.window is not None:
        fill = last.position - plan.left(max(last.page, 0)) * PAGE
    return Listing(
        owner=session.key.owner,
        session_id=session.key.session_id,
        generation=session.generation,
        tokens=session.tokens,
        floor=session.floor(),
        bytes=session.size,
        created=session.created,
        last_used=session.last_used,
        has_state=session.state is not None,
        window=0 if plan.window is None else plan.window * PAGE,
        window_fill=fill,
        absorbed=0 if last is None else last.absorbed,
        updates=session.stats.updates,
        last_update=session.stats.last_update,
    )


def encode_session(layout: Layout, session: Session) -> bytes:
    """Serialises a session's present state and what it has not read yet; earlier checkpoints are not kept."""
    history = session.history
    header: dict[str, Any] = {
        "window": session.shape.plan.window,
        "update": session.shape.plan.update,
        "layers": session.shape.layers,
        "degree": session.shape.degree,
        "length": history.length,
        "first_reply": history.first_reply,
        "replies": history.replies,
        "preamble": session.text().preamble,
        "unread": [[len(part.tokens), part.reading, part.replies] for part in session.unread],
        "pending": session.pending,
        "updates": session.stats.updates,
        "muon_iterations": session.stats.muon_iterations,
        "omega_loss": session.stats.omega_loss,
        "last_update": session.stats.last_update,
        "state": None if session.state is None else msgspec.Raw(session.state),
        "has_state": session.state is not None,
    }
    arrays: dict[str, np.ndarray] = {
        "history.tail": np.asarray(history.tail, np.int32),
        "history.digests": np.frombuffer(b"".join(history.digests), np.uint8),
        "unread": np.asarray([token for part in session.unread for token in part.tokens], np.int32),
    }
    if session.checkpoints:
        last = session.checkpoints[-1]
        header |= {"position": last.position, "page": last.page, "absorbed": last.absorbed}
        arrays |= layout.arrays(session.shape, last)
    return snapshot.encode(listing_of(session), layout.header(), header, arrays)


def check_bound(layout: Layout, head: Head) -> None:
    """Raises SnapshotInvalid for a snapshot that another model, memory or cache type has made; the message says which."""
    for name, wanted in layout.header().items():
        if head.bound.get(name) != wanted:
            raise SnapshotInvalid(f"snapshot was made with another {BOUND[name]}")
    if head.listing.window > layout.largest_window:
        raise SnapshotInvalid(f"snapshot's window of {head.listing.window} tokens exceeds this server's largest")


def decode_session(layout: Layout, data: bytes, generation: int | None = None) -> Session:
    """Reads a session back.

    Args:
      generation: the session's, where it is another than when the snapshot was made.

    Raises:
      SnapshotInvalid: it is damaged, or belongs to another model, memory or cache type; the message says which.
    """
    head, header, arrays = snapshot.decode(data)
    check_bound(layout, head)
    if generation is not None:
        head = snapshot.with_generation(head, generation)
    try:
        return _session(layout, head.listing, header, arrays)
    except (KeyError, TypeError, ValueError, OverflowError, msgspec.MsgspecError) as error:
        raise SnapshotInvalid("snapshot is damaged: its header does not describe a session") from error


BOUND = {"model": "model", "memory": "memory configuration", "adapter": "memory adapter", "kv_dtype": "cache type"}
"""What a snapshot is bound to, by the header's key."""


def _session(layout: Layout, listing: Listing, header: Mapping[str, Any], arrays: Mapping[str, np.ndarray]) -> Session:
    shape = layout.shape(header)
    length = integer(header, "length", 0, 1 << 30)
    tail = _tokens(layout, arrays, "history.tail")
    digests = arrays["history.digests"].tobytes()
    if len(tail) > length or len(digests) != length // PAGE * 8:
        raise SnapshotInvalid("snapshot's history does not add up")
    reply = header["first_reply"]
    history = History(
        length=length,
        digests=[digests[i : i + 8] for i in range(0, len(digests), 8)],
        tail=tail,
        first_reply=None if reply is None else integer(header, "first_reply", 0, length),
        replies=_replies(header["replies"]),
        preamble=msgspec.convert(header["preamble"], tuple[int, bytes] | None),
    )
    checkpoints = []
    if "position" in header:
        position = integer(header, "position", 0, 1 << 30)
        page = integer(header, "page", (position - 1) // PAGE if position else -1, position // PAGE)
        row = layout.row(shape, position, page, arrays)
        checkpoints.append(Checkpoint(position, page, row, integer(header, "absorbed", 0, position)))
        if not checkpoints[0].reachable(shape.plan) <= length <= position:
            raise SnapshotInvalid("snapshot's state does not lie at the end of its history")
    elif length:
        raise SnapshotInvalid("snapshot has a history but no state")
    last_update, pending = header["last_update"], header["pending"]
    return Session(
        key=SessionKey(listing.owner, listing.session_id),
        shape=shape,
        history=history,
        unread=_unread(layout, header, arrays),
        preamble=history.preamble,
        checkpoints=checkpoints,
        stats=SessionStats(
            updates=integer(header, "updates", 0, 1 << 40),
            muon_iterations=integer(header, "muon_iterations", 0, 1 << 40),
            omega_loss=float(header["omega_loss"]),
            last_update=None if last_update is None else float(last_update),
        ),
        pending=None if pending is None else integer(header, "pending", 0, layout.vocab - 1),
        state=msgspec.json.encode(header["state"]) if header["has_state"] else None,
        created=listing.created,
        last_used=listing.last_used,
        generation=listing.generation,
    )


def _replies(given: Any) -> list[tuple[int, int]]:
    replies = msgspec.convert(given, list[tuple[int, int]])
    if any(not 0 <= start <= end < 1 << 31 for start, end in replies):
        raise SnapshotInvalid("snapshot's history does not add up")
    return replies


def _tokens(layout: Layout, arrays: Mapping[str, np.ndarray], name: str) -> list[int]:
    given = arrays.get(name)
    array = snapshot.check_array(name, given, () if given is None else given.shape[:1], np.dtype("i4"))
    if array.size and not (array.min() >= 0 and array.max() < layout.vocab):
        raise SnapshotInvalid(f"snapshot's '{name}' holds unknown tokens")
    tokens: list[int] = array.tolist()
    return tokens


def _unread(layout: Layout, header: Mapping[str, Any], arrays: Mapping[str, np.ndarray]) -> tuple[Unread, ...]:
    tokens, parts, start = _tokens(layout, arrays, "unread"), [], 0
    for count, reading, replies in msgspec.convert(header["unread"], list[tuple[int, Reading, list[Any]]]):
        layout.shape(msgspec.structs.asdict(reading))
        parts.append(Unread(tokens[start : start + count], reading, _replies(replies)))
        start += count
    if start != len(tokens) or not all(part.tokens for part in parts):
        raise SnapshotInvalid("snapshot's unread text does not add up")
    return tuple(parts)


def replay(layout: Layout, session: Session, turns: Sequence[Turn]) -> Session:
    """A session as its journal says it has gone on; its state has not read the new text yet.

    Raises:
      SnapshotInvalid: the journal does not continue this session.
    """
    new = [turn for turn in turns if turn.generation > session.generation]
    if not new:
        return session
    if new[0].after != session.generation:
        raise SnapshotInvalid("journal does not continue the snapshot: a turn is missing")
    base = session.tokens
    parts = list(session.unread)
    start = session.history.length
    for turn in new:
        _check_turn(layout, turn, base)
        if turn.keep < start:
            if turn.keep and turn.keep < session.floor():
                raise SnapshotInvalid("journal goes back further than its snapshot can")
            start, parts = turn.keep, []
        else:
            parts = _first(parts, start, turn.keep)
        if turn.tokens:
            parts.append(Unread(turn.tokens, turn.reading, turn.replies))
        base = turn.keep + len(turn.tokens)
    last = new[-1]
    history = session.history.copy()
    history.truncate(start)
    reading = last.reading
    return replace(
        session,
        shape=layout.shape(msgspec.structs.asdict(reading)) if not start else session.shape,
        history=history,
        unread=tuple(parts),
        checkpoints=list(session.checkpoints) if start else [],
        stats=session.stats if start else SessionStats(),
        preamble=last.preamble,
        pending=last.pending,
        last_used=last.time,
        generation=last.generation,
    )


def _check_turn(layout: Layout, turn: Turn, length: int) -> None:
    if not 0 <= turn.keep <= length or not all(0 <= token < layout.vocab for token in turn.tokens):
        raise SnapshotInvalid("journal is damaged: a turn does not fit the text before it")
    if turn.pending is not None and not 0 <= turn.pending < layout.vocab:
        raise SnapshotInvalid("journal is damaged: it holds unknown tokens")


def _first(parts: Sequence[Unread], start: int, end: int) -> list[Unread]:
    """The parts, of which the first begins at position `insert_decode_state`, as far as `end`."""
    out: list[Unread] = []
    for part in parts:
        if start >= end:
            break
        out.append(part.first(end - start, end))
        start += len(part.tokens)
    return out


def integer(header: Mapping[str, Any], name: str, low: int, high: int) -> int:
    """A whole number of a header; raises SnapshotInvalid where it is none or out of range."""
    value = header[name]
    if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
        raise SnapshotInvalid(f"snapshot's '{name}' is out of range")
    return value
