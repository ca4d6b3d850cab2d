"""Small texts that a server keeps with its owners' sessions: in the store where there is one, else in memory."""

from __future__ import annotations

import re
import threading
import time
from collections import OrderedDict

from atlas_jax.engine.api import StorageFull, StoredFile
from atlas_jax.engine.sessions.index import SessionIndex
from atlas_jax.engine.sessions.store import Store

LARGEST = 16 << 20
"""Bytes of one document."""
_IN_MEMORY = 64 << 20
"""Bytes of all documents where there is no store; the oldest are dropped."""
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,199}")


class Documents:
    """Implements `api.DocumentStore`; thread-safe."""

    def __init__(self, store: Store | None = None) -> None:
        """The documents of a store, which count in nobody's usage yet; None keeps them in memory."""
        self._store = store
        self._index: SessionIndex | None = None
        self._lock = threading.Lock()
        self._files: dict[str, dict[str, StoredFile]] = {}
        self._kept: OrderedDict[tuple[str, str], bytes] = OrderedDict()

    def count_in(self, index: SessionIndex) -> None:
        """From now on what is stored counts in the usage of an index."""
        with self._lock:
            self._index = index
            for owner in self._files:
                self._count(owner)

    @property
    def shared(self) -> bool:
        """Whether other servers write and delete documents too: what was listed may be old."""
        return self._store is not None and self._store.shared

    def list(self, owner: str) -> tuple[StoredFile, ...]:
        """The owner's documents, by name."""
        with self._lock:
            if self.shared:
                self._files.pop(owner, None)
            return tuple(file for _, file in sorted(self._known(owner).items()))

    def read(self, owner: str, name: str) -> bytes | None:
        """A document, None where there is none; raises SnapshotInvalid where it is damaged."""
        with self._lock:
            if not self.shared and name not in self._known(owner):
                return None
        if self._store is None:
            return self._kept.get((owner, name))
        return self._store.read_document(owner, name, LARGEST)

    def write(self, owner: str, name: str, data: bytes) -> None:
        """Makes a document what it is from now on, whole or not at all.

        Raises:
          StorageFull: it is too large, or the disk or the owner's quota has no room.
        """
        if not _NAME.fullmatch(name):
            raise ValueError(f"{name!r} is no name of a document")
        if len(data) > LARGEST:
            raise StorageFull(f"a document exceeds {LARGEST} bytes")
        with self._lock:
            known = self._known(owner)
            more = len(data) - (known[name].bytes if name in known else 0)
            if self._store is None:
                self._keep(owner, name, data)
            else:
                if self._index is not None:
                    with self._index.lock:
                        self._index.usage.check_disk(owner, more)
                self._store.write_document(owner, name, data)
            known[name] = StoredFile(filename=name, bytes=len(data), modified=time.time())
            self._count(owner)

    def delete(self, owner: str, name: str) -> None:
        """Removes a document; one that is not there is no error."""
        with self._lock:
            if self._known(owner).pop(name, None) is None and not self.shared:
                return
            if self._store is None:
                del self._kept[owner, name]
            else:
                self._store.delete_document(owner, name)
            self._count(owner)

    def _keep(self, owner: str, name: str, data: bytes) -> None:
        self._kept[owner, name] = data
        self._kept.move_to_end((owner, name))
        size = sum(map(len, self._kept.values()))
        while size > _IN_MEMORY and len(self._kept) > 1:
            (whose, old), dropped = self._kept.popitem(last=False)
            self._files[whose].pop(old, None)
            size -= len(dropped)

    def _known(self, owner: str) -> dict[str, StoredFile]:
        """The owner's documents by name; the lock is held."""
        if owner not in self._files:
            self._files[owner] = {} if self._store is None else self._store.documents(owner)
            self._count(owner)
        return self._files[owner]

    def _count(self, owner: str) -> None:
        if self._index is not None and self._store is not None:
            size = sum(file.bytes for file in self._files[owner].values())
            with self._index.lock:
                self._index.usage.count_documents(owner, size)
