"""Exports: many sessions in one file, to be copied, kept, and read by another server.

An export is an uncompressed zip of snapshots with a manifest, written and read one session at a time. Members are named by
digests of session names. Which of two copies of a session is newer follows from their generations.
"""

from __future__ import annotations

import errno
import zipfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import BinaryIO

import msgspec

from atlas_jax.engine.api import SnapshotInvalid
from atlas_jax.engine.sessions.snapshot import Listing
from atlas_jax.engine.sessions.store import digest

_MANIFEST = "manifest.json"
_MAX_MANIFEST = 64 << 20
_MAX_MEMBERS = 100_000
_BLOCK = 1 << 20


class Manifest(msgspec.Struct, frozen=True):
    """Contents of an export; `model` is the fingerprint of the model it was made with."""

    model: str
    sessions: list[Listing]


def member_name(session_id: str) -> str:
    """A session's member in an export."""
    return f"{digest(session_id)}.atlas"


def write(file: BinaryIO, model: str, sessions: Iterable[tuple[Listing, bytes]]) -> tuple[int, int]:
    """Writes an export of (listing, snapshot) pairs to an empty file; returns its bytes and sessions."""
    listings: list[Listing] = []
    with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
        for listing, data in sessions:
            archive.writestr(zipfile.ZipInfo(member_name(listing.session_id)), data)
            listings.append(listing)
        archive.writestr(zipfile.ZipInfo(_MANIFEST), msgspec.json.encode(Manifest(model, listings)))
    return int(file.tell()), len(listings)


class Reader:
    """An export that is open for reading; make it with `opened`.

    Attributes:
      manifest: what it says it holds; every name in it has a member.
    """

    def __init__(self, archive: zipfile.ZipFile) -> None:
        """Raises SnapshotInvalid where the manifest cannot be read or does not match the contents."""
        self._archive = archive
        try:
            self.manifest = msgspec.json.decode(self._member(_MANIFEST, _MAX_MANIFEST), type=Manifest)
        except (msgspec.DecodeError, RecursionError) as error:
            raise SnapshotInvalid("archive is damaged: its manifest cannot be read") from error
        names = {member_name(session.session_id) for session in self.manifest.sessions}
        if len(names) != len(self.manifest.sessions) or names | {_MANIFEST} != set(archive.namelist()):
            raise SnapshotInvalid("archive is damaged: its manifest does not match its contents")

    def read(self, session_id: str, limit: int) -> bytes:
        """One session's snapshot; raises SnapshotInvalid for damage or more than `limit` bytes."""
        return self._member(member_name(session_id), limit)

    def check(self) -> None:
        """Reads all of it; raises SnapshotInvalid where some of it is damaged."""
        for info in self._archive.infolist():
            with _damage(), self._archive.open(info) as member:
                while member.read(_BLOCK):
                    pass

    def _member(self, name: str, limit: int) -> bytes:
        with _damage():
            info = self._archive.getinfo(name)
            if info.compress_type != zipfile.ZIP_STORED or info.flag_bits & 1:
                raise SnapshotInvalid("archive holds a member that is not stored plainly")
            if info.file_size > limit:
                raise SnapshotInvalid(f"archive member of {info.file_size} bytes exceeds the limit of {limit}")
            return self._archive.read(info)


@contextmanager
def opened(file: BinaryIO) -> Iterator[Reader]:
    """An export to be read; raises SnapshotInvalid where the file is none, or a damaged one."""
    try:
        archive = zipfile.ZipFile(file)
    except (zipfile.BadZipFile, ValueError, NotImplementedError) as error:
        raise SnapshotInvalid("not an archive of sessions, or a damaged one") from error
    with archive:
        if len(archive.namelist()) > _MAX_MEMBERS:
            raise SnapshotInvalid("archive holds too many sessions")
        yield Reader(archive)


@contextmanager
def _damage() -> Iterator[None]:
    """Turns what the zip library says of a damaged file into SnapshotInvalid."""
    try:
        yield
    except (KeyError, zipfile.BadZipFile, EOFError, ValueError, NotImplementedError) as error:
        raise SnapshotInvalid("archive is damaged") from error
    except OSError as error:
        if error.errno != errno.EINVAL:  # a place before the file's beginning: its directory is damaged
            raise
        raise SnapshotInvalid("archive is damaged") from error
