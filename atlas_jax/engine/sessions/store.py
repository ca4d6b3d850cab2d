"""Where sessions are kept between requests and between starts.

`Store` is what the engine needs of such a place; `FolderStore` is one in a folder, for one server at a time. Each session
has a folder of its own there, with

* `<generation>.snapshot.atlas`, its state, written beside its place and renamed;
* `journal`, the turns since then, appended;
* `saved.atlas`, a save point: the snapshot as it was when a client asked for it.

A session's generation orders all that happens to it, so a write that comes late never undoes a newer one. A deleted
session leaves a `deleted` file until no export can bring it back. Names of owners and sessions never become file
names: folders and files are named by digests.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import logging
import os
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from atlas_jax.config import ConfigError
from atlas_jax.engine.api import SessionKey, SnapshotInvalid
from atlas_jax.engine.sessions import journal, snapshot
from atlas_jax.engine.sessions.journal import Journal, Origin, Turn
from atlas_jax.engine.sessions.snapshot import Head

log = logging.getLogger("atlas.engine")

_LOCK = ".lock"
_JOURNAL = "journal"
_SAVED = "saved.atlas"
_DELETED = "deleted"
_SNAPSHOT = ".snapshot.atlas"
_TEMPORARY = ".tmp"
_LONGEST_JOURNAL = 1 << 30


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
    """One session's place in a store; methods are thread-safe."""

    @property
    def name(self) -> str:
        """Its place, as `Store.place` names it."""

    @property
    def generation(self) -> int:
        """Of its newest snapshot, 0 without one."""

    @property
    def has_saved(self) -> bool:
        """Whether there is a save point."""

    @property
    def size(self) -> int:
        """Bytes it takes of the store."""

    def read(self, limit: int) -> tuple[bytes | None, Journal | None]:
        """Its snapshot and its journal.

        Raises:
          SnapshotInvalid: one of them is damaged or larger than `limit`.
          OSError: it cannot be read.
        """

    def write(self, generation: int, data: bytes) -> bool:
        """Writes a snapshot and drops the journal; not where a newer one, a newer turn or a deletion is there.

        Raises:
          StorageFull, OSError: nothing was changed.
        """

    def append(self, origin: Origin, turn: Turn) -> bool:
        """Adds a turn to the journal; it is in the system's hands when this returns, and on the disk after `sync`.

        Returns:
          False where the journal cannot hold it: it does not follow what is stored, or goes back further than the snapshot
          can be set back. Only a snapshot will do then.

        Raises:
          StorageFull, OSError: the journal is as it was.
        """

    def sync(self) -> None:
        """Brings what was appended to the disk."""

    def keep(self) -> int:
        """Makes the present snapshot the save point, without copying it; returns its size."""

    def read_saved(self, limit: int) -> bytes | None:
        """The save point, or None."""

    def restore(self, generation: int) -> None:
        """Makes the save point the present snapshot, without copying it."""

    def delete(self, generation: int) -> None:
        """Removes it for good, and leaves a mark, so that an older copy in an export does not bring it back either.

        Raises:
          StorageFull, OSError: it is as it was.
        """


class Store(Protocol):
    """A place for sessions; methods are thread-safe."""

    def list(self) -> Iterator[Found]:
        """Every session that is stored."""

    def place(self, key: SessionKey) -> str:
        """Where a session lies or would lie."""

    def session(self, key: SessionKey) -> StoredSession:
        """The place of a session that is not there yet."""

    def close(self) -> None:
        """Lets another server have it."""


class MemoryFolder:
    """A folder of sessions that this process has taken; no other server can while it lives."""

    def __init__(self, root: Path) -> None:
        """Takes the folder, making it if need be, and removes what a killed process left half-written.

        Raises:
          ConfigError: it cannot be used, or another server is using it; the message says which.
        """
        self.root = root
        try:
            root.mkdir(parents=True, exist_ok=True, mode=0o700)
            if root.stat().st_uid == os.getuid():
                root.chmod(0o700)
            self._lock: int | None = _take(root)
            (root / f".probe{_TEMPORARY}").write_bytes(b"")
            for path in root.rglob(f".*{_TEMPORARY}"):
                path.unlink(missing_ok=True)
        except OSError as error:
            raise ConfigError(
                f"atlas.memory_path: sessions cannot be stored in '{root}': {error.strerror or error}"
            ) from error

    def close(self) -> None:
        """Lets another server have it; idempotent."""
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None


