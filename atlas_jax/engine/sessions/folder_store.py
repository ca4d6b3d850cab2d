"""Sessions in a folder, for one server at a time: `<owner>/sessions/<model>/<session>/`, `<owner>/exports/`
and `<owner>/documents/`.

Owners and sessions stand there as digests of their names, models as digests of their fingerprints; owners are spread over
folders by the first two digits.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import BinaryIO

from atlas_jax.config import ConfigError
from atlas_jax.engine.api import SessionKey, SnapshotInvalid, StoredFile
from atlas_jax.engine.sessions import files
from atlas_jax.engine.sessions.document_frame import FRAME_BYTES, framed, unframed
from atlas_jax.engine.sessions.folder_session import DELETED, TEMPORARY, FolderSession
from atlas_jax.engine.sessions.journal import Journal
from atlas_jax.engine.sessions.snapshot import Head
from atlas_jax.engine.sessions.store import Found, Place, StoredSession, digest

_LOCK = ".lock"


class MemoryFolder:
    """A folder of sessions that this process has taken; no other server can while it lives."""

    shared = False

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
            (root / f".probe{TEMPORARY}").write_bytes(b"")
            for path in root.rglob(f".*{TEMPORARY}"):
                path.unlink(missing_ok=True)
        except OSError as error:
            raise ConfigError(
                f"atlas.memory_path: sessions cannot be stored in '{root}': {error.strerror or error}"
            ) from error

    def store(self, model: str) -> FolderStore:
        """The sessions of one model there."""
        return FolderStore(self, model)

    def close(self) -> None:
        """Lets another server have it; idempotent."""
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None


class FolderStore:
    """Implements `Store` in a folder."""

    shared = False

    def __init__(self, folder: MemoryFolder, model: str) -> None:
        """The sessions of one model there.

        Args:
          model: its fingerprint; sessions of other models in the folder are left alone.
        """
        self.root = folder.root
        self._folder = folder
        self._model = digest(model)[:16]

    def folder(self, key: SessionKey) -> Path:
        """A session's folder."""
        return self._folder_of(Place.of(key))

    def _folder_of(self, place: Place) -> Path:
        return self._owner(place.owner) / "sessions" / self._model / place.session

    def _owner(self, owner: str) -> Path:
        """An owner's folder, by the digest of the name."""
        return self.root / owner[:2] / owner

    def session(self, key: SessionKey) -> FolderSession:
        """A session that is not there yet."""
        place = Place.of(key)
        return FolderSession(place, self._folder_of(place))

    def list(self) -> Iterator[Found]:
        """Every session of this model, damaged ones with the reason; finishes deletions that were cut short."""
        for path in sorted(self.root.glob(f"*/*/sessions/{self._model}/*")):
            if not path.is_dir() or path.is_symlink():
                continue
            found = self._find(FolderSession(Place(path.parents[2].name, path.name), path))
            if found is not None:
                yield found

    def changes(
        self, owner: str | None, known: Mapping[Place, StoredSession]
    ) -> Iterator[tuple[StoredSession, Found | None]]:
        """Nothing: no other server has the folder."""
        return iter(())

    def collect(self, known: Mapping[Place, StoredSession]) -> int:
        """Nothing: what was left half-written is removed at start."""
        return 0

    def other_models(self) -> int:
        """How many other models have sessions in the folder."""
        return len({path.name for path in self.root.glob("*/*/sessions/*")} - {self._model})

    def deletions(self, owner: str) -> dict[str, int]:
        """Generations of the owner's deletions that an export could undo, by the digest of the session's name."""
        out = {}
        for mark in self._marks(owner).glob(f"*/{DELETED}"):
            with contextlib.suppress(OSError, ValueError):
                out[mark.parent.name] = int(mark.read_text())
        return out

    def forget_deletions(self, owner: str, until: int | None = None) -> None:
        """Removes marks of deletions, up to a generation: no export has those sessions any more."""
        for name, generation in self.deletions(owner).items():
            if until is None or generation <= until:
                folder = self._marks(owner) / name
                (folder / DELETED).unlink(missing_ok=True)
                with contextlib.suppress(OSError):  # the session is there again
                    folder.rmdir()

    def _marks(self, owner: str) -> Path:
        return self._owner(digest(owner)) / "sessions" / self._model

    # --- exports --------------------------------------------------------------------------------------------------
    def exports(self, owner: str) -> tuple[StoredFile, ...]:
        """The owner's exports, by name."""
        names = sorted(path.name for path in self._exports(owner).glob("*") if not path.name.startswith("."))
        return tuple(found for name in names if (found := self.find_export(owner, name)) is not None)

    def find_export(self, owner: str, name: str) -> StoredFile | None:
        """One of the owner's exports, or None."""
        path = self._exports(owner) / name
        with contextlib.suppress(FileNotFoundError):
            if path.is_file():
                status = path.stat()
                return StoredFile(filename=name, bytes=status.st_size, modified=status.st_mtime)
        return None

    @contextlib.contextmanager
    def read_export(self, owner: str, name: str) -> Iterator[BinaryIO]:
        """Opens an export for reading; raises as `Store.read_export`."""
        path = self._exports(owner) / name
        if path.is_symlink() or (path.exists() and not path.is_file()):
            raise SnapshotInvalid("archive is not a regular file")
        with path.open("rb") as file:
            yield file

    def write_export(self, owner: str, name: str) -> contextlib.AbstractContextManager[BinaryIO]:
        """A file that takes the export's place; see `Store.write_export`."""
        return files.atomic_file(self._exports(owner) / name)

    def rename_export(self, owner: str, name: str, new: str) -> None:
        """Gives an export another name."""
        folder = self._exports(owner)
        (folder / name).rename(folder / new)
        files.sync_folder(folder)

    def delete_export(self, owner: str, name: str) -> None:
        """Removes an export; raises FileNotFoundError."""
        (self._exports(owner) / name).unlink()

    def _exports(self, owner: str) -> Path:
        return self._owner(digest(owner)) / "exports"

    # --- documents ------------------------------------------------------------------------------------------------
    def documents(self, owner: str) -> dict[str, StoredFile]:
        """The owner's documents by name; see `Store.documents`."""
        found = {}
        with contextlib.suppress(FileNotFoundError), os.scandir(self._documents(owner)) as entries:
            for entry in entries:
                if not entry.name.startswith(".") and entry.is_file(follow_symlinks=False):
                    status = entry.stat(follow_symlinks=False)
                    size = max(0, status.st_size - FRAME_BYTES)
                    found[entry.name] = StoredFile(filename=entry.name, bytes=size, modified=status.st_mtime)
        return found

    def read_document(self, owner: str, name: str, limit: int) -> bytes | None:
        """A document, or None; raises as `Store.read_document`."""
        try:
            data = files.read_file(self._documents(owner) / name, limit + 1024)
        except FileNotFoundError:
            return None
        return unframed(digest(owner), name, data)

    def write_document(self, owner: str, name: str, data: bytes) -> None:
        """Replaces a document; see `Store.write_document`."""
        with files.atomic_file(self._documents(owner) / name) as file:
            file.write(framed(digest(owner), name, data))

    def delete_document(self, owner: str, name: str) -> None:
        """Removes a document, if it is there."""
        (self._documents(owner) / name).unlink(missing_ok=True)

    def _documents(self, owner: str) -> Path:
        return self._owner(digest(owner)) / "documents"

    # --- a scan ---------------------------------------------------------------------------------------------------
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
        if stored.moved is not None:
            if self._has_moved(stored, newest):
                deleted = max(deleted, stored.moved[0])
            else:
                stored.stay()
        if deleted and newest <= deleted:  # a damaged file of a deleted session is nobody's
            stored.delete(deleted)
            return None
        if head is not None:
            key = SessionKey(head.listing.owner, head.listing.session_id)
        elif turns is not None:
            key = SessionKey(turns.origin.owner, turns.origin.session_id)
        elif problem is None:  # a folder that was made and not used
            stored.drop_orphan()
            with contextlib.suppress(OSError):
                stored.folder.rmdir()
            return None
        else:
            return Found(None, stored, None, None, problem)
        if Place.of(key) != stored.place:
            return Found(None, stored, None, None, "its files belong to another session")
        return Found(key, stored, head, turns, problem)

    def _has_moved(self, stored: FolderSession, newest: int) -> bool:
        """Whether a session is whole under the name it was to be given; one that was begun anew since is another."""
        assert stored.moved is not None
        generation, name = stored.moved
        place = Place(stored.place.owner, name)
        return newest < generation == FolderSession(place, self._folder_of(place)).generation

    def close(self) -> None:
        """Lets another server have the folder."""
        self._folder.close()


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
