"""Who holds which session, and which sessions lie on the device, in host memory or on disk only.

A session rests between turns as an immutable checkpoint. When a tier is over its budget, the eviction strategy of the request
that needed room says who moves down. Every turn is in the session's journal before its answer ends; a snapshot takes the
journal's place when the session leaves host memory, and from time to time.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from math import inf

from atlas_jax.engine.api import (
    CacheStrategy,
    EngineError,
    MemoryUnavailable,
    SessionConflict,
    SessionExists,
    SessionKey,
    SessionNotFound,
    SnapshotInvalid,
    StorageFull,
)
from atlas_jax.engine.sessions.entry import Entry, NewText, SessionLease, Tier
from atlas_jax.engine.sessions.index import SessionCounters, SessionIndex
from atlas_jax.engine.sessions.journal_writer import JournalWriter
from atlas_jax.engine.sessions.layout import Layout
from atlas_jax.engine.sessions.persistence import Persistence, reason
from atlas_jax.engine.sessions.session import Session
from atlas_jax.engine.sessions.store import StoredSession

log = logging.getLogger("atlas.engine")

_AT_ONCE = 8
"""Sessions that are read from a shared store at once, and turns that are written to it: each waits for a network."""
_PATIENCE = 120.0
"""Seconds an endpoint waits for a session that a request is using."""


class SessionTiers:
    """Leases sessions to requests and to endpoints, and moves them between tiers; every public method is thread-safe.

    `acquire`, `commit` and `release` are the scheduler's and never wait for a disk or for one another's requests; `held` and
    `leaving` are for endpoints and do.
    """

    def __init__(
        self,
        layout: Layout,
        index: SessionIndex,
        persistence: Persistence,
        *,
        on_idle: Callable[[], None],
        sync_seconds: float = 1.0,
    ) -> None:
        """Begins with every session on disk.

        Args:
          on_idle: called, from any thread, when a session that was busy is free.
          sync_seconds: how far the disk may be behind what was answered.
        """
        self._layout = layout
        self._index = index
        self._persistence = persistence
        self._on_idle = on_idle
        self._rest: Tier = "device" if index.usage.budgets.device else "host"
        self._leaving = 0
        width = _AT_ONCE if persistence.shared else 1
        self._reader = ThreadPoolExecutor(max_workers=width, thread_name_prefix="atlas-sessions-in")
        self._writer = ThreadPoolExecutor(max_workers=1, thread_name_prefix="atlas-sessions-out")
        self._journal = JournalWriter(sync_seconds, width) if persistence.enabled else None
        self._durable = sync_seconds == 0
        self._closed = False

    @property
    def counters(self) -> SessionCounters:
        """Of all sessions, since start."""
        return self._index.counters

    def count(self, tier: Tier) -> int:
        """Sessions whose state rests in a tier."""
        return self._index.count(tier)

    # --- for the scheduler ----------------------------------------------------------------------------------------
    def acquire(self, key: SessionKey, since: float) -> SessionLease | None:
        """Takes a session for one request; the place of one that does not exist yet is held too.

        Args:
          since: `time.monotonic()` when the request came: a shared store has to be asked after that.

        Returns:
          A lease to be committed or released; or None while another request holds it, it is being read from the store, or
          others have to leave host memory first. `on_idle` is called when that ends.

        Raises:
          MemoryUnavailable: it cannot be read, or there is no room for another.
          StorageFull: there is no room on disk for another, or for those that have to make room for it.
        """
        index = self._index
        with index.lock:
            entry = index.get(key)
            if self._persistence.shared and not index.is_checked(key, since):
                if entry is None or not entry.busy:
                    entry = entry or index.add(key)
                    entry.busy = True
                    self._reader.submit(self._look, entry)
                return None
            if entry is None:
                self._check_disk(key.owner)
                if not self._has_room():
                    return None
                index.counters.misses += 1
                return SessionLease(key, index.add(key, busy=True), None)
            if entry.problem is not None:
                raise MemoryUnavailable(_unusable(entry.problem), retry_after=30.0)
            if entry.error is not None:
                error, entry.error, entry.checked = entry.error, None, -inf
                if not entry.exists:
                    index.forget(entry)
                raise MemoryUnavailable(error, retry_after=5.0)
            if entry.busy:
                return None
            if entry.session is not None:
                entry.busy = True
                index.counters.hits += 1
                return SessionLease(key, entry, entry.session)
            if not self._has_room():
                return None
            entry.busy = True
            index.counters.misses += 1
            self._reader.submit(self._load, entry)
            return None

    def commit(
        self,
        lease: SessionLease,
        session: Session,
        text: NewText,
        strategy: CacheStrategy,
        done: Callable[[str | EngineError | None], None],
    ) -> None:
        """Gives a session back as a turn has left it; `done` is called once the turn is in the journal.

        Args:
          done: called from any thread with None, or with why the turn is in host memory only, or with the error that it has
            to end with: another server has gone on with the session.
        """
        entry, before = lease.entry, 0 if lease.session is None else lease.session.generation
        session.generation, session.last_used = self._index.next_generation(), time.time()
        unwritten = lease.session is not None and entry.written < before
        session.after = lease.session.after if lease.session is not None and unwritten else before
        known = self._index.holds(entry)
        if self._journal is None or not known:  # deleted meanwhile, and it must stay so
            self.release(lease, session if known else None, strategy)
            done(None)
            return

        began = time.monotonic()

        def write() -> StoredSession | None:
            return self._persistence.write_turn(entry, session, before, text)

        def written(failure: Exception | None) -> None:
            problem = None
            if isinstance(failure, SessionConflict):
                log.warning("[ATLAS] A turn was refused: another server has gone on with its session")
                self._index.let_go(entry)
                try:
                    self.release(lease, None, strategy)
                finally:
                    done(failure)
                return
            if failure is None and self._durable:  # it was the newest: else it would have been refused
                entry.checked = max(entry.checked, began)
            if failure is not None:
                problem = "This turn is in host memory only: it could not be written to the session store"
                log.error("[ATLAS] Failed to save a session's turn: %s", reason(failure))
                self._persistence.note_failure(failure)
            try:
                self.release(lease, session, strategy)
            finally:
                done(problem)

        self._journal.submit(write, written)

    def release(self, lease: SessionLease, session: Session | None, strategy: CacheStrategy) -> None:
        """Gives a session back, changed or (None) as it was."""
        entry = lease.entry
        if session is not None and self._rest == "host":  # before the lock is taken: a device's arrays are waited for
            session = self._at_rest(session)
        with self._index.lock:
            entry.busy = False
            if self._index.holds(entry):  # else it was deleted meanwhile, and must stay so
                if session is not None:
                    self._index.put(entry, session, self._rest)
                elif entry.session is not None:
                    self._index.use(entry)
                elif not entry.exists:
                    self._index.forget(entry)
                self._make_room(strategy)
            self._index.freed.notify_all()
        self._on_idle()

    def _at_rest(self, session: Session) -> Session:
        return replace(session, checkpoints=[self._layout.rest(session.shape, one) for one in session.checkpoints])

    @property
    def pending(self) -> int:
        """Turns that have been answered and whose last event waits for the journal."""
        return 0 if self._journal is None else self._journal.pending

    def look(self, key: SessionKey) -> None:
        """Asks a shared store for a session that no request is using; raises MemoryUnavailable where it cannot be reached."""
        index, deadline = self._index, time.monotonic() + _PATIENCE
        if not self._persistence.shared:
            return
        with index.lock:
            while (entry := index.get(key)) is not None and entry.busy and not entry.exists:  # it is being looked for
                if not index.freed.wait(deadline - time.monotonic()):
                    raise MemoryUnavailable("The session is in use", retry_after=5.0)
            if entry is not None and entry.busy:
                return
            entry = entry or index.add(key)
            entry.busy = True
        self._look(entry)
        with index.lock:
            error, entry.error = entry.error, None
            if error is not None:
                entry.checked = -inf
                if index.holds(entry) and not entry.exists:
                    index.forget(entry)
                raise MemoryUnavailable(error, retry_after=5.0)

    def _look(self, entry: Entry) -> None:
        """Asks a shared store for a session, in a thread."""
        index, began = self._index, time.monotonic()
        error: str | None = None
        try:
            self._persistence.look(entry)
        except Exception as problem:
            log.error("[ATLAS] The session store cannot be reached: %s", reason(problem))
            error = "This session's memory cannot be read: the session store cannot be reached"
        with index.lock:
            entry.busy = False
            if error is not None:
                index.counters.failures += 1
                entry.error, entry.checked = error, began
            index.freed.notify_all()
        self._on_idle()

    # --- for endpoints --------------------------------------------------------------------------------------------
    @contextmanager
    def held(self, key: SessionKey, *, create: bool = False, damaged: bool = False) -> Iterator[Entry]:
        """Holds a session for an endpoint, after whatever request is using it.

        Raises:
          SessionNotFound: there is none, and `create` is False.
          SnapshotInvalid: it cannot be used, and `damaged` is False.
          MemoryUnavailable: a request has been using it for too long.
        """
        index = self._index
        deadline = time.monotonic() + _PATIENCE
        self.look(key)
        with index.lock:
            while True:
                entry = index.get(key)
                if entry is None or not entry.exists:
                    if not create:
                        raise SessionNotFound("No such session")
                    if entry is None:
                        self._check_disk(key.owner)
                        entry = index.add(key)
                if entry.problem is not None and not damaged:
                    raise SnapshotInvalid(_unusable(entry.problem))
                if not entry.busy:
                    break
                if not index.freed.wait(deadline - time.monotonic()):
                    raise MemoryUnavailable("The session is in use", retry_after=5.0)
            entry.busy = True
        try:
            yield entry
        finally:
            self._give_back(entry)

    @contextmanager
    def begun(self, key: SessionKey) -> Iterator[Entry]:
        """Holds the place of a session that an endpoint begins.

        Raises:
          SessionExists: there is one, or a request is about to begin it.
          StorageFull: there is no room on disk for another.
        """
        self.look(key)
        with self._index.lock:
            if self._index.get(key) is not None:
                raise SessionExists("A session of that name exists already")
            self._check_disk(key.owner)
            entry = self._index.add(key, busy=True)
        try:
            yield entry
        finally:
            self._give_back(entry)

    def _give_back(self, entry: Entry) -> None:
        """Ends an endpoint's hold; nothing stays of a session that was to be made and was not."""
        index = self._index
        with index.lock:
            entry.busy = False
            nothing = entry.session is None and not entry.written and entry.problem is None
            if nothing and index.holds(entry):
                index.forget(entry)
            self._make_room("adaptive")
            index.freed.notify_all()
        self._on_idle()

    @contextmanager
    def leaving(
        self, key: SessionKey, condition: Callable[[Entry], bool] = lambda _: True
    ) -> Iterator[StoredSession | None]:
        """Takes a session out of the index while it is removed from the store; it is back if that fails.

        A request that is using it goes on without it; one that names it meanwhile waits.

        Raises:
          SessionNotFound: there is none that meets the condition.
        """
        index = self._index
        self.look(key)
        with index.lock:
            entry = index.find(key)
            if not condition(entry):
                raise SessionNotFound("No such session")
            index.forget(entry)
            nobody = index.add(key, busy=True)
        try:
            stored = entry.stored
            if stored is None and self._persistence.enabled:
                stored = self._persistence.store().session(key)
            yield stored
        except BaseException:
            with index.lock:
                if index.holds(nobody):
                    index.forget(nobody)
                index.take_back(entry)
            raise
        else:
            with index.lock:
                if index.holds(nobody):
                    index.forget(nobody)
        finally:
            with index.lock:
                index.freed.notify_all()
            self._on_idle()

    # --- between tiers --------------------------------------------------------------------------------------------
    def _check_disk(self, owner: str) -> None:
        if self._persistence.enabled:
            self._index.usage.check_disk(owner)

    def _has_room(self) -> bool:
        """Whether host memory has room for another session; begins to make some if not. The lock is held.

        Raises:
          MemoryUnavailable, StorageFull: there is none, and nobody can be moved to disk.
        """
        usage = self._index.usage
        if usage.host_excess() <= 0:
            return True
        if not self._persistence.enabled:
            if usage.in_memory() > usage.budgets.host:
                raise MemoryUnavailable("No available ATLAS contexts: session memory is full", retry_after=5.0)
            return True
        if self._persistence.is_full:
            raise StorageFull("There is no room on disk for the sessions that have to leave host memory")
        self._make_room("adaptive")
        # who is on the way out wakes the scheduler; where nobody can leave, waiting would not help
        return usage.host_excess() <= 0 or not self._leaving

    def _make_room(self, strategy: CacheStrategy) -> None:
        """Moves sessions down until every tier is within its budget; the lock is held."""
        index, usage = self._index, self._index.usage
        while usage.device_excess() > 0 and (entry := index.victim("device", strategy)) is not None:
            assert entry.session is not None
            index.evicted(entry, "device")
            entry.session, entry.tier = self._at_rest(entry.session), "host"
            usage.count(entry)
            index.use(entry)
        if not self._persistence.enabled or self._persistence.is_full:
            return
        excess = usage.host_excess()
        while excess > 0 and (entry := index.victim("host", strategy)) is not None:
            entry.busy = True
            self._leaving += 1
            excess -= entry.resting[1]
            index.evicted(entry, "host")
            self._writer.submit(self._evict, entry)

    def _load(self, entry: Entry) -> None:
        """Reads a session from disk, in a thread."""
        index = self._index
        session: Session | None = None
        try:
            session = self._persistence.read(entry)
        except SnapshotInvalid as error:
            name = entry.key.session_id
            log.error("[ATLAS] Memory of session %r cannot be read and was set aside: %s", name, error)
            with index.lock:
                index.counters.failures += 1
                entry.problem = str(error)
        except SessionConflict:  # it is asked for anew
            entry.checked = -inf
        except Exception as error:
            log.error("[ATLAS] Memory of a session could not be read: %s", reason(error))
            with index.lock:
                index.counters.failures += 1
                entry.error = "This session's memory cannot be read: its file cannot be opened"
        with index.lock:
            entry.busy = False
            if session is not None and index.holds(entry):
                index.put(entry, session)
                index.counters.loads += 1
            index.freed.notify_all()
        self._on_idle()

    def _evict(self, entry: Entry) -> None:
        """Writes a session to disk if what is there is old, and lets go of it; in a thread."""
        index, session = self._index, entry.session
        assert session is not None
        failure: Exception | None = None
        try:
            if not entry.is_clean:
                self._persistence.write(entry, session)
        except SessionConflict:
            entry.checked = -inf
        except Exception as error:
            log.error("[ATLAS] Memory of a session could not be moved to disk: %s", reason(error))
            self._persistence.note_failure(error)
            failure = error
        with index.lock:
            self._leaving -= 1
            entry.busy = False
            if failure is None:
                entry.session, entry.tier = None, "disk"
            if index.holds(entry):
                if failure is None:
                    index.usage.count(entry)
                else:
                    index.use(entry)
            index.freed.notify_all()
        self._on_idle()

    def close(self, timeout: float) -> None:
        """Writes the journals within `timeout` seconds; sessions are neither read nor moved any more."""
        if self._closed:
            return
        self._closed = True
        self._reader.shutdown(wait=False, cancel_futures=True)
        self._writer.shutdown(wait=False, cancel_futures=True)
        if self._journal is not None and not self._journal.close(max(0.5, timeout)):
            log.error("[ATLAS] The journals were not written within %.1f s", max(0.5, timeout))


def _unusable(problem: str) -> str:
    return f"This session's memory cannot be used: {problem}; delete or reset it to begin anew"
