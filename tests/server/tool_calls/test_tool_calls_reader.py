"""Calls and reasoning told from content, in every format, however the answer is cut."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from server.tool_calls.generic import GENERIC
from server.tool_calls.hermes import HERMES
from server.tool_calls.json_text import JsonText, elements, members
from server.tool_calls.llama import LLAMA
from server.tool_calls.mistral import MISTRAL, MISTRAL_NAMED
from server.tool_calls.style import Style
from server.tool_calls.styles import style_of
from tests.server.tool_calls.reading import NAMES, Read, read

STYLES = {
    "hermes": HERMES,
    "llama": LLAMA,
    "mistral": MISTRAL,
    "mistral named": MISTRAL_NAMED,
    "generic": GENERIC,
}
WEATHER = ("get_weather", '{"city": "Paris"}')
EMPTY = ("get", "{}")

# style, answer, content, calls
CASES: list[tuple[str, str, str, list[tuple[str, str]]]] = [
    # Hermes and Qwen
    ("hermes", "Just text.", "Just text.", []),
    ("hermes", '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Paris"}}\n</tool_call>', "", [WEATHER]),
    (
        "hermes",
        'I look.\n\n<tool_call>\n{"name": "get_weather", "arguments": {"city": "Paris"}}\n</tool_call>\n'
        '<tool_call>{"arguments":{},"name":"get"}</tool_call>',
        "I look.",
        [WEATHER, EMPTY],
    ),
    ("hermes", '<tool_call>{"name": "get"}</tool_call> Done.', "Done.", [EMPTY]),
    ("hermes", '<tool_call>[{"name": "get"}, {"name": "get", "arguments": null}]</tool_call>', "", [EMPTY, EMPTY]),
    ("hermes", '<tool_call>{"name": "get", "arguments": "{\\"a\\": 1}"}</tool_call>', "", [("get", '{"a": 1}')]),
    (
        "hermes",
        '<tool_call>{"name": "get", "arguments": {"a": "</tool_call>"}}',
        "",
        [("get", '{"a": "</tool_call>"}')],
    ),
    (
        "hermes",
        '<tool_call>{"type": "function", "function": {"name": "get", "parameters": {"é": "☃"}}}</tool_call>',
        "",
        [("get", '{"é": "☃"}')],
    ),
    ("hermes", '<tool_call>{"name": "unknown", "arguments": {}}</tool_call>', None, []),
    ("hermes", '<tool_call>{"name": "get", "arguments": {"a": 1,}}</tool_call>', None, []),
    ("hermes", '<tool_call>{"name": "get", "arguments": [1]}</tool_call>', None, []),
    ("hermes", '<tool_call>{"name": ["get"]}</tool_call>', None, []),
    ("hermes", "<tool_call>[]</tool_call>", None, []),
    ("hermes", "A <tool_call> tag begins a call.", None, []),
    ("hermes", "ends in <tool_", None, []),
    ("hermes", 'cut <tool_call>{"name": "get", "arguments": {"a": "b', None, []),
    ("hermes", '<tool_call><tool_call>{"name": "get"}</tool_call>', "<tool_call>", [EMPTY]),
    ("hermes", '<tool_call>{"oops <tool_call>{"name": "get"}', '<tool_call>{"oops', [EMPTY]),
    ("hermes", '{"name": "get"}', None, []),
    # Llama 3
    ("llama", '{"name": "get_weather", "parameters": {"city": "Paris"}}', "", [WEATHER]),
    ("llama", '<|python_tag|>{"name": "get_weather", "parameters": {"city": "Paris"}}', "", [WEATHER]),
    ("llama", '\n{"type": "function", "name": "get", "parameters": {}}', "", [EMPTY]),
    ("llama", '{"name": "get", "parameters": {}}; {"name": "get", "parameters": {"a": 1}}', "", [EMPTY]),
    ("llama", '{"name": "Bob", "age": 5}', None, []),
    ("llama", '{"a": 1} {"name": "get"}', None, []),
    ("llama", '  Not at the beginning: {"name": "get", "parameters": {}}', None, []),
    ("llama", '<|python_tag|>print("hi")', None, []),
    # Mistral
    ("mistral", '[TOOL_CALLS][{"name": "get_weather", "arguments": {"city": "Paris"}}]', "", [WEATHER]),
    (
        "mistral",
        'Yes.[TOOL_CALLS] [{"name": "get", "arguments": {}, "id": "abcdefghi"}, '
        '{"name": "get_weather", "arguments": {"city": "Paris"}, "id": "abcdefghj"}]',
        "Yes.",
        [EMPTY, WEATHER],
    ),
    ("mistral", '[TOOL_CALLS][{"name": "get"}, {"name": "unknown"}]', None, []),
    ("mistral named", '[TOOL_CALLS]get_weather[ARGS]{"city": "Paris"}[TOOL_CALLS]get[ARGS]{}', "", [WEATHER, EMPTY]),
    ("mistral named", "[TOOL_CALLS]get{}", "", [EMPTY]),
    ("mistral named", '[TOOL_CALLS]get_w[ARGS]{"city": "Paris"}', None, []),
    ("mistral named", "[TOOL_CALLS]get[ARGS][1]", None, []),
    # models that were told in a message
    ("generic", '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Paris"}}\n</tool_call>', "", [WEATHER]),
    ("generic", '{"name": "get_weather", "arguments": {"city": "Paris"}}', "", [WEATHER]),
    ("generic", '```json\n{"name": "get_weather", "arguments": {"city": "Paris"}}\n```', "", [WEATHER]),
    ("generic", '```\n[{"name": "get"}]\n```\nThat was it.', "That was it.", [EMPTY]),
    ("generic", '```json\n{"city": "Paris"}\n```', None, []),
    ("generic", "``` is a fence", None, []),
    ("generic", "[1, 2] is a list", None, []),
]


def cuts(text: str, places: list[int]) -> list[str]:
    ends = sorted({place % (len(text) + 1) for place in places})
    return [text[start:end] for start, end in zip([0, *ends], [*ends, len(text)], strict=True)]


@pytest.mark.parametrize(("name", "answer", "content", "calls"), CASES)
def test_calls_are_told_from_content(name: str, answer: str, content: str | None, calls: list[Any]) -> None:
    most = None if STYLES[name].parallel else 1
    whole = read(STYLES[name], [answer], most=most)
    assert (whole.content, whole.calls) == (answer if content is None else content, calls)
    assert [json.loads(arguments) for _, arguments in whole.calls] == [json.loads(one) for _, one in calls]
    assert read(STYLES[name], list(answer), most=most) == whole


@pytest.mark.parametrize("name", STYLES)
def test_a_call_in_the_canonical_form_is_passed_on_as_it_comes(name: str) -> None:
    style = STYLES[name]
    arguments = json.dumps({"city": 'Zürich "x" }]', "days": [1, -2.5e3, {"deep": [None, True]}]}, ensure_ascii=False)
    more = style.between + style.begin("get") + "{}" + style.close if style.parallel else ""
    answer = style.lead + style.first + style.begin("get_weather") + arguments + style.close + more + style.after
    found = read(style, list(answer), exact=True)
    assert found.calls == [("get_weather", arguments), *([EMPTY] if more else [])]
    assert found.content == ""
    assert len(found.deltas[0]) == len(arguments)
    assert read(style, [answer], exact=True).calls == found.calls
    # cut short, what there is has been passed on
    cut = read(style, list(answer[: answer.index("days")]), exact=True)
    assert cut.calls == [("get_weather", arguments[: arguments.index("days")])]
    assert cut.content == ""


_PIECES = st.sampled_from(
    [
        *(
            '{"name": "get',
            '", "arguments": ',
            '", "parameters": ',
            '{"a": 1}',
            "}",
            "\n",
            " ",
            "get",
            "[ARGS]",
            "é☃",
            '"',
        ),
        *("<tool_call>", "</tool_call>", "[TOOL_CALLS]", "<|python_tag|>", "[", "]", ", ", "; ", "```json\n", "```"),
        *('{"name": "get", "arguments": {}}', "<think>", "</think>", "<tool", "text", '{"x": "', "\\"),
    ]
)
_ANSWERS = st.one_of(
    st.lists(_PIECES, max_size=8).map("".join),
    st.sampled_from([answer for _, answer, _, _ in CASES]),
)


@given(
    style=st.sampled_from([None, *STYLES.values()]),
    answer=_ANSWERS,
    places=st.lists(st.integers(0, 200), max_size=12),
    exact=st.booleans(),
    think=st.sampled_from([None, True, False]),
    most=st.sampled_from([None, 1]),
)
@settings(max_examples=250, deadline=None)
def test_an_answer_cut_anywhere_is_read_the_same(
    style: Style | None, answer: str, places: list[int], exact: bool, think: bool | None, most: int | None
) -> None:
    options: dict[str, Any] = {"exact": exact, "think": think, "most": most}
    whole = read(style, [answer], **options)
    assert read(style, cuts(answer, places), **options) == Read(
        whole.content, whole.reasoning, whole.calls, whole.ids, read(style, cuts(answer, places), **options).deltas
    )
    letter_by_letter = read(style, list(answer), **options)
    assert (letter_by_letter.content, letter_by_letter.reasoning) == (whole.content, whole.reasoning)
    assert letter_by_letter.calls == whole.calls
    for name, arguments in whole.calls:
        assert name in NAMES
        if not exact:
            assert isinstance(json.loads(arguments), dict)
    if not whole.calls and think is None:
        assert whole.content == answer


@given(st.text(), st.sampled_from(list(STYLES.values())), st.booleans())
@settings(max_examples=100, deadline=None)
def test_other_text_is_content(text: str, style: Style, exact: bool) -> None:
    found = read(style, list(text), exact=exact)
    assert (found.content, found.calls) == (text, [])


_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)


@given(
    value=st.lists(_JSON, max_size=3) | st.dictionaries(st.text(max_size=5), _JSON, max_size=3),
    ascii_only=st.booleans(),
    indent=st.sampled_from([None, 1]),
    flip=st.none() | st.tuples(st.integers(0, 300), st.sampled_from('{}[],:"\\ 0-.etnu\n')),
)
@settings(max_examples=150, deadline=None)
@example(value=[0], ascii_only=True, indent=None, flip=(1, "-"))
def test_json_is_recognised_as_pythons_own_parser_does(
    value: Any, ascii_only: bool, indent: int | None, flip: tuple[int, str] | None
) -> None:
    text = json.dumps(value, ensure_ascii=ascii_only, indent=indent)
    if flip is not None:
        at = flip[0] % len(text)
        text = text[:at] + flip[1] + text[at + 1 :]
    try:
        _, end = json.JSONDecoder(parse_constant=lambda _: 1 / 0).raw_decode(text)
        valid = text[0] in "{["
    except (ValueError, ZeroDivisionError):
        valid, end = False, 0
    found, verdicts = JsonText(), []
    for char in text:
        verdicts.append(found.push(char))
    assert (verdicts[-1] == "done") == valid
    if valid:
        assert found.length == end
        whole = JsonText()
        assert (whole.push(text), whole.length) == ("done", end)
        parts = members(text[:end]) if text[0] == "{" else elements(text[:end])
        spans = parts.values() if isinstance(parts, dict) else parts
        expected = json.loads(text[:end])
        assert [json.loads(one) for one in spans] == list(expected.values() if isinstance(expected, dict) else expected)


def test_depth_and_digits_are_bounded() -> None:
    assert JsonText().push("[" * 100_000) == "wrong"
    assert JsonText().push("[" + "1" * 100_000) == "wrong"


@pytest.mark.parametrize(
    ("answer", "begun", "reasoning", "content"),
    [
        ("<think>\nhm\n</think>\n\nYes.", False, "hm", "Yes."),
        ("hm\n</think>\n\nYes.", True, "hm", "Yes."),
        (" <think></think>Yes.", False, "", "Yes."),
        ("Yes <think>no</think>", False, "", "Yes <think>no</think>"),
        ("\nYes.", False, "", "\nYes."),
        ("<think>a </thin b", False, "a </thin b", ""),
        ("<thin", False, "", "<thin"),
        ("<think>x</think>", False, "x", ""),
    ],
)
def test_reasoning_is_told_from_the_answer(answer: str, begun: bool, reasoning: str, content: str) -> None:
    for chunks in ([answer], list(answer)):
        found = read(None, chunks, think=begun)
        assert (found.reasoning, found.content) == (reasoning, content)


def test_calls_follow_reasoning_and_are_none_within_it() -> None:
    answer = 'I <tool_call>{"name": "get"}</tool_call> think.\n</think>\n\n<tool_call>\n{"name": "get"}\n</tool_call>'
    for chunks in ([answer], list(answer)):
        found = read(HERMES, chunks, think=True)
        assert found.reasoning == 'I <tool_call>{"name": "get"}</tool_call> think.'
        assert (found.content, found.calls) == ("", [EMPTY])


@pytest.mark.parametrize(
    ("call", "style"),
    [
        ('<tool_call>\n{"name": "f", "arguments": {"a": 1}}\n</tool_call>', HERMES),
        ('[TOOL_CALLS][{"name": "f", "arguments": {"a": 1}, "id": "abcdefghi"}]', MISTRAL),
        ('[TOOL_CALLS]f[CALL_ID]abcdefghi[ARGS]{"a": 1}', MISTRAL_NAMED),
        ('<|python_tag|>{"name": "f", "parameters": {"a": 1}}', LLAMA),
        ("<tool_call>\n<function=f>\n<parameter=a>\n1\n</parameter>", None),
        ("", None),
    ],
)
def test_the_format_is_found_from_what_the_template_writes(call: str, style: Style | None) -> None:
    assert style_of(call) == style


def test_ids_are_what_templates_demand() -> None:
    assert re.fullmatch(r"call_[0-9a-f]{24}", HERMES.new_id())
    assert re.fullmatch(r"[0-9a-zA-Z]{9}", MISTRAL.new_id())
    assert MISTRAL.id_of("abc123XYZ") == "abc123XYZ"
    assert re.fullmatch(r"[0-9a-zA-Z]{9}", MISTRAL.id_of("call_0123"))
    assert MISTRAL.id_of("call_0123") == MISTRAL.id_of("call_0123") != MISTRAL.id_of("call_0124")
    assert HERMES.id_of("anything") == "anything"
