"""All sessions of an engine: who holds which, and in which tier.

A session rests between turns as an immutable checkpoint, on the device or the host. When a tier is over its budget, the
eviction strategy of the request that needed room says who moves down. On disk a session is a snapshot file of its own or
a member of an archive that was saved or loaded; either is read again when the session is next used.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from atlas_jax.engine import archive, snapshot
from atlas_jax.engine.api import (
    CacheStrategy,
    MemoryUnavailable,
    SessionKey,
    SessionNotFound,
    SnapshotInvalid,
    StorageFull,
)
from atlas_jax.engine.archive import Listing, Location
from atlas_jax.engine.eviction import Eviction
from atlas_jax.engine.session import Checkpoint, Layout, Session, decode_session, encode_session, to_host

log = logging.getLogger("atlas.engine")

MAX_CONTEXT_STATE = 4 << 20
"""Bytes of JSON that a caller may keep with a session."""
_PATIENCE = 120.0
"""Seconds an endpoint waits for a session that a request is using."""
Tier = Literal["device", "host", "disk"]


@dataclass(frozen=True)
class Budgets:
    """Bytes of session state each tier may hold. 0 for the device: sessions rest on the host."""

    device: int
    host: int
    disk: int


@dataclass
class Entry:
    """A session as the table knows it.

    Attributes:
      session: the session itself, or None while it is on disk only.
      tier: where its state is.
      location, saved: its newest copy on disk, and the change number that copy holds.
      busy: a request is using it, or a thread is reading or writing it.
      error: why it could not be read, until that has been reported.
      listing: what can be said without the session itself.
    """

    listing: Listing
    session: Session | None = None
    tier: Tier = "host"
    location: Location | None = None
    saved: int = -1
    busy: bool = False
    error: str | None = None


@dataclass(frozen=True)
class Lease:
    """One request's hold on a session; `session` is None for one that does not exist yet."""

    key: SessionKey
    entry: Entry
    session: Session | None


