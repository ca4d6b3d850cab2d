"""A folder of sessions as it lies there: listed and checked without a model, without taking the folder and without a change.

A server may be using it meanwhile: what it replaces while it is being read is read again.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Literal, TypeVar

from atlas_jax.engine.api import SessionKey, SnapshotInvalid
from atlas_jax.engine.sessions import archive, files, journal, snapshot
from atlas_jax.engine.sessions.document_frame import unframed
from atlas_jax.engine.sessions.folder_session import DELETED, JOURNAL, LONGEST_JOURNAL, SAVED, SNAPSHOT
from atlas_jax.engine.sessions.journal import Journal
from atlas_jax.engine.sessions.snapshot import Head
from atlas_jax.engine.sessions.store import Place, digest

Part = Literal["snapshot", "journal", "save point", "export", "document"]
LARGEST = 1 << 40
_TRIES = 3
_DIGEST = re.compile(r"[0-9a-f]{64}")
T = TypeVar("T")


@dataclass(frozen=True)
class Fault:
    """A file that cannot be used.

    Attributes:
      path: within the folder.
      owner, session: names, or digests of them where damage has made a name unreadable; None for what is no session's.
    """

    path: str
    part: Part
    reason: str
    owner: str | None
    session: str | None


@dataclass(frozen=True)
class StoredSession:
    """One session's folder; what is in it is read when it is asked for.

    Attributes:
      model: digest of the fingerprint of its model, as the folder is named.
    """

    root: Path
    folder: Path
    model: str
    place: Place

    @property
    def snapshot(self) -> Path | None:
        """Its newest snapshot."""
        found = [path for path in self.folder.glob(f"*{SNAPSHOT}") if path.name.removesuffix(SNAPSHOT).isdecimal()]
        return max(found, key=lambda path: int(path.name.removesuffix(SNAPSHOT)), default=None)

    @property
    def size(self) -> int:
        """Bytes of its files; a save point that is the present snapshot takes none of its own."""
        sizes: dict[tuple[int, int], int] = {}
        with contextlib.suppress(FileNotFoundError):
            for path in self.folder.iterdir():
                with contextlib.suppress(FileNotFoundError):
                    status = path.lstat()
                    sizes[status.st_dev, status.st_ino] = status.st_size
        return sum(sizes.values())

    @cached_property
    def head(self) -> Head | None:
        """The head of its snapshot, None without one; raises SnapshotInvalid, OSError."""

        def read() -> Head | None:
            path = self.snapshot
            if path is None:
                return None
            head, _ = snapshot.read_head(files.read_file(path, None, first=snapshot.HEAD_BYTES))
            return snapshot.with_generation(head, int(path.name.removesuffix(SNAPSHOT)))

        return again(read)

    @cached_property
    def journal(self) -> Journal | None:
        """The turns since its snapshot, None without any; raises SnapshotInvalid, OSError."""
        try:
            found, _ = journal.decode(files.read_file(self.folder / JOURNAL, LONGEST_JOURNAL))
        except FileNotFoundError:
            return None
        generation = 0 if self.head is None else self.head.listing.generation
        if found is None or not found.turns or found.turns[-1].generation <= generation:
            return None
        return found

    @cached_property
    def key(self) -> SessionKey | None:
        """Whose it is and its name, from whichever file says so; None where none can."""
        for read in (lambda: self.head, lambda: self.journal):
            with contextlib.suppress(SnapshotInvalid, OSError):
                found = read()
                if isinstance(found, Head):
                    return SessionKey(found.listing.owner, found.listing.session_id)
                if isinstance(found, Journal):
                    return SessionKey(found.origin.owner, found.origin.session_id)
        return None

    @property
    def fingerprint(self) -> str | None:
        """Of its model."""
        with contextlib.suppress(SnapshotInvalid, OSError):
            if self.head is not None:
                return str(self.head.bound.get("model", ""))
            if self.journal is not None:
                return self.journal.origin.model
        return None

    @property
    def tokens(self) -> int:
        """Length of its text; raises as `head` and `journal`."""
        if self.journal is not None:
            last = self.journal.turns[-1]
            return last.keep + len(last.tokens)
        return 0 if self.head is None else self.head.listing.tokens

    @property
    def last_used(self) -> float:
        """Unix seconds; of its files where they do not say."""
        with contextlib.suppress(SnapshotInvalid, OSError):
            if self.journal is not None:
                return self.journal.turns[-1].time
        with contextlib.suppress(SnapshotInvalid, OSError):
            if self.head is not None:
                return self.head.listing.last_used
        with contextlib.suppress(OSError):
            return self.folder.stat().st_mtime
        return 0.0

    @property
    def problem(self) -> str | None:
        """Why it cannot be used, as far as its beginning tells; None where it can."""
        try:
            if self.head is None and self.journal is None:
                return "it has neither a snapshot nor a journal"
        except SnapshotInvalid as error:
            return str(error)
        except OSError as error:
            return f"its files cannot be read: {error.strerror}"
        key = self.key
        if key is None or Place.of(key) != self.place:
            return "its files belong to another session"
        return None

    def faults(self) -> Iterator[Fault]:
        """Reads all of its files, and yields those that are damaged or belong elsewhere."""
        for part, path, check in (
            ("snapshot", self.snapshot, self._check_snapshot),
            ("journal", self.folder / JOURNAL, self._check_journal),
            ("save point", self.folder / SAVED, self._check_saved),
        ):
            if path is None:
                continue
            try:
                again(check)
            except FileNotFoundError:
                continue
            except SnapshotInvalid as error:
                yield self._fault(part, path, str(error))  # type: ignore[arg-type]
            except OSError as error:
                yield self._fault(part, path, f"it cannot be read: {error.strerror}")  # type: ignore[arg-type]

    def _check_snapshot(self) -> None:
        path = self.snapshot
        if path is not None:
            self._check_bytes(files.read_file(path, None))

    def _check_saved(self) -> None:
        present, path = self.snapshot, self.folder / SAVED
        if present is None or not path.samefile(present):
            self._check_bytes(files.read_file(path, None))

    def _check_bytes(self, data: bytes) -> None:
        head, _, _ = snapshot.decode(data)
        self._check_place(SessionKey(head.listing.owner, head.listing.session_id), str(head.bound.get("model", "")))

    def _check_journal(self) -> None:
        found, _ = journal.decode(files.read_file(self.folder / JOURNAL, LONGEST_JOURNAL))
        if found is None:  # its first record was cut off: nothing was acknowledged
            return
        self._check_place(SessionKey(found.origin.owner, found.origin.session_id), found.origin.model)
        try:
            generation = 0 if self.head is None else self.head.listing.generation
        except (SnapshotInvalid, OSError):  # a damaged snapshot is a fault of its own
            return
        new = [turn for turn in found.turns if turn.generation > generation]
        if new and new[0].after != generation:
            raise SnapshotInvalid("journal does not continue the snapshot: a turn is missing")

    def _check_place(self, key: SessionKey, model: str) -> None:
        if Place.of(key) != self.place:
            raise SnapshotInvalid("it belongs to another session")
        if digest(model)[:16] != self.model:
            raise SnapshotInvalid("it belongs to another model")

    def _fault(self, part: Part, path: Path, reason: str) -> Fault:
        key = self.key
        owner, session = (self.place.owner, self.place.session) if key is None else (key.owner, key.session_id)
        return Fault(path.relative_to(self.root).as_posix(), part, reason, owner, session)


def sessions(root: Path) -> Iterator[StoredSession]:
    """Every session of every model and owner in a folder, deleted ones left out."""
    for path in _under(root, "sessions/*/*"):
        if not path.is_dir() or path.is_symlink():
            continue
        found = StoredSession(root, path, path.parent.name, Place(path.parents[2].name, path.name))
        if not _is_deleted(found):
            yield found


def _under(root: Path, pattern: str) -> Iterator[Path]:
    """What the owners' folders have of a pattern; other folders are not a server's."""
    for owner in sorted(root.glob("[0-9a-f][0-9a-f]/*")):
        if _DIGEST.fullmatch(owner.name) and owner.name.startswith(owner.parent.name):
            yield from sorted(owner.glob(pattern))


def _is_deleted(found: StoredSession) -> bool:
    """Whether only the mark of a deletion is left of it, or what the mark will take with it."""
    try:
        deleted = int((found.folder / DELETED).read_text())
    except (OSError, ValueError):
        return False
    newest = 0
    with contextlib.suppress(SnapshotInvalid, OSError):
        newest = 0 if found.head is None else found.head.listing.generation
    with contextlib.suppress(SnapshotInvalid, OSError):
        newest = max(newest, 0 if found.journal is None else found.journal.turns[-1].generation)
    return newest <= deleted


def faults(root: Path) -> Iterator[Fault | StoredSession]:
    """Checks every file of a folder: after the faults of a session comes the session, then those of exports and documents."""
    for session in sessions(root):
        yield from session.faults()
        yield session
    for path in _under(root, "exports/*"):
        if path.name.startswith(".") or path.name.endswith(".damaged"):  # set aside by a server, with its reason
            continue
        reason = _reason_against(path, _check_export)
        if reason is not None:
            yield Fault(path.relative_to(root).as_posix(), "export", reason, path.parents[1].name, None)
    for path in _under(root, "documents/*"):
        if not path.name.startswith("."):
            reason = _reason_against(path, _check_document)
            if reason is not None:
                yield Fault(path.relative_to(root).as_posix(), "document", reason, path.parents[1].name, None)


def _reason_against(path: Path, check: Callable[[Path], None]) -> str | None:
    try:
        again(lambda: check(path))
    except FileNotFoundError:
        return None
    except SnapshotInvalid as error:
        return str(error)
    except OSError as error:
        return f"it cannot be read: {error.strerror}"
    return None


def _check_export(path: Path) -> None:
    if path.is_symlink() or not path.is_file():
        raise SnapshotInvalid("archive is not a regular file")
    with path.open("rb") as file, archive.opened(file) as reader:
        for listing in reader.manifest.sessions:
            snapshot.decode(reader.read(listing.session_id, LARGEST))


def _check_document(path: Path) -> None:
    unframed(path.parents[1].name, path.name, files.read_file(path, None))


def again(read: Callable[[], T]) -> T:
    """What `read` returns; it is tried anew where a file went away meanwhile, as a server replaces them."""
    for _ in range(_TRIES - 1):
        with contextlib.suppress(FileNotFoundError):
            return read()
    return read()
