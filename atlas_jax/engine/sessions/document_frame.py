"""A document as a store keeps it: under a checksum over whose it is, so that no document stands for another."""

from __future__ import annotations

import hashlib

from atlas_jax.engine.api import SnapshotInvalid

_MAGIC = b"ATLASDOC1\n"
FRAME_BYTES = len(_MAGIC) + hashlib.sha256().digest_size
"""What a document takes beside its text."""


def framed(owner: str, name: str, content: bytes) -> bytes:
    """What is kept of a document; `owner` is the digest of whose it is."""
    whose = f"{owner}/{name}\n".encode()
    return _MAGIC + hashlib.sha256(whose + content).digest() + content


def unframed(owner: str, name: str, data: bytes) -> bytes:
    """The document in what is kept of it; raises SnapshotInvalid where that is not as it was written."""
    content = data[FRAME_BYTES:]
    if data != framed(owner, name, content):
        raise SnapshotInvalid("document is damaged, or belongs elsewhere")
    return content
