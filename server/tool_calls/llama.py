"""Calls as Llama 3.1 to 3.3 write them: one JSON object with `parameters`, alone or after a control token."""

from __future__ import annotations

from server.tool_calls.style import Style

LLAMA = Style(
    lead="<|python_tag|>",
    open='{"name": "',
    middle='", "parameters": ',
    close="}",
    between="; ",
    bare=True,
    alone=True,
    parallel=False,
)


def writes(call: str) -> bool:
    """Whether a template that writes a call so is of this family."""
    return '"parameters": {' in call
