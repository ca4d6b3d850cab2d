"""What a chat template puts around messages, found out by having it render small conversations."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from atlas_jax.engine.api import ChatFrame
from atlas_jax.gguf import TemplateError

Messages = Sequence[Mapping[str, Any]]
Variables = Mapping[str, Any] | None
Tools = Sequence[Mapping[str, Any]] | None

_ASKED = {"role": "user", "content": "?"}
_ANSWERS = ({"role": "assistant", "content": "!"}, {"role": "assistant", "content": "7"})


class Render(Protocol):
    """Token ids of a conversation, with or without the beginning of an answer."""

    def __call__(
        self, messages: Messages, begin_answer: bool, variables: Variables, tools: Tools = None, /
    ) -> list[int]: ...


@dataclass(frozen=True)
class _Parts:
    """What surrounds every turn.

    Attributes:
      turn: a question that follows an answer, and the beginning of the next answer.
    """

    turn: list[int]
    opening: tuple[int, ...]
    closing: tuple[int, ...]


class ChatFrames:
    """The frames of conversations under one template."""

    def __init__(self, render: Render) -> None:
        self._render = render
        self._plain: _Parts | None = None  # without variables, found out once: five renderings are 0.7 to 2 ms

    def frame(self, messages: Messages, variables: Variables, tools: Tools = None) -> ChatFrame:
        """The frame of a conversation. What the template cannot be asked for is left out of it."""
        answers = any(message.get("role") == "assistant" for message in messages)
        count = next((at for at, one in enumerate(messages) if one.get("role") != "system"), len(messages))
        try:
            parts = self._parts(variables)
            begun = self._render([*messages[:count], _ASKED], True, variables, tools)  # may hold the date, so not kept
        except TemplateError:
            return ChatFrame(answers=answers)
        known = parts is not None and begun[-len(parts.turn) :] == parts.turn
        if parts is None or not known:
            return ChatFrame(answers=answers)
        return ChatFrame(
            preamble=tuple(begun[: -len(parts.turn)]),
            own=count == 0 and not variables and not tools,
            opening=parts.opening,
            closing=parts.closing,
            answers=answers,
        )

    def _parts(self, variables: Variables) -> _Parts | None:
        if self._plain is not None and not variables:
            return self._plain
        asked, begun = (self._render([_ASKED], begin, variables) for begin in (False, True))
        first, other = (self._render([_ASKED, answer], False, variables) for answer in _ANSWERS)
        again = self._render([_ASKED, _ANSWERS[0], _ASKED], True, variables)
        if again[: len(first)] != first or len(again) == len(first) or first == other:
            return None
        closing = 0
        while closing < min(len(first), len(other)) and first[-closing - 1] == other[-closing - 1]:
            closing += 1
        parts = _Parts(
            again[len(first) :],
            tuple(begun[len(asked) :]) if begun[: len(asked)] == asked else (),
            tuple(first[len(first) - closing :]),
        )
        if not variables:
            self._plain = parts
        return parts
