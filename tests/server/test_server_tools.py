"""Tools over HTTP, on an engine that says what a script has: plain and streamed, with the official client."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import openai
import pydantic
import pytest

from atlas_jax.engine.api import InvalidRequest, Overloaded, TemplateFacts
from tests.patience import PATIENCE
from tests.server.example_shapes import ROOT
from tests.server.live_server import Live

MODEL = "fake-7b"
CHAT = "/v1/chat/completions"
ASK: list[Any] = [{"role": "user", "content": "Is it warm in Paris?"}]
WEATHER: dict[str, Any] = {
    "name": "get_weather",
    "description": "The weather.",
    "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
}
TIME: dict[str, Any] = {"name": "get_time"}
TOOLS: list[Any] = [{"type": "function", "function": one} for one in (WEATHER, TIME)]
HERMES = TemplateFacts(call='<tool_call>\n{"name": "needle", "arguments": {"key": 1}}\n</tool_call>')
LLAMA = TemplateFacts(call='{"name": "needle", "parameters": {"key": 1}}')
MISTRAL = TemplateFacts(call='[TOOL_CALLS][{"name": "needle", "arguments": {"key": 1}, "id": "abc123XYZ"}]')
NAMED = TemplateFacts(call='[TOOL_CALLS]needle[ARGS]{"key": 1}')
THINKING = TemplateFacts(call=HERMES.call, thinking=("<think>", "</think>"))
HARMONY = TemplateFacts(
    call='<|start|>assistant to=functions.needle<|channel|>commentary json<|message|>{"key": 1}<|call|>', channels=True
)
NONE = TemplateFacts()

PARIS = ("get_weather", '{"city": "Paris"}')
NOON = ("get_time", "{}")
ANSWERS: list[tuple[TemplateFacts, str, str | None, list[tuple[str, str]]]] = [
    (
        HERMES,
        'I look. \n<tool_call>\n{"name": "get_weather", "arguments": {"city": "Paris"}}\n</tool_call>\n'
        '<tool_call>\n{"name": "get_time", "arguments": {}}\n</tool_call>',
        "I look.",
        [PARIS, NOON],
    ),
    (HERMES, "Yes, it is.", "Yes, it is.", []),
    (HERMES, 'No <tool_call>{"name": "get_wea', 'No <tool_call>{"name": "get_wea', []),
    (LLAMA, '{"name": "get_weather", "parameters": {"city": "Paris"}}', None, [PARIS]),
    (MISTRAL, '[TOOL_CALLS][{"name": "get_weather", "arguments": {"city": "Paris"}}]', None, [PARIS]),
    (NAMED, '[TOOL_CALLS]get_weather[ARGS]{"city": "Paris"}[TOOL_CALLS]get_time[ARGS]{}', None, [PARIS, NOON]),
    (
        HARMONY,
        "<|channel|>analysis<|message|>Hm.<|end|><|start|>assistant<|channel|>commentary to=functions.get_weather "
        '<|constrain|>json<|message|>{"city": "Paris"}',
        None,
        [PARIS],
    ),
    (HARMONY, "<|channel|>analysis<|message|>Hm.<|end|><|start|>assistant<|channel|>final<|message|>Yes.", "Yes.", []),
    (NONE, '```json\n{"name": "get_weather", "arguments": {"city": "Paris"}}\n```', None, [PARIS]),
    (NONE, '{"city": "é☃"}', '{"city": "é☃"}', []),
]


def told(live: Live, facts: TemplateFacts, *script: str) -> None:
    live.engine.template = facts
    live.engine.script.extend(script)


def streamed(client: openai.OpenAI, **body: Any) -> tuple[dict[str, Any], list[Any]]:
    """A stream put together as clients do it, and its chunks."""
    message: dict[str, Any] = {"content": "", "reasoning": "", "calls": []}
    chunks = list(client.chat.completions.create(model=MODEL, stream=True, **body))
    for chunk in chunks:
        (choice,) = chunk.choices
        delta = choice.delta
        message["content"] += delta.content or ""
        message["reasoning"] += getattr(delta, "reasoning_content", None) or ""
        for call in delta.tool_calls or ():
            if call.index == len(message["calls"]):
                assert call.id
                assert call.type == "function"
                message["calls"].append([call.id, call.function.name, ""])
            else:
                assert (call.id, call.type, call.function.name) == (None, None, None)
            message["calls"][call.index][2] += call.function.arguments
    assert [chunk.choices[0].finish_reason for chunk in chunks[:-1]] == [None] * (len(chunks) - 1)
    message["reason"] = chunks[-1].choices[0].finish_reason
    return message, chunks


@pytest.mark.parametrize(("facts", "answer", "content", "calls"), ANSWERS)
def test_an_answers_calls_are_read_in_every_format(
    live: Live, client: openai.OpenAI, facts: TemplateFacts, answer: str, content: str | None, calls: list[Any]
) -> None:
    told(live, facts, answer, answer)
    (choice,) = client.chat.completions.create(model=MODEL, messages=ASK, tools=TOOLS).choices
    found = choice.message
    assert found.content == content
    assert [(one.function.name, one.function.arguments) for one in found.tool_calls or ()] == calls
    assert choice.finish_reason == ("tool_calls" if calls else "stop")
    assert [one.type for one in found.tool_calls or ()] == ["function"] * len(calls)
    ids = {one.id for one in found.tool_calls or ()}
    assert len(ids) == len(calls)
    if facts == MISTRAL:  # its template takes no others
        assert all(len(one) == 9 and one.isalnum() for one in ids)
    message, _ = streamed(client, messages=ASK, tools=TOOLS)
    assert (message["content"] or None, message["reason"]) == (content, choice.finish_reason)
    assert [(name, arguments) for _, name, arguments in message["calls"]] == calls


def test_a_conversation_of_two_turns_with_results(live: Live, client: openai.OpenAI) -> None:
    call, answer = ANSWERS[0][1], "Yes, 24 degrees."
    told(live, HERMES, call, answer, call, answer)
    first = client.chat.completions.create(model=MODEL, messages=ASK, tools=TOOLS).choices[0].message
    assert first.tool_calls
    results = [
        {"role": "tool", "tool_call_id": one.id, "content": text}
        for one, text in zip(first.tool_calls, ("24", "noon"), strict=True)
    ]
    turns: Any = [*ASK, first.model_dump(exclude_none=True), *results]
    assert client.chat.completions.create(model=MODEL, messages=turns, tools=TOOLS).choices[0].message.content == answer
    messages, tools = live.engine.written
    assert [message["role"] for message in messages] == ["user", "assistant", "tool", "tool"]
    assert messages[1]["tool_calls"][0] == {
        "id": first.tool_calls[0].id,
        "type": "function",
        "function": {"name": "get_weather", "arguments": '{"city": "Paris"}'},
    }
    assert [message["tool_call_id"] for message in messages[2:]] == [one.id for one in first.tool_calls]
    assert tools[0] == {"type": "function", "function": WEATHER}
    # the same, streamed
    message, _ = streamed(client, messages=ASK, tools=TOOLS)
    calls = [
        {"id": id_, "type": "function", "function": {"name": name, "arguments": arguments}}
        for id_, name, arguments in message["calls"]
    ]
    turns = [*ASK, {"role": "assistant", "content": None, "tool_calls": calls}, *results[:1]]
    assert streamed(client, messages=turns, tools=TOOLS)[0]["content"] == answer


def test_a_template_that_knows_no_tools_is_told_in_messages(live: Live, client: openai.OpenAI) -> None:
    calls = [
        {"id": str(at), "type": "function", "function": {"name": name, "arguments": arguments}}
        for at, (name, arguments) in enumerate((PARIS, NOON))
    ]
    turns: list[Any] = [
        {"role": "system", "content": "Be brief."},
        *ASK,
        {"role": "assistant", "content": "I look.", "tool_calls": calls},
        {"role": "tool", "tool_call_id": "0", "content": "24"},
        {"role": "tool", "tool_call_id": "1", "content": "noon"},
    ]
    told(live, NONE, "Yes.", "Yes.", "Yes.")
    client.chat.completions.create(model=MODEL, messages=turns, tools=TOOLS)
    (system, user, assistant, results), tools = live.engine.written
    assert tools is None
    assert system["content"].startswith("Be brief.\n\n")
    assert json.dumps(WEATHER) in system["content"]
    assert '<tool_call>\n{"name": "NAME", "arguments": {ARGUMENTS}}\n</tool_call>' in system["content"]
    assert user == ASK[0]
    assert assistant == {
        "role": "assistant",
        "content": 'I look.\n<tool_call>\n{"name": "get_weather", "arguments": {"city": "Paris"}}\n</tool_call>\n'
        '<tool_call>\n{"name": "get_time", "arguments": {}}\n</tool_call>',
    }
    assert results == {
        "role": "user",
        "content": "<tool_response>\n24\n</tool_response>\n<tool_response>\nnoon\n</tool_response>",
    }
    client.chat.completions.create(model=MODEL, messages=ASK, tools=TOOLS)
    assert [message["role"] for message in live.engine.written[0]] == ["system", "user"]
    live.engine.template = TemplateFacts(system=False)
    client.chat.completions.create(model=MODEL, messages=ASK, tools=TOOLS)
    (only,) = live.engine.written[0]
    assert (only["role"], only["content"].endswith(ASK[0]["content"])) == ("user", True)


def grammar(live: Live, **body: Any) -> Any:
    """What the engine was asked to hold the answer to."""
    response = live.post(CHAT, {"messages": ASK, "tools": TOOLS, "max_tokens": 1, **body})
    assert response.status_code == 200, response.text
    made = live.engine.requests[-1].grammar
    return made and made.schema


def test_what_answers_are_held_to(live: Live) -> None:
    live.engine.template = HERMES
    auto = grammar(live)
    assert (auto.text, auto.answer, auto.lead, auto.most > 1) == (True, None, "<tool_call>", True)
    assert [call.begin for call in auto.calls] == [
        f'\n{{"name": "{name}", "arguments": ' for name in ("get_weather", "get_time")
    ]
    # A model may not make up arguments a function has not.
    assert [call.schema for call in auto.calls] == [
        {**WEATHER["parameters"], "additionalProperties": False},
        {"type": "object", "properties": {}, "additionalProperties": False},
    ]
    required = grammar(live, tool_choice="required", parallel_tool_calls=False)
    assert (required.text, required.most, len(required.calls)) == (False, 1, 2)
    named = grammar(live, tool_choice={"type": "function", "function": {"name": "get_time"}})
    assert (named.text, named.most, [call.field for call in named.calls]) == (
        False,
        1,
        ["tools[1].function.parameters"],
    )
    some = {"mode": "required", "tools": [{"type": "function", "function": {"name": "get_weather"}}]}
    allowed = grammar(live, tool_choice={"type": "allowed_tools", "allowed_tools": some})
    assert (allowed.text, [call.field for call in allowed.calls]) == (False, ["tools[0].function.parameters"])
    assert len(live.engine.written[1]) == 2  # the model is told of all
    either = grammar(live, response_format={"type": "json_object"})
    assert (either.text, either.answer.wanted) == (False, {"type": "object"})
    assert grammar(live, tool_choice="none") is None
    assert live.engine.written[1] is None
    live.engine.template = LLAMA
    assert (grammar(live).bare, grammar(live, tool_choice="required").lead) == (True, "")
    live.engine.template = MISTRAL
    assert live.engine.requests[-1].shown >= {"<|python_tag|>"}
    grammar(live)
    assert live.engine.requests[-1].shown >= {"[TOOL_CALLS]"}


def test_schemas_that_calls_cannot_be_held_to(live: Live) -> None:
    told(live, HERMES, "Yes.")
    live.engine.grammar_fault = InvalidRequest("JSON schema: no", param="tools[0].function.parameters")
    assert grammar(live) is None  # a model that may call or not is trusted to know how
    strict = [{"type": "function", "function": {**WEATHER, "strict": True}}]
    for body in ({"tool_choice": "required"}, {"tools": strict}, {"response_format": {"type": "json_object"}}):
        response = live.post(CHAT, {"messages": ASK, "tools": TOOLS, **body})
        assert (response.status_code, response.json()["error"]["param"]) == (400, "tools[0].function.parameters")
    live.engine.grammar_fault = Overloaded("No JSON schema could be compiled in time", retry_after=5.0)
    assert grammar(live) is None
    assert live.post(CHAT, {"messages": ASK, "tools": TOOLS, "tool_choice": "required"}).status_code == 503


def test_a_forced_call_streams_its_arguments_and_may_be_cut_short(live: Live, client: openai.OpenAI) -> None:
    call = '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Zürich"}}\n</tool_call>'
    told(live, HERMES, call, call, call)
    named: Any = {"type": "function", "function": {"name": "get_weather"}}
    message, chunks = streamed(client, messages=ASK, tools=TOOLS, tool_choice=named)
    (_, name, arguments), *rest = message["calls"]
    assert (name, arguments, rest, message["content"]) == ("get_weather", '{"city": "Zürich"}', [], "")
    assert message["reason"] == "tool_calls"
    assert len(chunks) > 15
    cut = call.encode().index(b'"Z') + 2
    message, _ = streamed(client, messages=ASK, tools=TOOLS, tool_choice=named, max_tokens=cut)
    assert (message["calls"][0][1:], message["reason"]) == (["get_weather", '{"city": "Z'], "length")
    (choice,) = client.chat.completions.create(
        model=MODEL, messages=ASK, tools=TOOLS, tool_choice=named, max_tokens=cut
    ).choices
    assert choice.message.tool_calls
    assert (choice.message.tool_calls[0].function.arguments, choice.finish_reason) == ('{"city": "Z', "length")


class Weather(pydantic.BaseModel):
    """A function's arguments, as the official client takes them."""

    city: str


