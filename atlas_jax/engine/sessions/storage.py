"""The kinds of storage there are: a folder, and object stores by the scheme of their locations."""

from __future__ import annotations

import os
from pathlib import Path

from atlas_jax.config import ConfigError
from atlas_jax.engine.sessions.copies import Copies
from atlas_jax.engine.sessions.folder_store import MemoryFolder
from atlas_jax.engine.sessions.object_store import ObjectStorage
from atlas_jax.engine.sessions.store import Storage

SCHEMES = ("s3", "gs", "az")
"""Of the object stores: S3 and what is compatible with it, GCS, Azure."""


def open_storage(
    folder: str | os.PathLike[str] | None, location: str | None = None, *, endpoint: str | None = None, copies: int = 0
) -> Storage:
    """Takes the storage that sessions are kept in.

    Args:
      folder: for sessions, or for copies of snapshots where there is a `location`; None for no copies.
      location: `s3://bucket/prefix`, `gs://…` or `az://…`, which other servers use too.
      endpoint: URL of a server that is compatible with S3 or Azure; None asks the environment.
      copies: bytes that local copies may take.

    Raises:
      ConfigError: it cannot be used or honours no conditions, another server is using it, or there is no such kind; the
        message says which.
    """
    if not location:
        assert folder is not None
        return MemoryFolder(Path(folder))
    scheme, separator, bucket = location.partition("://")
    if not separator or scheme not in SCHEMES or not bucket.strip("/"):
        raise ConfigError(
            f"atlas.session_store: '{location}' is no object store: give "
            f"{', '.join(f'{name}://bucket/prefix' for name in SCHEMES)}"
        )
    try:
        from atlas_jax.engine.sessions._obstore import Bucket
    except ImportError as error:
        raise ConfigError(
            f"atlas.session_store needs the extra: pip install 'atlas-jax[object-store]' ({error.name} is missing)"
        ) from None
    objects = Bucket.open(location, endpoint or None)
    objects.check()
    return ObjectStorage(objects, None if folder is None or not copies else Copies(Path(folder), copies))
