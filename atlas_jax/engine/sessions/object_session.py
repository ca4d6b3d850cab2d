"""One session in an object store: a manifest that is only ever replaced by who has read it, and the snapshots it names."""

from __future__ import annotations

import contextlib
import hashlib
import logging
import threading
import time
import uuid
from collections.abc import Iterator

from msgspec.structs import replace

from atlas_jax.engine.api import SessionConflict, SessionKey, SnapshotInvalid
from atlas_jax.engine.sessions import journal, manifest, snapshot
from atlas_jax.engine.sessions.copies import Copies
from atlas_jax.engine.sessions.journal import Journal, Origin, Turn
from atlas_jax.engine.sessions.manifest import Manifest, StateObject
from atlas_jax.engine.sessions.objects import Changed, Objects, Version
from atlas_jax.engine.sessions.snapshot import Head
from atlas_jax.engine.sessions.store import Found, Place, StoredSession

log = logging.getLogger("atlas.engine")

JOURNAL_BYTES = 16 << 10
"""The longest journal of a manifest: every turn writes it anew, and who wakes the session prefills it."""
_PATIENCE = 8.0
"""Seconds for which a manifest is tried again whose put has failed."""
_CHANGED = "Another server has changed this session meanwhile: send the request again"
_TRIES = 8
"""How often an operation begins anew because others have changed the session meanwhile."""


class Keys:
    """Where the objects of one model's sessions lie.

    Attributes:
      copies: of snapshots on the local disk, if there are any.
    """

    def __init__(self, objects: Objects, model: str, copies: Copies | None) -> None:
        self.objects, self.copies = objects, copies
        self.manifests, self.states = f"sessions/{model}/", f"states/{model}/"

    def manifest(self, place: Place) -> str:
        """The object of a session's manifest."""
        return f"{self.manifests}{place.owner}/{place.session}"

    def state(self, place: Place, generation: int) -> str:
        """A new name of a snapshot."""
        return f"{self.states}{place.owner}/{place.session}/{generation:020d}-{uuid.uuid4().hex}"

    def drop(self, names: set[str]) -> None:
        """Removes snapshots that no manifest names any more; those that cannot be removed stay."""
        for name in names:
            if self.copies is not None:
                self.copies.drop(name)
        try:
            self.objects.delete(sorted(names))
        except OSError as error:
            log.warning("[ATLAS] Old snapshots stay in the object store: %s", error.strerror)


