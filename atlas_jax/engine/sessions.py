"""The memory endpoints' view of an engine's sessions: telling of them, saving, loading, emptying and deleting them."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec

from atlas_jax.engine import archive
from atlas_jax.engine.api import (
    MemoryInfo,
    SaveResult,
    SessionInfo,
    SessionKey,
    SessionNotFound,
    SnapshotInvalid,
    StorageFull,
)
from atlas_jax.engine.archive import Location, Manifest
from atlas_jax.engine.session import Layout, Session, encode_session
from atlas_jax.engine.tiers import MAX_CONTEXT_STATE, Budgets, Entry, SessionTiers, is_stored


class SessionTable(SessionTiers):
    """Implements `api.SessionStore`; every public method is thread-safe."""

    def __init__(
        self,
        layout: Layout,
        *,
        folder: Path | None,
        model_name: str,
        budgets: Budgets,
        on_idle: Callable[[], None],
    ) -> None:
        """Makes an empty table; `model_name` is what its archives are called after, the rest as `SessionTiers`."""
        super().__init__(layout, folder=folder, budgets=budgets, on_idle=on_idle)
        self._model_name = model_name
        self._archived: dict[Path, int] = {}

    def info(self, owner: str, session_id: str | None) -> MemoryInfo:
        """Memory state of one session, or totals over the owner's that are in main memory.

        Raises:
          SessionNotFound: the owner has none of that name.
        """
        with self._lock:
            if session_id is not None:
                entry = self._find(SessionKey(owner, session_id))
                found = [entry.session]
            else:
                found = [entry.session for key, entry in self._entries.items() if key.owner == owner]
        if session_id is not None and found[0] is None and entry.location is not None:
            found = [self._read(SessionKey(owner, session_id), entry.location)]
        return self._layout.describe([session for session in found if session is not None])

    def list(self, owner: str, *, after: str | None, limit: int) -> tuple[tuple[SessionInfo, ...], str | None]:
        """One page of the owner's sessions by name, and the cursor of the next page."""
        with self._lock:
            names = sorted(
                key.session_id
                for key in self._entries
                if key.owner == owner and (after is None or key.session_id > after)
            )
            rows = []
            for name in names[:limit]:
                entry = self._entries[SessionKey(owner, name)]
                listing = entry.listing
                rows.append(
                    SessionInfo(
                        session_id=name,
                        tokens=listing.tokens,
                        bytes=listing.bytes,
                        created=listing.created,
                        last_used=listing.last_used,
                        resident="disk" if entry.session is None and entry.location is not None else entry.tier,
                        has_state=listing.has_state,
                    )
                )
        return tuple(rows), names[limit - 1] if len(names) > limit else None

    def save_all(self, owner: str, filename: str | None) -> SaveResult:
        """Writes every session of the owner into one archive of the memory folder.

        A request that is running is not waited for: its session is saved as it was before. Nothing is written if
        nothing has changed since the same file was last written.

        Raises:
          StorageFull, MemoryUnavailable: as `api.SessionStore`.
        """
        folder = archive.owner_folder(self._require_folder(), owner)
        name = filename or self.default_file
        path = folder / name
        with self._lock:
            chosen = {k: e for k, e in self._entries.items() if k.owner == owner and is_stored(e)}
            newest = max((_change(entry) for entry in chosen.values()), default=0)
            stamp = hash((newest, tuple(sorted((k.session_id, _change(e)) for k, e in chosen.items()))))
            if self._archived.get(path) == stamp and path.is_file():
                size = path.stat().st_size
                return SaveResult(
                    filename=name, session_id=None, bytes=size, sessions=len(chosen), timestamp=time.time()
                )
            contents = [(key, entry, entry.session, entry.location, _change(entry)) for key, entry in chosen.items()]
        with self._disk:
            self._check_quota(sum(entry.listing.bytes for entry in chosen.values() if entry.session is not None))
            manifest = Manifest(self._layout.fingerprint, [entry.listing for _, entry, *_ in contents])
            snapshots = (
                (key.session_id, encode_session(self._layout, session) if session else self._raw(location))
                for key, _, session, location, _ in contents
            )
            try:
                size = archive.write(path, manifest, snapshots)
            except BaseException:
                self.failures += 1
                raise
        with self._lock:
            self._archived[path] = stamp
            self.saves += 1
            if filename is None or name == self.default_file:
                for key, entry, _, _, change in contents:
                    entry.location, entry.saved = Location(path, archive.member_name(key.session_id)), change
                self._drop_files(owner)
                archive.unbury(folder)
        return SaveResult(filename=name, session_id=None, bytes=size, sessions=len(contents), timestamp=time.time())

    def _drop_files(self, owner: str) -> None:
        """Removes single session files that the owner's archive has made redundant; the lock is held."""
        kept = {entry.location.path for entry in self._entries.values() if entry.location is not None}
        for path in (archive.owner_folder(self._require_folder(), owner) / "sessions").glob("*.atlas"):
            if path not in kept:
                path.unlink(missing_ok=True)

    @property
    def default_file(self) -> str:
        """Name of the archive that is loaded at start."""
        return f"{self._model_name}_memory.atlas"

    def save_session(self, owner: str, session_id: str) -> SaveResult:
        """Writes one session to its file on disk; raises SessionNotFound, StorageFull, MemoryUnavailable."""
        key = SessionKey(owner, session_id)
        self._require_folder()
        with self._lock:
            entry = self._find(key)
            session = entry.session
        if session is None:
            size = len(self._raw(entry.location)) if entry.location is not None else 0
        else:
            size = self._write(key, entry, session)
        with self._lock:
            self.saves += 1
            path = archive.session_file(self._require_folder(), owner, session_id)
        return SaveResult(filename=path.name, session_id=session_id, bytes=size, sessions=1, timestamp=time.time())

    def save_context(self, owner: str, context_id: str, state: Any) -> SaveResult:
        """Stores the caller's JSON with the session of that name, which is made if there is none.

        Raises:
          StorageFull: the JSON is too large, or the disk or the owner's quota has no room.
        """
        if len(msgspec.json.encode(state)) > MAX_CONTEXT_STATE:
            raise StorageFull(f"state exceeds {MAX_CONTEXT_STATE} bytes")
        key = SessionKey(owner, context_id)
        self._require_folder()
        with self._held(key, create=True) as entry:
            session = entry.session
            if session is None:
                where = entry.location
                session = Session(key, self._layout.default_shape) if where is None else self._read(key, where)
            session.state, session.has_state = state, True
            with self._lock:
                self._put(key, entry, session, "host")
        return self.save_session(owner, context_id)

    def load_context(self, owner: str, context_id: str) -> Any:
        """The caller's JSON as saved, with the session's memory restored from its file.

        Raises:
          SessionNotFound, SnapshotInvalid: as `api.SessionStore`.
        """
        key = SessionKey(owner, context_id)
        with self._held(key, create=True) as entry:
            path = archive.session_file(self._require_folder(), owner, context_id)
            location = Location(path) if path.is_file() else entry.location
            if location is None:
                raise SessionNotFound("No such session")
            session = self._read(key, location)
            with self._lock:
                self._put(key, entry, session, "host")
                entry.location, entry.saved = location, session.changed
                self.loads += 1
        return session.state

    def load_file(self, owner: str, filename: str) -> int:
        """Replaces the owner's sessions by those in an archive; every one is checked before any is replaced.

        Raises:
          SessionNotFound: no such file.
          SnapshotInvalid: the archive, or a session in it, is damaged or made by another model.
        """
        path = archive.owner_folder(self._require_folder(), owner) / filename
        with self._disk:
            try:
                manifest = archive.read_manifest(path)
            except FileNotFoundError as error:
                raise SessionNotFound("No such file") from error
            if manifest.model != self._layout.fingerprint:
                raise SnapshotInvalid("archive was made with another model")
            for listing in manifest.sessions:
                self._read(
                    SessionKey(owner, listing.session_id), Location(path, archive.member_name(listing.session_id))
                )
        # a session deleted since the default archive was written stays deleted; a named file is loaded as it is
        buried = archive.buried(path.parent) if filename == self.default_file else frozenset()
        wanted = [listing for listing in manifest.sessions if archive.member_name(listing.session_id) not in buried]
        with self._lock:
            for listing in wanted:
                self._changes += 1
                self._entries[SessionKey(owner, listing.session_id)] = Entry(
                    listing,
                    tier="disk",
                    location=Location(path, archive.member_name(listing.session_id)),
                    saved=self._changes,
                )
            self.loads += 1
        return len(wanted)

    def reset(self, owner: str, session_id: str | None) -> int:
        """Empties one session's memory, or all of the owner's; their names, and a caller's JSON, stay."""
        with self._lock:
            if session_id is not None:
                self._find(SessionKey(owner, session_id))
            keys = [key for key in self._entries if key.owner == owner and session_id in (None, key.session_id)]
        for key in keys:
            with self._held(key) as entry:
                session = entry.session
                if session is None and entry.location is not None:
                    session = self._read(key, entry.location)
                if session is None:
                    continue
                empty = Session(key, session.shape, state=session.state, has_state=session.has_state)
                empty.created = session.created
                with self._lock:
                    self._put(key, entry, empty, "host")
        return len(keys)

    def delete(self, owner: str, session_id: str) -> None:
        """Removes a session and its file; a request that is using it goes on without it."""
        key = SessionKey(owner, session_id)
        with self._disk, self._lock:
            self._find(key)
            self._forget(key)
            if self._folder is not None:
                archive.session_file(self._folder, owner, session_id).unlink(missing_ok=True)
                archive.bury(self._folder, owner, session_id)

    def _raw(self, location: Location | None) -> bytes:
        assert location is not None
        return location.read(self._largest)

    def _forget(self, key: SessionKey) -> None:
        self._changes += 1
        del self._entries[key]
        for eviction in self._eviction.values():
            eviction.forget(key)

    def _find(self, key: SessionKey) -> Entry:
        entry = self._entries.get(key)
        if entry is None or not is_stored(entry):
            raise SessionNotFound("No such session")
        return entry


def _change(entry: Entry) -> int:
    return entry.saved if entry.session is None else entry.session.changed