class FolderStore:
    """Implements `Store` in a folder."""

    def __init__(self, folder: MemoryFolder, model: str) -> None:
        """The sessions of one model there.

        Args:
          model: its fingerprint; sessions of other models in the folder are left alone.
        """
        self.root = folder.root
        self._folder = folder
        self._model = hashlib.sha256(model.encode()).hexdigest()[:16]

    def owner(self, owner: str) -> Path:
        """An owner's folder."""
        name = _digest(owner)
        return self.root / name[:2] / name

    def export(self, owner: str, name: str) -> Path:
        """The file of one of the owner's exports."""
        return self.owner(owner) / "exports" / name

    def exports(self, owner: str) -> list[Path]:
        """The owner's exports, by name."""
        return sorted(path for path in (self.owner(owner) / "exports").glob("*") if not _hidden(path))

    def place(self, key: SessionKey) -> str:
        """A session's folder."""
        return str(self.owner(key.owner) / "sessions" / self._model / _digest(key.session_id))

    def session(self, key: SessionKey) -> FolderSession:
        """The place of a session that is not there yet."""
        return FolderSession(Path(self.place(key)))

    def list(self) -> Iterator[Found]:
        """Every session of this model, damaged ones with the reason; finishes deletions that were cut short."""
        for path in sorted(self.root.glob(f"*/*/sessions/{self._model}/*")):
            if not path.is_dir() or path.is_symlink():
                continue
            found = self._find(FolderSession(path))
            if found is not None:
                yield found

    def others(self) -> int:
        """How many sessions of other models the folder holds."""
        return sum(path.parent.name != self._model for path in self.root.glob("*/*/sessions/*/*"))

    def deletions(self, owner: str) -> dict[str, int]:
        """Generations of the owner's deletions that an export could undo, by the digest of the session's name."""
        out = {}
        for mark in (self.owner(owner) / "sessions" / self._model).glob(f"*/{_DELETED}"):
            with contextlib.suppress(OSError, ValueError):
                out[mark.parent.name] = int(mark.read_text())
        return out

    def forget_deletions(self, owner: str, until: int | None = None) -> None:
        """Removes marks of deletions, up to a generation: no export has those sessions any more."""
        for name, generation in self.deletions(owner).items():
            if until is None or generation <= until:
                folder = self.owner(owner) / "sessions" / self._model / name
                (folder / _DELETED).unlink(missing_ok=True)
                with contextlib.suppress(OSError):  # the session is there again
                    folder.rmdir()

    def _find(self, stored: FolderSession) -> Found | None:
        head: Head | None = None
        turns: Journal | None = None
        problem: str | None = None
        try:
            head = stored.read_head()
        except (SnapshotInvalid, OSError) as error:
            problem = _reason(error)
        try:
            turns = stored.read_journal()
        except (SnapshotInvalid, OSError) as error:
            problem = problem or _reason(error)
        deleted = stored.deleted
        newest = max(
            0 if head is None else head.listing.generation, turns.turns[-1].generation if turns and turns.turns else 0
        )
        if deleted and newest <= deleted:  # a damaged file of a deleted session is nobody's
            stored.delete(deleted)
            return None
        if head is not None:
            key = SessionKey(head.listing.owner, head.listing.session_id)
        elif turns is not None:
            key = SessionKey(turns.origin.owner, turns.origin.session_id)
        elif problem is None:  # a folder that was made and not used
            with contextlib.suppress(OSError):
                stored.folder.rmdir()
            return None
        else:
            return Found(None, stored, None, None, problem)
        if self.session(key).folder != stored.folder:
            return Found(None, stored, None, None, "its files belong to another session")
        return Found(key, stored, head, turns, problem)

    def close(self) -> None:
        """Lets another server have the folder."""
        self._folder.close()


