"""Sessions in an object store that any number of servers use at once; `docs/design/sessions.md` says what must hold."""

from __future__ import annotations

import contextlib
import tempfile
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import BinaryIO

from atlas_jax.engine.api import SessionKey, SnapshotInvalid, StoredFile
from atlas_jax.engine.sessions.copies import Copies
from atlas_jax.engine.sessions.document_frame import FRAME_BYTES, framed, unframed
from atlas_jax.engine.sessions.object_session import Keys, ObjectSession
from atlas_jax.engine.sessions.objects import Objects, Version
from atlas_jax.engine.sessions.store import Found, Place, StoredSession, digest

_AT_ONCE = 16
"""Manifests that are read at once for a listing."""
_LEFT_SECONDS = 86_400.0
"""After which a snapshot that no manifest names will be named by none: its writer is gone."""
_IN_MEMORY = 64 << 20
"""Bytes of an export that are not put into a temporary file."""


class ObjectStorage:
    """A place in an object store; other servers use it too."""

    shared = True

    def __init__(self, objects: Objects, copies: Copies | None = None) -> None:
        """Sessions in objects, with copies of their snapshots on the local disk."""
        self._objects, self._copies = objects, copies

    def store(self, model: str) -> ObjectStore:
        """The sessions of one model there."""
        return ObjectStore(self._objects, model, self._copies)

    def close(self) -> None:
        """Nothing is held."""


class ObjectStore:
    """Implements `Store` in an object store."""

    shared = True

    def __init__(self, objects: Objects, model: str, copies: Copies | None) -> None:
        """The sessions of one model there.

        Args:
          model: its fingerprint; sessions of other models are left alone.
        """
        self._objects, self._model = objects, digest(model)[:16]
        self._keys = Keys(objects, self._model, copies)

    def session(self, key: SessionKey) -> ObjectSession:
        """A session that is not there yet."""
        return ObjectSession(self._keys, Place.of(key))

    def list(self) -> Iterator[Found]:
        """Every session of this model, damaged ones with the reason."""
        for _, found in self.changes(None, {}):
            if found is not None:
                yield found

    def changes(
        self, owner: str | None, known: Mapping[Place, StoredSession]
    ) -> Iterator[tuple[StoredSession, Found | None]]:
        """What others have done; see `Store.changes`."""
        folder = self._keys.manifests + ("" if owner is None else f"{digest(owner)}/")
        places = []
        for one in self._objects.list(folder):
            parts = one.name.split("/")
            place = Place(parts[-2], parts[-1])
            seen = known.get(place)
            if not isinstance(seen, ObjectSession) or not _same(seen.version, one.version):
                places.append(place)

        def read(place: Place) -> tuple[StoredSession, Found | None]:
            stored = ObjectSession(self._keys, place)
            stored.changed()
            found = stored.found()
            stored.let_go()
            return stored, found

        with ThreadPoolExecutor(_AT_ONCE, thread_name_prefix="atlas-sessions-list") as pool:
            yield from pool.map(read, places)

    def collect(self, known: Mapping[Place, StoredSession]) -> int:
        """Removes snapshots that no manifest names; see `Store.collect`. New ones may be about to be named."""
        old: dict[Place, set[str]] = {}
        for one in self._objects.list(self._keys.states):
            place = Place(*one.name.split("/")[-3:-1])
            seen = known.get(place)
            named = isinstance(seen, ObjectSession) and one.name in seen.objects
            if not named and one.modified < time.time() - _LEFT_SECONDS:
                old.setdefault(place, set()).add(one.name)
        count = 0
        for place, names in old.items():
            stored = ObjectSession(self._keys, place)
            stored.changed()
            found = stored.found()
            if found is None or found.problem is None:
                count += len(names - stored.objects)
                self._keys.drop(names - stored.objects)
        return count

    def other_models(self) -> int:
        """How many other models have sessions there."""
        return sum(name != self._model for name in self._objects.folders("sessions/"))

    def deletions(self, owner: str) -> dict[str, int]:
        """Generations of the owner's deletions, by the digest of the session's name."""
        return {stored.place.session: stored.newest for stored, found in self.changes(owner, {}) if found is None}

    def forget_deletions(self, owner: str, until: int | None = None) -> None:
        """They stay: a manifest is never removed."""

    # --- exports --------------------------------------------------------------------------------------------------
    def exports(self, owner: str) -> tuple[StoredFile, ...]:
        """The owner's exports, by name."""
        return tuple(sorted(self._files(f"exports/{digest(owner)}/"), key=lambda one: one.filename))

    def _files(self, folder: str) -> Iterator[StoredFile]:
        for one in self._objects.list(folder):
            yield StoredFile(filename=one.name.rsplit("/", 1)[-1], bytes=one.size, modified=one.modified)

    def find_export(self, owner: str, name: str) -> StoredFile | None:
        """One of the owner's exports, or None."""
        found = self._objects.find(_export(owner, name))
        return None if found is None else StoredFile(filename=name, bytes=found.size, modified=found.modified)

    @contextlib.contextmanager
    def read_export(self, owner: str, name: str) -> Iterator[BinaryIO]:
        """Opens an export for reading; raises as `Store.read_export`."""
        with tempfile.SpooledTemporaryFile(_IN_MEMORY) as file:
            file.write(self._objects.get_large(_export(owner, name)))
            file.seek(0)
            yield file  # type: ignore[misc]

    @contextlib.contextmanager
    def write_export(self, owner: str, name: str) -> Iterator[BinaryIO]:
        """A file that takes the export's place; see `Store.write_export`."""
        with tempfile.TemporaryFile() as file:
            yield file
            file.seek(0)
            self._objects.put_large(_export(owner, name), file)

    def rename_export(self, owner: str, name: str, new: str) -> None:
        """Gives an export another name."""
        self._objects.rename(_export(owner, name), _export(owner, new))

    def delete_export(self, owner: str, name: str) -> None:
        """Removes an export; raises FileNotFoundError."""
        if self._objects.find(_export(owner, name)) is None:
            raise FileNotFoundError
        self._objects.delete([_export(owner, name)])

    # --- documents ------------------------------------------------------------------------------------------------
    def documents(self, owner: str) -> dict[str, StoredFile]:
        """The owner's documents by name; see `Store.documents`."""
        return {
            one.filename: StoredFile(
                filename=one.filename, bytes=max(0, one.bytes - FRAME_BYTES), modified=one.modified
            )
            for one in self._files(f"documents/{digest(owner)}/")
        }

    def read_document(self, owner: str, name: str, limit: int) -> bytes | None:
        """A document, or None; raises as `Store.read_document`."""
        try:
            data = self._objects.get_large(_document(owner, name))
        except FileNotFoundError:
            return None
        if len(data) > limit + FRAME_BYTES:
            raise SnapshotInvalid("document is larger than any that was written")
        return unframed(digest(owner), name, data)

    def write_document(self, owner: str, name: str, data: bytes) -> None:
        """Replaces a document; see `Store.write_document`."""
        self._objects.put_large(_document(owner, name), framed(digest(owner), name, data))

    def delete_document(self, owner: str, name: str) -> None:
        """Removes a document, if it is there."""
        self._objects.delete([_document(owner, name)])

    def close(self) -> None:
        """Nothing is held."""


def _same(one: Version | None, listed: Version) -> bool:
    """Whether a listing shows this version: it tells no more of it than its ETag."""
    return one is not None and one.e_tag == listed.e_tag


def _export(owner: str, name: str) -> str:
    return f"exports/{digest(owner)}/{name}"


def _document(owner: str, name: str) -> str:
    return f"documents/{digest(owner)}/{name}"
