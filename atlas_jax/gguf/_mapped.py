"""A file that is read through a memory map, for as long as it is the file that was opened."""

from __future__ import annotations

import os
import sys
from contextlib import suppress
from io import FileIO
from mmap import ACCESS_READ, PAGESIZE, mmap
from pathlib import Path

from atlas_jax.gguf._header import GGUFError

if sys.platform == "linux":
    from mmap import MADV_DONTNEED


class MappedFile:
    """An open file behind a model; raises GGUFError where it is empty, closed, or was changed."""

    def __init__(self, path: Path) -> None:
        self._name = path.name
        self._file = FileIO(path)
        self._stamp = self._identity()
        self._map: mmap | None = None
        if self.size == 0:
            self._file.close()
            raise GGUFError(f"{path.name} is empty")
        self._map = mmap(self._file.fileno(), self.size, access=ACCESS_READ)

    @property
    def size(self) -> int:
        """Bytes of the file."""
        return self._stamp[0]

    def view(self) -> mmap:
        """The map of the file, after a look whether the file is still the one that was mapped."""
        if self._map is None:
            raise GGUFError(f"{self._name} is closed")
        # Reading a map past the end of a file that has shrunk kills the process, hence a look before every use.
        if self._identity() != self._stamp:
            raise GGUFError(f"{self._name} was changed after it was opened")
        return self._map

    def release(self, offset: int, size: int) -> None:
        """Lets pages of the map go that have been read; who looks at them again reads them again."""
        first = -(-offset // PAGESIZE) * PAGESIZE
        length = (offset + size) // PAGESIZE * PAGESIZE - first
        if self._map is not None and length > 0 and sys.platform == "linux":
            self._map.madvise(MADV_DONTNEED, first, length)

    def close(self) -> None:
        """Lets go of the file."""
        if self._map is not None:
            with suppress(BufferError):  # an array from `raw` still looks at the map, which ends with it
                self._map.close()
            self._map = None
            self._file.close()

    def _identity(self) -> tuple[int, int]:
        status = os.fstat(self._file.fileno())
        return status.st_size, status.st_mtime_ns
