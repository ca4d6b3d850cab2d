"""One session's files in a folder of its own:

* `<generation>.snapshot.atlas`, its state, written beside its place and renamed;
* `journal`, the turns since then, appended;
* `saved.atlas`, a save point: the snapshot as it was when a client asked for it, a second name (hard link) of its file;
* `moved`, while it is given another name, the generation of its snapshot under that name and the folder of that;
* `deleted`, in the place of all of these, the generation of its deletion.
"""

from __future__ import annotations

import errno
import logging
import os
import threading
from pathlib import Path

from atlas_jax.engine.api import StorageFull
from atlas_jax.engine.sessions import files, journal, snapshot
from atlas_jax.engine.sessions.journal import Journal, Origin, Turn
from atlas_jax.engine.sessions.snapshot import Head
from atlas_jax.engine.sessions.store import Found, Place, StoredSession

log = logging.getLogger("atlas.engine")

DELETED = "deleted"
"""The file that marks a deletion."""
TEMPORARY = ".tmp"
"""How the name of a file that is not finished ends; it begins with a dot."""
MOVED = "moved"
"""The file that marks a session that is being given another name."""
JOURNAL, SAVED = "journal", "saved.atlas"
"""Names of the journal and of a save point."""
SNAPSHOT = ".snapshot.atlas"
"""How the name of a snapshot ends, after its generation."""
LONGEST_JOURNAL = 1 << 30


