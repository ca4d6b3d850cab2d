"""Sessions between host memory and the store: read with what their journals add, written as turns or as snapshots."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from dataclasses import replace

from atlas_jax.engine.api import MemoryUnavailable, SessionConflict, SessionNotFound, SnapshotInvalid, StorageFull
from atlas_jax.engine.sessions.codec import decode_session, encode_session
from atlas_jax.engine.sessions.entry import Entry, NewText
from atlas_jax.engine.sessions.index import SessionIndex
from atlas_jax.engine.sessions.journal import Origin, Turn
from atlas_jax.engine.sessions.layout import Layout
from atlas_jax.engine.sessions.replay import replay
from atlas_jax.engine.sessions.session import Session
from atlas_jax.engine.sessions.store import Store, StoredSession

log = logging.getLogger("atlas.engine")

MAX_CONTEXT_STATE = 4 << 20
"""Bytes of JSON that a caller may keep with a session."""
_DISK_SPEED = 100e6
"""Bytes a second that snapshots are written at, before any has been."""
_SLACK = 1 << 20
"""Bytes by which a snapshot may exceed what was counted for it: its history and header."""
_FULL_SECONDS = 5.0
"""Seconds after a write that found no room during which no session is begun or read where host memory is needed."""


class Persistence:
    """Reads and writes the sessions of one engine; thread-safe."""

    def __init__(self, layout: Layout, index: SessionIndex, store: Store | None) -> None:
        self._layout = layout
        self._index = index
        self._store = store
        self._seconds_per_byte = 1 / _DISK_SPEED
        self._full_until = 0.0

    @property
    def enabled(self) -> bool:
        """Whether there is a store."""
        return self._store is not None

    @property
    def shared(self) -> bool:
        """Whether other servers use the store at the same time."""
        return self._store is not None and self._store.shared

    def look(self, entry: Entry) -> None:
        """Asks a shared store for a session, which nobody else is using here; raises OSError."""
        began = time.monotonic()
        stored = entry.stored or entry.vacant or self.store().session(entry.key)
        changed = stored.changed()
        self._index.looked(entry, stored, stored.found(), changed=changed, began=began)

    def store(self) -> Store:
        """The store; raises MemoryUnavailable where there is none."""
        if self._store is None:
            raise MemoryUnavailable("Memory persistence is not enabled")
        return self._store

    @property
    def largest(self) -> int:
        """More bytes than any honest snapshot has."""
        return 2 * self._layout.largest_snapshot + 2 * MAX_CONTEXT_STATE

    def read(self, entry: Entry) -> Session:
        """A session from the store, as its journal says it has gone on.

        Raises:
          SnapshotInvalid, OSError: it cannot be read.
          SessionConflict: another server has deleted it meanwhile.
        """
        stored = entry.stored
        if stored is None:
            raise SessionNotFound("No such session")
        data, journal = stored.read(self.largest)
        if data is not None:
            session = decode_session(self._layout, data, stored.generation)
        elif journal is not None:
            session = Session(entry.key, self._layout.default_shape, created=journal.origin.created)
        elif self.shared:
            raise SessionConflict("Another server has deleted this session meanwhile: send the request again")
        else:
            raise SnapshotInvalid("snapshot and journal are gone")
        if session.key != entry.key or (journal is not None and journal.origin.model != self._layout.fingerprint):
            raise SnapshotInvalid("snapshot belongs to another session")
        return session if journal is None else replay(self._layout, session, journal.turns)

    def write(self, entry: Entry, session: Session, *, anew: bool = False) -> None:
        """Writes a session's snapshot unless something newer is stored, or it was deleted meanwhile.

        Args:
          anew: it goes on from nothing that is stored, and takes its place.

        Raises:
          StorageFull, OSError: nothing was changed.
          SessionConflict: another server has gone on with it.
        """
        data = encode_session(self._layout, session)
        with self._index.lock:
            if not self._index.holds(entry):
                return
            stored = self._stored(entry)
            self._index.usage.check_disk(entry.key.owner, len(data) - entry.charged - _SLACK)
        started = time.monotonic()
        if stored.write(session.generation, data, after=None if anew else session.after):
            with self._index.lock:
                took = (time.monotonic() - started) / len(data)
                self._seconds_per_byte += 0.5 * (took - self._seconds_per_byte)
                entry.written = max(entry.written, session.generation)
                self._index.counters.saves += 1
                self._index.usage.count(entry)
                self._full_until = 0.0

    def move(self, entry: Entry, place: Entry, session: Session, after: int) -> None:
        """Makes what is stored of a session that of another name.

        Args:
          place: of the other name, of which nothing is stored.
          session: as it is from now on, with the other name.
          after: its generation until now.

        Raises:
          StorageFull, OSError: nothing was changed.
          SessionConflict: another server has changed one of the two meanwhile.
          SnapshotInvalid: its save point is damaged.
        """
        old = entry.stored
        if old is None:
            self.write(place, session)
            return
        saved = old.read_saved(self.largest)
        if saved is not None:
            saved = encode_session(self._layout, replace(decode_session(self._layout, saved), key=place.key))
        data = encode_session(self._layout, session)
        with self._index.lock:
            stored = self._stored(place)
            self._index.usage.check_disk(place.key.owner, len(data) + len(saved or b"") - entry.charged - _SLACK)
        old.move(stored, session.generation, data, saved, after=after)
        with self._index.lock:
            place.written = session.generation
            self._index.counters.saves += 1

    def write_turn(self, entry: Entry, session: Session, before: int, text: NewText) -> StoredSession | None:
        """Adds a turn to a session's journal, or writes a snapshot where the journal cannot hold it.

        Args:
          session: as the turn has left it.
          before: generation of the session before it.

        Returns:
          What is to be synced; None where the session was deleted meanwhile.

        Raises:
          StorageFull, OSError: nothing was changed.
          SessionConflict: another server has gone on with the session.
        """
        with self._index.lock:
            if not self._index.holds(entry):
                return None
            stored = self._stored(entry)
        history = session.history
        origin = Origin(self._layout.fingerprint, entry.key.owner, entry.key.session_id, session.created)

        def turn(keep: int, tokens: Sequence[int]) -> Turn:
            return Turn(
                generation=session.generation,
                after=before,
                keep=keep,
                tokens=tokens,
                replies=[reply for reply in history.replies if reply[0] >= keep],
                preamble=history.preamble,
                pending=session.pending,
                reading=text.reading,
                time=session.last_used,
            )

        fits = stored.append(origin, turn(text.keep, text.tokens))
        if not fits and text.whole is not None:
            fits = stored.append(origin, turn(0, text.whole()))
        if not fits:
            self.write(entry, session)
        with self._index.lock:
            entry.written = max(entry.written, session.generation)
        return stored

    def _stored(self, entry: Entry) -> StoredSession:
        if entry.stored is None:
            entry.stored, entry.vacant = entry.vacant or self.store().session(entry.key), None
        return entry.stored

    def write_changed(self, until: float | None = None) -> int:
        """Writes a snapshot of every session whose journal has gone on; returns how many are left.

        Args:
          until: `time.monotonic()` at which to give up; what is left stays in the journals.
        """
        with self._index.lock:
            changed = [(entry, entry.session) for entry in self._index.entries() if not entry.is_clean]
        left, failures = 0, list[OSError | StorageFull]()
        for entry, session in changed:
            if session is None:
                continue
            if until is not None and time.monotonic() + self.seconds_of(entry.listing.bytes) > until:
                left += 1
                continue
            try:
                self.write(entry, session)
            except SessionConflict:
                with self._index.lock:
                    if not entry.busy:  # else its request finds out
                        self._index.let_go(entry)
            except (StorageFull, OSError) as error:
                left += 1
                failures.append(error)
                self.note_failure(error)
        if failures:  # a full disk fails all of them, at every interval
            log.error("[ATLAS] Failed to save %d of %d sessions: %s", len(failures), len(changed), reason(failures[0]))
        return left

    def seconds_of(self, size: int) -> float:
        """How long so many bytes take at the speed at which snapshots were written."""
        return size * self._seconds_per_byte

    def note_failure(self, error: Exception) -> None:
        """Counts a write that failed; where the disk was full, host memory takes no new session for a while."""
        with self._index.lock:
            self._index.counters.failures += 1
            if isinstance(error, StorageFull):
                self._full_until = time.monotonic() + _FULL_SECONDS

    @property
    def is_full(self) -> bool:
        """Whether the last write, a moment ago, found no room."""
        return time.monotonic() < self._full_until


def reason(error: Exception) -> str:
    """What an error says without the path it happened at."""
    if isinstance(error, OSError):
        return error.strerror or type(error).__name__
    return str(error)
