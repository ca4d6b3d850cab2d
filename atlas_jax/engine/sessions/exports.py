"""Exports in the store: all sessions of an owner in one file, written and brought in again.

The default export is read at start and written from time to time and at the end; others when a client asks for them. None
is ever the only copy of a session.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

from atlas_jax.engine.api import (
    SaveResult,
    SessionConflict,
    SessionKey,
    SessionNotFound,
    SetAside,
    SnapshotInvalid,
    StoredFile,
)
from atlas_jax.engine.sessions import archive
from atlas_jax.engine.sessions.codec import decode_session, encode_session
from atlas_jax.engine.sessions.entry import Entry
from atlas_jax.engine.sessions.index import SessionIndex
from atlas_jax.engine.sessions.layout import Layout
from atlas_jax.engine.sessions.persistence import Persistence
from atlas_jax.engine.sessions.session import Session
from atlas_jax.engine.sessions.snapshot import Listing
from atlas_jax.engine.sessions.store import digest
from atlas_jax.engine.sessions.tiers import SessionTiers

log = logging.getLogger("atlas.engine")

_SHARE = 10
"""An export that nobody asked for is not repeated before this many times as long as it took has passed."""
File = tuple[str, str]
"""An export: its owner and its name."""


class Exports:
    """Writes and reads the exports of an engine; thread-safe.

    Attributes:
      default_file: name of the export that is read at start.
    """

    def __init__(
        self, layout: Layout, index: SessionIndex, persistence: Persistence, tiers: SessionTiers, default_file: str
    ) -> None:
        self.default_file = default_file
        self._layout = layout
        self._index = index
        self._persistence = persistence
        self._tiers = tiers
        self._stamps: dict[File, int] = {}
        self._readable: set[File] = set()
        self._set_aside: dict[str, dict[str, str]] = {}
        self._next: dict[str, float] = {}
        self._writing: dict[File, threading.Lock] = {}

    def files(self, owner: str) -> tuple[StoredFile, ...]:
        """The owner's exports."""
        return self._persistence.store().exports(owner) if self._persistence.enabled else ()

    def set_aside(self, owner: str) -> list[SetAside]:
        """Those that could not be read, in full or at all, with the reason."""
        with self._index.lock:
            found = self._set_aside.get(owner, {}).items()
            return [SetAside(name=name, kind="file", reason=reason) for name, reason in found]

    # --- writing --------------------------------------------------------------------------------------------------
    def save(self, owner: str, filename: str | None, *, deadline: float | None = None) -> SaveResult:
        """Writes every session of the owner into one export.

        A request that is running is not waited for: its session is saved as it was before. Nothing is written if
        nothing has changed since the same file was last written. A file that could not be read in full is not written
        over: it is moved aside.

        Args:
          deadline: `time.monotonic()` at which to give up.

        Raises:
          StorageFull, MemoryUnavailable: as `api.SessionStore`.
          TimeoutError: it was not written in time; the old file is there.
        """
        name = filename or self.default_file
        with self._index.lock:
            writing = self._writing.setdefault((owner, name), threading.Lock())
        # one after the other: an older list of sessions written last would bring back what was deleted in between
        if not writing.acquire(timeout=-1 if deadline is None else max(0.0, deadline - time.monotonic())):
            raise TimeoutError("Another export was being written")
        try:
            return self._save(owner, name, deadline)
        finally:
            writing.release()

    def _save(self, owner: str, name: str, deadline: float | None) -> SaveResult:
        store = self._persistence.store()
        old = store.find_export(owner, name)
        with self._index.lock:
            chosen = [entry for entry in self._index.entries(owner) if entry.problem is None]
            stamp = hash(tuple(sorted((entry.key.session_id, entry.listing.generation) for entry in chosen)))
            generation = self._index.next_generation()
            if old is not None and self._stamps.get((owner, name)) == stamp:
                return _saved(name, old.bytes, len(chosen))
            size = sum(entry.listing.bytes if entry.session else entry.stored_bytes for entry in chosen)
        try:
            self._move_aside_unreadable(owner, name)
            old = store.find_export(owner, name)
            with self._index.lock:
                self._index.usage.check_disk(owner, size - (0 if old is None else old.bytes))
            with store.write_export(owner, name) as file:
                written, count = archive.write(file, self._layout.fingerprint, self._members(chosen, deadline))
        except Exception as error:
            if not isinstance(error, TimeoutError):
                self._persistence.note_failure(error)
            raise
        with self._index.lock:
            self._stamps[owner, name] = stamp
            self._readable.add((owner, name))
            self._index.counters.saves += 1
        self._count(owner)
        if name == self.default_file:
            store.forget_deletions(owner, generation)
        return _saved(name, written, count)

    def _members(self, chosen: Sequence[Entry], deadline: float | None) -> Iterator[tuple[Listing, bytes]]:
        for entry in chosen:
            if deadline is not None and time.monotonic() > deadline:
                raise TimeoutError("An export took too long")
            with self._index.lock:
                session, listing = entry.session, entry.listing
                if not self._index.holds(entry):  # deleted meanwhile
                    continue
            try:
                if session is None and entry.stored is not None and entry.stored.generation == listing.generation:
                    data, _ = entry.stored.read(self._persistence.largest)
                    if data is not None:
                        yield listing, data
                        continue
                session = session or self._persistence.read(entry)
            except (SnapshotInvalid, SessionConflict, FileNotFoundError) as error:  # the others are saved all the same
                log.error("[ATLAS] Session %r is left out of an export: %s", entry.key.session_id, error)
                continue
            yield listing, encode_session(self._layout, session)

    def save_default(self, owner: str, *, timeout: float | None = None) -> SaveResult | None:
        """Writes the owner's default export, unless the last one took so long that it is not its turn yet.

        Args:
          timeout: seconds it may take; None where it costs nothing to wait.
        """
        started = time.monotonic()
        if self._persistence.shared:  # whose servers would write one over the other, and nothing needs the copy
            return None
        if started < self._next.get(owner, 0.0):
            return None
        size = sum(entry.listing.bytes for entry in self._index.entries(owner))
        if timeout is not None and self._persistence.seconds_of(size) > timeout / 2:
            return None
        try:
            saved = self.save(owner, None, deadline=None if timeout is None else started + timeout / 2)
        except TimeoutError:
            return None
        took = time.monotonic() - started
        self._next[owner] = time.monotonic() + _SHARE * took
        return saved

    # --- reading --------------------------------------------------------------------------------------------------
    def load(self, owner: str, filename: str) -> int:
        """Replaces the owner's sessions by those in an export; every one is checked before any is replaced.

        Raises:
          SessionNotFound: no such file.
          SnapshotInvalid: the export, or a session in it, is damaged or made by another model.
        """
        store = self._persistence.store()
        # what was deleted since the default file was written stays deleted; another file is loaded as it is
        deleted = store.deletions(owner) if filename == self.default_file else {}
        try:
            with self._opened(owner, filename) as reader:
                known = reader.manifest.sessions
                wanted = [one for one in known if one.generation > deleted.get(digest(one.session_id), 0)]
                for listing in wanted:
                    self._decode(owner, listing, reader)
                self._readable.add((owner, filename))
                for listing in wanted:
                    with self._tiers.held(SessionKey(owner, listing.session_id), create=True, damaged=True) as entry:
                        self._bring_in(owner, listing, reader, entry)
        except FileNotFoundError as error:
            raise SessionNotFound("No such file") from error
        with self._index.lock:
            self._index.counters.loads += 1
        return len(wanted)

    def load_default(self, owner: str) -> int | None:
        """Brings in what the owner's default export has that is newer than what is stored; None where there is no file.

        A session that cannot be brought in is set aside with its reason, and so is the file before it is written over.
        """
        store, name = self._persistence.store(), self.default_file
        if store.shared:
            self._count(owner)
            return None
        deleted = store.deletions(owner)
        count = 0
        self._count(owner)
        try:
            with self._opened(owner, name) as reader:
                for listing in reader.manifest.sessions:
                    key = SessionKey(owner, listing.session_id)
                    entry = self._index.get(key)
                    known = 0 if entry is None else entry.listing.generation
                    if listing.generation <= max(known, deleted.get(digest(listing.session_id), 0)):
                        continue
                    try:
                        with self._tiers.held(key, create=True, damaged=True) as held:
                            self._bring_in(owner, listing, reader, held, listing.generation)
                        count += 1
                    except SnapshotInvalid as error:
                        log.error("[ATLAS] Session %r of %s was set aside: %s", listing.session_id, name, error)
                        self._note(owner, name, f"session '{listing.session_id}': {error}")
        except FileNotFoundError:
            store.forget_deletions(owner)
            return None
        except (SnapshotInvalid, OSError) as error:
            reason = str(error) if isinstance(error, SnapshotInvalid) else "it cannot be read"
            log.error("[ATLAS] Memory file %s was set aside: %s", name, reason)
            self._note(owner, name, reason)
        with self._index.lock:
            self._index.counters.loads += 1
        return count

    @contextmanager
    def _opened(self, owner: str, name: str) -> Iterator[archive.Reader]:
        """An export of this model; raises FileNotFoundError, SnapshotInvalid."""
        with self._persistence.store().read_export(owner, name) as file, archive.opened(file) as reader:
            if reader.manifest.model != self._layout.fingerprint:
                raise SnapshotInvalid("archive was made with another model")
            yield reader

    def _bring_in(
        self, owner: str, listing: Listing, reader: archive.Reader, entry: Entry, generation: int | None = None
    ) -> None:
        """Makes a member of an export the present session; `generation` is its own where it is to keep it."""
        session = self._decode(owner, listing, reader)
        session.generation = generation or self._index.next_generation()
        self._persistence.write(entry, session, anew=True)
        with self._index.lock:
            entry.problem = None
            self._index.put_stored(entry, session)

    def _decode(self, owner: str, listing: Listing, reader: archive.Reader) -> Session:
        session = decode_session(self._layout, reader.read(listing.session_id, self._persistence.largest))
        if session.key.session_id != listing.session_id:
            raise SnapshotInvalid("archive is damaged: a member belongs to another session")
        return replace(session, key=SessionKey(owner, listing.session_id))

    # --- keeping --------------------------------------------------------------------------------------------------
    def _move_aside_unreadable(self, owner: str, name: str) -> None:
        """Keeps a file that cannot be read in full from being written over."""
        if (owner, name) in self._readable:
            return
        try:
            with self._opened(owner, name) as reader:
                if self._set_aside.get(owner, {}).get(name) is None:
                    reader.check()
                    self._readable.add((owner, name))
                    return
            reason = "some of it could not be loaded"
        except FileNotFoundError:
            return
        except SnapshotInvalid as error:
            reason = str(error)
        aside = f"{name}.{time.strftime('%Y%m%d-%H%M%S')}.damaged"
        self._persistence.store().rename_export(owner, name, aside)
        log.error("[ATLAS] %s is kept as %s and written anew: %s", name, aside, reason)
        self._note(owner, aside, self._set_aside.get(owner, {}).pop(name, reason))

    def _note(self, owner: str, name: str, reason: str) -> None:
        self._set_aside.setdefault(owner, {})[name] = reason

    def delete(self, owner: str, filename: str) -> None:
        """Removes an export; raises SessionNotFound."""
        try:
            self._persistence.store().delete_export(owner, filename)
        except FileNotFoundError as error:
            raise SessionNotFound("No such file") from error
        with self._index.lock:
            self._stamps.pop((owner, filename), None)
            self._readable.discard((owner, filename))
            self._set_aside.get(owner, {}).pop(filename, None)
        self._count(owner)

    def _count(self, owner: str) -> None:
        size = sum(file.bytes for file in self.files(owner))
        with self._index.lock:
            self._index.usage.count_exports(owner, size)


def _saved(filename: str, size: int, sessions: int) -> SaveResult:
    return SaveResult(filename=filename, session_id=None, bytes=size, sessions=sessions, timestamp=time.time())
