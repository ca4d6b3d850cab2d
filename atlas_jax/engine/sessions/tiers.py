"""All sessions of an engine: who holds which, in which tier, and what of them is on disk.

A session rests between turns as an immutable checkpoint, on the device or the host. When a tier is over its budget, the
eviction strategy of the request that needed room says who moves down. Every turn is in the session's journal before its
answer ends; a snapshot takes the journal's place when the session leaves main memory, and from time to time.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Literal

import msgspec

from atlas_jax.engine.api import (
    CacheStrategy,
    MemoryUnavailable,
    SessionKey,
    SessionNotFound,
    SnapshotInvalid,
    StorageFull,
)
from atlas_jax.engine.sessions.eviction import Eviction
from atlas_jax.engine.sessions.journal import Origin, Reading, Turn
from atlas_jax.engine.sessions.journal_writer import JournalWriter
from atlas_jax.engine.sessions.session import (
    Checkpoint,
    Layout,
    Session,
    check_bound,
    decode_session,
    encode_session,
    listing_of,
    replay,
    to_host,
)
from atlas_jax.engine.sessions.snapshot import Listing
from atlas_jax.engine.sessions.store import Found, Store, StoredSession

log = logging.getLogger("atlas.engine")

MAX_CONTEXT_STATE = 4 << 20
"""Bytes of JSON that a caller may keep with a session."""
_PATIENCE = 120.0
"""Seconds an endpoint waits for a session that a request is using."""
_DISK_SPEED = 100e6
"""Bytes a second that snapshots are written at, before any has been."""
_SLACK = 1 << 20
"""Bytes by which a snapshot may exceed what was counted for it: its history and header."""
_FULL_SECONDS = 5.0
"""Seconds after a write that found no room during which no session is begun or woken where main memory is needed."""
Tier = Literal["device", "host", "disk"]


@dataclass(frozen=True)
class Budgets:
    """Bytes of session state.

    Attributes:
      device, host, disk: what each tier may hold. 0 for the device: sessions rest on the host.
      owner: what one owner may have on disk; None is all of it.
    """

    device: int
    host: int
    disk: int
    owner: int | None = None


@dataclass(eq=False)
class Entry:
    """A session as the table knows it.

    Attributes:
      session: the session itself, or None while it is on disk only.
      tier: where its state is.
      stored: its place in the store, or None before anything has been written.
      written: the generation that store holds, snapshot and journal together.
      busy: a request is using it, or a thread is reading or writing it.
      error: why it could not be read the last time, until that has been reported.
      problem: why it cannot be used at all.
      listing: what can be said without the session itself.
      resting, charged: bytes counted for its tier, and for its owner's share of the disk.
    """

    listing: Listing
    session: Session | None = None
    tier: Tier = "host"
    stored: StoredSession | None = None
    written: int = 0
    busy: bool = False
    error: str | None = None
    problem: str | None = None
    resting: tuple[Tier, int] = ("host", 0)
    charged: int = 0


@dataclass(frozen=True)
class SessionLease:
    """One request's hold on a session; `session` is None for one that does not exist yet."""

    key: SessionKey
    entry: Entry
    session: Session | None


@dataclass(frozen=True)
class NewText:
    """What a turn did to its session's text.

    Attributes:
      keep: how many tokens of the text before it stay.
      tokens: what follows them.
      whole: the whole text from its beginning, where the request brought it; else None.
    """

    keep: int
    tokens: Sequence[int]
    whole: Callable[[], Sequence[int]] | None
    reading: Reading


