"""Where snapshots lie: files of single sessions, and archives of all sessions of an owner.

An archive is an uncompressed zip of snapshot files with a manifest, so it is written and read one session at a time.
Names of owners and sessions never become file names: folders, files and members are named by digests.
"""

from __future__ import annotations

import errno
import hashlib
import zipfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import msgspec

from atlas_jax.engine import snapshot
from atlas_jax.engine.api import SnapshotInvalid

_MANIFEST = "manifest.json"
_MAX_MANIFEST = 64 << 20
_MAX_MEMBERS = 100_000


class Listing(msgspec.Struct, frozen=True):
    """What can be said of a stored session without reading its state."""

    session_id: str
    tokens: int
    bytes: int
    created: float
    last_used: float
    has_state: bool


class Manifest(msgspec.Struct, frozen=True):
    """Contents of an archive; `model` is the fingerprint of the model it was made with."""

    model: str
    sessions: list[Listing]


@dataclass(frozen=True)
class Location:
    """A stored session: a snapshot file, or a member of an archive."""

    path: Path
    member: str | None = None

    def read(self, limit: int) -> bytes:
        """The snapshot's bytes.

        Raises:
          SnapshotInvalid: it is damaged or larger than `limit`.
          OSError: it cannot be read.
        """
        if self.member is None:
            return snapshot.read_file(self.path, limit)
        with _opened(self.path) as archive:
            return _member(archive, self.member, limit)


def owner_folder(root: Path, owner: str) -> Path:
    """An owner's folder."""
    name = _digest(owner)
    return root / name[:2] / name


def session_file(root: Path, owner: str, session_id: str) -> Path:
    """A session's own snapshot file."""
    return owner_folder(root, owner) / "sessions" / f"{_digest(session_id)}.atlas"


def member_name(session_id: str) -> str:
    """A session's member in an archive."""
    return f"{_digest(session_id)}.atlas"


def bury(root: Path, owner: str, session_id: str) -> None:
    """Marks a session as deleted, so that an older archive does not bring it back."""
    grave = owner_folder(root, owner) / "deleted" / member_name(session_id)
    grave.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    grave.touch(mode=0o600)


def buried(folder: Path) -> frozenset[str]:
    """Members marked as deleted in an owner's folder."""
    return frozenset(grave.name for grave in (folder / "deleted").glob("*.atlas"))


def unbury(folder: Path) -> None:
    """Removes the marks: the archive has been written without the deleted sessions."""
    for grave in (folder / "deleted").glob("*.atlas"):
        grave.unlink(missing_ok=True)


def write(path: Path, manifest: Manifest, snapshots: Iterable[tuple[str, bytes]]) -> int:
    """Writes an archive of (session id, snapshot) pairs, replacing `path` at the end; returns its size in bytes."""
    with snapshot.atomic_file(path) as file:
        with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
            for session_id, data in snapshots:
                archive.writestr(zipfile.ZipInfo(member_name(session_id)), data)
            archive.writestr(zipfile.ZipInfo(_MANIFEST), msgspec.json.encode(manifest))
        return int(file.tell())


def read_manifest(path: Path) -> Manifest:
    """Contents of an archive.

    Raises:
      FileNotFoundError: there is none.
      SnapshotInvalid: it is not an archive, or is damaged.
    """
    with _opened(path) as archive:
        try:
            manifest = msgspec.json.decode(_member(archive, _MANIFEST, _MAX_MANIFEST), type=Manifest)
        except (msgspec.DecodeError, RecursionError) as error:
            raise SnapshotInvalid("archive is damaged: its manifest cannot be read") from error
        names = {member_name(session.session_id) for session in manifest.sessions}
        if len(names) != len(manifest.sessions) or names | {_MANIFEST} != set(archive.namelist()):
            raise SnapshotInvalid("archive is damaged: its manifest does not match its contents")
        return manifest


@contextmanager
def _opened(path: Path) -> Iterator[zipfile.ZipFile]:
    if path.is_symlink() or (path.exists() and not path.is_file()):
        raise SnapshotInvalid("archive is not a regular file")
    try:
        archive = zipfile.ZipFile(path)
    except (zipfile.BadZipFile, ValueError, NotImplementedError) as error:
        raise SnapshotInvalid("not an archive of sessions, or a damaged one") from error
    with archive:
        if len(archive.namelist()) > _MAX_MEMBERS:
            raise SnapshotInvalid("archive holds too many sessions")
        yield archive


def _member(archive: zipfile.ZipFile, name: str, limit: int) -> bytes:
    try:
        info = archive.getinfo(name)
        if info.compress_type != zipfile.ZIP_STORED or info.flag_bits & 1:
            raise SnapshotInvalid("archive holds a member that is not stored plainly")
        if info.file_size > limit:
            raise SnapshotInvalid(f"archive member of {info.file_size} bytes exceeds the limit of {limit}")
        return archive.read(info)
    except (KeyError, zipfile.BadZipFile, EOFError, ValueError, NotImplementedError) as error:
        raise SnapshotInvalid("archive is damaged") from error
    except OSError as error:
        if error.errno != errno.EINVAL:  # a place before the file's beginning: its directory is damaged
            raise
        raise SnapshotInvalid("archive is damaged") from error


def _digest(name: str) -> str:
    return hashlib.sha256(name.encode("utf-8", "surrogatepass")).hexdigest()
