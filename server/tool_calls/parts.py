"""An answer as a row of parts, for APIs that have one: each begins, grows and ends before the next begins."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, Literal

import msgspec

from server.tool_calls.answer import AnswerReader
from server.tool_calls.pieces import CallArguments, CallBegun, Content, Piece, Reasoning


@dataclass(slots=True)
class Part:
    """One part of an answer.

    Attributes:
      index: its place in the answer.
      id, name: of a call.
      whole: whether it has come to its end and was not cut short.
    """

    kind: Literal["reasoning", "text", "call"]
    index: int
    id: str = ""
    name: str = ""
    whole: bool = False
    pieces: list[str] = field(default_factory=list)

    @property
    def text(self) -> str:
        """What it says; of a call, its arguments."""
        return "".join(self.pieces)

    @property
    def arguments(self) -> dict[str, Any]:
        """Those of a call; none where they are cut short."""
        try:
            found = msgspec.json.decode(self.text)
        except (ValueError, RecursionError):  # msgspec takes no numbers beyond a double's
            return {}
        return found if isinstance(found, dict) else {}


@dataclass(frozen=True, slots=True)
class Opened:
    """A part begins."""

    part: Part


@dataclass(frozen=True, slots=True)
class Grown:
    """A part goes on by a text."""

    part: Part
    text: str


@dataclass(frozen=True, slots=True)
class Closed:
    """A part has ended."""

    part: Part


Change = Opened | Grown | Closed


class Parts:
    """The parts of one answer as it grows. It has one at least: an answer of nothing is an empty text.

    Attributes:
      found: the parts so far.
    """

    def __init__(self, reader: AnswerReader) -> None:
        self._reader = reader
        self.found: list[Part] = []
        self._open: Part | None = None

    @property
    def called(self) -> bool:
        """Whether tools have been called, and the last call was not cut short."""
        return self._reader.called

    def push(self, text: str) -> list[Change]:
        """Takes more of the answer."""
        return self._changes(self._reader.push(text))

    def finish(self, *, cut: bool) -> list[Change]:
        """The rest, when the answer has ended; `cut` is whether it would have gone on."""
        out = self._changes(self._reader.finish())
        if not self.found:
            out.append(self._begin("text"))
        assert self._open is not None
        whole = self._reader.called if self._open.kind == "call" else not cut
        return [*out, *self._end(whole=whole)]

    def _changes(self, pieces: Iterable[Piece]) -> list[Change]:
        out: list[Change] = []
        for piece in pieces:
            match piece:
                case Content(text):
                    out += self._grow("text", text)
                case Reasoning(text):
                    out += self._grow("reasoning", text)
                case CallBegun(_, id_, name):
                    out += [*self._end(whole=True), self._begin("call", id_, name)]
                case CallArguments(_, text):
                    out += self._grow("call", text)
        return out

    def _grow(self, kind: Literal["reasoning", "text", "call"], text: str) -> list[Change]:
        out: list[Change] = []
        if self._open is None or self._open.kind != kind:
            out += [*self._end(whole=True), self._begin(kind)]
        assert self._open is not None
        self._open.pieces.append(text)
        return [*out, Grown(self._open, text)]

    def _begin(self, kind: Literal["reasoning", "text", "call"], id_: str = "", name: str = "") -> Opened:
        self._open = Part(kind, len(self.found), id_, name)
        self.found.append(self._open)
        return Opened(self._open)

    def _end(self, *, whole: bool) -> list[Change]:
        part, self._open = self._open, None
        if part is None:
            return []
        part.whole = whole
        return [Closed(part)]