def test_the_clients_own_helpers(live: Live, client: openai.OpenAI) -> None:
    call = '<tool_call>\n{"name": "Weather", "arguments": {"city": "Paris"}}\n</tool_call>'
    told(live, HERMES, call, call)
    tools = [openai.pydantic_function_tool(Weather)]
    parsed = client.chat.completions.parse(model=MODEL, messages=ASK, tools=tools).choices[0].message
    assert [one.function.parsed_arguments for one in parsed.tool_calls or ()] == [Weather(city="Paris")]
    with client.chat.completions.stream(model=MODEL, messages=ASK, tools=tools) as stream:
        kinds = {event.type for event in stream}
        final = stream.get_final_completion().choices[0]
    assert {"tool_calls.function.arguments.delta", "tool_calls.function.arguments.done"} <= kinds
    assert final.finish_reason == "tool_calls"
    assert [one.function.parsed_arguments for one in final.message.tool_calls or ()] == [Weather(city="Paris")]


def test_functions_of_the_time_before_tools(live: Live, client: openai.OpenAI) -> None:
    call = '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Paris"}}\n</tool_call>'
    told(live, HERMES, call, call, "Yes.")
    body: Any = {"functions": [WEATHER], "function_call": {"name": "get_weather"}}
    (choice,) = client.chat.completions.create(model=MODEL, messages=ASK, **body).choices
    called = choice.message.function_call
    assert called
    assert (called.name, called.arguments, choice.finish_reason) == (*PARIS, "function_call")
    assert (choice.message.content, choice.message.tool_calls) == (None, None)
    chunks = list(client.chat.completions.create(model=MODEL, messages=ASK, stream=True, **body))
    parts = [one.choices[0].delta.function_call for one in chunks if one.choices[0].delta.function_call]
    assert [part.name for part in parts] == ["get_weather", *[None] * (len(parts) - 1)]
    assert "".join(part.arguments or "" for part in parts) == PARIS[1]
    assert chunks[-1].choices[0].finish_reason == "function_call"
    turns: Any = [
        *ASK,
        {"role": "assistant", "content": None, "function_call": {"name": PARIS[0], "arguments": PARIS[1]}},
        {"role": "function", "name": "get_weather", "content": "24"},
    ]
    client.chat.completions.create(model=MODEL, messages=turns, functions=[WEATHER])
    _, assistant, result = live.engine.written[0]
    assert result["tool_call_id"] == assistant["tool_calls"][0]["id"]
    assert (result["role"], assistant["tool_calls"][0]["function"]["name"]) == ("tool", "get_weather")


