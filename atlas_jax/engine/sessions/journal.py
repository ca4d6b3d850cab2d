"""What a session has read since its last snapshot: an append-only file of turns, a few bytes a token.

Layout: 8 bytes magic, u32 version, then records: u32 length, u32 CRC-32 of the payload, payload (MessagePack). The first
record says whose journal it is; every other one is a turn. A record that was cut off ends the journal: it belongs to a
turn that was never acknowledged. Damage before the end is an error, for what follows cannot be trusted.
"""

from __future__ import annotations

import itertools
import struct
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import msgspec

from atlas_jax.engine.api import SnapshotInvalid
from atlas_jax.engine.sessions.lora import LoraScales

MAGIC = b"ATLASJRN"
VERSION = 2
_START = struct.Struct("<8sI")
_RECORD = struct.Struct("<II")
_LONGEST = 64 << 20
"""Bytes of the longest record that is believed: a turn of some ten million tokens."""
_UNWRITTEN = bytes(8)


class Origin(msgspec.Struct, frozen=True, array_like=True):
    """Whose journal it is.

    Attributes:
      model: fingerprint of the model whose tokens these are.
      created: Unix seconds of the session's first turn.
    """

    model: str
    owner: str
    session_id: str
    created: float


class Reading(msgspec.Struct, frozen=True, array_like=True):
    """How a turn's tokens were read: the session's shape and how its memory was written.

    Attributes:
      window, update: pages of the exact window (None where the memory is the model's own) and of one write.
      kept: the most pairs kept per KV head, on average per layer.
      budget: bytes that the session's parts had to fit into.
      optimizer, omega_window, step: of the memory's writes.
      decay: of the scores by which pairs are kept.
      lora: the LoRA adapters it was read with.
    """

    window: int | None
    update: int
    layers: int
    degree: int
    kept: int
    budget: int
    optimizer: Literal["exact", "gradient", "muon"]
    omega_window: int
    step: float
    decay: float
    lora: LoraScales = ()


class Turn(msgspec.Struct, frozen=True, array_like=True):
    """One answered request.

    Attributes:
      generation: of the session after it.
      after: generation of the session before it.
      keep: how many tokens of the text before it stay; less than all for an edited or regenerated turn.
      tokens: what follows them.
      replies: where in the whole text the answers that begin after `keep` lie, as (begin, end) pairs.
      preamble: see `History.preamble`.
      pending: the last token drawn, which has not been read.
    """

    generation: int
    after: int
    keep: int
    tokens: Sequence[int]
    replies: Sequence[tuple[int, int]]
    preamble: tuple[int, bytes] | None
    pending: int | None
    reading: Reading
    time: float


@dataclass(frozen=True)
class Journal:
    """A journal that was read."""

    origin: Origin
    turns: list[Turn]


_encoder = msgspec.msgpack.Encoder()
_origins = msgspec.msgpack.Decoder(Origin)
_turns = msgspec.msgpack.Decoder(Turn)


def begin(origin: Origin) -> bytes:
    """The bytes a new journal begins with."""
    return _START.pack(MAGIC, VERSION) + _record(_encoder.encode(origin))


def encode(turn: Turn) -> bytes:
    """The record of a turn."""
    return _record(_encoder.encode(turn))


def _record(payload: bytes) -> bytes:
    return _RECORD.pack(len(payload), zlib.crc32(payload)) + payload


def decode(data: bytes) -> tuple[Journal | None, int]:
    """Reads a journal.

    Returns:
      The journal, None where not even its first record was finished; and how many bytes of it are whole: a record that was
      cut off may follow.

    Raises:
      SnapshotInvalid: it is something else, or damaged before its end.
    """
    if len(data) < _START.size:
        return None, 0
    magic, version = _START.unpack_from(data)
    if magic != MAGIC:
        raise SnapshotInvalid("not a journal of a session")
    if version != VERSION:
        raise SnapshotInvalid(f"journal version {version} is not supported (this server reads version {VERSION})")
    payloads, end = _payloads(data)
    if not payloads:
        return None, 0
    try:
        origin = _origins.decode(payloads[0])
        turns = [_turns.decode(payload) for payload in payloads[1:]]
    except (msgspec.MsgspecError, RecursionError) as error:
        raise SnapshotInvalid("journal is damaged: a record does not describe a turn") from error
    for before, turn in itertools.pairwise(turns):
        if turn.after != before.generation:
            raise SnapshotInvalid("journal is damaged: a turn is missing")
    return Journal(origin, turns), end


def _payloads(data: bytes) -> tuple[list[bytes], int]:
    payloads: list[bytes] = []
    end = _START.size
    while end + _RECORD.size <= len(data):
        length, checksum = _RECORD.unpack_from(data, end)
        start = end + _RECORD.size
        if start + length > len(data):
            if length > _LONGEST:  # no crash makes such a length, for a record is written from its beginning
                raise SnapshotInvalid("journal is damaged: a record's length is wrong")
            break
        payload = data[start : start + length]
        if not length or zlib.crc32(payload) != checksum:
            # After a power failure a file may have grown while its last blocks are still zeros.
            if not any(data[start:]) or (start + length == len(data) and payload.endswith(_UNWRITTEN)):
                break
            raise SnapshotInvalid("journal is damaged: its checksum does not match")
        payloads.append(payload)
        end = start + length
    return payloads, end
