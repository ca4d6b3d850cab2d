"""The memory endpoints' view of an engine's sessions: telling of them, saving, loading, emptying and deleting them."""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import msgspec

from atlas_jax.engine.api import (
    MemoryInfo,
    SaveResult,
    SessionConflict,
    SessionInfo,
    SessionKey,
    SessionNotFound,
    SetAside,
    SnapshotInvalid,
    StateBytes,
    StorageFull,
    StoredFile,
)
from atlas_jax.engine.sessions import archive
from atlas_jax.engine.sessions.budgets import Budgets
from atlas_jax.engine.sessions.codec import decode_session
from atlas_jax.engine.sessions.documents import Documents
from atlas_jax.engine.sessions.entry import Entry
from atlas_jax.engine.sessions.exports import Exports
from atlas_jax.engine.sessions.index import SessionIndex
from atlas_jax.engine.sessions.info import totals
from atlas_jax.engine.sessions.layout import Layout
from atlas_jax.engine.sessions.persistence import MAX_CONTEXT_STATE, Persistence, reason
from atlas_jax.engine.sessions.session import Session
from atlas_jax.engine.sessions.store import Storage
from atlas_jax.engine.sessions.tiers import SessionTiers

log = logging.getLogger("atlas.engine")


class SessionTable:
    """Implements `api.SessionStore`; every public method is thread-safe.

    Attributes:
      tiers: leases of the same sessions, for the scheduler.
    """

    def __init__(
        self,
        layout: Layout,
        *,
        storage: Storage | None,
        documents: Documents,
        default_file: str,
        budgets: Budgets,
        on_idle: Callable[[], None],
        sync_seconds: float = 1.0,
    ) -> None:
        """Finds what is stored.

        Args:
          storage: where sessions are kept; None keeps nothing but in memory.
          documents: what else is kept for their owners, in the same place.
          default_file: name of the export that is read at start.
          on_idle, sync_seconds: as `SessionTiers`.
        """
        self._layout = layout
        self._store = None if storage is None else storage.store(layout.fingerprint)
        self._index = SessionIndex(layout, self._store, budgets)
        self._persistence = Persistence(layout, self._index, self._store)
        self.tiers = SessionTiers(layout, self._index, self._persistence, on_idle=on_idle, sync_seconds=sync_seconds)
        documents.count_in(self._index)
        self._exports = Exports(layout, self._index, self._persistence, self.tiers, default_file)
        if self._store is not None and self._store.shared:
            threading.Thread(target=self._learn_all, name="atlas-sessions-list", daemon=True).start()
        elif self._store is not None and (others := self._store.other_models()):
            log.warning("[ATLAS] The memory folder holds sessions of %d other models, which are left alone", others)

    def _learn_all(self) -> None:
        self._learn()
        try:
            self._index.collect()
        except OSError as error:
            log.error("[ATLAS] Old snapshots stay in the object store: %s", reason(error))

    def _learn(self, owner: str | None = None) -> None:
        """Learns of an owner's sessions what other servers have done; what is known already serves where that fails."""
        try:
            self._index.sync(owner)
        except OSError as error:
            log.error("[ATLAS] The sessions in the store cannot be listed: %s", reason(error))

    # --- telling --------------------------------------------------------------------------------------------------
    def info(self, owner: str, session_id: str | None) -> MemoryInfo:
        """Memory state of one session, or totals over the owner's; layers are of those in memory.

        Raises:
          SessionNotFound: the owner has none of that name.
          SnapshotInvalid: it is damaged.
        """
        if session_id is None:
            self._learn(owner)
            with self._index.lock:
                entries = self._index.entries(owner)
                listings = [entry.listing for entry in entries]
                found = [entry.session for entry in entries if entry.session is not None]
            layers = self._layout.describe(found).layers
            return totals(listings, self._layout.capacity, layers, self._layout.state_bytes)
        self.tiers.look(SessionKey(owner, session_id))
        with self._index.lock:
            entry = self._index.find(SessionKey(owner, session_id))
            session = entry.session
        if entry.problem is not None:
            raise SnapshotInvalid(entry.problem)
        return self._layout.describe([session or self._persistence.read(entry)])

    def list(self, owner: str, *, after: str | None, limit: int) -> tuple[tuple[SessionInfo, ...], str | None]:
        """One page of the owner's sessions by name, and the cursor of the next page."""
        self._learn(owner)
        with self._index.lock:
            found = {entry.key.session_id: entry for entry in self._index.entries(owner)}
            names = sorted(name for name in found if after is None or name > after)
            rows = tuple(_row(self._layout, found[name]) for name in names[:limit])
        return rows, names[limit - 1] if len(names) > limit else None

    def set_aside(self, owner: str) -> tuple[SetAside, ...]:
        """The owner's sessions and files that cannot be used, with the reason."""
        with self._index.lock:
            found = [
                SetAside(name=entry.key.session_id, kind="session", reason=entry.problem)
                for entry in self._index.entries(owner)
                if entry.problem is not None
            ]
            found += [
                SetAside(name=name, kind="session", reason=reason) for name, reason in self._index.nameless(owner)
            ]
            found += self._exports.set_aside(owner)
        return tuple(sorted(found, key=lambda one: one.name))

    # --- files of many sessions -----------------------------------------------------------------------------------
    @property
    def default_file(self) -> str:
        """Name of the export that is read at start."""
        return self._exports.default_file

    def files(self, owner: str) -> tuple[StoredFile, ...]:
        """The owner's exports."""
        return self._exports.files(owner)

    def save_all(self, owner: str, filename: str | None) -> SaveResult:
        """Writes every session of the owner into one export; raises as `Exports.save`."""
        self._learn(owner)
        return self._exports.save(owner, filename)

    def save_default(self, owner: str, *, timeout: float | None = None) -> SaveResult | None:
        """Writes the owner's default export; None where there is not the time for it."""
        return self._exports.save_default(owner, timeout=timeout)

    def load_file(self, owner: str, filename: str) -> int:
        """Replaces the owner's sessions by those in an export; raises as `Exports.load`."""
        return self._exports.load(owner, filename)

    def load_default(self, owner: str) -> int | None:
        """Brings in what is newer in the owner's default export; None where there is no file."""
        return self._exports.load_default(owner)

    def delete_file(self, owner: str, filename: str) -> None:
        """Removes an export; raises SessionNotFound."""
        self._exports.delete(owner, filename)

    # --- saving and loading one session ---------------------------------------------------------------------------
    def save_changed(self, *, timeout: float | None = None) -> int:
        """Writes a snapshot of every session that has gone on since its last; returns how many are left."""
        return self._persistence.write_changed(None if timeout is None else time.monotonic() + timeout)

    def save_session(self, owner: str, session_id: str) -> SaveResult:
        """Makes a save point of one session, which stays as it is until the next; raises SessionNotFound, StorageFull."""
        self._persistence.store()
        self.tiers.look(SessionKey(owner, session_id))
        entry = self._index.find(SessionKey(owner, session_id))
        if entry.problem is not None:
            raise SnapshotInvalid(entry.problem)
        return self._save_point(entry)

    def _save_point(self, entry: Entry) -> SaveResult:
        # where a turn has ended meanwhile, the snapshot is of the state before and not written
        while not entry.is_clean:
            self._persistence.write(entry, entry.session or self._persistence.read(entry))
            self._index.find(entry.key)
        assert entry.stored is not None
        name = entry.key.session_id
        return SaveResult(
            filename=archive.member_name(name),
            session_id=name,
            bytes=entry.stored.keep(),
            sessions=1,
            timestamp=time.time(),
        )

    def save_context(self, owner: str, context_id: str, state: Any) -> SaveResult:
        """Stores the caller's JSON with the session of that name, which is made if there is none, as a save point.

        Raises:
          StorageFull: the JSON is too large, or the disk or the owner's quota has no room.
        """
        data = msgspec.json.encode(state)
        if len(data) > MAX_CONTEXT_STATE:
            raise StorageFull(f"state exceeds {MAX_CONTEXT_STATE} bytes")
        key = SessionKey(owner, context_id)
        self._persistence.store()
        with self.tiers.held(key, create=True) as entry:
            session = entry.session
            if session is None:
                session = self._persistence.read(entry) if entry.exists else Session(key, self._layout.default_shape)
            if session.state != data or not entry.exists:
                self._replace(entry, replace(session, state=data))
            return self._save_point(entry)

    def load_context(self, owner: str, context_id: str) -> Any:
        """The caller's JSON as saved, with the session rolled back to its save point, if it has one.

        Raises:
          SessionNotFound, SnapshotInvalid: as `api.SessionStore`.
        """
        key = SessionKey(owner, context_id)
        self._persistence.store()
        with self.tiers.held(key, damaged=True) as entry:
            stored = entry.stored
            saved = None if stored is None else stored.read_saved(self._persistence.largest)
            if saved is None or stored is None:
                if entry.problem is not None:
                    raise SnapshotInvalid(entry.problem)
                session = entry.session or self._persistence.read(entry)
            else:
                generation = self._index.next_generation()
                session = decode_session(self._layout, saved, generation)
                if session.key != key:
                    raise SnapshotInvalid("snapshot belongs to another session")
                stored.restore(generation)
            with self._index.lock:
                entry.problem, entry.written = None, max(entry.written, session.generation)
                self._index.put(entry, session)
                self._index.counters.loads += 1
        return None if session.state is None else msgspec.json.decode(session.state)

    def fork(self, owner: str, source: str, target: str) -> bool:
        """Begins a session that goes on from another's last turn, and leaves that one alone; False where it is not there.

        States are immutable, so the two share them. A request that is using the first one is not waited for: the other goes
        on from what was before. On disk the new one is with its first turn.
        """
        key = SessionKey(owner, target)
        for one in (SessionKey(owner, source), key):
            self.tiers.look(one)
        with self._index.lock:
            entry = self._index.get(SessionKey(owner, source))
            if entry is None or not entry.exists or entry.problem is not None or self._index.get(key) is not None:
                return False
            session = entry.session
        try:
            session = session or self._persistence.read(entry)
        except (SnapshotInvalid, SessionNotFound, SessionConflict):
            return False
        copy = replace(
            session,
            key=key,
            history=session.history.copy(),
            checkpoints=list(session.checkpoints),
            stats=replace(session.stats),
            appended=None,
            state=None,
            created=time.time(),
            last_used=time.time(),
            generation=self._index.next_generation(),
            after=0,
        )
        with self._index.lock:
            if self._index.get(key) is not None:
                return False
            self._index.put(self._index.add(key), copy)
        return True

    def rename(self, owner: str, source: str, target: str) -> None:
        """Gives a session another name; raises as `api.SessionStore`.

        A request that names it as it was called waits, and then begins a new session.
        """
        key = SessionKey(owner, target)
        with self.tiers.held(SessionKey(owner, source)) as entry, self.tiers.begun(key) as place:
            session = entry.session or self._persistence.read(entry)
            renamed = replace(session, key=key, generation=self._index.next_generation())
            if self._store is not None:
                self._persistence.move(entry, place, renamed, session.generation)
            with self._index.lock:
                if entry.session is None:
                    self._index.put_stored(place, renamed)
                else:
                    self._index.put(place, renamed, entry.tier)
                if self._index.holds(entry):  # else it was deleted meanwhile
                    self._index.forget(entry)

    def _replace(self, entry: Entry, session: Session) -> None:
        """Makes a session what it is from now on: first on disk, then in memory."""
        session.generation = self._index.next_generation()
        if self._store is not None:
            self._persistence.write(entry, session, anew=True)
        with self._index.lock:
            entry.problem = None
            self._index.put(entry, session)

    # --- emptying -------------------------------------------------------------------------------------------------
    def reset(self, owner: str, session_id: str | None) -> int:
        """Empties one session's memory, or all of the owner's; their names, and a caller's JSON, stay."""
        if session_id is None:
            self._learn(owner)
            keys = [entry.key for entry in self._index.entries(owner)]
        else:
            keys = [SessionKey(owner, session_id)]
            self.tiers.look(keys[0])
            self._index.find(keys[0])
        for key in keys:
            with contextlib.suppress(SessionNotFound), self.tiers.held(key, damaged=True) as entry:
                session = entry.session
                if session is None and entry.problem is None:
                    with contextlib.suppress(SnapshotInvalid):
                        session = self._persistence.read(entry)
                session = session or Session(key, self._layout.default_shape, created=entry.listing.created)
                self._replace(entry, Session(key, session.shape, state=session.state, created=session.created))
        return len(keys)

    def delete(self, owner: str, session_id: str) -> None:
        """Removes a session from memory and store for good; a request that is using it goes on without it."""
        with self.tiers.leaving(SessionKey(owner, session_id)) as stored:
            if stored is not None:
                stored.delete(self._index.next_generation())

    def expire(self, idle: float) -> int:
        """Deletes every session that nobody has used for `idle` seconds; returns how many."""
        limit, count = time.time() - idle, 0
        self._learn()

        def is_old(entry: Entry) -> bool:
            return not entry.busy and entry.problem is None and entry.listing.last_used < limit

        with self._index.lock:
            old = [entry.key for entry in self._index.entries() if is_old(entry)]
        for key in old:
            with contextlib.suppress(SessionNotFound, SessionConflict), self.tiers.leaving(key, is_old) as stored:
                if stored is not None:
                    stored.delete(self._index.next_generation(), unless_changed=True)
                count += 1
        return count

    # --- the end --------------------------------------------------------------------------------------------------
    def close(self, timeout: float) -> None:
        """Brings what was answered to the store within `timeout` seconds, and lets another server have it; idempotent."""
        self.tiers.close(timeout)
        if self._store is not None:
            self._store.close()


def _row(layout: Layout, entry: Entry) -> SessionInfo:
    listing = entry.listing
    state, window = StateBytes(), 0
    if listing.tokens:  # what has read nothing gets its shape with its first request
        state, window = layout.state_bytes(listing.ring, listing.kept_capacity, listing.budget), listing.window
    return SessionInfo(
        session_id=entry.key.session_id,
        tokens=listing.tokens,
        bytes=listing.bytes,
        window_size=window,
        window_fill=min(window, listing.window_fill),
        kept_pairs=listing.kept,
        kept_pairs_capacity=listing.kept_capacity,
        state=state,
        created=listing.created,
        last_used=listing.last_used,
        resident="disk" if entry.session is None else entry.tier,
        has_state=listing.has_state,
    )