def test_the_example_holds_a_conversation(live: Live) -> None:
    told(live, NONE, '{"name": "to_seconds", "arguments": {"amount": 3, "unit": "days"}}', "259200 seconds.")
    command = [sys.executable, str(ROOT / "examples" / "tool_calls.py"), "--url", live.url]
    printed = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE, check=True).stdout
    assert printed.splitlines() == [
        'to_seconds({"amount": 3, "unit": "days"}) = 259200 seconds',
        "259200 seconds.",
    ]


def test_reasoning_is_apart_from_content_and_calls(live: Live, client: openai.OpenAI) -> None:
    answer = "<think>\nHm, Paris.\n</think>\n\n" + ANSWERS[0][1]
    told(live, THINKING, answer, answer, "<think>\nHm.\n</think>\n\nYes.")
    message: Any = client.chat.completions.create(model=MODEL, messages=ASK, tools=TOOLS).choices[0].message
    assert (message.reasoning_content, message.content, len(message.tool_calls)) == ("Hm, Paris.", "I look.", 2)
    parts, _ = streamed(client, messages=ASK, tools=TOOLS)
    assert (parts["reasoning"], parts["content"], len(parts["calls"])) == ("Hm, Paris.", "I look.", 2)
    plain: Any = client.chat.completions.create(model=MODEL, messages=ASK).choices[0].message
    assert (plain.reasoning_content, plain.content, plain.tool_calls) == ("Hm.", "Yes.", None)


