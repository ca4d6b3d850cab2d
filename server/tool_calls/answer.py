"""One answer as clients see it: reasoning, content and calls, in the order the model wrote them."""

from __future__ import annotations

from collections.abc import Iterable

from server.tool_calls.channels import ChannelReader
from server.tool_calls.pieces import Content, Piece
from server.tool_calls.reader import CallReader
from server.tool_calls.reasoning import ReasoningReader


class AnswerReader:
    """Reads an answer as it grows; without readers all of it is content.

    Args:
      reasoning: tells reasoning from the rest; or of an answer in channels, everything.
      calls: tells calls from the content that is left.
    """

    def __init__(
        self, reasoning: ReasoningReader | ChannelReader | None = None, calls: CallReader | None = None
    ) -> None:
        self._reasoning, self._calls = reasoning, calls

    @property
    def plain(self) -> bool:
        """Whether all of the answer is content."""
        return self._reasoning is None and self._calls is None

    @property
    def called(self) -> bool:
        """Whether tools have been called, and the last call was not cut short."""
        return any(one is not None and one.whole for one in (self._reasoning, self._calls))

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
