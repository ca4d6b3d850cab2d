"""What a chat template puts around messages, found out by having it render small conversations."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from atlas_jax.engine.api import ChatFrame
from atlas_jax.gguf import TemplateError

Messages = Sequence[Mapping[str, Any]]
Render = Callable[[Messages, bool], list[int]]
"""Token ids of a conversation, with or without the beginning of an answer."""

_ASKED = {"role": "user", "content": "?"}
_ANSWERS = ({"role": "assistant", "content": "!"}, {"role": "assistant", "content": "7"})


def chat_frame(render: Render, messages: Messages, *, own: bool) -> ChatFrame:
    """The frame of a conversation.

    Args:
      own: whether nothing but the messages was given to the template, so that without a system message, what it writes
        before the first one holds no words of the client's.
    """
    answers = any(message.get("role") == "assistant" for message in messages)
    count = next((at for at, one in enumerate(messages) if one.get("role") != "system"), len(messages))
    system = list(messages[:count])
    try:
        asked, begun = render([_ASKED], False), render([_ASKED], True)
        first, other = (render([_ASKED, answer], False) for answer in _ANSWERS)
        again = render([_ASKED, _ANSWERS[0], _ASKED], True)
        turn = again[len(first) :]
        if again[: len(first)] != first or begun[-len(turn) :] != turn:
            return ChatFrame(answers=answers)
        closing = 0
        while closing < min(len(first), len(other)) and first[-closing - 1] == other[-closing - 1]:
            closing += 1
        whole = render([*system, _ASKED], True) if system else begun
    except TemplateError:
        return ChatFrame(answers=answers)
    return ChatFrame(
        preamble=tuple(whole[: -len(turn)]) if whole[-len(turn) :] == turn else None,
        own=own and not system,
        opening=tuple(begun[len(asked) :]) if begun[: len(asked)] == asked else (),
        closing=tuple(first[len(first) - closing :] if first != other else ()),
        answers=answers,
    )
