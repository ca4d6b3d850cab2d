"""The families of models, and how a template's is found."""

from __future__ import annotations

from collections.abc import Callable

from server.tool_calls import harmony, hermes, llama, mistral
from server.tool_calls.style import Style

_FAMILIES: tuple[tuple[Callable[[str], bool], Style], ...] = (
    (harmony.writes, harmony.HARMONY),
    (hermes.writes, hermes.HERMES),
    (mistral.writes_named, mistral.MISTRAL_NAMED),
    (mistral.writes, mistral.MISTRAL),
    (llama.writes, llama.LLAMA),
)


def style_of(call: str) -> Style | None:
    """The family of a template.

    Args:
      call: how it writes a call with arguments, empty where it knows no tools.

    Returns:
      None where it is none of those known; such models are told about tools in a message.
    """
    return next((style for writes, style in _FAMILIES if writes(call)), None)
