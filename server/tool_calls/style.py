"""How a family of models writes tool calls: as data, for the parser, for grammars and for messages."""

from __future__ import annotations

import hashlib
import uuid
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class Channels:
    """How answers are written that are messages in channels (`tool_calls.channels`).

    Attributes:
      thinking: what begins a message of reasoning, and what ends it and begins the next message.
      final: what begins a message for the reader.
    """

    thinking: tuple[str, str]
    final: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Style:
    """How calls are written.

    The canonical form, which grammars demand and which is read as it comes, is
    `lead first open NAME middle ARGUMENTS close (between open NAME middle ARGUMENTS close)* after`. What models write by
    themselves is read more loosely.

    Attributes:
      lead: what begins calls anywhere in an answer.
      ends: texts after a call that belong to it, in any answer.
      bare: whether a JSON text at the answer's beginning, fenced or not, may be a call too.
      alone: whether calls are written without their lead as a rule.
      named: whether a call may be a name followed by its arguments instead of an object that holds both.
      parallel: whether an answer may have several calls.
      channels: how the rest of an answer is written, where it is messages in channels.
      id_length: of calls' ids in letters and digits, where templates demand one; 0 for OpenAI's kind.
    """

    lead: str
    first: str = ""
    open: str
    middle: str
    close: str
    between: str
    after: str = ""
    ends: tuple[str, ...] = ()
    bare: bool = False
    alone: bool = False
    named: bool = False
    parallel: bool = True
    channels: Channels | None = None
    id_length: int = 0

    def begin(self, name: str) -> str:
        """What stands between a call's lead and its arguments, but for `first`."""
        return f"{self.open}{name}{self.middle}"

    def write(self, name: str, arguments: str) -> str:
        """A call in its canonical form."""
        lead = "" if self.alone else self.lead
        return f"{lead}{self.first}{self.begin(name)}{arguments}{self.close}{self.after}"

    def new_id(self) -> str:
        """An id for a call."""
        return uuid.uuid4().hex[: self.id_length] if self.id_length else f"call_{uuid.uuid4().hex[:24]}"

    def id_of(self, given: str) -> str:
        """The id that stands for a client's in what the template is given."""
        if not self.id_length or (len(given) == self.id_length and given.isascii() and given.isalnum()):
            return given
        return hashlib.sha256(given.encode("utf-8", "replace")).hexdigest()[: self.id_length]

    @property
    def markers(self) -> tuple[str, ...]:
        """Texts that may be control tokens of the model, and are part of a call all the same."""
        return tuple(text for text in (self.lead, self.middle, *self.ends) if text)