def test_a_template_that_begins_the_reasoning(live: Live, client: openai.OpenAI) -> None:
    marks = ("Paris?<|im_end|>", "</think>")  # what the fake engine's prompts end with
    told(
        live, TemplateFacts(call=HERMES.call, thinking=marks), "Hm.</think>\n\nYes.", "Hm.</think>\n\n{}", "Hm.</think>"
    )
    plain: Any = client.chat.completions.create(model=MODEL, messages=ASK).choices[0].message
    assert (plain.reasoning_content, plain.content) == ("Hm.", "Yes.")
    shaped: Any = client.chat.completions.create(model=MODEL, messages=ASK, response_format={"type": "json_object"})
    assert (shaped.choices[0].message.reasoning_content, shaped.choices[0].message.content) == ("Hm.", "{}")
    made = live.engine.requests[-1].grammar.schema
    assert (made.thinking, made.answer.wanted, made.calls) == ("</think>", {"type": "object"}, ())
    client.chat.completions.create(model=MODEL, messages=ASK, tools=TOOLS, tool_choice="required")
    assert live.engine.requests[-1].grammar.schema.thinking == "</think>"


def test_a_call_that_a_stop_string_cuts_is_none(live: Live, client: openai.OpenAI) -> None:
    told(live, HERMES, ANSWERS[0][1])
    (choice,) = client.chat.completions.create(model=MODEL, messages=ASK, tools=TOOLS, stop=["Par"]).choices
    assert choice.finish_reason == "stop"


