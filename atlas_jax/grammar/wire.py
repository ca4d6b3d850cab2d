"""What the engine and its grammar processes say to each other over socket pairs.

The engine orders a process (`ORDER` with `SPAWN`, and the process's end of a new socket pair), hands it what
answers must match as a frame, and gets a `Compiled` as a frame. Then it sends one end of another pair for
every answer. On that one it sends the token that was drawn (`TOKEN`, `BEGIN` before the first), and gets a `VERDICT`
with one bit for every token of the tokenizer.
"""

from __future__ import annotations

import struct

import msgspec

ORDER = struct.Struct("<cI")
SPAWN, KILL = b"+", b"-"
BEGUN = b"!"
LENGTH = struct.Struct("<I")
TOKEN = struct.Struct("<i")
BEGIN = -1
VERDICT = struct.Struct("<i")
MAY_GO_ON, COMPLETE, FAILED = range(3)
ANSWER, CALLS = b"a", b"c"
"""What a frame holds after this first byte: a `shape.AnswerShape`, or a `calls.CallGrammar`, as JSON."""
_REASON = 256


class Compiled(msgspec.Struct):
    """What came of a schema.

    Attributes:
      error: why it cannot be had, or empty.
      ignored: what of it is not enforced.
      field: which of a call grammar's schemas cannot be had, if it is one of them.
    """

    error: str = ""
    ignored: tuple[str, ...] = ()
    field: str = ""


def frame(data: bytes) -> bytes:
    """A message that says how long it is."""
    return LENGTH.pack(len(data)) + data


def mask_bytes(vocabulary: int) -> int:
    """Bytes of one bit for every token, in whole words of 32 bits."""
    return -(-vocabulary // 32) * 4


def verdict_bytes(vocabulary: int) -> int:
    """Bytes of a verdict with its mask, or in the mask's place the reason of a failure, which needs some room."""
    return VERDICT.size + max(mask_bytes(vocabulary), _REASON)
