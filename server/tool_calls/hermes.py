"""Calls as Hermes and Qwen write them, and many models after them: JSON objects in tags."""

from __future__ import annotations

from server.tool_calls.style import Style

HERMES = Style(
    lead="<tool_call>",
    open='\n{"name": "',
    middle='", "arguments": ',
    close="}\n</tool_call>",
    between="\n<tool_call>",
    ends=("</tool_call>",),
)


def writes(call: str) -> bool:
    """Whether a template that writes a call so is of this family."""
    return "<tool_call>" in call and '"arguments": {' in call
