"""Calls as Mistral's models write them: a list of JSON objects after a control token, in newer ones names and arguments."""

from __future__ import annotations

from dataclasses import replace

from server.tool_calls.style import Style

MISTRAL = Style(
    lead="[TOOL_CALLS]",
    first="[",
    open='{"name": "',
    middle='", "arguments": ',
    close="}",
    between=", ",
    after="]",
    named=True,
    id_length=9,
)
MISTRAL_NAMED = replace(MISTRAL, first="", open="", middle="[ARGS]", close="", between="[TOOL_CALLS]", after="")


def writes(call: str) -> bool:
    """Whether a template that writes a call so is of this family."""
    return "[TOOL_CALLS]" in call and "[ARGS]" not in call


def writes_named(call: str) -> bool:
    """The same for the newer form."""
    return "[TOOL_CALLS]" in call and "[ARGS]" in call
