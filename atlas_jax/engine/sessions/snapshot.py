"""Snapshots of sessions: versioned, checksummed, bound to one model, and never trusted until checked.

Format: 8 bytes magic, u32 version, u32 length of the head, SHA-256 of the head; the head, JSON that says whose session this
is and what the payload's SHA-256 is; the payload, safetensors whose metadata carries a JSON header. The head alone is
enough to list a session. Nothing in it is code. Shapes and types are compared with what the engine expects before an array
is touched, and numbers must be finite and of plausible size.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Mapping
from typing import Any

import msgspec
import numpy as np

from atlas_jax import _tensors
from atlas_jax.engine.api import SnapshotInvalid

MAGIC = b"ATLASNAP"
VERSION = 5
_PREFIX = struct.Struct("<8sII32s")
_MAX_HEAD = 64 << 10
_MAX_NORM = 1e8


class Listing(msgspec.Struct, frozen=True):
    """What can be said of a stored session without reading its state.

    Attributes:
      generation: orders everything that was ever done to a session: later changes have greater numbers, on every machine
        whose clock is about right.
      tokens: length of its text.
      floor: the earliest position to which the state can be rolled back; a journal after it must not go back further.
      bytes: of its state in host memory.
      has_state: a caller stored JSON with it.
      window, window_fill, absorbed, updates, last_update: what its memory held, for totals over many sessions.
      ring: tokens its window has room for: with several pages a write, more than the window's.
      kept, kept_capacity: pairs kept per KV head and on average per layer, and how many may be.
      budget: bytes that its parts had to fit into.
      lora: digests of the LoRA adapters that its text was read with.
    """

    owner: str
    session_id: str
    generation: int
    tokens: int
    floor: int
    bytes: int
    created: float
    last_used: float
    has_state: bool
    window: int = 0
    window_fill: int = 0
    ring: int = 0
    kept: int = 0
    kept_capacity: int = 0
    budget: int = 0
    lora: tuple[str, ...] = ()
    absorbed: int = 0
    updates: int = 0
    last_update: float | None = None


class Head(msgspec.Struct, frozen=True):
    """The beginning of a snapshot.

    Attributes:
      bound: what the engine that made it and one that reads it must have in common.
    """

    listing: Listing
    bound: dict[str, Any]
    payload_bytes: int
    payload_sha256: str


def encode(
    listing: Listing, bound: Mapping[str, Any], header: Mapping[str, Any], arrays: Mapping[str, np.ndarray]
) -> bytes:
    """Serialises one session."""
    payload = _tensors.encode(header, arrays)
    return _joined(Head(listing, dict(bound), len(payload), hashlib.sha256(payload).hexdigest()), payload)


def with_listing(data: bytes, listing: Listing) -> bytes:
    """The same snapshot under another listing; raises SnapshotInvalid as `read_head`."""
    head, start = read_head(data)
    return _joined(msgspec.structs.replace(head, listing=listing), data[start:])


def _joined(head: Head, payload: bytes) -> bytes:
    encoded = msgspec.json.encode(head)
    prefix = _PREFIX.pack(MAGIC, VERSION, len(encoded), hashlib.sha256(encoded).digest())
    return b"".join((prefix, encoded, payload))


def read_head(data: bytes) -> tuple[Head, int]:
    """The head of a snapshot from its first bytes, and where the payload begins.

    Raises:
      SnapshotInvalid: they are damaged, of another version, or not of a snapshot.
    """
    if len(data) < _PREFIX.size:
        raise SnapshotInvalid("snapshot is truncated")
    magic, version, length, digest = _PREFIX.unpack_from(data)
    if magic != MAGIC:
        raise SnapshotInvalid("not a session snapshot")
    if version != VERSION:
        raise SnapshotInvalid(f"snapshot version {version} is not supported (this server reads version {VERSION})")
    head = data[_PREFIX.size : _PREFIX.size + length]
    if length > _MAX_HEAD or len(head) != length or hashlib.sha256(head).digest() != digest:
        raise SnapshotInvalid("snapshot is damaged: its head cannot be read")
    try:
        return msgspec.json.decode(head, type=Head), _PREFIX.size + length
    except (msgspec.MsgspecError, RecursionError) as error:
        raise SnapshotInvalid("snapshot is damaged: its head cannot be read") from error


def with_generation(head: Head, generation: int) -> Head:
    """The same head for another generation: a save point that was made the present state keeps its bytes."""
    return msgspec.structs.replace(head, listing=msgspec.structs.replace(head.listing, generation=generation))


HEAD_BYTES = _PREFIX.size + _MAX_HEAD
"""As many of a snapshot's first bytes hold its head."""


def decode(data: bytes) -> tuple[Head, dict[str, Any], dict[str, np.ndarray]]:
    """Reads what `encode` wrote.

    Raises:
      SnapshotInvalid: it is damaged, of another version, or not a snapshot; nothing was kept.
    """
    head, start = read_head(data)
    payload = memoryview(data)[start:]
    if len(payload) != head.payload_bytes or hashlib.sha256(payload).hexdigest() != head.payload_sha256:
        raise SnapshotInvalid("snapshot is damaged: its checksum does not match")
    try:
        header, arrays = _tensors.decode(bytes(payload), dict[str, Any])
    except _tensors.DamagedFile as error:
        raise SnapshotInvalid("snapshot is damaged: its contents cannot be read") from error
    return head, header, arrays


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
    # upper halves of float32, as `kernels.packed_pages` keeps scales and scores
    numbers = (array.astype(np.uint32) << 16).view(np.float32) if array.dtype == np.uint16 else array
    if numbers.dtype.kind == "f" and numbers.size:
        peak = float(np.abs(numbers).max())  # NaN and inf both fail the comparison, which numpy would make in 16 bits
        if not peak <= _MAX_NORM:
            raise SnapshotInvalid(f"snapshot's '{name}' holds numbers that are not finite or far too large")
    return array
