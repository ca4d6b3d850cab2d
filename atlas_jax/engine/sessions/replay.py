"""A session as its journal says it has gone on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import msgspec

from atlas_jax.engine.api import SnapshotInvalid
from atlas_jax.engine.sessions.journal import Turn
from atlas_jax.engine.sessions.layout import Layout
from atlas_jax.engine.sessions.session import Session, SessionStats, Unread


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
    """The parts, of which the first begins at position `start`, as far as `end`."""
    out: list[Unread] = []
    for part in parts:
        if start >= end:
            break
        out.append(part.first(end - start, end))
        start += len(part.tokens)
    return out
