"""Every session an engine knows, in memory or stored: one lock, and what must change together under it."""

from __future__ import annotations

import logging
import threading
import time
from collections import OrderedDict
from dataclasses import dataclass, replace
from math import inf

import msgspec

from atlas_jax.engine.api import CacheStrategy, SessionKey, SessionNotFound, SnapshotInvalid
from atlas_jax.engine.sessions.budgets import Budgets, Usage
from atlas_jax.engine.sessions.codec import listing_of
from atlas_jax.engine.sessions.entry import Entry, Tier, new_listing
from atlas_jax.engine.sessions.eviction import Eviction
from atlas_jax.engine.sessions.layout import Layout, check_bound
from atlas_jax.engine.sessions.lora import check_loaded
from atlas_jax.engine.sessions.session import Session
from atlas_jax.engine.sessions.store import Found, Place, Store, StoredSession, digest

log = logging.getLogger("atlas.engine")
_ABSENT = 4096
"""Names of sessions that are remembered not to be in a shared store, until a request that asked begins one."""


@dataclass
class SessionCounters:
    """Counters since start.

    Attributes:
      hits, misses: leases of sessions that were in memory, and that were not.
      saves, loads: snapshots and exports that were written, and read.
      failures: of writes and reads.
      conflicts: turns and other changes that were refused since another server had changed the session.
    """

    hits: int = 0
    misses: int = 0
    saves: int = 0
    loads: int = 0
    failures: int = 0
    conflicts: int = 0


