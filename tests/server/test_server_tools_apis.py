"""Tools and reasoning in the Responses API, Anthropic's and Ollama's: requests, answers, conversations that go on."""

from __future__ import annotations

import json
from typing import Any

import openai
import pytest

from tests.server.live_server import Live
from tests.server.test_server_messages import stream as message_events
from tests.server.test_server_tools import HARMONY, HERMES, NONE, PARIS, THINKING, WEATHER, told

CALL = 'I look. <tool_call>\n{"name": "get_weather", "arguments": {"city": "Paris"}}\n</tool_call>'
THOUGHT = f"<think>\nHm, Paris.\n</think>\n\n{CALL}"
ASK = "Is it warm in Paris?"
FLAT: list[Any] = [{"type": "function", **WEATHER}, {"type": "function", "name": "get_time"}]
USED: list[Any] = [
    {"name": "get_weather", "description": "The weather.", "input_schema": WEATHER["parameters"]},
    {"name": "get_time", "input_schema": {"type": "object"}},
]
TOOLS: list[Any] = [{"type": "function", "function": one} for one in (WEATHER, {"name": "get_time"})]
SCHEMA = {**WEATHER["parameters"], "additionalProperties": False}


def held(live: Live) -> Any:
    """What the engine was asked to hold the last answer to."""
    made = live.engine.requests[-1].grammar
    return made and made.schema


# --- responses --------------------------------------------------------------------------------------------------------
def test_responses_call_functions_and_go_on_with_what_they_return(live: Live, client: openai.OpenAI) -> None:
    told(live, THINKING, THOUGHT, "Yes.", "Yes again.")
    first = client.responses.create(model="any", input=ASK, tools=FLAT)
    assert [item.type for item in first.output] == ["reasoning", "message", "function_call"]
    reasoning, _, call = first.output
    assert reasoning.type == "reasoning"
    assert reasoning.content is not None
    assert (reasoning.content[0].text, first.output_text) == ("Hm, Paris.", "I look.")
    assert call.type == "function_call"
    assert (call.name, call.arguments, call.status) == (*PARIS, "completed")
    assert (first.status, [tool.name for tool in first.tools]) == ("completed", ["get_weather", "get_time"])  # type: ignore[union-attr]
    output: Any = {"type": "function_call_output", "call_id": call.call_id, "output": "24"}
    second = client.responses.create(model="any", input=[output], previous_response_id=first.id, tools=FLAT)
    assert second.output_text == "Yes."
    kept, tools = live.engine.written
    assert [one["role"] for one in kept] == ["user", "assistant", "tool"]
    assert (kept[1]["reasoning_content"], kept[1]["content"]) == ("Hm, Paris.", "I look.")
    assert kept[1]["tool_calls"] == [
        {"id": call.call_id, "type": "function", "function": {"name": PARIS[0], "arguments": PARIS[1]}}
    ]
    assert (kept[2]["content"], kept[2]["tool_call_id"]) == ("24", call.call_id)
    assert tools[0]["function"] == WEATHER
    # the same without anything kept: the client sends the items back
    items: Any = [{"role": "user", "content": ASK}, *(one.model_dump() for one in first.output), output]
    client.responses.create(model="any", input=items, tools=FLAT, store=False)
    assert live.engine.written[0] == kept
    shown = client.responses.input_items.list(second.id).data
    assert [(one.type, one.call_id) for one in shown] == [("function_call_output", call.call_id)]  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("choice", "forced", "names"),
    [
        ("auto", False, ["tools[0].parameters", "tools[1].parameters"]),
        ("required", True, ["tools[0].parameters", "tools[1].parameters"]),
        ({"type": "function", "name": "get_time"}, True, ["tools[1].parameters"]),
        (
            {"type": "allowed_tools", "mode": "required", "tools": [{"type": "function", "name": "get_time"}]},
            True,
            ["tools[1].parameters"],
        ),
    ],
    ids=str,
)
def test_every_choice_of_responses(live: Live, choice: Any, forced: bool, names: list[str]) -> None:
    told(live, HERMES, CALL)
    answer = live.post("/v1/responses", {"input": ASK, "tools": FLAT, "tool_choice": choice})
    assert answer.json()["tool_choice"] == choice
    made = held(live)
    assert ([call.field for call in made.calls], made.text) == (names, not forced)
    if len(names) == 2:
        assert made.calls[0].schema == SCHEMA
    assert len(live.engine.written[1]) == 2


