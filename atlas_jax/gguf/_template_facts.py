"""What a chat template can do beside writing messages, found out by having it render small conversations."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from atlas_jax.gguf._budget import TemplateError

# What is looked for in a rendering to see whether a template has read it.
NEEDLE = "needle7c1f"
_ARGUMENT = "key7c1f"
_ID = "abc123XYZ"  # Mistral's templates refuse ids of another length
_USER = {"role": "user", "content": "x"}
_TOOL = {
    "type": "function",
    "function": {
        "name": NEEDLE,
        "description": "x",
        "parameters": {
            "type": "object",
            "properties": {_ARGUMENT: {"type": "integer", "description": "x"}},
            "required": [_ARGUMENT],
        },
    },
}
_RESULT = {"role": "tool", "tool_call_id": _ID, "name": NEEDLE, "content": "result7c1f"}
_THINKING = (("<think>", "</think>"), ("[THINK]", "[/THINK]"))

Messages = Sequence[Mapping[str, Any]]
Render = Callable[[Messages, Sequence[Mapping[str, Any]] | None], str]
"""A conversation as text, with tools or without, as the template is given it; raises TemplateError."""


class TemplateFacts:
    """Of one template.

    Attributes:
      call: how it writes an assistant's call of a tool; empty unless it also tells of tools and gives their results.
      text_arguments: whether it wants a call's arguments as JSON in a string instead of an object.
      takes_system: whether it takes a system message.
      thinking: the marks around what the model thinks, or None.
      channels: whether answers are messages in channels (OpenAI's Harmony).
    """

    def __init__(self, render: Render, source: str) -> None:
        """Asks a template.

        Args:
          source: of the template.
        """
        self.thinking = next((marks for marks in _THINKING if marks[1] in source), None)
        self.channels = "<|channel|>final<|message|>" in source
        self.takes_system = NEEDLE in _tried(render, [{"role": "system", "content": NEEDLE}, _USER])
        self.text_arguments = False
        self.call = ""
        if "tool" not in source or NEEDLE not in _tried(render, [_USER], [_TOOL]):
            return
        for as_text in (False, True):
            arguments: Any = f'{{"{_ARGUMENT}": 1}}' if as_text else {_ARGUMENT: 1}
            function = {"name": NEEDLE, "arguments": arguments}
            calling = {
                "role": "assistant",
                "content": "",
                "tool_calls": [{"id": _ID, "type": "function", "function": function}],
            }
            call = _tried(render, [_USER, calling])[len(_tried(render, [_USER])) :]
            # A template that prints an object without `tojson` writes Python's quotes.
            if NEEDLE in call and _ARGUMENT in call and f"'{_ARGUMENT}'" not in call and f'\\"{_ARGUMENT}' not in call:
                self.text_arguments = as_text
                if _RESULT["content"] in _tried(render, [_USER, calling, _RESULT]):
                    self.call = call
                return


def _tried(render: Render, messages: Messages, tools: Sequence[Mapping[str, Any]] | None = None) -> str:
    try:
        return render(messages, tools)
    except TemplateError:
        return ""