class FolderSession:
    """Implements `StoredSession` in a folder of its own."""

    def __init__(self, folder: Path) -> None:
        """The place `folder`, which need not be there yet."""
        self.folder = folder
        self._guard = threading.Lock()
        self._gone = False
        self._snapshot = self._journal_bytes = self._saved_bytes = 0
        self._last_turn = self._floor = 0
        self._unsynced = self._new = self._shared = False
        snapshots = sorted(folder.glob(f"*{_SNAPSHOT}")) if folder.is_dir() else []
        self._generation = 0
        for path in snapshots:
            number = path.name.removesuffix(_SNAPSHOT)
            if number.isdecimal():
                self._generation, self._snapshot = int(number), path.stat().st_size
        for path in snapshots:  # a write was cut short after the newer one was whole
            if path != self._path(self._generation):
                path.unlink(missing_ok=True)
        if (saved := folder / _SAVED).is_file():
            self._shared = self._generation > 0 and saved.samefile(self._path(self._generation))
            self._saved_bytes = 0 if self._shared else saved.stat().st_size

    def _path(self, generation: int) -> Path:
        return self.folder / f"{generation:020d}{_SNAPSHOT}"

    @property
    def name(self) -> str:
        """Its folder."""
        return str(self.folder)

    @property
    def size(self) -> int:
        """Bytes it takes of the disk."""
        return self._snapshot + self._journal_bytes + self._saved_bytes

    @property
    def generation(self) -> int:
        """Of its newest snapshot, 0 without one."""
        return self._generation

    @property
    def has_saved(self) -> bool:
        """Whether there is a save point."""
        return (self.folder / _SAVED).is_file()

    @property
    def deleted(self) -> int:
        """Generation of the deletion that is marked, or 0."""
        try:
            return int((self.folder / _DELETED).read_text())
        except (OSError, ValueError):
            return 0

    def read_head(self) -> Head | None:
        """The head of its snapshot, None without one; raises as `read`."""
        if not self._generation:
            return None
        data = snapshot.read_file(self._path(self._generation), None, first=snapshot.HEAD_BYTES)
        head, _ = snapshot.read_head(data)
        if head.listing.generation != self._generation:  # a save point that was made the present state
            head = snapshot.with_generation(head, self._generation)
        self._floor = head.listing.floor
        return head

    def read_journal(self) -> Journal | None:
        """Its journal, None without one; what a crash cut off at its end is removed. Raises as `read`."""
        path = self.folder / _JOURNAL
        try:
            data = snapshot.read_file(path, _LONGEST_JOURNAL)
        except FileNotFoundError:
            return None
        found = journal.decode(data)
        end = 0 if found is None else found.end
        if end < len(data):
            os.truncate(path, end)
        self._journal_bytes = end
        if found is None:
            path.unlink()
            return None
        last = found.turns[-1].generation if found.turns else 0
        if last <= self._generation:  # a snapshot that holds all of it had just been written
            path.unlink()
            self._journal_bytes = 0
            return None
        self._last_turn = last
        if any(turn.keep == 0 and turn.generation > self._generation for turn in found.turns):
            self._floor = 0
        return found

    def read(self, limit: int) -> tuple[bytes | None, Journal | None]:
        """Its snapshot and its journal; raises as `StoredSession.read`."""
        with self._guard:
            data = snapshot.read_file(self._path(self._generation), limit) if self._generation else None
            return data, self.read_journal()

    def write(self, generation: int, data: bytes) -> bool:
        """Writes a snapshot; see `StoredSession.write`."""
        floor = snapshot.read_head(data)[0].listing.floor
        with self._guard:
            # what the journal has read since might go back further than this state can be set back
            if self._gone or generation <= self._generation or generation < self._last_turn:
                return False
            with snapshot.atomic_file(self._path(generation)) as file:
                file.write(data)
            self._replaced(generation, len(data), floor)
            return True

    def restore(self, generation: int) -> None:
        """Makes the save point the present snapshot, without copying it."""
        with self._guard:
            if self._gone or generation <= self._generation:
                return
            saved = self.folder / _SAVED
            head, _ = snapshot.read_head(snapshot.read_file(saved, None, first=snapshot.HEAD_BYTES))
            os.link(saved, self._path(generation))
            snapshot.sync_folder(self.folder)
            self._replaced(generation, saved.stat().st_size, head.listing.floor)
            self._shared, self._saved_bytes = True, 0

    def _replaced(self, generation: int, size: int, floor: int) -> None:
        """Drops what a new snapshot has made old."""
        if self._shared:
            self._shared, self._saved_bytes = False, self._snapshot
        old, self._generation, self._snapshot, self._floor = self._generation, generation, size, floor
        if old:
            self._path(old).unlink(missing_ok=True)
        (self.folder / _JOURNAL).unlink(missing_ok=True)
        self._journal_bytes = 0

    def append(self, origin: Origin, turn: Turn) -> bool:
        """Adds a turn; see `StoredSession.append`. Raises StorageFull, OSError."""
        with self._guard:
            if self._gone:
                return True
            if turn.after != max(self._generation, self._last_turn) or 0 < turn.keep < self._floor:
                return False
            record = journal.encode(turn)
            if not self._journal_bytes:
                self.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
                record = journal.begin(origin) + record
                self._new = True
            try:
                self._append(record)
            except OSError as error:
                raise snapshot.storage_error(error) from error
            self._last_turn = turn.generation
            if turn.keep == 0:
                self._floor = 0
            return True

    def _append(self, record: bytes) -> None:
        flags = os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
        descriptor = os.open(self.folder / _JOURNAL, flags, 0o600)
        try:
            written = os.pwrite(descriptor, record, self._journal_bytes)
            if written < len(record):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            self._journal_bytes += written
            self._unsynced = True
        except OSError:
            os.ftruncate(descriptor, self._journal_bytes)
            raise
        finally:
            os.close(descriptor)

    def sync(self) -> None:
        """Brings what was appended to the disk."""
        with self._guard:
            if self._gone or not self._unsynced:
                return
            new, self._unsynced, self._new = self._new, False, False
            try:
                descriptor = os.open(self.folder / _JOURNAL, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
            except FileNotFoundError:  # a snapshot has taken its place
                return
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        if new:
            for folder in (self.folder, *self.folder.parents[:5]):  # up to the root: each may be new
                snapshot.sync_folder(folder)

    def keep(self) -> int:
        """Makes the present snapshot the save point; see `StoredSession.keep`."""
        with self._guard:
            present, saved = self._path(self._generation), self.folder / _SAVED
            if not self._shared:
                temporary = self.folder / f".saved{_TEMPORARY}"
                temporary.unlink(missing_ok=True)
                os.link(present, temporary)
                temporary.replace(saved)
                snapshot.sync_folder(self.folder)
            self._shared, self._saved_bytes = True, 0
            return self._snapshot

    def read_saved(self, limit: int) -> bytes | None:
        """The save point, or None; raises as `read`."""
        try:
            return snapshot.read_file(self.folder / _SAVED, limit)
        except FileNotFoundError:
            return None

    def delete(self, generation: int) -> None:
        """Removes it; see `StoredSession.delete`. One that is cut short is finished by the next scan."""
        with self._guard:
            if self.deleted < generation:
                with snapshot.atomic_file(self.folder / _DELETED) as file:
                    file.write(str(generation).encode())
            self._gone = True
            for path in self.folder.iterdir():
                if path.name != _DELETED:
                    path.unlink(missing_ok=True)


def _digest(name: str) -> str:
    return hashlib.sha256(name.encode("utf-8", "surrogatepass")).hexdigest()


def _hidden(path: Path) -> bool:
    return path.name.startswith(".") or not path.is_file()


def _reason(error: SnapshotInvalid | OSError) -> str:
    return str(error) if isinstance(error, SnapshotInvalid) else "its files cannot be read"


def _take(root: Path) -> int:
    """Locks a folder until this process ends; raises ConfigError where another has it."""
    descriptor = os.open(root / _LOCK, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        holder = os.read(descriptor, 20).decode(errors="replace").strip()
        os.close(descriptor)
        raise ConfigError(
            f"atlas.memory_path: '{root}' is in use by another server (process {holder or 'unknown'})"
        ) from error
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, f"{os.getpid()}\n".encode(), 0)
    return descriptor
