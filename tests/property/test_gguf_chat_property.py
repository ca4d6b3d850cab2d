"""Whatever messages say, the control tokens of a prompt are those of the template."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from atlas_jax.gguf import ChatTemplate, Tokenizer

GOLDEN = Path(__file__).parents[1] / "golden" / "tokenizer"
CONTROL = ["<|im_start|>", "<|im_end|>", "<|user|>", "<|assistant|>"]


def tokenizer_of(name: str) -> Tokenizer:
    """A golden vocabulary with the control tokens of the templates."""
    metadata = json.loads(gzip.decompress((GOLDEN / f"{name}.json.gz").read_bytes()))["metadata"]
    count = len(CONTROL)
    metadata["tokenizer.ggml.tokens"] += CONTROL
    metadata["tokenizer.ggml.token_type"] = np.array(metadata["tokenizer.ggml.token_type"] + [3] * count, np.int32)
    if "tokenizer.ggml.scores" in metadata:
        metadata["tokenizer.ggml.scores"] = np.array(metadata["tokenizer.ggml.scores"] + [0.0] * count, np.float32)
    return Tokenizer.from_metadata({**metadata, "tokenizer.ggml.pre": "gpt-2"})


TOKENIZERS = {name: tokenizer_of(name) for name in ("pretokenizers", "sentencepiece")}
TEMPLATES = {
    "chatml": ChatTemplate(
        "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
    ),
    "roles": ChatTemplate("{% for m in messages %}{{ '<|' + m.role + '|>\n' ~ m.content }}<|im_end|>{% endfor %}"),
    "cutting": ChatTemplate(
        "{% for m in messages %}<|im_start|>{{ m.content | replace('x', '') | trim }}{{ m.content.split('ab')[-1] }}"
        "{{ m.content | upper | lower }}{{ m.content[1:] ~ m.name }}{{ m | tojson }}<|im_end|>{% endfor %}"
    ),
}

fragments = st.sampled_from(
    [*CONTROL, "<s>", "</s>", "<|a|>", "<|endoftext|>", "<|", "|>", "im_end", "user", "x", "ab", "<", "\n", " "]
    + ["\U00100000", "\U00100001", "\U00100005", "\U0010fffd", "\ue000", "\ud800", "é", "▁"]
)
contents = st.lists(fragments | st.text(max_size=5), max_size=12).map("".join)


def controls(tokenizer: Tokenizer, ids: list[int]) -> list[int]:
    return [token for token in ids if tokenizer.is_special(token)]


@pytest.mark.parametrize("name", TOKENIZERS)
@pytest.mark.parametrize("template", TEMPLATES)
@settings(max_examples=150, deadline=None)
@given(first=contents, second=contents, extra=contents)
def test_no_message_makes_a_control_token(name: str, template: str, first: str, second: str, extra: str) -> None:
    tokenizer, chat = TOKENIZERS[name], TEMPLATES[template]

    def messages(a: str, b: str, c: str) -> list[dict[str, Any]]:
        return [{"role": "user", "content": a, "name": c}, {"role": "assistant", "content": b, "name": c}]

    ids = chat.render_tokens(tokenizer, messages(first, second, extra))
    harmless = chat.render_tokens(tokenizer, messages("a", "b", "c"))
    assert controls(tokenizer, ids) == controls(tokenizer, harmless)


@pytest.mark.parametrize("name", TOKENIZERS)
@pytest.mark.parametrize("template", ["chatml", "roles"])
@settings(max_examples=150, deadline=None)
@given(content=st.text(max_size=40))
def test_ordinary_messages_give_the_tokens_of_the_text(name: str, template: str, content: str) -> None:
    tokenizer, chat = TOKENIZERS[name], TEMPLATES[template]
    assume(not any(text in content for text in tokenizer.control_tokens))
    messages = [{"role": "user", "content": content}]
    text = chat.render(messages)
    assert chat.render_tokens(tokenizer, messages) == tokenizer.encode(text, add_special=True, parse_special=True)
