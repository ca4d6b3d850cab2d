"""A conversation with tools as the model's chat template can write it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from atlas_jax.engine.api import TemplateFacts
from server.schemas.chat import ChatMessage
from server.tool_calls.choice import Function
from server.tool_calls.generic import GENERIC
from server.tool_calls.harmony import HARMONY
from server.tool_calls.style import Style
from server.tool_calls.styles import style_of

Messages = list[dict[str, Any]]


class ChatForm:
    """How conversations with tools are written for one template.

    Attributes:
      style: how its model writes calls.
      facts: what is known of the template.
    """

    def __init__(self, facts: TemplateFacts) -> None:
        known = style_of(facts.call)
        self.style: Style = HARMONY if facts.channels else known or GENERIC
        self.facts = facts
        self._native = known is not None

    def write(self, messages: Messages, functions: Sequence[Function]) -> tuple[Messages, list[dict[str, Any]] | None]:
        """Messages and tools for the template.

        Args:
          messages: with calls and results as OpenAI's API has them.
          functions: what the model is told of.
        """
        if self._native:
            told = [one.described() for one in functions]
            messages = [self._with_ids(message) for message in messages]
            return (_in_channels(messages) if self.style.channels else messages), told or None
        out: Messages = []
        for message in messages:
            out = _joined(out, self._as_text(message))
        return (self._told(out, functions) if functions else out), None

    def _with_ids(self, message: dict[str, Any]) -> dict[str, Any]:
        out = dict(message)
        if out.get("tool_call_id") is not None:
            out["tool_call_id"] = self.style.id_of(out["tool_call_id"])
        if out.get("tool_calls"):
            out["tool_calls"] = [{**call, "id": self.style.id_of(call["id"])} for call in out["tool_calls"]]
        return out

    def _as_text(self, message: dict[str, Any]) -> dict[str, Any]:
        """A message as templates without tools know them: calls are what the model wrote, results are the user's."""
        if message["role"] == "tool":
            return {"role": "user", "content": f"<tool_response>\n{message['content']}\n</tool_response>"}
        calls = message.get("tool_calls")
        if not calls:
            return message
        written = [self.style.write(call["function"]["name"], _json(call["function"]["arguments"])) for call in calls]
        content = "\n".join([*filter(None, [message["content"]]), *written])
        return {**{name: value for name, value in message.items() if name != "tool_calls"}, "content": content}

    def _told(self, messages: Messages, functions: Sequence[Function]) -> Messages:
        text = _DESCRIPTION.format(
            tools="\n".join(_json(one.described()["function"]) for one in functions),
            call=self.style.write("NAME", "{ARGUMENTS}"),
        )
        first = messages[0]
        if first["role"] == "system":
            return [{**first, "content": f"{first['content']}\n\n{text}"}, *messages[1:]]
        if self.facts.system:
            return [{"role": "system", "content": text}, *messages]
        if first["role"] == "user":
            return [{**first, "content": f"{text}\n\n{first['content']}"}, *messages[1:]]
        return [{"role": "user", "content": text}, *messages]


def _in_channels(messages: Messages) -> Messages:
    """Messages as Harmony's templates take them: one call a message, followed by its result, and what led to it as
    `thinking`, beside which they take no content."""
    results = {message["tool_call_id"]: message for message in messages if message.get("tool_call_id") is not None}
    out, placed = Messages(), set[str]()
    for message in messages:
        if message.get("tool_call_id") in placed:
            continue
        calls = message.get("tool_calls") or []
        thought = message.get("reasoning_content")
        if thought and "thinking" not in message:
            message = {**message, "thinking": thought, **({"content": ""} if calls else {})}
        if len(calls) < 2:
            out.append(message)
            continue
        for at, call in enumerate(calls):
            first = message if not at else {"role": message["role"], "content": ""}
            out.append({**first, "tool_calls": [call]})
            if (result := results.get(call["id"])) is not None:
                out.append(result)
                placed.add(call["id"])
    return out


# What Hermes models were trained on, and others after them, less what only they would understand.
_DESCRIPTION = """\
You may call one or more functions to help with the user's request. These are the functions, as JSON, one a line:
{tools}

To call a function, write its name and its arguments as JSON, in this form and with nothing after it:
{call}
What the function returns comes in the next message. If no function is needed, answer in plain text."""


def _joined(messages: Messages, message: dict[str, Any]) -> Messages:
    """The messages and one more; two of the user's in a row are one, for templates that want turns."""
    last = messages[-1] if messages else None
    if last is None or not last["role"] == message["role"] == "user" or "<tool_response>" not in last["content"]:
        return [*messages, message]
    return [*messages[:-1], {**last, "content": f"{last['content']}\n{message['content']}"}]


def _json(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def calls_of(message: ChatMessage, index: int) -> list[dict[str, Any]] | None:
    """The calls of an assistant's message as templates take them, each with an id."""
    calls: list[Mapping[str, Any]] = [
        {"id": one.id or f"call_{index}_{at}", "function": one.function}
        for at, one in enumerate(message.tool_calls or ())
    ]
    if message.function_call is not None:
        calls.append({"id": f"call_{index}_0", "function": message.function_call})
    return [
        {
            "id": call["id"],
            "type": "function",
            "function": {"name": call["function"].name, "arguments": call["function"].arguments},
        }
        for call in calls
    ] or None
