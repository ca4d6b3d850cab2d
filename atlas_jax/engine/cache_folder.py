"""Files that an engine can do without: shipped with the library, or kept in the cache folder from an earlier start."""

from __future__ import annotations

import contextlib
import errno
import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from atlas_jax.engine.sessions.files import atomic_file

log = logging.getLogger("atlas.engine")
T = TypeVar("T")


def load(
    what: str, shipped: Path | None, kept: Path | None, decode: Callable[[bytes], T]
) -> tuple[T, bytes, Path] | None:
    """The first of two files that can be used: what `decode` makes of it, its bytes, and which it is.

    One that cannot is named in the log; in the cache folder it is set aside, so that it is made anew and not met again.

    Args:
      what: the kind of file, for the log.
      decode: raises ValueError for bytes that are not such a file.
    """
    for file in (shipped, kept):
        if file is None:
            continue
        try:
            data = file.read_bytes()
            return decode(data), data, file
        except FileNotFoundError:
            continue
        except (OSError, ValueError) as error:
            log.warning("The %s in %s cannot be used: %s", what, file, error)
            if file == kept:
                with contextlib.suppress(OSError):  # a folder that cannot be written
                    file.replace(file.with_suffix(".unusable"))
    return None


def keep(what: str, file: Path | None, data: bytes) -> None:
    """Writes a file into the cache folder, if there is one; a folder without room or permission is no reason to stop."""
    if file is None:
        return
    try:
        with atomic_file(file) as target:
            target.write(data)
    except Exception as error:
        log.warning("The %s could not be kept in %s, the next start makes it again: %s", what, file.parent, error)


def usable(folder: Path) -> Path | None:
    """The cache folder, made if it is not there; None, with a warning, if nothing can be read from it or kept in it."""
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        why = None if os.access(folder, os.R_OK | os.X_OK) else os.strerror(errno.EACCES)
    except OSError as error:
        why = error.strerror
    if why is not None:
        log.warning("Nothing is kept between starts: the cache folder %s cannot be used: %s", folder, why)
        return None
    if not os.access(folder, os.W_OK):
        log.warning("Nothing more is kept between starts: the cache folder %s cannot be written", folder)
    return folder
