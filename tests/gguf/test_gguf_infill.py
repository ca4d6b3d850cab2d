"""Tokens that mark a gap: named by metadata, or found by what vocabularies call them."""

from __future__ import annotations

from typing import Any

import pytest

from atlas_jax.gguf import infill_tokens

NAMED = {"fim_pre": 7, "fim_suf": 8, "fim_mid": 9}


def keys(**ids: Any) -> dict[str, Any]:
    return {f"tokenizer.ggml.{name}_token_id": value for name, value in ids.items()}


@pytest.mark.parametrize(
    ("metadata", "control", "wanted"),
    [
        (keys(**NAMED), {}, (7, 8, 9)),
        (keys(prefix=1, suffix=2, middle=3), {}, (1, 2, 3)),
        (keys(**NAMED), {"<fim_prefix>": 1, "<fim_suffix>": 2, "<fim_middle>": 3}, (7, 8, 9)),
        ({}, {"<|fim_prefix|>": 4, "<|fim_suffix|>": 6, "<|fim_middle|>": 5}, (4, 6, 5)),
        (keys(fim_pre=7), {"<SUF>": 2, "<MID>": 3}, (7, 2, 3)),
        ({}, {"<fim_prefix>": 1, "<fim_suffix>": 2}, None),
        (keys(**{**NAMED, "fim_mid": 10}), {}, None),
        (keys(**{**NAMED, "fim_mid": -1}), {}, None),
        ({}, {}, None),
    ],
)
def test_all_three_are_there_or_none(
    metadata: dict[str, Any], control: dict[str, int], wanted: tuple[int, int, int] | None
) -> None:
    assert infill_tokens(metadata, control, 10) == wanted