def test_choices_and_logprobs(live: Live, client: openai.OpenAI) -> None:
    call = '<tool_call>\n{"name": "get_time", "arguments": {}}\n</tool_call>'
    told(live, HERMES, call, "No.", call, "No.")
    body: Any = {"messages": ASK, "tools": TOOLS, "n": 2, "logprobs": True, "model": MODEL}
    choices = client.chat.completions.create(**body).choices
    assert [choice.finish_reason for choice in choices] == ["tool_calls", "stop"]
    texts = ["".join(one.token for one in choice.logprobs.content) for choice in choices if choice.logprobs]
    assert texts == [call, "No."]
    spoken = {0: "", 1: ""}
    for chunk in client.chat.completions.create(**body, stream=True):
        for part in chunk.choices:
            if part.logprobs:
                spoken[part.index] += "".join(one.token for one in part.logprobs.content or ())
    assert list(spoken.values()) == [call, "No."]


def test_a_conversation_with_tools_is_written_out(live: Live) -> None:
    live.engine.template = HERMES
    assert live.post("/apply-template", {"messages": ASK, "tools": TOOLS}).status_code == 200
    assert [one["function"]["name"] for one in live.engine.written[1]] == ["get_weather", "get_time"]
    wrong = live.post("/apply-template", {"messages": ASK, "tools": [*TOOLS, *TOOLS]}).json()
    assert wrong["error"]["param"] == "tools[2].function.name"


