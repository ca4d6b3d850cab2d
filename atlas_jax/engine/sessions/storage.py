"""The kinds of storage there are, by the scheme of the location that names one."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from atlas_jax.config import ConfigError
from atlas_jax.engine.sessions.folder_store import MemoryFolder
from atlas_jax.engine.sessions.store import Storage

_FOLDER = ""
_KINDS: dict[str, Callable[[str], Storage]] = {
    _FOLDER: lambda location: MemoryFolder(Path(location)),
}
"""What opens a location, by its scheme: another kind of storage is a file with its `Storage`, and a line here."""


def open_storage(location: str | os.PathLike[str]) -> Storage:
    """Takes the storage that a location names: a folder, where it has no scheme.

    Raises:
      ConfigError: it cannot be used, another server is using it, or there is no such kind; the message says which.
    """
    text = os.fspath(location)
    scheme, separator, _ = text.partition("://")
    kind = _KINDS.get(scheme if separator else _FOLDER)
    if kind is None:
        raise ConfigError(f"atlas.memory_path: sessions cannot be stored in '{text}': no storage of kind '{scheme}'")
    return kind(text)
