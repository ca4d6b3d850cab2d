"""Conversations a gate is fitted to: what is asked was said, answers are where they are said to be, templates may fail."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from atlas_jax.gguf import FALLBACK_TEMPLATE, ChatTemplate, GGUFFile, Tokenizer
from atlas_jax.recall import adapter_store, conversation
from atlas_jax.recall.conversation import PARTS, Conversation
from atlas_jax.recall.fit import _conversations

CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TEMPLATES = {
    "chatml": ChatTemplate(CHATML),
    "fallback": ChatTemplate(FALLBACK_TEMPLATE),
    "none": None,
    "refuses": ChatTemplate("{{ raise_exception('no') }}"),
    "answers otherwise": ChatTemplate("{{ messages | length }}{{ messages[-1]['content'] }}"),
}


def made(models: dict[str, tuple[Path, Path]], template: str) -> tuple[Tokenizer, list[Conversation]]:
    with GGUFFile.open(models["llama"][0]) as file:
        tokenizer = Tokenizer.from_metadata(file.metadata)

    def encode(text: str) -> list[int]:
        return tokenizer.encode(text, add_special=False, parse_special=False)

    return tokenizer, _conversations(tokenizer, TEMPLATES[template], encode)


@pytest.mark.parametrize("template", TEMPLATES)
def test_what_is_marked_is_the_answers_and_what_they_say_was_said_before(
    models: dict[str, tuple[Path, Path]], template: str
) -> None:
    tokenizer, conversations = made(models, template)
    assert len(conversations) == PARTS
    for part, found in enumerate(conversations):
        text = tokenizer.decode(found.tokens)
        runs = np.split(found.answered, np.flatnonzero(np.diff(found.answered) > 1) + 1)
        answers = [tokenizer.decode([found.tokens[place + 1] for place in run]) for run in runs]
        facts, others = conversation._FACTS[part::PARTS], conversation._OTHERS[part::PARTS]
        wanted = [answer for *_, answer in (*facts, *others)]
        assert len(answers) == len(wanted)
        for answer in wanted:
            assert any(answer in one and len(one) < len(answer) + 15 for one in answers), answer
        for said, asked, _ in facts:
            assert 0 <= text.index(said) < text.index(asked)


def test_facts_have_left_the_window_when_they_are_asked_for(models: dict[str, tuple[Path, Path]]) -> None:
    tokenizer, conversations = made(models, "chatml")
    for part, found in enumerate(conversations):
        first = found.answered[0]
        for said, *_ in conversation._FACTS[part::PARTS]:
            assert said in tokenizer.decode(found.tokens[: first - 4 * 128])


def test_no_question_of_a_benchmark_is_fitted_to() -> None:
    from atlas_jax.experiments import fact_recall
    from benchmarks import chat_recall

    held_out = " ".join([Path(chat_recall.__file__).read_text("utf-8"), Path(fact_recall.__file__).read_text("utf-8")])
    for said, asked, answer in conversation._FACTS:
        for text in (said, asked, answer):
            assert text not in held_out
    assert adapter_store.probe_filler()