def test_responses_without_a_choice_of_tools(live: Live) -> None:
    told(live, HERMES, CALL)
    body = {"input": ASK, "tools": [*FLAT, {"type": "web_search"}], "tool_choice": "none"}
    answer = live.post("/v1/responses", body).json()
    assert [(one["type"], len(answer["output"])) for one in answer["output"]] == [("message", 1)]
    assert (held(live), live.engine.written[1]) == (None, None)
    for wrong, param in (
        ({"tool_choice": {"type": "function", "name": "f"}}, "tool_choice.name"),
        ({"tools": [FLAT[0], FLAT[0]]}, "tools[1].name"),
        ({"tools": [{**FLAT[0], "parameters": {"type": "array"}}]}, "tools[0].parameters.type"),
    ):
        error = live.post("/v1/responses", {"input": ASK, "tools": FLAT, **wrong})
        assert (error.status_code, error.json()["error"]["param"]) == (400, param)


def test_functions_in_a_namespace_are_called_with_it(live: Live) -> None:
    """Codex offers its agents so, and `web_search` beside them, which nothing here can run."""
    spaced = [{"type": "namespace", "name": "sky", "description": "The sky", "tools": FLAT}, {"type": "web_search"}]
    told(live, HERMES, CALL, "Yes.")
    first = live.post("/v1/responses", {"input": ASK, "tools": spaced}).json()
    (call,) = (item for item in first["output"] if item["type"] == "function_call")
    assert (call["name"], call["namespace"]) == ("get_weather", "sky")
    assert [call.field for call in held(live).calls] == ["tools[0].tools[0].parameters", "tools[0].tools[1].parameters"]
    assert [tool["type"] for tool in first["tools"]] == ["namespace"]
    result = {"type": "function_call_output", "call_id": call["call_id"], "output": "24"}
    items = [{"role": "user", "content": ASK}, call, result]
    second = live.post("/v1/responses", {"input": items, "tools": spaced, "store": False}).json()
    assert second["output"][-1]["content"][0]["text"] == "Yes."
    told(live, HERMES, CALL)
    plain = live.post("/v1/responses", {"input": ASK, "tools": FLAT}).json()
    assert "namespace" not in next(item for item in plain["output"] if item["type"] == "function_call")


def test_reasoning_as_a_summary(live: Live, client: openai.OpenAI) -> None:
    told(live, THINKING, THOUGHT)
    with client.responses.stream(model="any", input=ASK, tools=FLAT, reasoning={"summary": "auto"}) as stream:
        kinds = [event.type for event in stream]
        final = stream.get_final_response()
    assert "response.reasoning_summary_text.delta" in kinds
    assert "response.function_call_arguments.done" in kinds
    assert "response.reasoning_text.delta" not in kinds
    (item,) = [one for one in final.output if one.type == "reasoning"]
    assert [part.text for part in item.summary] == ["Hm, Paris."]
    assert not item.content


def test_a_call_that_is_cut_short_is_incomplete_in_every_api(live: Live) -> None:
    call = CALL.removeprefix("I look. ")
    cut = call.index('"Par') + 3
    told(live, HERMES, call, call, call)
    named = {"type": "function", "name": "get_weather"}
    body = {"input": ASK, "tools": FLAT, "tool_choice": named, "max_output_tokens": cut}
    response = live.post("/v1/responses", body).json()
    assert (response["status"], response["output"][0]["status"]) == ("incomplete", "incomplete")
    assert response["output"][0]["arguments"] == '{"city": "Pa'
    body = {
        "max_tokens": cut,
        "messages": [{"role": "user", "content": ASK}],
        "tools": USED,
        "tool_choice": {"type": "tool", "name": "get_weather"},
    }
    message = live.post("/v1/messages", body).json()
    assert (message["stop_reason"], message["content"][0]["input"]) == ("max_tokens", {})
    found = message_events(live, **body)
    deltas = [data["delta"] for name, data in found if name == "content_block_delta"]
    assert "".join(delta["partial_json"] for delta in deltas) in '{"city": "Paris"}'