def function(**fields: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": "f", **fields}}


def wrong() -> Iterator[tuple[dict[str, Any], str]]:
    for name in ("", "a b", "x\ny", 'q"', "é", "n" * 129, "<tool_call>"):
        yield {"tools": [TOOLS[0], function(name=name)]}, "tools[1].function.name"
    yield {"tools": [{"type": "function"}]}, "tools[0].function"
    yield {"tools": [{"type": "custom", "custom": {"name": "x"}}]}, "tools[0].type"
    yield {"tools": [function(parameters=[])]}, "tools[0].function.parameters"
    yield {"tools": [function(parameters={"type": "array"})]}, "tools[0].function.parameters.type"
    yield {"tools": [function(strict="yes")]}, "tools[0].function.strict"
    yield {"tools": [function(), TOOLS[0], function()]}, "tools[2].function.name"
    yield {"tools": [function(name=f"f{index}") for index in range(129)]}, "tools"
    yield {"tools": "get_weather"}, "tools"
    yield {"tools": TOOLS, "tool_choice": "any"}, "tool_choice"
    yield {"tools": TOOLS, "tool_choice": {"type": "custom"}}, "tool_choice.type"
    yield {"tools": TOOLS, "tool_choice": {"type": "function"}}, "tool_choice.function"
    yield {"tools": TOOLS, "tool_choice": function(name="other")}, "tool_choice.function.name"
    some = {"mode": "auto", "tools": [function(name="other")]}
    yield (
        {"tools": TOOLS, "tool_choice": {"type": "allowed_tools", "allowed_tools": some}},
        "tool_choice.allowed_tools.tools[0].function.name",
    )
    yield {"tool_choice": "required"}, "tool_choice"
    yield {"tool_choice": function()}, "tool_choice"
    yield {"tools": TOOLS, "parallel_tool_calls": "no"}, "parallel_tool_calls"
    yield {"functions": [WEATHER, WEATHER]}, "functions[1].name"
    yield {"functions": [WEATHER], "function_call": {"name": "other"}}, "function_call.name"
    yield {"function_call": {"name": "f"}}, "function_call"
    yield {"tools": TOOLS, "functions": [WEATHER]}, "functions"
    yield {"messages": [*ASK, {"role": "assistant", "tool_calls": [{}]}]}, "messages[1].tool_calls[0].function"
    yield (
        {"messages": [*ASK, {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": 5}}]}]},
        "messages[1].tool_calls[0].function.arguments",
    )
    yield {"messages": [*ASK, {"role": "tool", "tool_call_id": "1"}]}, "messages[1].content"


@pytest.mark.parametrize(("body", "param"), list(wrong()))
def test_what_is_wrong_is_named(live: Live, body: dict[str, Any], param: str) -> None:
    response = live.post(CHAT, {"messages": ASK, **body})
    assert response.status_code == 400, response.text
    error = response.json()["error"]
    assert error["param"] == param
    assert len(error["message"]) < 400
    assert live.engine.requests == []


def test_channels_are_read_without_tools_and_their_grammars_let_the_model_think(
    live: Live, client: openai.OpenAI
) -> None:
    answer = "<|channel|>analysis<|message|>Hm.<|end|><|start|>assistant<|channel|>final<|message|>"
    told(live, HARMONY, answer + "Yes.", answer + "No.", answer + '{"a": 1}')
    (choice,) = client.chat.completions.create(model=MODEL, messages=ASK).choices
    assert (choice.message.content, choice.message.reasoning_content) == ("Yes.", "Hm.")  # type: ignore[attr-defined]
    message, _ = streamed(client, messages=ASK)
    assert (message["content"], message["reasoning"]) == ("No.", "Hm.")
    schema: Any = {"type": "json_schema", "json_schema": {"name": "a", "schema": {"type": "object"}}}
    (choice,) = client.chat.completions.create(model=MODEL, messages=ASK, response_format=schema).choices
    assert choice.message.content == '{"a": 1}'
    grammar = live.engine.requests[-1].grammar.schema
    assert (grammar.thinks, grammar.thinking, grammar.before) == (
        "<|channel|>analysis<|message|>",
        "<|end|><|start|>assistant",
        "<|channel|>final<|message|>",
    )
