"""One answer as clients see it: reasoning, content and calls, in the order the model wrote them."""

from __future__ import annotations

from collections.abc import Iterable

from server.tool_calls.pieces import Content, Piece
from server.tool_calls.reader import CallReader
from server.tool_calls.reasoning import ReasoningReader


class AnswerReader:
    """Reads an answer as it grows; without readers all of it is content."""

    def __init__(self, reasoning: ReasoningReader | None = None, calls: CallReader | None = None) -> None:
        self._reasoning, self._calls = reasoning, calls

    @property
    def plain(self) -> bool:
        """Whether all of the answer is content."""
        return self._reasoning is None and self._calls is None

    @property
    def called(self) -> bool:
        """Whether tools have been called, and the last call was not cut short."""
        return self._calls is not None and self._calls.whole

    def push(self, text: str) -> list[Piece]:
        """Takes more of the answer."""
        return self._read([Content(text)] if self._reasoning is None else self._reasoning.push(text))

    def finish(self) -> list[Piece]:
        """The rest, when the answer has ended."""
        out = [] if self._reasoning is None else self._read(self._reasoning.finish())
        return out if self._calls is None else out + self._calls.finish()

    def _read(self, pieces: Iterable[Piece]) -> list[Piece]:
        out: list[Piece] = []
        for piece in pieces:
            if isinstance(piece, Content):
                out += self._calls.push(piece.text) if self._calls is not None else [piece] if piece.text else []
            else:
                out.append(piece)
        return out