class ObjectSession:
    """Implements `StoredSession`; what it knows of the session is as old as the manifest it read or wrote last."""

    def __init__(self, keys: Keys, place: Place) -> None:
        """The session at a place, of which nothing is known yet: `changed` asks."""
        self.place = place
        self._keys, self._name = keys, keys.manifest(place)
        self._lock = threading.RLock()
        self._gone = False
        self._known = True  # that there is nothing: what is written on that is refused where there is
        self._adopt(Manifest(), None)

    def _forget(self) -> None:
        """Knows nothing any more: neither what is there nor whether there is anything."""
        self._known = False
        self._adopt(Manifest(), None)

    def _adopt(self, found: Manifest, version: Version | None, problem: str | None = None) -> None:
        self._manifest, self._version, self._problem = found, version, problem
        self._tried: list[str] = []
        self._journal, self._pending = found.journal, False
        self._last, self._floor = found.generation, 0
        try:
            self._floor = 0 if found.state is None else found.state.read_head().listing.floor
            read = found.read_journal()
        except SnapshotInvalid as error:
            self._problem = problem or str(error)
            return
        if read is not None and any(turn.keep == 0 for turn in read.turns):
            self._floor = 0

    @property
    def generation(self) -> int:
        """Of its newest snapshot, 0 without one."""
        state = self._manifest.state
        return 0 if state is None else state.generation

    @property
    def newest(self) -> int:
        """Of the newest thing that was done to it, as far as is known."""
        return self._last

    @property
    def version(self) -> Version | None:
        """Of its manifest, None where there is none, or nothing is known."""
        return self._version

    @property
    def size(self) -> int:
        """Bytes it takes of the store."""
        known = self._manifest
        objects = {one.name: one.size for one in (known.state, known.saved) if one is not None}
        return sum(objects.values()) + len(self._journal)

    # --- what is there --------------------------------------------------------------------------------------------
    def changed(self) -> bool:
        """Asks the store; see `StoredSession.changed`."""
        with self._lock:
            known = self._known
            found = self._fetch(self._version if known else None)
            if found is None:
                return False
            what, version, problem = found
            if version is None and self._version is None and known:
                return False
            if version is not None and what.writer in self._tried:  # ours, of which that was not known
                if what.generation == self._last:
                    self._adopt(what, version)
                    return False
                if what.state == self._manifest.state and self._journal.startswith(what.journal):
                    self._taken(what, version)
                    return False
            if self._pending:
                log.error(
                    "[ATLAS] Turns of a session were not written before another server went on with it: they are lost"
                )
            self._known = True
            self._adopt(what, version, problem)
            return True

    def _fetch(self, known: Version | None) -> tuple[Manifest, Version | None, str | None] | None:
        """The manifest that is there, with what is wrong with it; None where it is the version that is known."""
        for _ in range(_TRIES):
            try:
                found = self._keys.objects.get(self._name, known)
            except FileNotFoundError:
                return Manifest(), None, None
            if found is None:
                return None
            data, version = found
            try:
                what = manifest.decode(data)
            except SnapshotInvalid as error:
                return Manifest(), version, str(error)
            if what.arriving is None:
                return what, version, None
            self._settle(what, version)
        raise OSError(0, "the session is changed by others all the time")

    def _settle(self, here: Manifest, version: Version) -> None:
        """Ends an arrival that another server has begun, one way or the other; another manifest is here then."""
        assert here.arriving is not None
        generation, source = here.arriving
        objects, name = self._keys.objects, self._keys.manifest(Place(self.place.owner, source))
        ended = Manifest(generation=here.generation, deleted=here.generation, moved=here.moved)
        try:
            data, old = objects.get(name) or (b"", None)
            there = manifest.decode(data)
            if there.moved == (generation, self.place.session):
                ended = replace(here, arriving=None)
            else:  # who is renaming it can do so no more from now on
                objects.put(name, manifest.encode(there.after(there, _writer())), old)
        except (FileNotFoundError, SnapshotInvalid):
            pass
        except Changed:
            return
        try:
            objects.put(self._name, manifest.encode(ended.after(here, _writer())), version)
        except Changed:
            return
        if not ended.exists:
            self._keys.drop(here.objects)

    def found(self) -> Found | None:
        """What is known to be there, or None."""
        with self._lock:
            known, problem = self._manifest, self._problem
            if not known.exists and problem is None:
                return None
            key: SessionKey | None = None
            head: Head | None = None
            turns: Journal | None = None
            try:
                key = known.key()
                head = None if known.state is None else known.state.read_head()
                turns = known.read_journal()
            except SnapshotInvalid as error:
                problem = problem or str(error)
            if key is not None and Place.of(key) != self.place:
                key, problem = None, "its manifest belongs to another session"
            return Found(key, self, head, turns, problem)

    def let_go(self) -> None:
        """Keeps no journal of what was found, only which version it was: a listing holds many sessions."""
        with self._lock:
            if self._journal and not self._pending:
                self._known, self._journal = False, b""
                self._manifest = replace(self._manifest, journal=b"")

    def read(self, limit: int) -> tuple[bytes | None, Journal | None]:
        """Its snapshot and its journal; raises as `StoredSession.read`."""
        with self._lock:
            for _ in range(_TRIES):
                if not self._known:
                    self.changed()
                if self._problem is not None:
                    raise SnapshotInvalid(self._problem)
                try:
                    state = self._manifest.state
                    data = None if state is None else self._read_state(state, limit)
                    return data, replace(self._manifest, journal=self._journal).read_journal()
                except FileNotFoundError:  # another server has written a newer one meanwhile
                    if not self.changed():
                        raise SnapshotInvalid("its snapshot is gone from the object store") from None
            raise OSError(0, "the session is changed by others all the time")

    def _read_state(self, state: StateObject, limit: int) -> bytes:
        if state.size > limit:
            raise SnapshotInvalid(f"snapshot of {state.size} bytes exceeds the limit of {limit}")
        copies = self._keys.copies
        data = None if copies is None else copies.get(state.name, state.sha256, state.size)
        if data is None:
            data = self._keys.objects.get_large(state.name)
            if hashlib.sha256(data).digest() != state.sha256:
                raise SnapshotInvalid("snapshot is damaged: it is not the one that its manifest names")
            if copies is not None:
                copies.put(state.name, data)
        return data

    @property
    def objects(self) -> set[str]:
        """The snapshots that its manifest names, as far as is known."""
        return self._manifest.objects

    # --- the chain of manifests -----------------------------------------------------------------------------------
    def _replace(self, new: Manifest) -> None:
        """Makes a manifest the next of the chain.

        Raises:
          SessionConflict: another server has gone on with the session; nothing is known of it any more.
          OSError: it may have been taken or not; the same state may be tried again.
        """
        if not self._known:
            raise SessionConflict(_CHANGED)
        new = new.after(self._manifest, _writer())
        self._tried.append(new.writer)
        waits = _waits()
        while True:
            try:
                try:
                    version = self._keys.objects.put(self._name, manifest.encode(new), self._version)
                    self._taken(new, version)
                    return
                except Changed:
                    if self._is_ours(new):
                        return
                    # else one of ours of which that was not known is there, and this one belongs after it
                    new = new.after(self._manifest, new.writer)
            except OSError:
                pause = next(waits, None)
                if pause is None:
                    raise
                time.sleep(pause)

    def _is_ours(self, new: Manifest) -> bool:
        """After a refusal: whether ours was taken all the same; False where an earlier one of ours was, and ours may follow.

        Raises:
          SessionConflict: others have gone on with the session.
          OSError: it is not known.
        """
        found = None
        with contextlib.suppress(FileNotFoundError):
            found = self._keys.objects.get(self._name)
        if found is not None:
            data, version = found
            try:
                what = manifest.decode(data)
            except SnapshotInvalid:
                what = Manifest()
            if what.writer == new.writer:
                self._taken(what, version)
                return True
            if new.writer in what.earlier:  # and others have gone on from it
                self._forget()
                return True
            if what.writer in self._tried:
                self._manifest, self._version = what, version
                return False
        self._forget()
        raise SessionConflict(_CHANGED)

    def _taken(self, what: Manifest, version: Version) -> None:
        self._manifest, self._version, self._tried, self._problem = what, version, [], None
        self._known = True
        self._pending = what.journal != self._journal

    # --- turns ----------------------------------------------------------------------------------------------------
    def append(self, origin: Origin, turn: Turn) -> bool:
        """Adds a turn, which `sync` writes; raises SessionConflict."""
        with self._lock:
            if self._gone:
                return True
            if not self._known:
                raise SessionConflict(_CHANGED)
            if turn.after != self._last_of_session or 0 < turn.keep < self._floor:
                return False
            record = journal.encode(turn)
            if not self._journal:
                record = journal.begin(origin) + record
            if len(self._journal) + len(record) > JOURNAL_BYTES:
                return False
            self._journal += record
            self._pending, self._last = True, turn.generation
            if turn.keep == 0:
                self._floor = 0
            return True

    @property
    def _last_of_session(self) -> int:
        """Generation of the session as it is now: 0 after a deletion."""
        return self._last if self._journal or self._manifest.state is not None else 0

    def sync(self) -> None:
        """Writes the turns that were appended; raises SessionConflict, OSError."""
        with self._lock:
            if self._pending and not self._gone:
                self._replace(replace(self._manifest, generation=self._last, journal=self._journal, deleted=0))

    # --- snapshots ------------------------------------------------------------------------------------------------
    def write(self, generation: int, data: bytes, *, after: int | None = None) -> bool:
        """Writes a snapshot; raises as `StoredSession.write`."""
        with self._lock:
            if self._gone or generation <= self.generation or generation < self._last:
                return False
            if after not in (None, self._last_of_session) and generation != self._last:
                raise SessionConflict(_CHANGED)
            state = self._put_state(generation, data)
            old = self._manifest
            self._become(replace(old, generation=generation, state=state, journal=b"", deleted=0), state)
            self._last, self._floor = generation, state.read_head().listing.floor
            if self._keys.copies is not None:
                self._keys.copies.put(state.name, data)
            return True

    def _put_state(self, generation: int, data: bytes) -> StateObject:
        head = data[: snapshot.read_head(data)[1]]
        name = self._keys.state(self.place, generation)
        self._keys.objects.put_large(name, data)
        return StateObject(name, generation, len(data), hashlib.sha256(data).digest(), head)

    def _become(self, new: Manifest, state: StateObject | None = None) -> None:
        """Replaces the manifest by one that has a journal of its own, and removes what it does not name any more.

        Args:
          state: a snapshot that was written for it, which nobody names if it is refused.
        """
        old, before = self._manifest, (self._journal, self._pending)
        self._journal, self._pending = new.journal, False
        try:
            self._replace(new)
        except SessionConflict:
            if state is not None:
                self._keys.drop({state.name})
            raise
        except OSError:
            self._journal, self._pending = before
            raise
        if dropped := old.objects - new.objects:
            self._keys.drop(dropped)

    def keep(self) -> int:
        """Makes the present snapshot the save point: a manifest that names it twice."""
        with self._lock:
            self.sync()
            state = self._manifest.state
            assert state is not None
            if self._manifest.saved != state:
                self._become(replace(self._manifest, saved=state))
            return state.size

    def read_saved(self, limit: int) -> bytes | None:
        """The save point, or None; raises as `read`."""
        with self._lock:
            if not self._known:
                self.changed()
            saved = self._manifest.saved
            try:
                return None if saved is None else self._read_state(saved, limit)
            except FileNotFoundError:
                raise SnapshotInvalid("its save point is gone from the object store") from None

    def restore(self, generation: int) -> None:
        """Makes the save point the present snapshot, of that generation."""
        with self._lock:
            saved = self._manifest.saved
            if self._gone or saved is None or generation <= self._last:
                return
            state = replace(saved, generation=generation)
            self._whole(replace(self._manifest, generation=generation, state=state, journal=b""))

    def _whole(self, new: Manifest) -> None:
        """Makes it another session than it was; where it is not known whether that was done, `changed` will ask."""
        try:
            self._become(new)
        except OSError:
            self._forget()
            raise
        version = self._version
        if version is not None:
            self._adopt(self._manifest, version)

    def move(
        self, target: StoredSession, generation: int, data: bytes, saved: bytes | None, *, after: int | None = None
    ) -> None:
        """Makes it the session of another name; see `StoredSession.move`.

        The deletion under this name is what decides. Its condition is the manifest as it was before the other one was
        written: who meets that one first writes this one anew, and the deletion is refused.
        """
        assert isinstance(target, ObjectSession)
        with self._lock, target._lock:
            self.sync()
            if after not in (None, self._last):
                raise SessionConflict(_CHANGED)
            if self._manifest.moved is not None:  # what was given away before has arrived once it has been looked at
                ObjectSession(self._keys, Place(self.place.owner, self._manifest.moved[1])).changed()
            if not target._known:
                target.changed()
            if target._manifest.exists:
                raise SessionConflict("Another server has begun a session of that name: send the request again")
            state = target._put_state(generation, data)
            kept = None if saved is None else target._put_state(generation, saved)
            here = Manifest(
                generation=generation,
                state=state,
                saved=kept,
                moved=target._manifest.moved,
                arriving=(generation, self.place.session),
            )
            target._whole(here)
            gone = replace(_deleted(self._manifest, generation), moved=(generation, target.place.session))
            try:
                self._whole(gone)
            except (SessionConflict, OSError):
                target._forget()
                raise
            self._gone = True
            try:
                target._whole(replace(target._manifest, arriving=None))
            except (SessionConflict, OSError):  # who looks at it next does it
                target._forget()

    def delete(self, generation: int, *, unless_changed: bool = False) -> None:
        """Removes it; raises as `StoredSession.delete`. The manifest stays, and says so."""
        with self._lock:
            for _ in range(_TRIES):
                if not self._known:
                    self.changed()
                if self._version is None:
                    self._gone = True
                    return
                try:
                    self._whole(_deleted(self._manifest, max(generation, self._last + 1)))
                    self._gone = True
                    return
                except SessionConflict:
                    if unless_changed:
                        raise
            raise OSError(0, "the session is changed by others all the time")


def _deleted(before: Manifest, generation: int) -> Manifest:
    return Manifest(generation=generation, deleted=generation, moved=before.moved)


def _writer() -> str:
    return uuid.uuid4().hex


def _waits() -> Iterator[float]:
    """Pauses between tries of a put, as long as there is patience."""
    end, pause = time.monotonic() + _PATIENCE, 0.05
    while time.monotonic() + pause < end:
        yield pause
        pause = min(2 * pause, 2.0)