# --- messages ---------------------------------------------------------------------------------------------------------
def test_messages_use_tools_think_and_take_results(live: Live) -> None:
    told(live, THINKING, THOUGHT, THOUGHT, "Yes.")
    body: Any = {"max_tokens": 500, "messages": [{"role": "user", "content": ASK}], "tools": USED}
    message = live.post("/v1/messages", body).json()
    use = message["content"][2]
    assert message["content"] == [
        {"type": "thinking", "thinking": "Hm, Paris.", "signature": ""},
        {"type": "text", "text": "I look."},
        {"type": "tool_use", "id": use["id"], "name": "get_weather", "input": {"city": "Paris"}},
    ]
    assert message["stop_reason"] == "tool_use"
    found = message_events(live, **body)
    starts = [data["content_block"] for name, data in found if name == "content_block_start"]
    assert [start["type"] for start in starts] == ["thinking", "text", "tool_use"]
    assert starts[2]["input"] == {}
    deltas = [data["delta"] for name, data in found if name == "content_block_delta"]
    assert "".join(delta.get("partial_json", "") for delta in deltas) == PARIS[1]
    assert found[-2][1]["delta"]["stop_reason"] == "tool_use"
    results = [
        {"type": "tool_result", "tool_use_id": use["id"], "content": [{"type": "text", "text": "24"}]},
        {"type": "tool_result", "tool_use_id": "other", "content": "no", "is_error": True},
        {"type": "text", "text": "Well?"},
    ]
    turns = [
        *body["messages"],
        {"role": "assistant", "content": message["content"]},
        {"role": "user", "content": results},
    ]
    answer = live.post("/v1/messages", {**body, "messages": turns}).json()
    assert (answer["content"][0]["text"], answer["stop_reason"]) == ("Yes.", "end_turn")
    written, tools = live.engine.written
    assert [one["role"] for one in written] == ["user", "assistant", "tool", "tool", "user"]
    assert (written[1]["reasoning_content"], written[1]["content"]) == ("Hm, Paris.", "I look.")
    assert written[1]["tool_calls"][0]["function"] == {"name": PARIS[0], "arguments": PARIS[1]}
    assert [one["content"] for one in written[2:]] == ["24", "Error: no", "Well?"]
    assert tools[0]["function"] == WEATHER
    counted = live.post("/v1/messages/count_tokens", {name: body[name] for name in ("messages", "tools")}).json()
    assert counted["input_tokens"] > 0
    assert live.engine.written[1] == tools


def test_every_choice_of_messages_and_their_formats(live: Live) -> None:
    live.engine.template = HERMES
    body: Any = {"max_tokens": 2, "messages": [{"role": "user", "content": ASK}], "tools": USED}
    for choice, forced, count, many in (
        (None, False, 2, True),
        ({"type": "any"}, True, 2, True),
        ({"type": "any", "disable_parallel_tool_use": True}, True, 2, False),
        ({"type": "tool", "name": "get_time"}, True, 1, False),
    ):
        assert live.post("/v1/messages", {**body, "tool_choice": choice}).status_code == 200
        made = held(live)
        assert (not made.text, len(made.calls), made.most > 1) == (forced, count, many)
    assert made.calls[0].field == "tools[1].input_schema"
    live.post("/v1/messages", {**body, "tool_choice": {"type": "none"}})
    assert (held(live), live.engine.written[1]) == (None, None)
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}, "additionalProperties": False}
    for given in (
        {"output_config": {"format": {"type": "json_schema", "schema": schema}, "effort": "low"}},
        {"output_format": {"type": "json_schema", "schema": schema}},
    ):
        live.post("/v1/messages", {**body, "tools": None, **given})
        assert (held(live).wanted, held(live).field.partition(".")[0]) == (schema, next(iter(given)))


# --- Ollama -----------------------------------------------------------------------------------------------------------
def test_ollama_calls_tools_thinks_and_takes_results(live: Live) -> None:
    told(live, THINKING, THOUGHT, THOUGHT, "Yes.", THOUGHT)
    body: Any = {"model": "any", "messages": [{"role": "user", "content": ASK}], "tools": TOOLS, "think": True}
    message = live.post("/api/chat", {**body, "stream": False}).json()["message"]
    (call,) = message["tool_calls"]
    assert (message["thinking"], message["content"]) == ("Hm, Paris.", "I look.")
    assert call["function"] == {"index": 0, "name": "get_weather", "arguments": {"city": "Paris"}}
    lines = [json.loads(line) for line in live.post("/api/chat", body).text.splitlines()]
    assert "".join(line["message"].get("thinking", "") for line in lines) == "Hm, Paris."
    assert [one["function"] for line in lines for one in line["message"].get("tool_calls", ())] == [call["function"]]
    assert (lines[-1]["done"], lines[-1]["done_reason"], lines[-1]["message"]["content"]) == (True, "stop", "")
    turns = [*body["messages"], message, {"role": "tool", "tool_name": "get_weather", "content": "24"}]
    answer = live.post("/api/chat", {**body, "messages": turns, "stream": False}).json()["message"]
    assert answer == {"role": "assistant", "content": "Yes."}
    written, tools = live.engine.written
    assert [one["role"] for one in written] == ["user", "assistant", "tool"]
    assert written[1]["tool_calls"][0]["function"] == {"name": PARIS[0], "arguments": PARIS[1]}
    assert written[2]["tool_call_id"] == written[1]["tool_calls"][0]["id"]
    assert tools[0]["function"] == WEATHER
    generated = live.post("/api/generate", {"model": "any", "prompt": ASK, "stream": False}).json()
    assert (generated["thinking"], generated["response"]) == ("Hm, Paris.", CALL)
    assert "thinking" in live.post("/api/show", {"model": "any"}).json()["capabilities"]