class FolderSession:
    """Implements `StoredSession` in a folder of its own."""

    def __init__(self, place: Place, folder: Path) -> None:
        """The session at `place`, in `folder`, which need not be there yet."""
        self.place = place
        self.folder = folder
        self._guard = threading.Lock()
        self._gone = False
        self._snapshot = self._journal_bytes = self._saved_bytes = 0
        self._last_turn = self._floor = 0
        self._unsynced = self._new = self._shared = False
        snapshots = sorted(folder.glob(f"*{SNAPSHOT}")) if folder.is_dir() else []
        self._generation = 0
        for path in snapshots:
            number = path.name.removesuffix(SNAPSHOT)
            if number.isdecimal():
                self._generation, self._snapshot = int(number), path.stat().st_size
        for path in snapshots:  # a write was cut short after the newer one was whole
            if path != self._path(self._generation):
                path.unlink(missing_ok=True)
        if (saved := folder / SAVED).is_file():
            self._shared = self._generation > 0 and saved.samefile(self._path(self._generation))
            self._saved_bytes = 0 if self._shared else saved.stat().st_size

    def _path(self, generation: int) -> Path:
        return self.folder / f"{generation:020d}{SNAPSHOT}"

    @property
    def size(self) -> int:
        """Bytes it takes of the disk."""
        return self._snapshot + self._journal_bytes + self._saved_bytes

    @property
    def generation(self) -> int:
        """Of its newest snapshot, 0 without one."""
        return self._generation

    @property
    def newest(self) -> int:
        """Of its last turn, or its snapshot if that is newer."""
        return max(self._generation, self._last_turn)

    @property
    def deleted(self) -> int:
        """Generation of the deletion that is marked, or 0."""
        try:
            return int((self.folder / DELETED).read_text())
        except (OSError, ValueError):
            return 0

    @property
    def moved(self) -> tuple[int, str] | None:
        """The generation and the digest of the name that it is being given, or None."""
        try:
            generation, name = (self.folder / MOVED).read_text().split()
            return int(generation), name
        except (OSError, ValueError):
            return None

    def stay(self) -> None:
        """Forgets that it was to be given another name."""
        (self.folder / MOVED).unlink(missing_ok=True)

    def drop_orphan(self) -> None:
        """Removes a save point without a session: what was to be given this name has kept its own."""
        (self.folder / SAVED).unlink(missing_ok=True)

    def read_head(self) -> Head | None:
        """The head of its snapshot, None without one; raises as `read`."""
        if not self._generation:
            return None
        data = files.read_file(self._path(self._generation), None, first=snapshot.HEAD_BYTES)
        head, _ = snapshot.read_head(data)
        if head.listing.generation != self._generation:  # a save point that was made the present state
            head = snapshot.with_generation(head, self._generation)
        self._floor = head.listing.floor
        return head

    def read_journal(self) -> Journal | None:
        """Its journal, None without one; what a crash cut off at its end is removed. Raises as `read`."""
        path = self.folder / JOURNAL
        try:
            data = files.read_file(path, LONGEST_JOURNAL)
        except FileNotFoundError:
            return None
        found, end = journal.decode(data)
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
            data = files.read_file(self._path(self._generation), limit) if self._generation else None
            return data, self.read_journal()

    def write(self, generation: int, data: bytes, *, after: int | None = None) -> bool:
        """Writes a snapshot; see `StoredSession.write`."""
        floor = snapshot.read_head(data)[0].listing.floor
        with self._guard:
            # what the journal has read since might go back further than this state can be rolled back
            if self._gone or generation <= self._generation or generation < self._last_turn:
                return False
            with files.atomic_file(self._path(generation)) as file:
                file.write(data)
            self._replaced(generation, len(data), floor)
            return True

    def move(
        self, target: StoredSession, generation: int, data: bytes, saved: bytes | None, *, after: int | None = None
    ) -> None:
        """Makes it the session of another name; see `StoredSession.move`.

        The mark decides for a scan which of the two folders is the session; it is durable before the other one is written.
        """
        assert isinstance(target, FolderSession)
        with self._guard, files.atomic_file(self.folder / MOVED) as file:
            file.write(f"{generation} {target.place.session}".encode())
        try:
            target.receive(generation, data, saved)
        except BaseException:
            self.stay()
            raise
        try:
            self.delete(generation)
        except (StorageFull, OSError) as error:
            log.error("[ATLAS] A renamed session is removed under its old name at the next start: %s", error)
            self._gone = True

    def receive(self, generation: int, data: bytes, saved: bytes | None) -> None:
        """Becomes a session that had another name; raises StorageFull, OSError."""
        if saved is not None:
            with files.atomic_file(self.folder / SAVED) as file:
                file.write(saved)
        try:
            self.write(generation, data)
        except BaseException:
            self.drop_orphan()
            raise
        self._saved_bytes = len(saved or b"")

    def restore(self, generation: int) -> None:
        """Makes the save point the present snapshot, without copying it."""
        with self._guard:
            if self._gone or generation <= self._generation:
                return
            saved = self.folder / SAVED
            head, _ = snapshot.read_head(files.read_file(saved, None, first=snapshot.HEAD_BYTES))
            os.link(saved, self._path(generation))
            files.sync_folder(self.folder)
            self._replaced(generation, saved.stat().st_size, head.listing.floor)
            self._shared, self._saved_bytes = True, 0

    def _replaced(self, generation: int, size: int, floor: int) -> None:
        """Drops what a new snapshot has made old."""
        if self._shared:
            self._shared, self._saved_bytes = False, self._snapshot
        old, self._generation, self._snapshot, self._floor = self._generation, generation, size, floor
        if old:
            self._path(old).unlink(missing_ok=True)
        (self.folder / JOURNAL).unlink(missing_ok=True)
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
                raise files.storage_error(error) from error
            self._last_turn = turn.generation
            if turn.keep == 0:
                self._floor = 0
            return True

    def _append(self, record: bytes) -> None:
        flags = os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
        descriptor = os.open(self.folder / JOURNAL, flags, 0o600)
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
                descriptor = os.open(self.folder / JOURNAL, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
            except FileNotFoundError:  # a snapshot has taken its place
                return
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        if new:
            for folder in (self.folder, *self.folder.parents[:5]):  # up to the root: each may be new
                files.sync_folder(folder)

    def keep(self) -> int:
        """Makes the present snapshot the save point; see `StoredSession.keep`."""
        with self._guard:
            present, saved = self._path(self._generation), self.folder / SAVED
            if not self._shared:
                temporary = self.folder / f".saved{TEMPORARY}"
                temporary.unlink(missing_ok=True)
                os.link(present, temporary)
                temporary.replace(saved)
                files.sync_folder(self.folder)
            self._shared, self._saved_bytes = True, 0
            return self._snapshot

    def read_saved(self, limit: int) -> bytes | None:
        """The save point, or None; raises as `read`."""
        try:
            return files.read_file(self.folder / SAVED, limit)
        except FileNotFoundError:
            return None

    def changed(self) -> bool:
        """Never: no other server has the folder."""
        return False

    def found(self) -> Found | None:
        """Is for stores that others write to."""
        return None

    def delete(self, generation: int, *, unless_changed: bool = False) -> None:
        """Removes it; see `StoredSession.delete`. One that is cut short is finished by the next scan."""
        with self._guard:
            if self.deleted < generation:
                with files.atomic_file(self.folder / DELETED) as file:
                    file.write(str(generation).encode())
            self._gone = True
            for path in self.folder.iterdir():
                if path.name != DELETED:
                    path.unlink(missing_ok=True)
