"""What one object says of a session in an object store: which snapshot is its state, and what its journal adds.

Layout: 8 bytes magic, u32 version, SHA-256 of the rest, the rest as MessagePack.
"""

from __future__ import annotations

import hashlib
import struct

import msgspec

from atlas_jax.engine.api import SessionKey, SnapshotInvalid
from atlas_jax.engine.sessions import journal, snapshot
from atlas_jax.engine.sessions.journal import Journal
from atlas_jax.engine.sessions.snapshot import Head

MAGIC = b"ATLASMAN"
VERSION = 1
_PREFIX = struct.Struct("<8sI32s")
REMEMBERED = 8
"""Writers before a manifest's own that it names."""


class StateObject(msgspec.Struct, frozen=True, array_like=True):
    """A snapshot that a manifest names.

    Attributes:
      name: of its object.
      generation: of the session that it is the state of; a save point that was made the present state is of two.
      sha256: of the object.
      head: its first bytes, up to its payload.
    """

    name: str
    generation: int
    size: int
    sha256: bytes
    head: bytes

    def read_head(self) -> Head:
        """Its head, for the generation it stands for; raises SnapshotInvalid."""
        return snapshot.with_generation(snapshot.read_head(self.head)[0], self.generation)


class Manifest(msgspec.Struct, frozen=True, array_like=True, kw_only=True):
    """A session at one moment; the default is one that nobody has written to.

    Attributes:
      writer: number of this write, which no other has.
      earlier: those of the manifests before, the latest first.
      generation: of the newest thing that was done to the session.
      state: its snapshot.
      saved: its save point.
      journal: the turns since the snapshot, as in a folder's file.
      deleted: generation of the deletion after which there is nothing, or 0.
      moved: of the last rename away: its generation and the digest of the new name.
      arriving: while it is given this name: the same of where it comes from. It is nothing until that has said `moved`.
    """

    writer: str = ""
    earlier: tuple[str, ...] = ()
    generation: int = 0
    state: StateObject | None = None
    saved: StateObject | None = None
    journal: bytes = b""
    deleted: int = 0
    moved: tuple[int, str] | None = None
    arriving: tuple[int, str] | None = None

    @property
    def exists(self) -> bool:
        """Whether it is a session at all."""
        return self.state is not None or bool(self.journal)

    def after(self, before: Manifest, writer: str) -> Manifest:
        """This one as the next of a chain."""
        earlier = (before.writer, *before.earlier)[:REMEMBERED] if before.writer else ()
        return msgspec.structs.replace(self, writer=writer, earlier=earlier)

    @property
    def objects(self) -> set[str]:
        """The snapshots it names."""
        return {one.name for one in (self.state, self.saved) if one is not None}

    def read_journal(self) -> Journal | None:
        """The turns since its snapshot, or None; raises SnapshotInvalid."""
        if not self.journal:
            return None
        found, end = journal.decode(self.journal)
        if found is None or end < len(self.journal):
            raise SnapshotInvalid("journal is damaged: it was cut off")
        return found

    def key(self) -> SessionKey | None:
        """Whose it is; raises SnapshotInvalid."""
        if self.state is not None:
            listing = self.state.read_head().listing
            return SessionKey(listing.owner, listing.session_id)
        found = self.read_journal()
        return None if found is None else SessionKey(found.origin.owner, found.origin.session_id)


_encoder = msgspec.msgpack.Encoder()
_decoder = msgspec.msgpack.Decoder(Manifest)


def encode(manifest: Manifest) -> bytes:
    """The object of a manifest."""
    payload = _encoder.encode(manifest)
    return _PREFIX.pack(MAGIC, VERSION, hashlib.sha256(payload).digest()) + payload


def decode(data: bytes) -> Manifest:
    """Reads a manifest; raises SnapshotInvalid where it is damaged, of another version, or something else."""
    if len(data) < _PREFIX.size:
        raise SnapshotInvalid("session's manifest is truncated")
    magic, version, digest = _PREFIX.unpack_from(data)
    payload = data[_PREFIX.size :]
    if magic != MAGIC:
        raise SnapshotInvalid("not a session's manifest")
    if version != VERSION:
        raise SnapshotInvalid(f"manifest version {version} is not supported (this server reads version {VERSION})")
    if hashlib.sha256(payload).digest() != digest:
        raise SnapshotInvalid("session's manifest is damaged: its checksum does not match")
    try:
        return _decoder.decode(payload)
    except (msgspec.MsgspecError, RecursionError) as error:
        raise SnapshotInvalid("session's manifest is damaged: it does not describe a session") from error
