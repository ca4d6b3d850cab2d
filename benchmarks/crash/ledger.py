"""What the clients know of their sessions, and what a server may say of them after a restart.

Every operation of a session is acknowledged or in doubt: its connection broke before the answer's end. One in doubt may
have happened or not, but wholly. What was acknowledged is applied, in order, to a server that is never stopped (the
oracle); how many tokens a session has there is what it must have after each restart.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

Count = int | None
"""Tokens of a session; None for one that does not exist."""


class Kind(StrEnum):
    """Operations of one session."""

    TURN = "turn"
    AGAIN = "again"  # the last turn regenerated or edited
    STATE = "state"  # save with the caller's JSON
    SAVE = "save"
    RESET = "reset"
    DELETE = "delete"


@dataclass(frozen=True)
class Answer:
    """What a turn brought: the text, and how many tokens of the prompt were not read again."""

    text: str
    cached: int


@dataclass
class Operation:
    """One request about a session.

    Attributes:
      loose: the session's state may have been rebuilt from tokens by then, so its bits may differ from the oracle's.
      answer: of a turn that was acknowledged.
    """

    kind: Kind
    path: str
    body: dict[str, Any]
    headers: dict[str, str] = field(default_factory=dict)
    loose: bool = False
    answer: Answer | None = None


@dataclass
class Session:
    """One name, which may be deleted and used again.

    Attributes:
      whole: its client sends whole histories, else only what is new.
      digits: its answers are held to digits, so that they become the same tokens when they are sent again.
      messages: the conversation as its client has it.
      counts: tokens after each acknowledged operation, as the oracle has them; None where it was deleted.
      todo: acknowledged, not yet applied to the oracle.
      doubt: the request that was cut, and whether by a stop, which may keep a part of a turn.
      turns: acknowledged in all.
      unsaved: it has turns since it was last saved as a whole.
      loose: it was killed with such turns.
      state: the JSON stored with it.
      state_doubt: JSON of a save that was cut.
    """

    name: str
    whole: bool = False
    digits: bool = False
    messages: list[dict[str, str]] = field(default_factory=list)
    exists: bool = False
    counts: list[Count] = field(default_factory=lambda: [None])
    todo: list[Operation] = field(default_factory=list)
    doubt: Operation | None = None
    stopped: bool = False
    turns: int = 0
    unsaved: bool = False
    loose: bool = False
    diverged: bool = False
    state: Any = None
    has_state: bool = False
    state_is_last: bool = False

    def acknowledge(self, operation: Operation) -> None:
        """Notes an operation whose answer came."""
        self.todo.append(operation)
        body = operation.body
        match operation.kind:
            case Kind.TURN | Kind.AGAIN:
                assert operation.answer is not None
                self.turns += 1
                self.exists, self.unsaved, self.state_is_last = True, True, False
                if self.whole:
                    self.messages = [*body["messages"], {"role": "assistant", "content": operation.answer.text}]
            case Kind.STATE:
                self.exists, self.unsaved = True, False
                self.state, self.has_state, self.state_is_last = body["state"], True, True
            case Kind.SAVE:
                self.unsaved = False
            case Kind.RESET:
                self.messages, self.loose, self.unsaved, self.state_is_last = [], False, False, False
            case Kind.DELETE:
                self.gone()

    def gone(self) -> None:
        """Forgets everything but the counts, by which an old life of the name is recognised."""
        self.messages, self.exists, self.loose, self.unsaved, self.diverged = [], False, False, False, False
        self.state, self.has_state, self.state_is_last, self.doubt, self.stopped = None, False, False, None, False

    def restarted(self, *, complete: bool) -> None:
        """The server was stopped; `complete` where it had the time to save every state."""
        if self.unsaved and not complete:
            self.loose = True
        self.unsaved = False

    @property
    def expected(self) -> Count:
        """Tokens it must have."""
        return self.counts[-1]


def judge(found: Count, counts: list[Count]) -> tuple[str, int]:
    """What is wrong with a session that has `found` tokens; `counts` are those it has had, the last what it must have.

    Returns:
      `lost` and how many acknowledged operations, `half`, `resurrected`, or `ok`.
    """
    if found == counts[-1]:
        return "ok", 0
    begun = max((i + 1 for i, count in enumerate(counts[:-1]) if count is None), default=0)
    life = counts[begun:]  # since the name was last free; empty if it is free now
    if counts[-1] is None:
        return "resurrected", 1
    if found is None:
        return "lost", len(life)
    if found in life:
        return "lost", len(life) - 1 - max(i for i, count in enumerate(life) if count == found)
    if found in counts[:begun]:
        return "resurrected", 1
    return "half", 1
