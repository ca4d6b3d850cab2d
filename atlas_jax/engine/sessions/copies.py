"""Copies of immutable objects on a local disk: the latest ones, as many as there is room for, checked when they are read."""

from __future__ import annotations

import hashlib
import logging
import os
import threading
from collections import OrderedDict
from pathlib import Path

from atlas_jax.config import ConfigError
from atlas_jax.engine.api import SnapshotInvalid, StorageFull
from atlas_jax.engine.sessions import files

log = logging.getLogger("atlas.engine")
_FOLDER = "copies"


class Copies:
    """Copies in a folder of one process; thread-safe. A copy that cannot be written is one that is not there."""

    def __init__(self, root: Path, limit: int) -> None:
        """Takes over the copies that are there.

        Args:
          limit: bytes of all of them.

        Raises:
          ConfigError: the folder cannot be used.
        """
        self._folder, self._limit = root / _FOLDER, limit
        self._lock = threading.Lock()
        self._sizes: OrderedDict[str, int] = OrderedDict()
        try:
            self._folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            found = [(entry.stat(), entry.name) for entry in os.scandir(self._folder) if entry.is_file()]
        except OSError as error:
            raise ConfigError(
                f"atlas.memory_path: copies of sessions cannot be kept in '{root}': {error.strerror or error}"
            ) from error
        for status, name in sorted(found, key=lambda one: one[0].st_mtime):
            if name.startswith("."):  # a killed process left it half-written
                (self._folder / name).unlink(missing_ok=True)
            else:
                self._sizes[name] = status.st_size
        with self._lock:
            self._make_room(0)

    def get(self, name: str, sha256: bytes, size: int) -> bytes | None:
        """A copy of an object, if there is one and it is whole."""
        file = _file(name)
        with self._lock:
            if file not in self._sizes:
                return None
            self._sizes.move_to_end(file)
        try:
            data = files.read_file(self._folder / file, size)
        except (OSError, SnapshotInvalid):
            data = b""
        if hashlib.sha256(data).digest() == sha256:
            return data
        self.drop(name)
        return None

    def put(self, name: str, data: bytes) -> None:
        """Keeps a copy, if there is room."""
        file = _file(name)
        with self._lock:
            if len(data) > self._limit or file in self._sizes:
                return
            self._make_room(len(data))
            self._sizes[file] = len(data)
        try:
            with files.atomic_file(self._folder / file) as out:
                out.write(data)
        except (OSError, StorageFull) as error:
            log.warning("[ATLAS] A copy of a session could not be kept: %s", error)
            self.drop(name)

    def drop(self, name: str) -> None:
        """Removes a copy, if there is one."""
        file = _file(name)
        with self._lock:
            self._sizes.pop(file, None)
        (self._folder / file).unlink(missing_ok=True)

    def _make_room(self, more: int) -> None:
        total = sum(self._sizes.values()) + more
        while self._sizes and total > self._limit:
            file, size = self._sizes.popitem(last=False)
            total -= size
            (self._folder / file).unlink(missing_ok=True)


def _file(name: str) -> str:
    return hashlib.sha256(name.encode()).hexdigest()
