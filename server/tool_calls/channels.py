"""Tells the messages of an answer apart that is written in channels: reasoning, calls, and what is for the reader.

Such an answer (OpenAI's Harmony) goes on after `<|start|>assistant`. A message is a header, which names its channel and
perhaps whom it is for, then `<|message|>`, its text, and `<|end|>`, `<|call|>` or `<|return|>`; `<|start|>` begins the next
one. Whatever the pieces in which the text arrives, the same comes out.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection

from server.tool_calls.json_text import JsonText
from server.tool_calls.pieces import CallArguments, CallBegun, Content, Piece, Reasoning
from server.tool_calls.style import Style

_START, _MESSAGE = "<|start|>", "<|message|>"
_ENDS = ("<|end|>", "<|call|>", "<|return|>", _START)
_BEGINS = ("<|channel|>", "<|constrain|>", _MESSAGE, "to=")
"""What an answer's first header begins with; another text is for the reader as it is."""
_CHANNEL = re.compile(r"<\|channel\|>\s*([A-Za-z_]*)")
_RECIPIENT = re.compile(r"(?:^|[\s>])to=([^\s<]+)")
_FUNCTIONS = "functions."
_LONGEST_HEADER = 512
_BETWEEN = "\n\n"
"""Between two messages that follow each other as one text."""


