"""How the APIs write a stream: server-sent events of OpenAI's kind, events that have names, and lines of JSON."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import msgspec

from server.errors import Problem, openai_error

_encode = msgspec.json.Encoder().encode
# Ends of lines to clients that split streams by Unicode's rules (Python's `str.splitlines`); in JSON they stand in strings
# alone, where they may be escaped. Those in ASCII are always.
_LINE_ENDS = "\x85\u2028\u2029"
PING = b": ping\n\n"


def json_line(chunk: msgspec.Struct) -> bytes:
    """A struct as JSON on one line, whatever a client takes for the end of one."""
    encoded = _encode(chunk)
    if not encoded.isascii():
        for char in _LINE_ENDS:
            encoded = encoded.replace(char.encode(), f"\\u{ord(char):04x}".encode())
    return encoded


def event(chunk: msgspec.Struct) -> bytes:
    """A server-sent event."""
    return b"data: " + json_line(chunk) + b"\n\n"


def named_event(chunk: msgspec.Struct) -> bytes:
    """A server-sent event whose name is the struct's `type`."""
    name: str = chunk.type  # type: ignore[attr-defined]
    return b"event: " + name.encode() + b"\n" + event(chunk)


def line(chunk: msgspec.Struct) -> bytes:
    """A line of JSON."""
    return json_line(chunk) + b"\n"


def _nothing() -> Sequence[msgspec.Struct]:
    return ()


@dataclass(frozen=True, kw_only=True, slots=True)
class Wire:
    """One API's stream.

    Attributes:
      frame: a chunk as it is sent.
      error: what a stream ends with that has failed.
      opening: chunks before the first text.
      ping: what is sent after a long silence; nothing where the format has no comments.
      done: what a stream ends with that went well.
    """

    frame: Callable[[msgspec.Struct], bytes] = event
    error: Callable[[Problem], msgspec.Struct] = openai_error
    opening: Callable[[], Sequence[msgspec.Struct]] = _nothing
    ping: bytes = PING
    done: bytes = b""
    media_type: str = "text/event-stream"


OPENAI = Wire(done=b"data: [DONE]\n\n")
