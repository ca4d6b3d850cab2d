"""A session as a snapshot, and back: the header and the arrays that `snapshot` puts into a file."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgspec
import numpy as np

from atlas_jax.config import PAGE
from atlas_jax.engine.api import SessionKey, SnapshotInvalid
from atlas_jax.engine.sessions import snapshot
from atlas_jax.engine.sessions.history import History
from atlas_jax.engine.sessions.journal import Reading
from atlas_jax.engine.sessions.layout import Layout, check_bound, integer
from atlas_jax.engine.sessions.session import Checkpoint, Session, SessionStats, Unread
from atlas_jax.engine.sessions.snapshot import Listing


def listing_of(session: Session) -> Listing:
    """What can be said of a session without reading its state."""
    last = session.checkpoints[-1] if session.checkpoints else None
    shape, plan = session.shape, session.shape.plan
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
        ring=plan.room * PAGE,
        kept=0 if last is None else last.kept(shape),
        kept_capacity=shape.kept,
        budget=shape.budget,
        lora=tuple(digest for digest, _ in shape.lora),
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
        "kept": session.shape.kept,
        "budget": session.shape.budget,
        "lora": session.shape.lora,
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
        if not checkpoints[0].reachable(shape) <= length <= position:
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
