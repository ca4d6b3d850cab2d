"""Fields other servers know that would change the text and that this one does not implement.

They are refused unless they have the value that changes nothing. Fields that only advise (`user`, `store`, `metadata`)
and fields nobody knows are ignored.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from server.schemas.chat import ChatRequest
from server.validation import unsupported

# Field to the values that change nothing; null and empty are always among them.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "add_generation_prompt": (True,),
    "allowed_token_ids": (),
    "bad_words": (),
    "chat_template": (),
    "continue_final_message": (False,),
    "dry_multiplier": (0,),
    "dynatemp_range": (0,),
    "grammar": (),
    "guided_choice": (),
    "guided_grammar": (),
    "guided_json": (),
    "guided_regex": (),
    "image_data": (),
    "include_stop_str_in_output": (False,),
    "input_extra": (),
    "json_schema": (),
    "length_penalty": (1,),
    "lora": (),
    "min_tokens": (0,),
    "mirostat": (0,),
    "multimodal_data": (),
    "prompt_embeds": (),
    "repetition_penalty": (1,),
    "samplers": (),
    "stop_token_ids": (),
    "structured_outputs": (),
    "suffix": (),
    "tfs_z": (1,),
    "top_n_sigma": (-1, 0),
    "truncate_prompt_tokens": (),
    "use_beam_search": (False,),
    "xtc_probability": (0,),
}
_TEMPLATE_VARIABLES = frozenset({"enable_thinking", "reasoning_effort", "thinking"})


def refuse_unsupported(raw: Mapping[str, Any]) -> None:
    """Raises BadRequest for the first field that asks for something this server cannot do."""
    for name in raw.keys() & _NEUTRAL.keys():
        value = raw[name]
        if value is None or value in ("", [], {}):
            continue
        if not any(value is same or (not isinstance(value, bool) and value == same) for same in _NEUTRAL[name]):
            raise unsupported(name)


def refuse_unsupported_chat(body: ChatRequest) -> None:
    """The same for the fields whose meaning depends on each other: tools, modalities."""
    if body.tools and body.tool_choice != "none":
        raise unsupported("tools")
    if body.functions and body.function_call != "none":
        raise unsupported("functions")
    if body.tool_choice not in (None, "none", "auto"):
        raise unsupported("tool_choice")
    if body.audio:
        raise unsupported("audio")
    if body.modalities and set(body.modalities) != {"text"}:
        raise unsupported("modalities")


def template_variables(given: Mapping[str, Any] | None) -> dict[str, Any]:
    """The chat template variables a client may set; anything else could take over the template's own."""
    for name, value in (given or {}).items():
        if name not in _TEMPLATE_VARIABLES or not isinstance(value, bool | str | int | None):
            raise unsupported(f"chat_template_kwargs.{name[:64]}")
    return dict(given or {})
