"""Answers as gpt-oss writes them (OpenAI's Harmony): messages in channels, calls among them, one and no more."""

from __future__ import annotations

from server.tool_calls.style import Channels, Style

HARMONY = Style(
    lead="<|channel|>commentary to=functions.",
    open="",
    middle=" <|constrain|>json<|message|>",
    close="",
    between="",
    ends=("<|call|>",),
    parallel=False,
    channels=Channels(
        thinking=("<|channel|>analysis<|message|>", "<|end|><|start|>assistant"), final="<|channel|>final<|message|>"
    ),
)


def writes(call: str) -> bool:
    """Whether a template that writes a call so is of this family."""
    return "to=functions." in call and "<|channel|>" in call