class SessionTiers:
    """Sessions by owner and name, on device, host and disk; every public method is thread-safe."""

    def __init__(
        self,
        layout: Layout,
        *,
        folder: Path | None,
        budgets: Budgets,
        on_idle: Callable[[], None],
    ) -> None:
        """Makes an empty table.

        Args:
          folder: where snapshots are kept; None keeps nothing on disk.
          on_idle: called, from any thread, when a session that was busy is free.
        """
        self._layout = layout
        self._folder = folder
        self._budgets = budgets
        self._on_idle = on_idle
        self._lock = threading.RLock()
        self._freed = threading.Condition(self._lock)
        self._disk = threading.Lock()  # one save or load of files at a time
        self._entries: dict[SessionKey, Entry] = {}
        self._eviction: dict[Tier, Eviction] = {"device": Eviction(), "host": Eviction()}
        self._pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="atlas-sessions")
        self._changes = 0
        self.hits = self.misses = self.saves = self.loads = self.failures = 0

    # --- for the engine's thread ----------------------------------------------------------------------------------
    def acquire(self, key: SessionKey) -> Lease | None:
        """Takes a session for one request; the place of one that does not exist yet is held too.

        Returns:
          A lease to be released; or None while another request holds it or it is being read from disk. `on_idle` is
          called when that ends.

        Raises:
          MemoryUnavailable: it cannot be read, or there is no room for another.
        """
        with self._lock:
            entry = self._entries.get(key)
            if entry is None:
                if self._folder is None and self._bytes("host") + self._bytes("device") > self._budgets.host:
                    raise MemoryUnavailable("No available ATLAS contexts: session memory is full", retry_after=5.0)
                now = time.time()
                listing = Listing(key.session_id, tokens=0, bytes=0, created=now, last_used=now, has_state=False)
                entry = self._entries[key] = Entry(listing, busy=True)
                self.misses += 1
                return Lease(key, entry, None)
            if entry.error is not None:
                error, entry.error = entry.error, None
                raise MemoryUnavailable(error, retry_after=5.0)
            if entry.busy:
                return None
            entry.busy = True
            if entry.session is not None:
                self.hits += 1
                return Lease(key, entry, entry.session)
            self.misses += 1
            self._pool.submit(self._wake, key, entry)
            return None

    def release(self, lease: Lease, session: Session | None, strategy: CacheStrategy) -> None:
        """Gives a session back, changed or (None) as it was."""
        with self._lock:
            entry = lease.entry
            entry.busy = False
            if self._entries.get(lease.key) is entry:  # else it was deleted meanwhile, and must stay so
                if session is not None:
                    session.last_used = time.time()
                    self._put(lease.key, entry, session, "device" if self._budgets.device else "host")
                elif entry.session is not None:
                    self._eviction[entry.tier].use(lease.key)
                elif entry.location is None:
                    del self._entries[lease.key]
                self._make_room(strategy)
            self._freed.notify_all()
        self._on_idle()

    def _put(self, key: SessionKey, entry: Entry, session: Session, tier: Tier) -> None:
        """Enters a changed session; the lock is held."""
        self._changes += 1
        session.changed = self._changes
        entry.session, entry.tier, entry.listing = session, tier, _listing(session)
        self._eviction[tier].use(key)

    @contextmanager
    def _held(self, key: SessionKey, *, create: bool = False) -> Iterator[Entry]:
        """Holds a session for an endpoint, after whatever request is using it.

        Raises:
          SessionNotFound: there is none, and `create` is False.
          MemoryUnavailable: a request has been using it for too long.
        """
        deadline = time.monotonic() + _PATIENCE
        with self._freed:
            while True:
                entry = self._entries.get(key)
                if entry is None or not is_stored(entry):
                    if not create:
                        raise SessionNotFound("No such session")
                    if entry is None:
                        now = time.time()
                        entry = self._entries[key] = Entry(Listing(key.session_id, 0, 0, now, now, False))
                if not entry.busy:
                    break
                if not self._freed.wait(deadline - time.monotonic()):
                    raise MemoryUnavailable("The session is in use", retry_after=5.0)
            entry.busy = True
        try:
            yield entry
        finally:
            with self._freed:
                entry.busy = False
                if not is_stored(entry) and self._entries.get(key) is entry:
                    del self._entries[key]
                self._freed.notify_all()
            self._on_idle()

    def _wake(self, key: SessionKey, entry: Entry) -> None:
        """Reads a session from disk, in a thread."""
        session: Session | None = None
        try:
            assert entry.location is not None
            session = self._read(key, entry.location)
        except (SnapshotInvalid, OSError) as error:
            reason = str(error) if isinstance(error, SnapshotInvalid) else "its file cannot be opened"
            log.error("[ATLAS] Memory of a session could not be read: %s", reason)
            with self._lock:
                self.failures += 1
                entry.error = f"This session's memory cannot be read: {reason}"
        with self._lock:
            entry.busy = False
            if session is not None and self._entries.get(key) is entry:
                session.changed = entry.saved
                entry.session, entry.tier = session, "host"
                self._eviction["host"].use(key)
                self.loads += 1
            self._freed.notify_all()
        self._on_idle()

    def _read(self, key: SessionKey, location: Location) -> Session:
        session = decode_session(self._layout, location.read(self._largest))
        if session.key != key:
            raise SnapshotInvalid("snapshot belongs to another session")
        return session

    @property
    def _largest(self) -> int:
        """More bytes than any honest snapshot has."""
        return 2 * self._layout.largest_snapshot + MAX_CONTEXT_STATE

    # --- tiers ----------------------------------------------------------------------------------------------------
    def _bytes(self, tier: Tier) -> int:
        return sum(e.listing.bytes for e in self._entries.values() if e.session is not None and e.tier == tier)

    def count(self, tier: Tier) -> int:
        """Sessions whose state rests in a tier."""
        with self._lock:
            if tier == "disk":
                return sum(entry.session is None and entry.location is not None for entry in self._entries.values())
            return sum(entry.session is not None and entry.tier == tier for entry in self._entries.values())

    def _make_room(self, strategy: CacheStrategy) -> None:
        """Moves sessions down until every tier is within its budget; the lock is held."""

        def resting(tier: Tier) -> Callable[[SessionKey], bool]:
            def may_leave(key: SessionKey) -> bool:
                entry = self._entries.get(key)
                return entry is not None and not entry.busy and entry.session is not None and entry.tier == tier

            return may_leave

        while self._bytes("device") > self._budgets.device:
            key = self._eviction["device"].victim(strategy, resting("device"))
            if key is None:
                break
            entry = self._entries[key]
            assert entry.session is not None
            entry.session.checkpoints = [
                Checkpoint(c.position, c.page, to_host(c.row), c.absorbed) for c in entry.session.checkpoints
            ]
            entry.tier = "host"
            self._eviction["device"].evicted(key)
            self._eviction["host"].use(key)
        if self._folder is None:
            return
        excess = self._bytes("host") - self._budgets.host
        while excess > 0:
            key = self._eviction["host"].victim(strategy, resting("host"))
            if key is None:
                break
            entry = self._entries[key]
            entry.busy = True
            excess -= entry.listing.bytes
            self._eviction["host"].evicted(key)
            self._pool.submit(self._put_down, key, entry)

    def _put_down(self, key: SessionKey, entry: Entry) -> None:
        """Writes a session to disk if its copy there is old, and lets go of it; in a thread."""
        session = entry.session
        assert session is not None
        try:
            if entry.location is None or entry.saved != session.changed:
                self._write(key, entry, session)
            with self._freed:
                entry.session, entry.busy = None, False
                self._freed.notify_all()
        except (StorageFull, OSError) as error:
            log.error("[ATLAS] Memory of a session could not be moved to disk: %s", error)
            with self._lock:
                self.failures += 1
                entry.busy = False
                self._eviction["host"].use(key)
                self._freed.notify_all()
        self._on_idle()

    def _write(self, key: SessionKey, entry: Entry, session: Session) -> int:
        """Writes a session's own file; returns its size."""
        folder = self._require_folder()
        data = encode_session(self._layout, session)
        path = archive.session_file(folder, key.owner, key.session_id)
        with self._disk:
            self._check_quota(len(data))
            with snapshot.atomic_file(path) as file:
                file.write(data)
        with self._lock:
            entry.location, entry.saved = Location(path), session.changed
        return len(data)

    def _check_quota(self, more: int) -> None:
        folder = self._require_folder()
        used = sum(path.stat().st_size for path in folder.rglob("*.atlas"))
        if used + more > self._budgets.disk:
            raise StorageFull("The disk budget of session snapshots is used up")

    def _require_folder(self) -> Path:
        if self._folder is None:
            raise MemoryUnavailable("Memory persistence is not enabled")
        return self._folder

    def close(self) -> None:
        """Waits for reads and writes under way."""
        self._pool.shutdown(wait=True)


def is_stored(entry: Entry) -> bool:
    """Whether there is anything of it yet; the place held for a session that does not exist has nothing."""
    return entry.session is not None or entry.location is not None


def _listing(session: Session) -> Listing:
    return Listing(
        session_id=session.key.session_id,
        tokens=session.history.length,
        bytes=sum(checkpoint.bytes for checkpoint in session.checkpoints),
        created=session.created,
        last_used=session.last_used,
        has_state=session.has_state,
    )
