"""Session files: versioned, checksummed, bound to one model, and never trusted until checked.

Layout: 8 bytes magic, u32 version, sha256 of the rest, then a safetensors payload whose metadata carries a JSON header.
Nothing in it is code. Shapes and types are compared with what the engine expects before an array is touched, and numbers
must be finite and of plausible size. Files are written beside their place, synced, and renamed.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import stat
import struct
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from atlas_jax import _tensors
from atlas_jax.engine.api import SnapshotInvalid, StorageFull

MAGIC = b"ATLASNAP"
VERSION = 1
_PREFIX = struct.Struct("<8sI32s")
_MAX_NORM = 1e8


def encode(header: Mapping[str, Any], arrays: Mapping[str, np.ndarray]) -> bytes:
    """Serialises one session."""
    payload = _tensors.encode(header, arrays)
    return _PREFIX.pack(MAGIC, VERSION, hashlib.sha256(payload).digest()) + payload


def decode(data: bytes) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Reads what `encode` wrote.

    Raises:
      SnapshotInvalid: it is damaged, of another version, or not a snapshot; nothing was kept.
    """
    if len(data) < _PREFIX.size:
        raise SnapshotInvalid("snapshot is truncated")
    magic, version, digest = _PREFIX.unpack_from(data)
    if magic != MAGIC:
        raise SnapshotInvalid("not a session snapshot")
    if version != VERSION:
        raise SnapshotInvalid(f"snapshot version {version} is not supported (this server reads version {VERSION})")
    payload = data[_PREFIX.size :]
    if hashlib.sha256(payload).digest() != digest:
        raise SnapshotInvalid("snapshot is damaged: its checksum does not match")
    try:
        return _tensors.decode(payload, dict[str, Any])
    except _tensors.DamagedFile as error:
        raise SnapshotInvalid("snapshot is damaged: its contents cannot be read") from error


def check_array(name: str, array: np.ndarray | None, shape: tuple[int, ...], dtype: np.dtype[Any]) -> np.ndarray:
    """The array, if it is what the engine expects.

    Raises:
      SnapshotInvalid: it is missing, misshapen, of another type, not finite or absurdly large; the message names it.
    """
    if array is None:
        raise SnapshotInvalid(f"snapshot lacks '{name}'")
    if array.shape != shape or array.dtype != dtype:
        found = f"{array.dtype}{list(array.shape)}"
        raise SnapshotInvalid(f"snapshot's '{name}' is {found}, this server needs {dtype}{list(shape)}")
    if array.dtype.kind == "f" and array.size:
        peak = np.abs(array).max()  # NaN and inf both fail the comparison
        if not peak <= _MAX_NORM:
            raise SnapshotInvalid(f"snapshot's '{name}' holds numbers that are not finite or far too large")
    return array


def read_file(path: Path, limit: int) -> bytes:
    """Reads a regular file of at most `limit` bytes, following no link.

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
        if status.st_size > limit:
            raise SnapshotInvalid(f"snapshot of {status.st_size} bytes exceeds the limit of {limit}")
        return file.read(limit + 1)


@contextlib.contextmanager
def atomic_file(path: Path) -> Iterator[Any]:
    """A binary file that replaces `path` when the block ends well, and leaves it alone otherwise.

    Raises:
      StorageFull: the disk or the quota has no room.
    """
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    try:
        descriptor, name = tempfile.mkstemp(prefix=".", suffix=".tmp", dir=path.parent)
    except OSError as error:
        raise _storage_error(error) from error
    temporary = Path(name)
    try:
        with os.fdopen(descriptor, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
        _sync_folder(path.parent)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise _storage_error(error) from error
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def _storage_error(error: OSError) -> Exception:
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return StorageFull("no space left for session snapshots")
    return error


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