def test_a_model_that_does_not_think_says_so_to_ollamas_clients(live: Live) -> None:
    told(live, NONE, "Yes.")
    body: Any = {"model": "any", "messages": [{"role": "user", "content": ASK}], "stream": False}
    refused = live.post("/api/chat", {**body, "think": True})
    assert (refused.status_code, "think" in refused.json()["error"]) == (400, True)
    assert live.post("/api/chat", {**body, "think": False}).json()["message"]["content"] == "Yes."


@pytest.mark.parametrize(
    ("path", "fields", "variables"),
    [
        ("/v1/chat/completions", {"reasoning_effort": "none"}, {"enable_thinking": False}),
        ("/v1/chat/completions", {"reasoning_effort": "low"}, {"reasoning_effort": "low"}),
        ("/v1/responses", {"reasoning": {"effort": "none"}}, {"enable_thinking": False}),
        ("/v1/responses", {"reasoning": {"effort": "high"}}, {"reasoning_effort": "high"}),
        ("/v1/messages", {"thinking": {"type": "disabled"}}, {"enable_thinking": False}),
        ("/v1/messages", {"thinking": {"type": "enabled", "budget_tokens": 2048}}, {"enable_thinking": True}),
        ("/v1/messages", {"output_config": {"effort": "low"}}, {"reasoning_effort": "low"}),
        ("/api/chat", {"think": False}, {"enable_thinking": False}),
        ("/api/chat", {"think": "high"}, {"enable_thinking": True, "reasoning_effort": "high"}),
    ],
    ids=str,
)
def test_whether_a_model_thinks_is_told_to_its_template(
    live: Live, path: str, fields: dict[str, Any], variables: dict[str, Any]
) -> None:
    told(live, THINKING, "Yes.")
    asked = {"input": ASK} if path == "/v1/responses" else {"messages": [{"role": "user", "content": ASK}]}
    limit = {"max_tokens": 9} if path == "/v1/messages" else {}
    answer = live.post(path, {"model": "any", **asked, **limit, **fields})
    assert answer.status_code == 200, answer.text
    assert live.engine.variables == variables


@pytest.mark.parametrize(
    ("path", "fields", "effort"),
    [
        ("/v1/chat/completions", {"reasoning_effort": "none"}, "low"),
        ("/v1/chat/completions", {"reasoning_effort": "medium"}, "medium"),
        ("/v1/chat/completions", {"reasoning_effort": "xhigh"}, "high"),
        ("/v1/responses", {"reasoning": {"effort": "minimal"}}, "low"),
        ("/v1/messages", {"thinking": {"type": "disabled"}}, "low"),
        ("/v1/messages", {"output_config": {"effort": "max"}}, "high"),
        ("/api/chat", {"think": "high"}, "high"),
    ],
    ids=str,
)
def test_models_that_answer_in_channels_are_told_one_of_their_efforts(
    live: Live, path: str, fields: dict[str, Any], effort: str
) -> None:
    told(live, HARMONY, "<|channel|>analysis<|message|>Hm.<|end|><|start|>assistant<|channel|>final<|message|>Yes.")
    asked = {"input": ASK} if path == "/v1/responses" else {"messages": [{"role": "user", "content": ASK}]}
    limit = {"max_tokens": 9} if path == "/v1/messages" else {}
    answer = live.post(path, {"model": "any", **asked, **limit, **fields})
    assert answer.status_code == 200, answer.text
    assert live.engine.variables["reasoning_effort"] == effort
