"""Finds the tool calls in an answer as it grows.

Whatever the pieces in which the text arrives, the same comes out: every decision is taken at the first character that
decides it. Text that begins as a call does and is none comes out as content. Only white space beside a call is dropped, for
templates write their own there.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Collection, Iterable

from server.tool_calls.json_text import JsonText, elements, members
from server.tool_calls.pieces import CallArguments, CallBegun, Content, Piece
from server.tool_calls.style import Style

_FENCE = "```"
_FENCE_LINE = re.compile(r"```[a-z_]{0,16}\s*")
_FENCE_PART = re.compile(r"`{0,2}|```[a-z_]{0,16}\s*")
_NAME = re.compile(r"[A-Za-z0-9_.-]*")
_NAME_ENDS = "[ARGS]"
_ANOTHER = re.compile(r"[;,]?\s*")


class CallReader:
    """The calls of one answer.

    Args:
      names: the tools there are; what names another is no call.
      exact: a grammar holds the answer to the canonical form, so a call's arguments may be passed on as they come. Else a
        call is passed on once it is whole, for only then it is known to be one.
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
        self._ends = style.ends  # what may follow the present call and belongs to it
        self._held = ""
        self._state: Callable[[], bool] = self._start if style.bare else self._text
        self._out: list[Piece] = []
        # Of what may be a call, or is one under way:
        self._lead = 0  # characters of the held text before it
        self._bare = False
        self._name = ""  # given before its arguments, not with them
        self._value = 0  # where in the held text its JSON text begins
        self._json: JsonText | None = None
        self._read = 0  # how much of the held text `_json` has seen
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
        while self._state == self._candidate:
            self._refuse()
            while self._held and self._state():
                pass
        rest, self._held = self._held, ""
        if self._state == self._after:  # an end that was cut short is none of the content
            rest = "" if _begins(self._ends, rest) else rest
        if self._state in (self._start, self._text, self._after):
            self._give(rest)
        return self._drain()

    def _drain(self) -> list[Piece]:
        out, self._out = self._out, []
        return out

    def _give(self, text: str) -> None:
        if text:
            self._out.append(Content(text))

    # Each state takes what it can from the held text, and says whether another look is worth while; if not, more text is
    # needed.
    def _start(self) -> bool:
        """Where an answer begins that may be a bare JSON text."""
        text = self._held.lstrip()
        if _FENCE_PART.fullmatch(text):
            return False
        fence = _FENCE_LINE.match(text)
        lead = len(fence[0]) if fence else 0
        self._ends = (*self._style.ends, *((_FENCE,) if fence else ()))
        if text[lead] in "{[":
            self._begin(len(self._held) - len(text) + lead, bare=True)
        else:
            self._state = self._text
        return True

    def _text(self) -> bool:
        """In content, where calls may begin."""
        text, lead = self._held, self._style.lead
        at = text.find(lead)
        if at >= 0:
            blank = len(text[:at].rstrip())
            self._give(text[:blank])
            self._held, self._ends = text[blank:], self._style.ends
            self._begin(at - blank + len(lead), bare=False)
            return True
        part = next((size for size in range(min(len(lead) - 1, len(text)), 0, -1) if text.endswith(lead[:size])), 0)
        sure = len(text[: len(text) - part].rstrip())
        self._give(text[:sure])
        self._held = text[sure:]
        return False

    def _begin(self, lead: int, *, bare: bool) -> None:
        self._state, self._lead, self._bare = self._candidate, lead, bare
        self._json, self._name = None, ""

    def _refuse(self) -> None:
        """What began as a call is none: its first characters are content, and a call may begin after them."""
        size = self._lead + self._bare
        self._give(self._held[:size])
        self._held = self._held[size:]
        self._state = self._text

    def _candidate(self) -> bool:
        """After what begins a call."""
        if self._json is None:
            decided = self._commit(self._style.first) if self._exact else False
            if decided is False:
                decided = self._find_value()
                if decided is False:
                    self._refuse()
            return decided is not None
        verdict = self._json.push(self._held, self._read)
        self._read = len(self._held)
        if verdict == "more":
            return False
        end = self._value + self._json.length
        calls = self._calls(self._held[self._value : end]) if verdict == "done" else None
        if calls is None:
            self._refuse()
            return True
        for name, arguments in calls:
            self._call(name)
            self._argue(arguments)
        self._held, self._state = self._held[end:], self._after
        return True

    def _commit(self, before: str) -> bool | None:
        """Whether a call in the canonical form begins, which then is one for sure; None while that is open."""
        rest = self._held[self._lead :]
        for name in self._names:
            head = before + self._style.begin(name)
            if rest.startswith(head):
                self._call(name)
                self._held = rest[len(head) :]
                self._json, self._state = JsonText(), self._arguments
                return True
        return None if any((before + self._style.begin(name)).startswith(rest) for name in self._names) else False

    def _find_value(self) -> bool | None:
        """Whether the JSON text of a call begins, perhaps after a name; None while that is open."""
        at = _blank(self._held, self._lead)
        name = _NAME.match(self._held, at)
        if self._style.named and name and name[0]:
            at = name.end()
            if at == len(self._held) and any(one.startswith(name[0]) for one in self._names):
                return None
            if name[0] not in self._names:
                return False
            self._name = name[0]
            rest = self._held[at:]
            if rest.startswith(_NAME_ENDS):
                at += len(_NAME_ENDS)
            elif _NAME_ENDS.startswith(rest):
                return None
            at = _blank(self._held, at)
        if at == len(self._held):
            return None
        if self._held[at] not in ("{" if self._name else "{["):
            return False
        self._json, self._value, self._read = JsonText(), at, at
        return True

    def _calls(self, text: str) -> list[tuple[str, str]] | None:
        """The calls that a JSON text holds; None if it is something else."""
        if self._name:
            return [(self._name, text)]
        found = [self._member(one) for one in (elements(text) if text[0] == "[" else [text])]
        calls = [one for one in found if one is not None]
        return calls if calls and len(calls) == len(found) else None

    def _member(self, text: str) -> tuple[str, str] | None:
        if text[0] != "{":
            return None
        fields = members(text)
        if fields.get("function", "")[:1] == "{":
            fields = members(fields["function"])
        name = json.loads(fields.get("name", "null"))
        arguments = next((fields[one] for one in ("arguments", "parameters") if one in fields), "{}")
        if arguments[0] == '"':  # as OpenAI's API writes them
            arguments = json.loads(arguments).strip()
            if JsonText().push(arguments) != "done":
                return None
        elif arguments == "null":
            arguments = "{}"
        if not isinstance(name, str) or name not in self._names or arguments[0] != "{":
            return None
        return name, arguments

    def _call(self, name: str) -> None:
        self._dropped = self._most is not None and self.calls >= self._most
        if not self._dropped:
            self._out.append(CallBegun(self.calls, self._new_id(), name))
            self.calls += 1

    def _argue(self, text: str) -> None:
        if text and not self._dropped:
            self._out.append(CallArguments(self.calls - 1, text))

    def _arguments(self) -> bool:
        """In the arguments of a call in the canonical form."""
        assert self._json is not None
        before = self._json.length
        verdict = self._json.push(self._held)
        taken = self._json.length - before
        self._argue(self._held[:taken])
        self._held = self._held[taken:]
        if verdict != "more":
            self._state = self._closing
        return bool(self._held)

    def _closing(self) -> bool:
        """After the arguments of a call in the canonical form."""
        style, self._lead = self._style, 0
        end = style.close + style.after
        if self._held.startswith(end):
            self._held = self._held[len(end) :]
        elif end.startswith(self._held):
            return False
        elif style.first and (more := self._commit(style.close + style.between)) is not False:
            return more is True
        self._state = self._after
        return True

    def _after(self) -> bool:
        """After a call."""
        text = self._held = self._held.lstrip()
        for end in self._ends:
            if text.startswith(end):
                self._held = text[len(end) :]
                return True
        if _begins(self._ends, text):
            return False
        if self._bare and (more := _ANOTHER.match(text)):
            if more.end() == len(text):
                return False
            if text[more.end()] == "{":
                self._begin(more.end(), bare=True)
                return True
        self._state = self._text
        return True


def _begins(ends: Iterable[str], text: str) -> bool:
    return any(end.startswith(text) for end in ends)


def _blank(text: str, at: int) -> int:
    while at < len(text) and text[at].isspace():
        at += 1
    return at
