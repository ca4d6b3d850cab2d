"""Fill-in-the-middle: the tokens by which a model that was taught to fills a gap in a text."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

# Role to the metadata keys that name its token, and the texts it has in vocabularies; both as llama.cpp knows them.
_ROLES = {
    "prefix": (
        ("fim_pre_token_id", "prefix_token_id"),
        ("<|fim_prefix|>", "<fim-prefix>", "<fim_prefix>", "<｜fim▁begin｜>", "<PRE>", "▁<PRE>", "<|code_prefix|>"),
    ),
    "suffix": (
        ("fim_suf_token_id", "suffix_token_id"),
        ("<|fim_suffix|>", "<fim-suffix>", "<fim_suffix>", "<｜fim▁hole｜>", "<SUF>", "▁<SUF>", "<|code_suffix|>"),
    ),
    "middle": (
        ("fim_mid_token_id", "middle_token_id"),
        ("<|fim_middle|>", "<fim-middle>", "<fim_middle>", "<｜fim▁end｜>", "<MID>", "▁<MID>", "<|code_middle|>"),
    ),
}


def infill_tokens(
    metadata: Mapping[str, Any], control: Mapping[str, int], vocab_size: int
) -> tuple[int, int, int] | None:
    """What goes before a text, before what follows its gap, and before what fills it; None unless all three are there.

    Args:
      control: text → id of the control tokens; the same text as ordinary text means nothing.
    """
    found = []
    for keys, texts in _ROLES.values():
        named = (metadata.get(f"tokenizer.ggml.{key}") for key in keys)
        token = next((one for one in named if one is not None), None)
        if token is None:
            token = next((control[text] for text in texts if text in control), None)
        if not isinstance(token, int) or not 0 <= token < vocab_size:
            return None
        found.append(token)
    prefix, suffix, middle = found
    return prefix, suffix, middle