class SessionTiers:
    """Sessions by owner and name, on device, host and disk; every public method is thread-safe."""

    def __init__(
        self,
        layout: Layout,
        *,
        store: Store | None,
        budgets: Budgets,
        on_idle: Callable[[], None],
        sync_seconds: float = 1.0,
    ) -> None:
        """Finds what the store holds.

        Args:
          store: where sessions are kept; None keeps nothing but in main memory.
          on_idle: called, from any thread, when a session that was busy is free.
          sync_seconds: how far the disk may be behind what was answered.
        """
        self.layout = layout
        self.store = store
        self.budgets = budgets
        self.lock = threading.RLock()
        self.entries: dict[SessionKey, Entry] = {}
        self.hits = self.misses = self.saves = self.loads = self.failures = 0
        self.seconds_per_byte = 1 / _DISK_SPEED
        self.nameless: dict[str, str] = {}
        self.exported: dict[str, int] = {}
        self._on_idle = on_idle
        self._freed = threading.Condition(self.lock)
        self._eviction: dict[Tier, Eviction] = {"device": Eviction(), "host": Eviction()}
        self._sizes: dict[Tier, int] = {"device": 0, "host": 0, "disk": 0}
        self._used: dict[str, int] = {}
        self._generation = self._leaving = 0
        self._full_until = 0.0
        self._reader = ThreadPoolExecutor(max_workers=1, thread_name_prefix="atlas-sessions-in")
        self._writer = ThreadPoolExecutor(max_workers=1, thread_name_prefix="atlas-sessions-out")
        self._journal = None if store is None else JournalWriter(sync_seconds)
        self._closed = False
        if store is not None:
            for found in store.list():
                self._adopt(found)

    # --- what is stored -------------------------------------------------------------------------------------------
    def _adopt(self, found: Found) -> None:
        """Enters a session that was found in the store."""
        if found.key is None:
            self.nameless[found.stored.name] = found.problem or "its files cannot be read"
            log.error("[ATLAS] A stored session was set aside: %s", found.problem)
            return
        turns = [] if found.journal is None else found.journal.turns
        problem = found.problem
        if found.head is not None:
            listing = found.head.listing
            try:
                check_bound(self.layout, found.head)
            except SnapshotInvalid as error:
                problem = problem or str(error)
        else:
            created = time.time() if found.journal is None else found.journal.origin.created
            listing = _new_listing(found.key, created)
        if turns:
            last = turns[-1]
            listing = msgspec.structs.replace(
                listing,
                generation=last.generation,
                tokens=last.keep + len(last.tokens),
                last_used=max(listing.last_used, last.time),
            )
        if problem is not None:
            log.error("[ATLAS] Session %r was set aside: %s", listing.session_id, problem)
        self._generation = max(self._generation, listing.generation)
        entry = Entry(listing, tier="disk", stored=found.stored, written=listing.generation, problem=problem)
        self.entries[found.key] = entry
        self._count(found.key, entry)

    def next_generation(self) -> int:
        """A number greater than any before, on this machine and, its clock being about right, on others."""
        with self.lock:
            self._generation = max(self._generation + 1, time.time_ns() // 1000)
            return self._generation

    def find(self, key: SessionKey) -> Entry:
        """A session's entry; the lock must be held. Raises SessionNotFound."""
        entry = self._known(key)
        if entry is None or not is_kept(entry):
            raise SessionNotFound("No such session")
        return entry

    def _known(self, key: SessionKey) -> Entry | None:
        entry = self.entries.get(key)
        if entry is None and self.nameless and self.store is not None:
            problem = self.nameless.pop(self.store.place(key), None)
            if problem is not None:  # now that somebody has said its name
                stored = self.store.session(key)
                entry = Entry(_new_listing(key, 0.0), tier="disk", stored=stored, problem=problem)
                self.entries[key] = entry
        return entry

    # --- for the engine's thread ----------------------------------------------------------------------------------
    def acquire(self, key: SessionKey) -> SessionLease | None:
        """Takes a session for one request; the place of one that does not exist yet is held too.

        Returns:
          A lease to be committed or released; or None while another request holds it, it is being read from disk, or
          others have to leave main memory first. `on_idle` is called when that ends.

        Raises:
          MemoryUnavailable: it cannot be read, or there is no room for another.
          StorageFull: there is no room on disk for another, or for those that have to make room for it.
        """
        with self.lock:
            entry = self._known(key)
            if entry is None:
                self._check_share(key.owner)
                if not self._logits_buffer():
                    return None
                entry = self.entries[key] = Entry(_new_listing(key, time.time()), busy=True)
                self.misses += 1
                return SessionLease(key, entry, None)
            if entry.problem is not None:
                raise MemoryUnavailable(_unusable(entry.problem), retry_after=30.0)
            if entry.error is not None:
                error, entry.error = entry.error, None
                raise MemoryUnavailable(error, retry_after=5.0)
            if entry.busy:
                return None
            if entry.session is not None:
                entry.busy = True
                self.hits += 1
                return SessionLease(key, entry, entry.session)
            if not self._logits_buffer():
                return None
            entry.busy = True
            self.misses += 1
            self._reader.submit(self._wake, key, entry)
            return None

    def commit(
        self,
        lease: SessionLease,
        session: Session,
        text: NewText,
        strategy: CacheStrategy,
        done: Callable[[str | None], None],
    ) -> None:
        """Gives a session back as a turn has left it; `done` is called once the turn is in the journal.

        Args:
          done: called from any thread with None, or with why the turn is in main memory only.
        """
        entry, before = lease.entry, 0 if lease.session is None else lease.session.generation
        session.generation, session.last_used = self.next_generation(), time.time()
        with self.lock:
            known = self.entries.get(lease.key) is entry
        if self._journal is None or not known:  # deleted meanwhile, and it must stay so
            self.release(lease, session if known else None, strategy)
            done(None)
            return

        def write() -> StoredSession | None:
            return self._write_turn(lease.key, entry, session, before, text)

        def written(failure: Exception | None) -> None:
            problem = None
            if failure is not None:
                problem = "This turn is in main memory only: it could not be written to disk"
                log.error("[ATLAS] Failed to save a session's turn: %s", _brief(failure))
                self.note_failure(failure)
            try:
                self.release(lease, session, strategy)
            finally:
                done(problem)

        self._journal.submit(write, written)

    def _write_turn(
        self, key: SessionKey, entry: Entry, session: Session, before: int, text: NewText
    ) -> StoredSession | None:
        assert self.store is not None
        with self.lock:
            if self.entries.get(key) is not entry:
                return None
            if entry.stored is None:
                entry.stored = self.store.session(key)
            stored = entry.stored
        history = session.history
        origin = Origin(self.layout.fingerprint, key.owner, key.session_id, session.created)

        def turn(keep: int, tokens: Sequence[int]) -> Turn:
            replies = [reply for reply in history.replies if reply[0] >= keep]
            return Turn(
                session.generation, before, keep, tokens, replies, history.preamble, session.pending, text.reading,
                session.last_used,
            )  # fmt: skip

        fits = stored.append(origin, turn(text.keep, text.tokens))
        if not fits and text.whole is not None:
            fits = stored.append(origin, turn(0, text.whole()))
        if not fits:
            self.write(key, entry, session)
        with self.lock:
            entry.written = max(entry.written, session.generation)
        return stored

    def release(self, lease: SessionLease, session: Session | None, strategy: CacheStrategy) -> None:
        """Gives a session back, changed or (None) as it was."""
        with self.lock:
            entry = lease.entry
            entry.busy = False
            if self.entries.get(lease.key) is entry:  # else it was deleted meanwhile, and must stay so
                if session is not None:
                    self.put(lease.key, entry, session, "device" if self.budgets.device else "host")
                elif entry.session is not None:
                    self._eviction[entry.tier].use(lease.key)
                elif not is_kept(entry):
                    self.forget(lease.key)
                self.make_room(strategy)
            self._freed.notify_all()
        self._on_idle()

    # --- for endpoints --------------------------------------------------------------------------------------------
    def put(self, key: SessionKey, entry: Entry, session: Session, tier: Tier = "host") -> None:
        """Enters a session as it is now; the lock must be held."""
        entry.session, entry.tier, entry.listing = session, tier, listing_of(session)
        self._eviction[tier].use(key)
        self._count(key, entry)

    def put_stored(self, key: SessionKey, entry: Entry, session: Session) -> None:
        """Enters a session that has just been written, and leaves it on disk; the lock must be held."""
        entry.session, entry.tier, entry.listing = None, "disk", listing_of(session)
        self._count(key, entry)

    @contextmanager
    def leaving(self, key: SessionKey) -> Iterator[StoredSession | None]:
        """Takes a session out of the table while its files are removed; it is back if that fails.

        A request that is using it goes on without it; one that names it meanwhile waits.

        Raises:
          SessionNotFound: there is none.
        """
        with self.lock:
            entry = self.find(key)
            self.forget(key)
            nobody = self.entries[key] = Entry(_new_listing(key, time.time()), busy=True)
        try:
            yield entry.stored if entry.stored is not None or self.store is None else self.store.session(key)
        except BaseException:
            with self.lock:
                self.forget(key)
                self.entries[key] = entry
                entry.resting, entry.charged = ("host", 0), 0
                if entry.session is not None:
                    self._eviction[entry.tier].use(key)
                self._count(key, entry)
            raise
        else:
            with self.lock:
                if self.entries.get(key) is nobody:
                    self.forget(key)
        finally:
            with self._freed:
                self._freed.notify_all()
            self._on_idle()

    def forget(self, key: SessionKey) -> None:
        """Takes a session out of the table; the lock must be held."""
        entry = self.entries.pop(key)
        self._sizes[entry.resting[0]] -= entry.resting[1]
        self._used[key.owner] = self._used.get(key.owner, 0) - entry.charged
        for eviction in self._eviction.values():
            eviction.forget(key)

    @contextmanager
    def held(self, key: SessionKey, *, create: bool = False, damaged: bool = False) -> Iterator[Entry]:
        """Holds a session for an endpoint, after whatever request is using it.

        Raises:
          SessionNotFound: there is none, and `create` is False.
          SnapshotInvalid: it cannot be used, and `damaged` is False.
          MemoryUnavailable: a request has been using it for too long.
        """
        deadline = time.monotonic() + _PATIENCE
        with self._freed:
            while True:
                entry = self._known(key)
                if entry is None or not is_kept(entry):
                    if not create:
                        raise SessionNotFound("No such session")
                    if entry is None:
                        self._check_share(key.owner)
                        entry = self.entries[key] = Entry(_new_listing(key, time.time()))
                if entry.problem is not None and not damaged:
                    raise SnapshotInvalid(_unusable(entry.problem))
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
                if not is_kept(entry) and self.entries.get(key) is entry:
                    self.forget(key)
                self.make_room("adaptive")
                self._freed.notify_all()
            self._on_idle()

    def read(self, key: SessionKey, entry: Entry) -> Session:
        """A session from the store, as its journal says it has gone on.

        Raises:
          SnapshotInvalid, OSError: it cannot be read.
        """
        stored = entry.stored
        if stored is None:
            raise SessionNotFound("No such session")
        data, journal = stored.read(self.largest)
        if data is not None:
            session = decode_session(self.layout, data, stored.generation)
        elif journal is not None:
            session = Session(key, self.layout.default_shape, created=journal.origin.created)
        else:
            raise SnapshotInvalid("snapshot and journal are gone")
        if session.key != key or (journal is not None and journal.origin.model != self.layout.fingerprint):
            raise SnapshotInvalid("snapshot belongs to another session")
        return session if journal is None else replay(self.layout, session, journal.turns)

    def write(self, key: SessionKey, entry: Entry, session: Session) -> int:
        """Writes a session's snapshot unless something newer is stored; returns its size.

        Raises:
          StorageFull, OSError: nothing was changed.
        """
        store = self.require_store()
        data = encode_session(self.layout, session)
        with self.lock:
            if self.entries.get(key) is not entry:
                return 0
            if entry.stored is None:
                entry.stored = store.session(key)
            stored = entry.stored
            self._check_share(key.owner, len(data) - entry.charged - _SLACK)
        started = time.monotonic()
        if stored.write(session.generation, data):
            with self.lock:
                took = (time.monotonic() - started) / len(data)
                self.seconds_per_byte += 0.5 * (took - self.seconds_per_byte)
                entry.written = max(entry.written, session.generation)
                self.saves += 1
                self._count(key, entry)
                self._full_until = 0.0
        return len(data)

    def write_changed(self, until: float | None = None) -> int:
        """Writes a snapshot of every session whose journal has gone on; returns how many are left.

        Args:
          until: `time.monotonic()` at which to give up; what is left stays in the journals.
        """
        with self.lock:
            changed = [(k, e, e.session) for k, e in self.entries.items() if e.session is not None and not is_clean(e)]
        left, failures = 0, list[OSError | StorageFull]()
        for key, entry, session in changed:
            size = entry.listing.bytes
            if until is not None and time.monotonic() + size * self.seconds_per_byte > until:
                left += 1
                continue
            try:
                self.write(key, entry, session)
            except (StorageFull, OSError) as error:
                left += 1
                failures.append(error)
                self.note_failure(error)
        if failures:  # a full disk fails all of them, at every interval
            log.error("[ATLAS] Failed to save %d of %d sessions: %s", len(failures), len(changed), _brief(failures[0]))
        return left

    def note_failure(self, error: Exception) -> None:
        """Counts a write that failed; where the disk was full, main memory takes no new session for a while."""
        with self.lock:
            self.failures += 1
            if isinstance(error, StorageFull):
                self._full_until = time.monotonic() + _FULL_SECONDS

    def require_store(self) -> Store:
        """The store; raises MemoryUnavailable where there is none."""
        if self.store is None:
            raise MemoryUnavailable("Memory persistence is not enabled")
        return self.store

    @property
    def largest(self) -> int:
        """More bytes than any honest snapshot has."""
        return 2 * self.layout.largest_snapshot + 2 * MAX_CONTEXT_STATE

    # --- tiers ----------------------------------------------------------------------------------------------------
    def _wake(self, key: SessionKey, entry: Entry) -> None:
        """Reads a session from disk, in a thread."""
        session: Session | None = None
        try:
            session = self.read(key, entry)
        except SnapshotInvalid as error:
            log.error("[ATLAS] Memory of session %r cannot be read and was set aside: %s", key.session_id, error)
            with self.lock:
                self.failures += 1
                entry.problem = str(error)
        except Exception as error:
            log.error("[ATLAS] Memory of a session could not be read: %s", _brief(error))
            with self.lock:
                self.failures += 1
                entry.error = "This session's memory cannot be read: its file cannot be opened"
        with self.lock:
            entry.busy = False
            if session is not None and self.entries.get(key) is entry:
                self.put(key, entry, session)
                self.loads += 1
            self._freed.notify_all()
        self._on_idle()

    def _count(self, key: SessionKey, entry: Entry) -> None:
        """Counts what an entry takes of its tier, and of its owner's share of the disk; the lock is held."""
        resting = (entry.tier, 0 if entry.session is None else entry.session.size)
        self._sizes[entry.resting[0]] -= entry.resting[1]
        self._sizes[resting[0]] += resting[1]
        entry.resting = resting
        charged = 0 if entry.stored is None else entry.stored.size
        if entry.session is not None and not is_clean(entry):  # what it will take once it is written
            last = entry.session.checkpoints[-1].bytes if entry.session.checkpoints else 0
            charged = max(charged, last + len(entry.session.state or b""))
        self._used[key.owner] = self._used.get(key.owner, 0) + charged - entry.charged
        entry.charged = charged

    def used(self, owner: str | None = None) -> int:
        """Bytes of disk that an owner's sessions and exports take, or everyone's."""
        with self.lock:
            if owner is not None:
                return self._used.get(owner, 0) + self.exported.get(owner, 0)
            return sum(self._used.values()) + sum(self.exported.values())

    def _check_share(self, owner: str, more: int = 1) -> None:
        """Raises StorageFull where an owner, or everyone together, has no room on disk for `more` bytes."""
        if self.store is None or more <= 0:
            return
        budgets = self.budgets
        if self.used() + more > budgets.disk:
            raise StorageFull("The disk budget of session snapshots is used up")
        share = budgets.disk if budgets.owner is None else budgets.owner
        if self.used(owner) + more > share:
            raise StorageFull("This owner's share of the disk is used up: delete sessions or files to make room")

    def check_export(self, owner: str, more: int) -> None:
        """Raises StorageFull where there is no room for an export of `more` bytes beside what is there."""
        with self.lock:
            self._check_share(owner, more)

    def _logits_buffer(self) -> bool:
        """Whether main memory has room for another session; begins to make some if not. The lock is held.

        Raises:
          MemoryUnavailable, StorageFull: there is none, and nobody can be moved to disk.
        """
        if self._sizes["host"] <= self.budgets.host:
            return True
        if self.store is None:
            if self._sizes["host"] + self._sizes["device"] > self.budgets.host:
                raise MemoryUnavailable("No available ATLAS contexts: session memory is full", retry_after=5.0)
            return True
        if time.monotonic() < self._full_until:
            raise StorageFull("There is no room on disk for the sessions that have to leave main memory")
        self.make_room("adaptive")
        # who is on the way out wakes the loop; where nobody can leave, waiting would not help
        return self._sizes["host"] <= self.budgets.host or not self._leaving

    def count(self, tier: Tier) -> int:
        """Sessions whose state rests in a tier."""
        with self.lock:
            if tier == "disk":
                return sum(entry.session is None and is_kept(entry) for entry in self.entries.values())
            return sum(entry.session is not None and entry.tier == tier for entry in self.entries.values())

    def make_room(self, strategy: CacheStrategy) -> None:
        """Moves sessions down until every tier is within its budget; the lock must be held."""

        def resting(tier: Tier) -> Callable[[SessionKey], bool]:
            def may_leave(key: SessionKey) -> bool:
                entry = self.entries.get(key)
                return entry is not None and not entry.busy and entry.session is not None and entry.tier == tier

            return may_leave

        while self._sizes["device"] > self.budgets.device:
            key = self._eviction["device"].victim(strategy, resting("device"))
            if key is None:
                break
            entry = self.entries[key]
            assert entry.session is not None
            kept = [Checkpoint(c.position, c.page, to_host(c.row), c.absorbed) for c in entry.session.checkpoints]
            entry.session = replace(entry.session, checkpoints=kept)
            entry.tier = "host"
            self._count(key, entry)
            self._eviction["device"].evicted(key)
            self._eviction["host"].use(key)
        if self.store is None or time.monotonic() < self._full_until:
            return
        excess = self._sizes["host"] - self.budgets.host
        while excess > 0:
            key = self._eviction["host"].victim(strategy, resting("host"))
            if key is None:
                break
            entry = self.entries[key]
            entry.busy = True
            self._leaving += 1
            excess -= entry.resting[1]
            self._eviction["host"].evicted(key)
            self._writer.submit(self._put_down, key, entry)

    def _put_down(self, key: SessionKey, entry: Entry) -> None:
        """Writes a session to disk if what is there is old, and lets go of it; in a thread."""
        session = entry.session
        assert session is not None
        try:
            if not is_clean(entry):
                self.write(key, entry, session)
            with self._freed:
                self._leaving -= 1
                entry.session, entry.busy, entry.tier = None, False, "disk"
                if self.entries.get(key) is entry:
                    self._count(key, entry)
                self._freed.notify_all()
        except Exception as error:
            log.error("[ATLAS] Memory of a session could not be moved to disk: %s", _brief(error))
            self.note_failure(error)
            with self._freed:
                self._leaving -= 1
                entry.busy = False
                if self.entries.get(key) is entry:
                    self._eviction["host"].use(key)
                self._freed.notify_all()
        self._on_idle()

    @property
    def pending(self) -> int:
        """Turns that have been answered and whose last event waits for the journal."""
        return 0 if self._journal is None else self._journal.pending

    def close(self, timeout: float) -> None:
        """Writes the journals, then as many snapshots as there is time for, and lets another server have the store."""
        end = time.monotonic() + timeout
        if self._closed:
            return
        self._closed = True
        self._reader.shutdown(wait=False, cancel_futures=True)
        self._writer.shutdown(wait=False, cancel_futures=True)
        if self._journal is not None and not self._journal.close(max(0.5, timeout)):
            log.error("[ATLAS] The journals were not written within %.1f s", time.monotonic() - end + timeout)
        if self.store is not None:
            self.store.close()


def is_kept(entry: Entry) -> bool:
    """Whether there is anything of it yet; the place held for a session that does not exist has nothing."""
    return entry.session is not None or entry.stored is not None


def is_clean(entry: Entry) -> bool:
    """Whether its newest snapshot holds all of it."""
    generation = entry.listing.generation if entry.session is None else entry.session.generation
    return entry.stored is not None and entry.stored.generation >= generation


def _new_listing(key: SessionKey, now: float) -> Listing:
    return Listing(
        owner=key.owner,
        session_id=key.session_id,
        generation=0,
        tokens=0,
        floor=0,
        bytes=0,
        created=now,
        last_used=now,
        has_state=False,
    )


def _unusable(problem: str) -> str:
    return f"This session's memory cannot be used: {problem}; delete or reset it to begin anew"


def _brief(error: Exception) -> str:
    if isinstance(error, OSError):
        return error.strerror or type(error).__name__
    return str(error)
