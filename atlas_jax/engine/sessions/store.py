"""Where sessions are kept between requests and between starts: what the engine needs of such a place.

`Storage` is the place itself, and `Store` the sessions and exports of one model there. A session is a snapshot of its
state, a journal of the turns since then, and a save point if a client has asked for one. How these lie there is the store's
own affair: `folder_store` has files in a folder, for one server at a time; `object_store` objects in a bucket, which many
servers *share*. `storage` lists all there are.

A session's generation orders all that happens to it, so a write that comes late never undoes a newer one. In a shared store a
write on anything but the newest is refused with SessionConflict, so what is known of a session is asked for with `changed`
before it is used. A deleted session leaves a mark until no export can bring it back. Names of owners and sessions never
become names of files or objects: `Place` has their digests.

What a store raises of its own (a client library's errors) it translates: `StorageFull` where there is no room,
`FileNotFoundError` where there is no such export, any other `OSError` where the place cannot be reached.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import BinaryIO, Protocol

from atlas_jax.engine.api import SessionKey, StoredFile
from atlas_jax.engine.sessions.journal import Journal, Origin, Turn
from atlas_jax.engine.sessions.snapshot import Head


def digest(name: str) -> str:
    """What stands for the name of an owner or a session in a store."""
    return hashlib.sha256(name.encode("utf-8", "surrogatepass")).hexdigest()


@dataclass(frozen=True)
class Place:
    """Whose session it is, without their names: digests of the owner's name and the session's."""

    owner: str
    session: str

    @classmethod
    def of(cls, key: SessionKey) -> Place:
        """The place of a session."""
        return cls(digest(key.owner), digest(key.session_id))


@dataclass(frozen=True)
class Found:
    """A stored session as a scan finds it.

    Attributes:
      key: None where damage has made its name unreadable.
      head: of its snapshot, or None where there is only a journal.
      journal: the turns since then, or None.
      problem: why it cannot be used, or None.
    """

    key: SessionKey | None
    stored: StoredSession
    head: Head | None
    journal: Journal | None
    problem: str | None = None


class StoredSession(Protocol):
    """One session in a store; methods are thread-safe."""

    @property
    def place(self) -> Place:
        """Whose it is."""

    @property
    def generation(self) -> int:
        """Of its newest snapshot, 0 without one."""

    @property
    def newest(self) -> int:
        """Of the newest thing that was done to it, as far as is known: a snapshot, a turn, a deletion."""

    @property
    def size(self) -> int:
        """Bytes it takes of the store."""

    def changed(self) -> bool:
        """Asks a shared store whether another server has changed it; what it is now is known from then on.

        Raises:
          OSError: the store cannot be reached.
        """

    def found(self) -> Found | None:
        """What is known to be there in a shared store, or None."""

    def read(self, limit: int) -> tuple[bytes | None, Journal | None]:
        """Its snapshot and its journal.

        Raises:
          SnapshotInvalid: one of them is damaged or larger than `limit`.
          OSError: it cannot be read.
        """

    def write(self, generation: int, data: bytes, *, after: int | None = None) -> bool:
        """Writes a snapshot and drops the journal; not where a newer one, a newer turn or a deletion is there.

        Args:
          after: generation of what was stored before, where the snapshot is not of that; in a shared store nothing else is
            written over. None writes over whatever is known to be there.

        Raises:
          StorageFull, OSError: nothing was changed.
          SessionConflict: another server has changed it, and nothing is known of it any more.
        """

    def move(
        self, target: StoredSession, generation: int, data: bytes, saved: bytes | None, *, after: int | None = None
    ) -> None:
        """Makes it the session of another name, of which nothing is stored; like a deletion, for this one.

        Whenever the process is killed, a scan finds the session under one of the two names.

        Args:
          data, saved: its snapshot, of that generation, and its save point, if it has one, under the other name.
          after: its generation until now; None moves whatever is known to be there.

        Raises:
          StorageFull, OSError: nothing was changed.
        """

    def append(self, origin: Origin, turn: Turn) -> bool:
        """Adds a turn to the journal.

        In a folder it outlives this process when this returns, and this machine after `sync`; in a shared store both after
        `sync`, and others see it then.

        Returns:
          False where the journal cannot hold it: it does not follow what is stored, or goes back further than the snapshot
          can be rolled back. Only a snapshot will do then.

        Raises:
          StorageFull, OSError: the journal is as it was.
        """

    def sync(self) -> None:
        """Makes durable what was appended; raises OSError, and SessionConflict where another server has gone on with it."""

    def keep(self) -> int:
        """Makes the present snapshot the save point; returns its size. Costs as little as the store allows."""

    def read_saved(self, limit: int) -> bytes | None:
        """The save point, or None; raises as `read`."""

    def restore(self, generation: int) -> None:
        """Makes the save point the present snapshot, of that generation."""

    def delete(self, generation: int, *, unless_changed: bool = False) -> None:
        """Removes it for good, and leaves a mark, so that an older copy in an export does not bring it back either.

        Args:
          unless_changed: not where another server has changed it since it was last known.

        Raises:
          StorageFull, OSError: it is as it was.
          SessionConflict: it was changed.
        """


class Store(Protocol):
    """The sessions and exports of one model; methods are thread-safe."""

    @property
    def shared(self) -> bool:
        """Whether other servers use it at the same time."""

    def list(self) -> Iterator[Found]:
        """Every session that is stored, damaged ones with the reason; finishes deletions that were cut short."""

    def session(self, key: SessionKey) -> StoredSession:
        """A session that is not there yet."""

    def changes(
        self, owner: str | None, known: Mapping[Place, StoredSession]
    ) -> Iterator[tuple[StoredSession, Found | None]]:
        """What other servers have done: sessions that are not, or not as they are known; None for what is deleted.

        Args:
          owner: whose sessions; None for everyone's.
        """

    def collect(self, known: Mapping[Place, StoredSession]) -> int:
        """Removes from a shared store what killed servers have left that is part of no session; returns how many objects."""

    def other_models(self) -> int:
        """How many other models have sessions there beside this one."""

    def deletions(self, owner: str) -> dict[str, int]:
        """Generations of the owner's deletions that an export could undo, by the digest of the session's name."""

    def forget_deletions(self, owner: str, until: int | None = None) -> None:
        """Removes marks of deletions, up to a generation: no export has those sessions any more."""

    def exports(self, owner: str) -> tuple[StoredFile, ...]:
        """The owner's exports, by name."""

    def find_export(self, owner: str, name: str) -> StoredFile | None:
        """One of them, or None."""

    def read_export(self, owner: str, name: str) -> AbstractContextManager[BinaryIO]:
        """Opens an export for reading, at any place in it.

        Raises:
          FileNotFoundError: there is none.
          SnapshotInvalid: what is there is no file.
        """

    def write_export(self, owner: str, name: str) -> AbstractContextManager[BinaryIO]:
        """A file that takes the export's place when the block ends well, and leaves it alone otherwise.

        Raises:
          StorageFull, OSError: the export is as it was.
        """

    def rename_export(self, owner: str, name: str, new: str) -> None:
        """Gives an export another name."""

    def delete_export(self, owner: str, name: str) -> None:
        """Removes an export; raises FileNotFoundError."""

    def documents(self, owner: str) -> dict[str, StoredFile]:
        """The owner's documents by name, with the size of what is in each."""

    def read_document(self, owner: str, name: str, limit: int) -> bytes | None:
        """A document, or None; raises SnapshotInvalid where it is damaged, larger than `limit` or another's."""

    def write_document(self, owner: str, name: str, data: bytes) -> None:
        """Replaces a document, whole or not at all; raises StorageFull, OSError."""

    def delete_document(self, owner: str, name: str) -> None:
        """Removes a document, if it is there."""

    def close(self) -> None:
        """Lets another server have the storage; idempotent."""


class Storage(Protocol):
    """A place for sessions that this process may use; where it is not shared, no other server can while it lives."""

    @property
    def shared(self) -> bool:
        """Whether other servers use it at the same time."""

    def store(self, model: str) -> Store:
        """The sessions of one model there; those of others are left alone.

        Args:
          model: its fingerprint.
        """

    def close(self) -> None:
        """Lets another server have it; idempotent."""
