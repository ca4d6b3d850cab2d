"""Answers in channels (OpenAI's Harmony): reasoning, calls and text told apart, however the answer is cut."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from atlas_jax.engine.api import TemplateFacts
from atlas_jax.gguf import ChatTemplate
from server.schemas.chat import FunctionDefinition
from server.tool_calls.choice import Function
from server.tool_calls.conversation import ChatForm
from server.tool_calls.harmony import HARMONY
from server.tool_calls.styles import style_of
from tests.server.tool_calls.reading import NAMES, Read, read

TEMPLATE = (Path(__file__).parent / "harmony.jinja").read_text()
WEATHER = ("get_weather", '{"city": "Paris"}')
EMPTY = ("get", "{}")
THINKS = "<|channel|>analysis<|message|>Hm, Paris.<|end|><|start|>assistant"
CALLS = "<|channel|>commentary to=functions.get_weather <|constrain|>json<|message|>"
FINAL = "<|channel|>final<|message|>"

# answer, reasoning, content, calls
CASES: list[tuple[str, str, str, list[tuple[str, str]]]] = [
    (f"{THINKS}{FINAL}It is warm.", "Hm, Paris.", "It is warm.", []),
    (f"{FINAL}It is warm.<|return|>", "", "It is warm.", []),
    (f"{THINKS}{CALLS}{WEATHER[1]}<|call|>", "Hm, Paris.", "", [WEATHER]),
    (f"{THINKS}{CALLS}{WEATHER[1]}", "Hm, Paris.", "", [WEATHER]),
    (f" to=functions.get_weather<|channel|>commentary json<|message|>{WEATHER[1]}<|call|>", "", "", [WEATHER]),
    (f"{THINKS} to=functions.get<|channel|>commentary<|message|><|call|>", "Hm, Paris.", "", [EMPTY]),
    ("<|channel|>commentary to=functions.send.mail <|constrain|>json<|message|>{}", "", "", [("send.mail", "{}")]),
    # what leads to a call is for the reader
    (f"<|channel|>commentary<|message|>I look.<|end|><|start|>assistant{CALLS}{WEATHER[1]}", "", "I look.", [WEATHER]),
    # several messages of one kind are paragraphs
    (f"{THINKS}{THINKS}{FINAL}A<|end|><|start|>assistant{FINAL}B", "Hm, Paris.\n\nHm, Paris.", "A\n\nB", []),
    # marks that are missing or too many
    (f"<|channel|>analysis<|message|>x<|start|>assistant{FINAL}y<|end|><|return|>", "x", "y", []),
    ("<|channel|>analysis<|message|>x<|end|><|channel|>final<|message|>y", "x", "y", []),
    ("<|start|>assistant<|end|><|start|>assistant<|message|>y", "", "y", []),
    # no calls: of nobody that there is, or without a JSON object
    ("<|channel|>commentary to=functions.other <|constrain|>json<|message|>{}", "", "{}", []),
    ("<|channel|>analysis to=python code<|message|>1 + 1", "1 + 1", "", []),
    (f"{CALLS}[1]<|call|>", "", "[1]", []),
    (f'{CALLS}{{"city": "Par', "", '{"city": "Par', []),
    # cut short
    ("<|channel|>analysis<|message|>Hm", "Hm", "", []),
    ("<|channel|>analysis", "", "", []),
    ("<|channel|>analysis<|message|>Hm<|en", "Hm<|en", "", []),
    (f"{THINKS[:-9]}", "Hm, Paris.", "", []),
    # no channels at all
    ("Just text <|end", "", "Just text <|end", []),
    ("to", "", "to", []),
    ("to=me is no header", "", "to=me is no header", []),
    (" a < b", "", " a < b", []),
]


@pytest.mark.parametrize(("answer", "reasoning", "content", "calls"), CASES)
def test_messages_are_told_apart(answer: str, reasoning: str, content: str, calls: list[Any]) -> None:
    for chunks in ([answer], list(answer)):
        found = read(HARMONY, chunks)
        assert (found.reasoning, found.content, found.calls) == (reasoning, content, calls)
    assert [json.loads(arguments) for _, arguments in found.calls] == [json.loads(one) for _, one in calls]


def test_a_call_that_a_grammar_holds_is_passed_on_as_it_comes() -> None:
    arguments = json.dumps({"city": 'Zürich "x" }]<|end|>', "days": [1, {"deep": [None, True]}]}, ensure_ascii=False)
    answer = THINKS + CALLS + arguments + "<|call|>"
    found = read(HARMONY, list(answer), exact=True)
    assert (found.reasoning, found.content, found.calls) == ("Hm, Paris.", "", [("get_weather", arguments)])
    assert len(found.deltas[0]) == len(arguments)
    cut = answer[: answer.index("days")]
    assert read(HARMONY, list(cut), exact=True).calls == [("get_weather", arguments[: arguments.index("days")])]
    again = f"{CALLS}{{}}<|call|><|start|>assistant{CALLS}{{}}<|call|>"
    assert len(read(HARMONY, [again], exact=True, most=1).calls) == 1


_PIECES = st.sampled_from(
    [
        *("<|channel|>", "<|message|>", "<|end|>", "<|start|>", "<|call|>", "<|return|>", "<|constrain|>", "<|", "|>"),
        *("analysis", "commentary", "final", "assistant", " to=functions.get", " to=", "json", "{}", '{"a": 1}', " "),
        *("\n", "é☃", "text", THINKS, CALLS, FINAL, "x" * 600),
    ]
)


@given(
    answer=st.lists(_PIECES, max_size=8).map("".join) | st.sampled_from([answer for answer, *_ in CASES]),
    places=st.lists(st.integers(0, 900), max_size=12),
    exact=st.booleans(),
    most=st.sampled_from([None, 1]),
)
@settings(max_examples=300, deadline=None)
def test_an_answer_cut_anywhere_is_read_the_same(answer: str, places: list[int], exact: bool, most: int | None) -> None:
    whole = read(HARMONY, [answer], exact=exact, most=most)
    ends = sorted({place % (len(answer) + 1) for place in places})
    pieces = [answer[start:end] for start, end in zip([0, *ends], [*ends, len(answer)], strict=True)]
    for chunks in (pieces, list(answer)):
        found = read(HARMONY, chunks, exact=exact, most=most)
        assert found == Read(whole.content, whole.reasoning, whole.calls, whole.ids, found.deltas)
    assert all(name in NAMES for name, _ in whole.calls)


@example("<")
@given(st.text().filter(lambda text: text.strip() and "<|" not in text))
@settings(max_examples=100, deadline=None)
def test_a_text_without_channels_is_content(text: str) -> None:
    found = read(HARMONY, list(text))
    assert (found.content, found.reasoning, found.calls) == (text, "", [])


TOOL = Function(
    "get_weather",
    "tools[0].function",
    "tools[0].function.parameters",
    {},
    FunctionDefinition(
        name="get_weather",
        parameters={"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    ),
)


def called(*ids: str) -> list[dict[str, Any]]:
    return [{"id": one, "type": "function", "function": {"name": WEATHER[0], "arguments": WEATHER[1]}} for one in ids]


def test_the_template_tells_of_tools_and_takes_calls_back() -> None:
    template = ChatTemplate(TEMPLATE)
    facts = TemplateFacts(
        call=template.facts.call, system=template.facts.takes_system, channels=template.facts.channels
    )
    assert template.facts.channels
    assert style_of(facts.call) is HARMONY
    form = ChatForm(facts)
    assert form.style is HARMONY
    conversation = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Warm in Paris?"},
        {"role": "assistant", "content": "", "reasoning_content": "I look.", "tool_calls": called("a", "b")},
        {"role": "tool", "tool_call_id": "a", "content": "24"},
        {"role": "tool", "tool_call_id": "b", "content": "25"},
    ]
    messages, tools = form.write(conversation, [TOOL])
    text = template.render(messages, tools=tools)
    assert "type get_weather = (_: {" in text
    one = f"<|start|>assistant to=functions.get_weather<|channel|>commentary json<|message|>{WEATHER[1]}<|call|>"
    result = '<|start|>functions.get_weather to=assistant<|channel|>commentary<|message|>"{}"<|end|>'
    thought = "<|start|>assistant<|channel|>analysis<|message|>I look.<|end|>"
    assert text.endswith(thought + one + result.format(24) + one + result.format(25) + "<|start|>assistant")


def test_a_template_that_tells_of_no_tools_is_read_in_channels_all_the_same() -> None:
    form = ChatForm(TemplateFacts(channels=True))
    assert form.style is HARMONY
    messages, tools = form.write([{"role": "user", "content": "Hi"}], [TOOL])
    assert tools is None
    assert "<|channel|>commentary to=functions.NAME <|constrain|>json<|message|>{ARGUMENTS}" in messages[0]["content"]
