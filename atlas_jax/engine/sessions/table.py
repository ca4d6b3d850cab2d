"""The memory endpoints' view of an engine's sessions: telling of them, saving, loading, emptying and deleting them."""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec

from atlas_jax.engine.api import (
    MemoryInfo,
    SaveResult,
    SessionInfo,
    SessionKey,
    SessionNotFound,
    SetAside,
    SnapshotInvalid,
    StorageFull,
    StoredFile,
)
from atlas_jax.engine.sessions import archive, snapshot
from atlas_jax.engine.sessions.info import totals
from atlas_jax.engine.sessions.session import Layout, Session, decode_session, encode_session
from atlas_jax.engine.sessions.snapshot import Listing
from atlas_jax.engine.sessions.store import FolderStore, MemoryFolder
from atlas_jax.engine.sessions.tiers import MAX_CONTEXT_STATE, Budgets, Entry, SessionTiers, is_clean, is_kept

log = logging.getLogger("atlas.engine")

_EXPORT_SHARE = 10
"""An export that nobody asked for is not repeated before this many times as long as it took has passed."""


class SessionTable:
    """Implements `api.SessionStore`; every public method is thread-safe.

    Attributes:
      tiers: the sessions themselves, for the engine's thread.
      default_file: name of the export that is read at start.
    """

    def __init__(
        self,
        layout: Layout,
        *,
        folder: MemoryFolder | None,
        default_file: str,
        budgets: Budgets,
        on_idle: Callable[[], None],
        sync_seconds: float = 1.0,
    ) -> None:
        """Finds what is in the folder; see `SessionTiers`."""
        self._layout = layout
        self._store = None if folder is None else FolderStore(folder, layout.fingerprint)
        self.default_file = default_file
        self.tiers = SessionTiers(
            layout, store=self._store, budgets=budgets, on_idle=on_idle, sync_seconds=sync_seconds
        )
        self._lock = self.tiers.lock
        self._exports: dict[Path, int] = {}
        self._readable: set[Path] = set()
        self._set_aside_files: dict[str, dict[str, str]] = {}
        self._next_export: dict[str, float] = {}
        if self._store is not None and (others := self._store.others()):
            log.warning("[ATLAS] The memory folder holds %d sessions of other models, which are left alone", others)

    # --- telling --------------------------------------------------------------------------------------------------
    def info(self, owner: str, session_id: str | None) -> MemoryInfo:
        """Memory state of one session, or totals over the owner's; layers are of those in main memory.

        Raises:
          SessionNotFound: the owner has none of that name.
          SnapshotInvalid: it is damaged.
        """
        if session_id is None:
            with self._lock:
                entries = [entry for key, entry in self.tiers.entries.items() if key.owner == owner]
                listings = [entry.listing for entry in entries]
                found = [entry.session for entry in entries if entry.session is not None]
            return totals(listings, self._layout.capacity, self._layout.describe(found).layers)
        key = SessionKey(owner, session_id)
        with self._lock:
            entry = self.tiers.find(key)
            session = entry.session
        if entry.problem is not None:
            raise SnapshotInvalid(entry.problem)
        return self._layout.describe([session or self.tiers.read(key, entry)])

    def list(self, owner: str, *, after: str | None, limit: int) -> tuple[tuple[SessionInfo, ...], str | None]:
        """One page of the owner's sessions by name, and the cursor of the next page."""
        with self._lock:
            entries = self.tiers.entries
            names = sorted(
                key.session_id
                for key, entry in entries.items()
                if key.owner == owner and is_kept(entry) and (after is None or key.session_id > after)
            )
            rows = tuple(_row(name, entries[SessionKey(owner, name)]) for name in names[:limit])
        return rows, names[limit - 1] if len(names) > limit else None

    def set_aside(self, owner: str) -> tuple[SetAside, ...]:
        """The owner's sessions and files that cannot be used, with the reason."""
        with self._lock:
            sessions = [
                SetAside(name=key.session_id, kind="session", reason=entry.problem)
                for key, entry in self.tiers.entries.items()
                if key.owner == owner and entry.problem is not None
            ]
            nameless: list[SetAside] = []
            if self._store is not None:
                folder = str(self._store.owner(owner))
                nameless = [
                    SetAside(name=Path(place).name, kind="session", reason=reason)
                    for place, reason in self.tiers.nameless.items()
                    if place.startswith(folder)
                ]
            files = [
                SetAside(name=name, kind="file", reason=reason)
                for name, reason in self._set_aside_files.get(owner, {}).items()
            ]
        return tuple(sorted([*sessions, *nameless, *files], key=lambda one: one.name))

    def files(self, owner: str) -> tuple[StoredFile, ...]:
        """The owner's exports."""
        if self._store is None:
            return ()
        out = []
        for path in self._store.exports(owner):
            with contextlib.suppress(FileNotFoundError):
                status = path.stat()
                out.append(StoredFile(filename=path.name, bytes=status.st_size, modified=status.st_mtime))
        return tuple(out)

    # --- saving ---------------------------------------------------------------------------------------------------
    def save_changed(self, *, timeout: float | None = None) -> int:
        """Writes a snapshot of every session that has gone on since its last; returns how many are left."""
        return self.tiers.write_changed(None if timeout is None else time.monotonic() + timeout)

    def save_all(self, owner: str, filename: str | None, *, until: float | None = None) -> SaveResult:
        """Writes every session of the owner into one export of the memory folder.

        A request that is running is not waited for: its session is saved as it was before. Nothing is written if
        nothing has changed since the same file was last written. A file that could not be read in full is not written
        over: it is moved aside.

        Args:
          until: `time.monotonic()` at which to give up.

        Raises:
          StorageFull, MemoryUnavailable: as `api.SessionStore`.
          TimeoutError: it was not written in time; the old file is there.
        """
        store = self._require_store()
        name = filename or self.default_file
        path = store.export(owner, name)
        with self._lock:
            chosen = [
                (key, entry)
                for key, entry in self.tiers.entries.items()
                if key.owner == owner and is_kept(entry) and entry.problem is None
            ]
            stamp = hash(tuple(sorted((key.session_id, entry.listing.generation) for key, entry in chosen)))
            until = self.tiers.next_generation()
            if self._exports.get(path) == stamp and path.is_file():
                return _saved(name, None, path.stat().st_size, len(chosen))
            size = sum(entry.listing.bytes if entry.session else _bytes(entry) for _, entry in chosen)
        if until is None:
            for key, entry in chosen:
                session = entry.session
                if session is not None and not is_clean(entry):
                    self.tiers.write(key, entry, session)
        try:
            self._move_aside_unreadable(owner, path)
            old = path.stat().st_size if path.is_file() else 0
            self.tiers.check_export(owner, size - old)
            written, count = archive.write(path, self._layout.fingerprint, self._members(chosen, until))
        except Exception as error:
            if not isinstance(error, TimeoutError):
                self.tiers.note_failure(error)
            raise
        with self._lock:
            self._exports[path] = stamp
            self._readable.add(path)
            self.tiers.saves += 1
        self._count_exports(owner)
        if name == self.default_file:
            store.forget_deletions(owner, until)
        return _saved(name, None, written, count)

    def _members(
        self, chosen: Sequence[tuple[SessionKey, Entry]], until: float | None
    ) -> Iterator[tuple[Listing, bytes]]:
        for key, entry in chosen:
            if until is not None and time.monotonic() > until:
                raise TimeoutError("An export took too long")
            with self._lock:
                session, listing = entry.session, entry.listing
                if self.tiers.entries.get(key) is not entry:  # deleted meanwhile
                    continue
            try:
                if session is None and entry.stored is not None and entry.stored.generation == listing.generation:
                    data, _ = entry.stored.read(self.tiers.largest)
                    if data is not None:
                        yield listing, data
                        continue
                session = session or self.tiers.read(key, entry)
            except (SnapshotInvalid, FileNotFoundError) as error:  # the others are saved all the same
                log.error("[ATLAS] Session %r is left out of an export: %s", key.session_id, error)
                continue
            yield listing, encode_session(self._layout, session)

    def save_default(self, owner: str, *, timeout: float | None = None) -> SaveResult | None:
        """Writes the owner's default export, unless the last one took so long that it is not its turn yet.

        Args:
          timeout: seconds it may take; None where it costs nothing to wait.
        """
        started = time.monotonic()
        if started < self._next_export.get(owner, 0.0):
            return None
        if timeout is not None and self._export_seconds(owner) > timeout / 2:
            return None
        try:
            saved = self.save_all(owner, None, until=None if timeout is None else started + timeout / 2)
        except TimeoutError:
            return None
        took = time.monotonic() - started
        self._next_export[owner] = time.monotonic() + _EXPORT_SHARE * took
        return saved

    def _export_seconds(self, owner: str) -> float:
        """How long an export would take at the speed at which snapshots were written."""
        with self._lock:
            size = sum(e.listing.bytes for k, e in self.tiers.entries.items() if k.owner == owner)
            return size * self.tiers.seconds_per_byte

    def save_session(self, owner: str, session_id: str) -> SaveResult:
        """Makes a save point of one session, which stays as it is until the next; raises SessionNotFound, StorageFull."""
        key = SessionKey(owner, session_id)
        self._require_store()
        with self._lock:
            entry = self.tiers.find(key)
        if entry.problem is not None:
            raise SnapshotInvalid(entry.problem)
        return self._save_point(key, entry)

    def _save_point(self, key: SessionKey, entry: Entry) -> SaveResult:
        while not is_clean(
            entry
        ):  # where a turn has ended meanwhile, the snapshot is of the state before and not written
            self.tiers.write(key, entry, entry.session or self.tiers.read(key, entry))
            with self._lock:
                self.tiers.find(key)
        assert entry.stored is not None
        size = entry.stored.keep()
        return _saved(archive.member_name(key.session_id), key.session_id, size, 1)

    def save_context(self, owner: str, context_id: str, state: Any) -> SaveResult:
        """Stores the caller's JSON with the session of that name, which is made if there is none, as a save point.

        Raises:
          StorageFull: the JSON is too large, or the disk or the owner's quota has no room.
        """
        data = msgspec.json.encode(state)
        if len(data) > MAX_CONTEXT_STATE:
            raise StorageFull(f"state exceeds {MAX_CONTEXT_STATE} bytes")
        key = SessionKey(owner, context_id)
        self._require_store()
        with self.tiers.held(key, create=True) as entry:
            session = entry.session
            if session is None:
                session = (
                    Session(key, self._layout.default_shape) if not is_kept(entry) else self.tiers.read(key, entry)
                )
            if session.state != data or not is_kept(entry):
                self._replace(key, entry, replace(session, state=data))
            return self._save_point(key, entry)

    def _replace(self, key: SessionKey, entry: Entry, session: Session) -> None:
        """Makes a session what it is from now on: first on disk, then in main memory."""
        session.generation = self.tiers.next_generation()
        if self._store is not None:
            self.tiers.write(key, entry, session)
        with self._lock:
            entry.problem = None
            self.tiers.put(key, entry, session)

    # --- loading --------------------------------------------------------------------------------------------------
    def load_context(self, owner: str, context_id: str) -> Any:
        """The caller's JSON as saved, with the session set back to its save point, if it has one.

        Raises:
          SessionNotFound, SnapshotInvalid: as `api.SessionStore`.
        """
        key = SessionKey(owner, context_id)
        self._require_store()
        with self.tiers.held(key, damaged=True) as entry:
            stored = entry.stored
            saved = None if stored is None else stored.read_saved(self.tiers.largest)
            if saved is None or stored is None:
                if entry.problem is not None:
                    raise SnapshotInvalid(entry.problem)
                session = entry.session or self.tiers.read(key, entry)
            else:
                generation = self.tiers.next_generation()
                session = decode_session(self._layout, saved, generation)
                if session.key != key:
                    raise SnapshotInvalid("snapshot belongs to another session")
                stored.restore(generation)
            with self._lock:
                entry.problem, entry.written = None, max(entry.written, session.generation)
                self.tiers.put(key, entry, session)
                self.tiers.loads += 1
        return None if session.state is None else msgspec.json.decode(session.state)

    def load_file(self, owner: str, filename: str) -> int:
        """Replaces the owner's sessions by those in an export; every one is checked before any is replaced.

        Raises:
          SessionNotFound: no such file.
          SnapshotInvalid: the export, or a session in it, is damaged or made by another model.
        """
        store = self._require_store()
        path = store.export(owner, filename)
        # what was deleted since the default file was written stays deleted; another file is loaded as it is
        deleted = store.deletions(owner) if filename == self.default_file else {}
        try:
            with archive.opened(path) as reader:
                self._check_model(reader)
                wanted = [one for one in reader.manifest.sessions if one.generation > deleted.get(_digest(one), 0)]
                for listing in wanted:
                    self._decode(owner, listing, reader)
                self._readable.add(path)
                for listing in wanted:
                    with self.tiers.held(SessionKey(owner, listing.session_id), create=True, damaged=True) as entry:
                        self._bring_in(owner, listing, reader, entry)
                count = len(wanted)
        except FileNotFoundError as error:
            raise SessionNotFound("No such file") from error
        with self._lock:
            self.tiers.loads += 1
        return count

    def load_default(self, owner: str) -> int | None:
        """Brings in what the owner's default export has that is newer than what is stored; None where there is no file.

        A session that cannot be brought in is set aside with its reason, and so is the file before it is written over.
        """
        store = self._require_store()
        path = store.export(owner, self.default_file)
        deleted = store.deletions(owner)
        count = 0
        self._count_exports(owner)
        try:
            with archive.opened(path) as reader:
                self._check_model(reader)
                for listing in reader.manifest.sessions:
                    with self._lock:
                        entry = self.tiers.entries.get(SessionKey(owner, listing.session_id))
                        known = 0 if entry is None else entry.listing.generation
                    if listing.generation <= max(known, deleted.get(_digest(listing), 0)):
                        continue
                    try:
                        with self.tiers.held(SessionKey(owner, listing.session_id), create=True, damaged=True) as held:
                            self._bring_in(owner, listing, reader, held, listing.generation)
                        count += 1
                    except SnapshotInvalid as error:
                        log.error("[ATLAS] Session %r of %s was set aside: %s", listing.session_id, path.name, error)
                        self._note_file(owner, path.name, f"session '{listing.session_id}': {error}")
        except FileNotFoundError:
            store.forget_deletions(owner)
            return None
        except (SnapshotInvalid, OSError) as error:
            reason = str(error) if isinstance(error, SnapshotInvalid) else "it cannot be read"
            log.error("[ATLAS] Memory file %s was set aside: %s", path.name, reason)
            self._note_file(owner, path.name, reason)
        with self._lock:
            self.tiers.loads += 1
        return count

    def _bring_in(
        self, owner: str, listing: Listing, reader: archive.Reader, entry: Entry, generation: int | None = None
    ) -> None:
        """Makes a member of an export the present session; `generation` is its own where it is to keep it."""
        session = self._decode(owner, listing, reader)
        session.generation = generation or self.tiers.next_generation()
        self.tiers.write(session.key, entry, session)
        with self._lock:
            entry.problem = None
            self.tiers.put_stored(session.key, entry, session)

    def _decode(self, owner: str, listing: Listing, reader: archive.Reader) -> Session:
        session = decode_session(self._layout, reader.read(listing.session_id, self.tiers.largest))
        if session.key.session_id != listing.session_id:
            raise SnapshotInvalid("archive is damaged: a member belongs to another session")
        return replace(session, key=SessionKey(owner, listing.session_id))

    def _check_model(self, reader: archive.Reader) -> None:
        if reader.manifest.model != self._layout.fingerprint:
            raise SnapshotInvalid("archive was made with another model")

    def _move_aside_unreadable(self, owner: str, path: Path) -> None:
        """Keeps a file that cannot be read in full from being written over."""
        if path in self._readable or not path.exists():
            return
        try:
            if self._set_aside_files.get(owner, {}).get(path.name) is None:
                with archive.opened(path) as reader:
                    self._check_model(reader)
                    reader.check()
                self._readable.add(path)
                return
            reason = "some of it could not be loaded"
        except SnapshotInvalid as error:
            reason = str(error)
        aside = path.with_name(f"{path.name}.{time.strftime('%Y%m%d-%H%M%S')}.damaged")
        path.rename(aside)
        snapshot.sync_folder(path.parent)
        log.error("[ATLAS] %s is kept as %s and written anew: %s", path.name, aside.name, reason)
        self._note_file(owner, aside.name, self._set_aside_files.get(owner, {}).pop(path.name, reason))

    def _note_file(self, owner: str, name: str, reason: str) -> None:
        self._set_aside_files.setdefault(owner, {})[name] = reason

    # --- emptying -------------------------------------------------------------------------------------------------
    def reset(self, owner: str, session_id: str | None) -> int:
        """Empties one session's memory, or all of the owner's; their names, and a caller's JSON, stay."""
        with self._lock:
            if session_id is not None:
                self.tiers.find(SessionKey(owner, session_id))
            keys = [
                key
                for key, entry in self.tiers.entries.items()
                if key.owner == owner and is_kept(entry) and session_id in (None, key.session_id)
            ]
        for key in keys:
            with contextlib.suppress(SessionNotFound), self.tiers.held(key, damaged=True) as entry:
                session = entry.session
                if session is None and entry.problem is None:
                    with contextlib.suppress(SnapshotInvalid):
                        session = self.tiers.read(key, entry)
                session = session or Session(key, self._layout.default_shape, created=entry.listing.created)
                self._replace(key, entry, Session(key, session.shape, state=session.state, created=session.created))
        return len(keys)

    def delete(self, owner: str, session_id: str) -> None:
        """Removes a session and its files for good; a request that is using it goes on without it."""
        key = SessionKey(owner, session_id)
        with self.tiers.leaving(key) as stored:
            if stored is not None:
                stored.delete(self.tiers.next_generation())

    def delete_file(self, owner: str, filename: str) -> None:
        """Removes an export; raises SessionNotFound."""
        path = self._require_store().export(owner, filename)
        try:
            path.unlink()
        except FileNotFoundError as error:
            raise SessionNotFound("No such file") from error
        with self._lock:
            self._exports.pop(path, None)
            self._readable.discard(path)
            self._set_aside_files.get(owner, {}).pop(filename, None)
        self._count_exports(owner)

    def expire(self, idle: float) -> int:
        """Deletes every session that nobody has used for `idle` seconds; returns how many."""
        limit = time.time() - idle
        with self._lock:
            old = [
                key
                for key, entry in self.tiers.entries.items()
                if not entry.busy and is_kept(entry) and entry.problem is None and entry.listing.last_used < limit
            ]
        for key in old:
            with contextlib.suppress(SessionNotFound):
                self.delete(key.owner, key.session_id)
        return len(old)

    # --- the end --------------------------------------------------------------------------------------------------
    def close(self, timeout: float) -> None:
        """Brings what was answered to the disk and lets go of the folder."""
        self.tiers.close(timeout)

    def _require_store(self) -> FolderStore:
        self.tiers.require_store()
        assert self._store is not None
        return self._store

    def _count_exports(self, owner: str) -> None:
        if self._store is None:
            return
        size = sum(file.bytes for file in self.files(owner))
        with self._lock:
            self.tiers.exported[owner] = size


def _row(name: str, entry: Entry) -> SessionInfo:
    listing = entry.listing
    return SessionInfo(
        session_id=name,
        tokens=listing.tokens,
        bytes=listing.bytes,
        created=listing.created,
        last_used=listing.last_used,
        resident="disk" if entry.session is None else entry.tier,
        has_state=listing.has_state,
    )


def _digest(listing: Listing) -> str:
    """The name of a session's folder in the store."""
    return archive.member_name(listing.session_id).removesuffix(".atlas")


def _saved(filename: str, session_id: str | None, size: int, sessions: int) -> SaveResult:
    return SaveResult(filename=filename, session_id=session_id, bytes=size, sessions=sessions, timestamp=time.time())


def _bytes(entry: Entry) -> int:
    return 0 if entry.stored is None else entry.stored.size
