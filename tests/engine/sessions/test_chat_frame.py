"""A template's frame is found for every way templates write system messages, and left out where it cannot be."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest

from atlas_jax.engine.sessions.chat_frame import ChatFrames
from atlas_jax.gguf import ChatTemplate, TemplateError

CHATML = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}</>\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
DEFAULT = "{% if messages[0].role != 'system' %}<system>{{ kind | default('Be nice.') }}</>\n{% endif %}" + CHATML
STRICT = (
    "{% if messages[0].role == 'system' %}{{ raise_exception('no system messages') }}{% endif %}"
    "{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('turns') }}{% endif %}"
    "[{{ m.role[0] }}]{{ m.content | trim }}\n{% endfor %}{% if add_generation_prompt %}[a]{% endif %}"
)
MERGED = (  # the system message goes into the first turn
    "^{% if messages[0].role == 'system' %}{% set head = messages[0].content + '\n\n' %}{% set rest = messages[1:] %}"
    "{% else %}{% set head = '' %}{% set rest = messages %}{% endif %}{% for m in rest %}<{{ m.role }}>"
    "{{ head if loop.first else '' }}{{ m.content }}</>{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)
SYSTEM = {"role": "system", "content": "Be brief."}
USER = {"role": "user", "content": "Hello"}
ANSWER = {"role": "assistant", "content": "Hi"}


class Frames(ChatFrames):
    """Of a template whose tokens are characters."""

    def __init__(self, template: str) -> None:
        self.calls, self.template = 0, ChatTemplate(template)
        super().__init__(self.render)

    def render(self, messages: Sequence[Any], begin_answer: bool, variables: Any, tools: Any = None) -> list[int]:
        self.calls += 1
        text = self.template.render(messages, tools=tools, add_generation_prompt=begin_answer, variables=variables)
        return [ord(char) for char in text]

    def texts(self, *messages: Any, variables: Any = None) -> tuple[str | None, bool, str, str]:
        found = self.frame(messages, variables)
        assert found.answers == (ANSWER in messages)
        preamble = None if found.preamble is None else "".join(map(chr, found.preamble))
        opening, closing = ("".join(map(chr, part)) for part in (found.opening, found.closing))
        return preamble, found.own, opening, closing


@pytest.mark.parametrize(
    ("template", "system", "preamble", "own", "closing"),
    [
        (CHATML, False, "", True, "</>\n"),
        (CHATML, True, "<system>Be brief.</>\n", False, "</>\n"),
        (DEFAULT, False, "<system>Be nice.</>\n", True, "</>\n"),
        (DEFAULT, True, "<system>Be brief.</>\n", False, "</>\n"),
        (MERGED, False, "^", True, "</>"),
    ],
)
def test_a_frame_is_what_the_template_writes(
    template: str, system: bool, preamble: str, own: bool, closing: str
) -> None:
    head = [SYSTEM] if system else []
    frames = Frames(template)
    for messages in ([*head, USER], [*head, USER, ANSWER, USER]):
        assert frames.texts(*messages) == (preamble, own, "<assistant>", closing)
        rendered = frames.template.render(messages, add_generation_prompt=True)
        assert rendered.startswith(preamble)
    calls = frames.calls
    frames.frame([*head, USER], None)
    assert frames.calls == calls + 1, "what surrounds a turn is asked once"


def test_what_a_client_put_there_is_not_the_templates_own() -> None:
    frames = Frames(DEFAULT)
    frames.frame([USER], None)
    assert frames.texts(USER, variables={"kind": "Be rude."})[:2] == ("<system>Be rude.</>\n", False)
    assert frames.texts(USER)[:2] == ("<system>Be nice.</>\n", True)


def test_descriptions_of_tools_are_the_clients_words() -> None:
    frames = Frames("{% if tools %}<system>{{ tools | tojson }}</>\n{% endif %}" + CHATML)
    plain, told = frames.frame([USER], None), frames.frame([USER], None, [{"name": "f"}])
    assert (plain.preamble, plain.own) == ((), True)
    assert "".join(map(chr, told.preamble or ())) == '<system>[{"name": "f"}]</>\n'
    assert not told.own


def test_what_cannot_be_asked_is_left_out() -> None:
    assert Frames(STRICT).texts(USER) == ("", True, "[a]", "\n")
    assert Frames(STRICT).frame([SYSTEM, USER], None).preamble is None
    assert Frames(MERGED).frame([SYSTEM, USER, ANSWER, USER], None).preamble is None
    never = Frames("{{ raise_exception('never') }}").frame([USER, ANSWER, USER], None)
    assert (never.preamble, never.answers) == (None, True)
    with pytest.raises(TemplateError):
        Frames("{{ raise_exception('never') }}").template.render([USER])
    forgetful = Frames("{{ messages[-1].content }}")  # no conversation at all
    assert forgetful.frame([USER], None).preamble is None