class SessionIndex:
    """Sessions by owner and name. Every method is thread-safe; who needs several of them to be one step holds `lock`.

    Attributes:
      lock: guards every entry and all of this.
      freed: is told when a session that was busy is free.
      usage: what the sessions take; the lock must be held.
    """

    def __init__(self, layout: Layout, store: Store | None, budgets: Budgets) -> None:
        """Finds what the store holds; what a shared one holds is found as it is asked for, and by `sync`."""
        self.lock = threading.RLock()
        self.freed = threading.Condition(self.lock)
        self.usage = Usage(budgets)
        self.counters = SessionCounters()
        self._layout = layout
        self._store = store
        self._entries: dict[SessionKey, Entry] = {}
        self._nameless: dict[Place, str] = {}
        self._eviction: dict[Tier, Eviction] = {"device": Eviction(), "host": Eviction()}
        self._absent: OrderedDict[SessionKey, tuple[float, StoredSession]] = OrderedDict()
        self._generation = 0
        if store is not None and not store.shared:
            for found in store.list():
                self._adopt(found)

    def _adopt(self, found: Found, entry: Entry | None = None) -> None:
        """Enters a session that was found in the store, in the place of what was known of it."""
        if found.key is None:
            self._nameless[found.stored.place] = found.problem or "its files cannot be read"
            log.error("[ATLAS] A stored session was set aside: %s", found.problem)
            return
        turns = [] if found.journal is None else found.journal.turns
        problem = found.problem
        if found.head is not None:
            listing = found.head.listing
            try:
                check_bound(self._layout, found.head)
            except SnapshotInvalid as error:
                problem = problem or str(error)
        else:
            created = time.time() if found.journal is None else found.journal.origin.created
            listing = new_listing(found.key, created)
        if turns:
            last = turns[-1]
            listing = msgspec.structs.replace(
                listing,
                generation=last.generation,
                tokens=last.keep + len(last.tokens),
                last_used=max(listing.last_used, last.time),
                lora=tuple(digest for digest, _ in last.reading.lora),
            )
            try:
                check_loaded(listing.lora, self._layout.lora)
            except SnapshotInvalid as error:
                problem = problem or str(error)
        if problem is not None:
            log.error("[ATLAS] Session %r was set aside: %s", listing.session_id, problem)
        self._generation = max(self._generation, listing.generation)
        self._nameless.pop(found.stored.place, None)
        if entry is None:
            entry = self._entries[found.key] = Entry(found.key, listing)
        entry.session, entry.tier, entry.listing = None, "disk", listing
        entry.stored, entry.vacant, entry.written, entry.problem = found.stored, None, listing.generation, problem
        self._leave_tiers(entry)
        self.usage.count(entry)

    # --- a shared store -------------------------------------------------------------------------------------------
    def is_checked(self, key: SessionKey, since: float) -> bool:
        """Whether a shared store has been asked for a session since then."""
        with self.lock:
            entry = self._entries.get(key)
            if entry is None:
                return key in self._absent and self._absent[key][0] >= since
            return entry.checked >= since

    def looked(self, entry: Entry, stored: StoredSession, found: Found | None, *, changed: bool, began: float) -> None:
        """Enters what a shared store has said of a session when it was asked.

        Args:
          changed: whether it is another than was known.
          began: `time.monotonic()` before it was asked.
        """
        with self.lock:
            if not self.holds(entry):
                return
            entry.checked = began
            if found is not None and found.key is None:
                found = replace(found, key=entry.key)
            self._generation = max(self._generation, stored.newest)
            if found is None and (changed or entry.session is None):
                self.forget(entry)
                self._absent[entry.key] = (began, stored)
                while len(self._absent) > _ABSENT:
                    self._absent.popitem(last=False)
            elif found is not None and (changed or entry.stored is None):
                self._adopt(found, entry)
            elif entry.stored is None:  # in memory only
                entry.vacant = stored

    def let_go(self, entry: Entry) -> None:
        """Drops a session's state from memory: another server has gone on with it."""
        with self.lock:
            self.counters.conflicts += 1
            entry.checked = -inf
            if entry.session is not None:
                entry.session, entry.tier = None, "disk"
                self._leave_tiers(entry)
                if self.holds(entry):
                    self.usage.count(entry)

    def sync(self, owner: str | None = None) -> None:
        """Learns what other servers have done with an owner's sessions, or everyone's; raises OSError."""
        store = self._store
        if store is None or not store.shared:
            return
        entries, known = self._stored_of(owner)
        for stored, found in store.changes(owner, known):
            self._learned(stored, found, entries.get(stored.place))

    def collect(self) -> None:
        """Has a shared store remove what was written and is part of no session; raises OSError."""
        if self._store is not None and self._store.shared:
            self._store.collect(self._stored_of(None)[1])

    def _stored_of(self, owner: str | None) -> tuple[dict[Place, Entry], dict[Place, StoredSession]]:
        with self.lock:
            entries = {Place.of(one.key): one for one in self.entries(owner)}
            known = {place: one.stored for place, one in entries.items() if one.stored is not None}
        return entries, known

    def _learned(self, stored: StoredSession, found: Found | None, entry: Entry | None) -> None:
        """Enters what a listing has said of a session, unless it is in use: then it is asked for before it is used again."""
        with self.lock:
            if entry is None and found is not None and found.key is not None:
                entry = self._entries.get(found.key)
            if entry is not None and (entry.busy or not self.holds(entry) or entry.listing.generation >= stored.newest):
                return
            self._generation = max(self._generation, stored.newest)
            if found is not None:
                self._adopt(found, entry)
            elif entry is not None:
                self.forget(entry)

    def _leave_tiers(self, entry: Entry) -> None:
        for eviction in self._eviction.values():
            eviction.forget(entry.key)

    def next_generation(self) -> int:
        """A number greater than any before, on this machine and, its clock being about right, on others."""
        with self.lock:
            self._generation = max(self._generation + 1, time.time_ns() // 1000)
            return self._generation

    # --- finding --------------------------------------------------------------------------------------------------
    def get(self, key: SessionKey) -> Entry | None:
        """A session's entry, or None; one whose name damage had made unreadable is known once it is named."""
        with self.lock:
            entry = self._entries.get(key)
            if entry is None and self._nameless and self._store is not None:
                problem = self._nameless.pop(Place.of(key), None)
                if problem is not None:
                    stored = self._store.session(key)
                    entry = Entry(key, new_listing(key, 0.0), tier="disk", stored=stored, problem=problem)
                    self._entries[key] = entry
            return entry

    def find(self, key: SessionKey) -> Entry:
        """A session's entry; raises SessionNotFound."""
        entry = self.get(key)
        if entry is None or not entry.exists:
            raise SessionNotFound("No such session")
        return entry

    def entries(self, owner: str | None = None) -> list[Entry]:
        """Every session there is, or the owner's."""
        with self.lock:
            return [one for key, one in self._entries.items() if owner in (None, key.owner) and one.exists]

    def holds(self, entry: Entry) -> bool:
        """Whether it is still the session of its name: one that was deleted meanwhile must stay so."""
        with self.lock:
            return self._entries.get(entry.key) is entry

    def nameless(self, owner: str) -> list[tuple[str, str]]:
        """The owner's sessions whose names cannot be read: digests of them, each with the reason."""
        with self.lock:
            wanted = digest(owner)
            return [(place.session, reason) for place, reason in self._nameless.items() if place.owner == wanted]

    def count(self, tier: Tier) -> int:
        """Sessions whose state rests in a tier."""
        with self.lock:
            if tier == "disk":
                return sum(one.session is None and one.exists for one in self._entries.values())
            return sum(one.session is not None and one.tier == tier for one in self._entries.values())

    # --- entering and leaving -------------------------------------------------------------------------------------
    def add(self, key: SessionKey, *, busy: bool = False) -> Entry:
        """Holds the place of a session that does not exist yet."""
        with self.lock:
            entry = self._entries[key] = Entry(key, new_listing(key, time.time()), busy=busy)
            if key in self._absent:
                entry.checked, entry.vacant = self._absent.pop(key)
            return entry

    def put(self, entry: Entry, session: Session, tier: Tier = "host") -> None:
        """Enters a session as it is now."""
        with self.lock:
            entry.session, entry.tier, entry.listing = session, tier, listing_of(session)
            self.use(entry)
            self.usage.count(entry)

    def put_stored(self, entry: Entry, session: Session) -> None:
        """Enters a session that has just been written, and leaves it on disk."""
        with self.lock:
            entry.session, entry.tier, entry.listing = None, "disk", listing_of(session)
            self.usage.count(entry)

    def forget(self, entry: Entry) -> None:
        """Takes a session out of the index."""
        with self.lock:
            del self._entries[entry.key]
            self.usage.drop(entry)
            self._leave_tiers(entry)

    def take_back(self, entry: Entry) -> None:
        """Enters a session again that was taken out."""
        with self.lock:
            self._entries[entry.key] = entry
            if entry.session is not None:
                self.use(entry)
            self.usage.count(entry)

    # --- moving between tiers -------------------------------------------------------------------------------------
    def use(self, entry: Entry) -> None:
        """Records a use, for those that will have to leave its tier."""
        with self.lock:
            self._eviction[entry.tier].use(entry.key)

    def victim(self, tier: Tier, strategy: CacheStrategy) -> Entry | None:
        """The session that should leave a tier first, of those that nobody is using."""

        def may_leave(key: SessionKey) -> bool:
            entry = self._entries.get(key)
            return entry is not None and not entry.busy and entry.session is not None and entry.tier == tier

        with self.lock:
            key = self._eviction[tier].victim(strategy, may_leave)
            return None if key is None else self._entries[key]

    def evicted(self, entry: Entry, tier: Tier) -> None:
        """Records that a session leaves a tier to make room."""
        with self.lock:
            self._eviction[tier].evicted(entry.key)
