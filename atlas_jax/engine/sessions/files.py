"""Files read without following links, and replaced whole or not at all: written beside their place, synced, renamed."""

from __future__ import annotations

import contextlib
import errno
import os
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from atlas_jax.engine.api import SnapshotInvalid, StorageFull


def read_file(path: Path, limit: int | None, *, first: int | None = None) -> bytes:
    """Reads a regular file of at most `limit` bytes, or its `first` bytes, following no link.

    Raises:
      FileNotFoundError: there is none.
      SnapshotInvalid: it is something else than a file, or larger.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise SnapshotInvalid("snapshot is not a regular file") from error
        raise
    with os.fdopen(descriptor, "rb") as file:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise SnapshotInvalid("snapshot is not a regular file")
        if limit is not None and status.st_size > limit:
            raise SnapshotInvalid(f"snapshot of {status.st_size} bytes exceeds the limit of {limit}")
        return file.read(first)


@contextlib.contextmanager
def atomic_file(path: Path) -> Iterator[BinaryIO]:
    """A binary file that replaces `path` when the block ends well, and leaves it alone otherwise.

    Raises:
      StorageFull: the disk or the quota has no room.
    """
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    try:
        descriptor, name = tempfile.mkstemp(prefix=".", suffix=".tmp", dir=path.parent)
    except OSError as error:
        raise storage_error(error) from error
    temporary = Path(name)
    try:
        with os.fdopen(descriptor, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
        sync_folder(path.parent)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise storage_error(error) from error
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def storage_error(error: OSError) -> Exception:
    """What an error of the file system is to a client."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return StorageFull("no space left for session snapshots")
    return error


def sync_folder(folder: Path) -> None:
    """Brings names made or removed in a folder to the disk."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
