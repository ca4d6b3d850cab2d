"""Tells what a model has thought from its answer, where its template has marks for it."""

from __future__ import annotations

from server.tool_calls.pieces import Content, Piece, Reasoning


class ReasoningReader:
    """An answer that may begin with reasoning between two marks; white space around both parts is dropped.

    Args:
      begun: whether the template has begun the reasoning for the model.

    Attributes:
      whole: whether it has found calls: it finds none.
    """

    whole = False

    def __init__(self, begin: str, end: str, *, begun: bool) -> None:
        self._begin, self._end = begin, end
        self._state = "thinking" if begun else "start"
        self._held = ""
        self._said = False  # whether something but white space of this part has been given out

    def push(self, text: str) -> list[Piece]:
        """Takes more of the answer."""
        if self._state == "answering":
            return [Content(text)] if text else []
        self._held += text
        out: list[Piece] = []
        if self._state == "start":
            self._look_for_begin()
        if self._state == "thinking":
            out += self._think()
        if self._state == "ended" and (rest := self._held.lstrip()):
            self._state, self._held = "answering", rest
        if self._state == "answering" and self._held:
            out.append(Content(self._held))
            self._held = ""
        return out

    def finish(self) -> list[Piece]:
        """The rest, when the answer has ended."""
        text, self._held = self._held, ""
        if self._state == "thinking":
            text = text.rstrip()
            return [Reasoning(text)] if text else []
        return [Content(text)] if text and self._state == "start" else []

    def _look_for_begin(self) -> None:
        text = self._held.lstrip()
        if text.startswith(self._begin):
            self._state, self._held = "thinking", text[len(self._begin) :]
        elif not self._begin.startswith(text):
            self._state = "answering"

    def _think(self) -> list[Piece]:
        text = self._held if self._said else self._held.lstrip()
        at = text.find(self._end)
        if at >= 0:
            sure, self._state, self._held = text[:at].rstrip(), "ended", text[at + len(self._end) :]
        else:
            end = self._end
            part = next((size for size in range(min(len(end) - 1, len(text)), 0, -1) if text.endswith(end[:size])), 0)
            sure = text[: len(text) - part].rstrip()
            self._held = text[len(sure) :]
        self._said = self._said or bool(sure)
        return [Reasoning(sure)] if sure else []
