"""One session: what it has read, its state at the end of the last turns, and how that is written to a snapshot."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import jax
import numpy as np

from atlas_jax.config import PAGE
from atlas_jax.engine import snapshot
from atlas_jax.engine.api import MemoryInfo, SessionKey, SnapshotInvalid
from atlas_jax.engine.history import History
from atlas_jax.engine.state import Sequences
from atlas_jax.model.window import WindowPlan


@dataclass(frozen=True)
class SessionShape:
    """What a session keeps from its first request to its end.

    Attributes:
      plan: its window; none where the memory is the model's own.
      layers: tapped layers in use.
      degree: polynomial degree.
    """

    plan: WindowPlan
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

    def reachable(self, plan: WindowPlan) -> int:
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
    feed: list[int]


@dataclass
class Session:
    """A named conversation of one owner.

    Attributes:
      checkpoints: states at the ends of turns, oldest first; the last is the present one.
      pending: the last token the model drew, not read yet: it precedes new text that is appended.
      appended: the last turn, if it brought only new text: further choices of the same request answer it too.
      state: JSON a caller stored with it, or None.
      changed: counts changes, to tell whether a file is up to date.
    """

    key: SessionKey
    shape: SessionShape
    history: History = field(default_factory=History)
    checkpoints: list[Checkpoint] = field(default_factory=list)
    stats: SessionStats = field(default_factory=SessionStats)
    pending: int | None = None
    appended: Appended | None = None
    state: Any = None
    has_state: bool = False
    created: float = field(default_factory=time.time)
    last_used: float = field(default_factory=time.time)
    changed: int = 0

    def resume(self, keep: int) -> tuple[Checkpoint | None, int]:
        """The state from which to read on after the first `keep` tokens, and the position it will be at.

        A checkpoint at or after `keep` serves if it can be rolled back that far; else the latest before it; else none,
        which is the empty state at position 0.
        """
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


def encode_session(layout: Layout, session: Session) -> bytes:
    """Serialises a session's present state; earlier checkpoints are not kept."""
    header: dict[str, Any] = {
        **layout.header(),
        "owner": session.key.owner,
        "session_id": session.key.session_id,
        "window": session.shape.plan.window,
        "update": session.shape.plan.update,
        "layers": session.shape.layers,
        "degree": session.shape.degree,
        "length": session.history.length,
        "first_reply": session.history.first_reply,
        "pending": session.pending,
        "updates": session.stats.updates,
        "muon_iterations": session.stats.muon_iterations,
        "omega_loss": session.stats.omega_loss,
        "last_update": session.stats.last_update,
        "created": session.created,
        "last_used": session.last_used,
        "state": session.state,
        "has_state": session.has_state,
    }
    arrays: dict[str, np.ndarray] = {
        "history.tail": np.asarray(session.history.tail, np.int32),
        "history.digests": np.frombuffer(b"".join(session.history.digests), np.uint8),
    }
    if session.checkpoints:
        last = session.checkpoints[-1]
        header |= {"position": last.position, "page": last.page, "absorbed": last.absorbed}
        arrays |= layout.arrays(session.shape, last)
    return snapshot.encode(header, arrays)


def decode_session(layout: Layout, data: bytes) -> Session:
    """Reads a session back.

    Raises:
      SnapshotInvalid: it is damaged, or belongs to another model, memory or cache type; the message says which.
    """
    header, arrays = snapshot.decode(data)
    for name, wanted in layout.header().items():
        if header.get(name) != wanted:
            raise SnapshotInvalid(f"snapshot was made with another {BOUND[name]}")
    try:
        return _session(layout, header, arrays)
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise SnapshotInvalid("snapshot is damaged: its header does not describe a session") from error


BOUND = {"model": "model", "memory": "memory configuration", "adapter": "memory adapter", "kv_dtype": "cache type"}
"""What a snapshot is bound to, by the header's key."""


def _session(layout: Layout, header: Mapping[str, Any], arrays: Mapping[str, np.ndarray]) -> Session:
    shape = layout.shape(header)
    length = integer(header, "length", 0, 1 << 30)
    tail = snapshot.check_array(
        "history.tail", arrays.get("history.tail"), _any(arrays, "history.tail"), np.dtype("i4")
    )
    digests = arrays["history.digests"].tobytes()
    if len(tail) > length or len(digests) != length // PAGE * 8:
        raise SnapshotInvalid("snapshot's history does not add up")
    if tail.size and not (tail.min() >= 0 and tail.max() < layout.vocab):
        raise SnapshotInvalid("snapshot's history holds unknown tokens")
    reply = header["first_reply"]
    history = History(
        length=length,
        digests=[digests[i : i + 8] for i in range(0, len(digests), 8)],
        tail=[int(t) for t in tail],
        first_reply=None if reply is None else integer(header, "first_reply", 0, length),
    )
    checkpoints = []
    if "position" in header:
        position = integer(header, "position", length, length)
        page = integer(header, "page", (position - 1) // PAGE if position else -1, position // PAGE)
        row = layout.row(shape, position, page, arrays)
        checkpoints.append(Checkpoint(position, page, row, integer(header, "absorbed", 0, length)))
    elif length:
        raise SnapshotInvalid("snapshot has a history but no state")
    last_update, pending = header["last_update"], header["pending"]
    return Session(
        key=SessionKey(str(header["owner"]), str(header["session_id"])),
        shape=shape,
        history=history,
        checkpoints=checkpoints,
        stats=SessionStats(
            updates=integer(header, "updates", 0, 1 << 40),
            muon_iterations=integer(header, "muon_iterations", 0, 1 << 40),
            omega_loss=float(header["omega_loss"]),
            last_update=None if last_update is None else float(last_update),
        ),
        pending=None if pending is None else integer(header, "pending", 0, layout.vocab - 1),
        state=header["state"],
        has_state=bool(header["has_state"]),
        created=float(header["created"]),
        last_used=float(header["last_used"]),
    )


def integer(header: Mapping[str, Any], name: str, low: int, high: int) -> int:
    """A whole number of a header; raises SnapshotInvalid where it is none or out of range."""
    value = header[name]
    if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
        raise SnapshotInvalid(f"snapshot's '{name}' is out of range")
    return value


def _any(arrays: Mapping[str, np.ndarray], name: str) -> tuple[int, ...]:
    array = arrays.get(name)
    return () if array is None else array.shape[:1]