class ChannelReader:
    """The messages of one answer.

    Args:
      names: the tools there are; a message for anybody else is for the reader.
      exact: a grammar holds calls in the canonical form to their schema, so their arguments may be passed on as they come.
        Others are passed on once they are whole.
      most: calls an answer may have, further ones are dropped; None is no bound.
      new_id: makes the id of a call.

    Attributes:
      calls: how many there have been.
    """

    def __init__(
        self, style: Style, names: Collection[str], *, exact: bool, most: int | None, new_id: Callable[[], str]
    ) -> None:
        self._style, self._names, self._new_id = style, frozenset(names), new_id
        self._exact, self._most = exact, most
        self._held = ""
        self._state: Callable[[], bool] = self._between
        self._out: list[Piece] = []
        self._kind: type[Content] | type[Reasoning] = Content
        self._said: set[type[Piece]] = set()  # kinds of text that there have been in earlier messages
        self._fresh = False  # whether nothing of this message has been given out
        self._name = ""
        self._json = JsonText()
        self._body = ""  # of a call that is not known to be one
        self._dropped = False
        self.calls = 0

    @property
    def whole(self) -> bool:
        """Whether there have been calls, and the last one has all of its arguments."""
        return self.calls > 0 and self._state != self._arguments

    def push(self, text: str) -> list[Piece]:
        """Takes more of the answer."""
        self._held += text
        while self._held and self._state():
            pass
        return self._drain()

    def finish(self) -> list[Piece]:
        """The rest. What began as a call and was cut short before it was known to be one comes out as content."""
        rest, self._held = self._held, ""
        if self._state == self._candidate:
            self._body += rest
            self._decide()
        elif self._state == self._text:
            self._give(rest)
        elif not rest.lstrip().startswith("<|"):  # a text that began as a header does
            self._begin_text(Content)
            self._give(rest if rest.strip() else "")
        return self._drain()

    def _drain(self) -> list[Piece]:
        out, self._out = self._out, []
        return out

    # Each state takes what it can from the held text, and says whether another look is worth while; if not, more text is
    # needed.
    def _between(self) -> bool:
        """Where a message begins."""
        text = self._held.lstrip()
        if not text:
            return False
        if text.startswith(_START):
            self._held, self._state = text[len(_START) :], self._header
            return True
        if any(text.startswith(one) for one in _BEGINS):
            self._held, self._state = text, self._header
            return True
        if any(one.startswith(text) for one in (*_BEGINS, _START)):
            return False
        for end in _ENDS[:-1]:  # two of them in a row
            if text.startswith(end):
                self._held = text[len(end) :]
                return True
        if any(end.startswith(text) for end in _ENDS):
            return False
        self._begin_text(Content)
        return True

    def _header(self) -> bool:
        marks = [at for mark in (_MESSAGE, *_ENDS) if (at := self._held.find(mark, 0, _LONGEST_HEADER)) >= 0]
        if not marks:
            if len(self._held) < _LONGEST_HEADER:
                return False
            self._begin_text(Content)
            return True
        at = min(marks)
        if not self._held.startswith(_MESSAGE, at):  # a message without a text
            self._held, self._state = self._held[at:], self._between
            return True
        header, self._held = self._held[:at], self._held[at + len(_MESSAGE) :]
        channel, recipient = _CHANNEL.search(header), _RECIPIENT.search(header)
        name = recipient[1].removeprefix(_FUNCTIONS) if recipient else ""
        if recipient and recipient[1].startswith(_FUNCTIONS) and name in self._names:
            self._name, self._json, self._body = name, JsonText(), ""
            canonical = f"{self._style.lead}{self._style.begin(name)}" == f"{header}{_MESSAGE}".removeprefix(
                "assistant"
            )
            if self._exact and canonical:
                self._call(name)
                self._state = self._arguments
            else:
                self._state = self._candidate
        else:
            self._begin_text(Reasoning if channel and channel[1] == "analysis" else Content)
        return True

    def _begin_text(self, kind: type[Content] | type[Reasoning]) -> None:
        self._state, self._kind, self._fresh = self._text, kind, True

    def _text(self) -> bool:
        text, sure, end = self._ending()
        self._give(text)
        self._held = sure
        if end:
            if not self._fresh:
                self._said.add(self._kind)
            self._state = self._between
        return bool(end)

    def _ending(self) -> tuple[str, str, bool]:
        """What of the held text is surely the message's, what is left of it, and whether the message has ended."""
        text = self._held
        found = [(at, end) for end in _ENDS if (at := text.find(end)) >= 0]
        if found:
            at, end = min(found)
            return text[:at], text[at:] if end == _START else text[at + len(end) :], True
        longest = max(map(len, _ENDS)) - 1
        part = next(
            (
                size
                for size in range(min(longest, len(text)), 0, -1)
                if any(end.startswith(text[-size:]) for end in _ENDS)
            ),
            0,
        )
        return text[: len(text) - part], text[len(text) - part :], False

    def _give(self, text: str) -> None:
        if not text:
            return
        if self._fresh and self._kind in self._said:
            text = _BETWEEN + text
        self._fresh = False
        self._out.append(self._kind(text))

    def _call(self, name: str) -> None:
        self._dropped = self._most is not None and self.calls >= self._most
        if not self._dropped:
            self._out.append(CallBegun(self.calls, self._new_id(), name))
            self.calls += 1

    def _argue(self, text: str) -> None:
        if text and not self._dropped:
            self._out.append(CallArguments(self.calls - 1, text))

    def _arguments(self) -> bool:
        """In the arguments of a call that a grammar holds to its schema."""
        before = self._json.length
        verdict = self._json.push(self._held)
        taken = self._json.length - before
        self._argue(self._held[:taken])
        self._held = self._held[taken:]
        if verdict != "more":
            self._state = self._rest
        return bool(self._held)

    def _rest(self) -> bool:
        """After a call's arguments, up to the message's end."""
        _, self._held, end = self._ending()
        if end:
            self._state = self._between
        return end

    def _candidate(self) -> bool:
        """In a message that is for a tool."""
        text, self._held, end = self._ending()
        self._body += text
        if end:
            self._decide()
        return end

    def _decide(self) -> None:
        """A message for a tool is a call if its text is a JSON object, or none where there are no arguments."""
        body = self._body.strip()
        json, self._state = JsonText(), self._between
        if not body or (body[0] == "{" and json.push(body) == "done" and json.length == len(body)):
            self._call(self._name)
            self._argue(body or "{}")
        else:
            self._begin_text(Content)
            self._give(self._body)
            self._said.add(Content)
            self._state = self._between
