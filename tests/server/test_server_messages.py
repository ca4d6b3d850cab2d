"""Anthropic's Messages API: the shape of messages, events and errors, and what is refused by which name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.server.live_server import Live, Start
from tests.server.test_server_responses import prompt_of

PATH = "/v1/messages"
BODY: dict[str, Any] = {"model": "any", "max_tokens": 5000, "messages": [{"role": "user", "content": "Hello"}]}
TEXT = "user\nHello"


def stream(live: Live, **fields: Any) -> list[tuple[str, dict[str, Any]]]:
    out = []
    for block in live.post(PATH, {**BODY, **fields, "stream": True}).text.strip().split("\n\n"):
        name, data = block.split("\n")
        out.append((name.removeprefix("event: "), json.loads(data.removeprefix("data: "))))
    return out


def test_a_message(live: Live) -> None:
    answer = live.post(PATH, {**BODY, "system": [{"type": "text", "text": "Be brief", "cache_control": {"type": "x"}}]})
    assert prompt_of(live.engine) == [("system", "Be brief"), ("user", "Hello")]
    message = answer.json()
    assert message["id"].startswith("msg_")
    tokens = len(live.engine.requests[-1].prompt)
    text = "system\nBe brief" + TEXT
    expected = {
        "type": "message",
        "role": "assistant",
        "model": "fake-7b",
        "content": [{"type": "text", "text": text}],
        "stop_reason": "end_turn",
        "stop_sequence": None,
        "usage": {
            "input_tokens": tokens,
            "output_tokens": len(text),
            "cache_creation_input_tokens": 0,
            "cache_read_input_tokens": 0,
        },
    }
    assert {name: message[name] for name in expected} == expected


@pytest.mark.parametrize(
    ("fields", "text", "reason", "matched"),
    [
        ({}, TEXT, "end_turn", None),
        ({"max_tokens": 3}, TEXT[:3], "max_tokens", None),
        ({"stop_sequences": ["Hel", "zzz"]}, "user\n", "stop_sequence", "Hel"),
    ],
)
def test_the_events_of_a_stream_and_why_it_ends(
    live: Live, fields: dict[str, Any], text: str, reason: str, matched: str | None
) -> None:
    found = stream(live, **fields)
    assert all(name == data["type"] for name, data in found)
    kinds = [name for name, _ in found if name != "content_block_delta"]
    assert kinds == ["message_start", "content_block_start", "content_block_stop", "message_delta", "message_stop"]
    start = found[0][1]["message"]
    assert (start["content"], start["stop_reason"], start["usage"]["output_tokens"]) == ([], None, 0)
    assert start["usage"]["input_tokens"] == len(live.engine.requests[-1].prompt)
    deltas = [data["delta"] for name, data in found if name == "content_block_delta"]
    assert all(delta["type"] == "text_delta" for delta in deltas)
    assert "".join(delta["text"] for delta in deltas) == text
    end = found[-2][1]
    assert end["delta"] == {"stop_reason": reason, "stop_sequence": matched}
    whole = live.post(PATH, {**BODY, **fields}).json()
    assert (whole["content"][0]["text"], whole["stop_reason"], whole["stop_sequence"]) == (text, reason, matched)
    assert whole["usage"]["output_tokens"] == end["usage"]["output_tokens"]


def test_settings_reach_the_engine(live: Live) -> None:
    live.post(PATH, {**BODY, "temperature": 0.5, "top_k": 7, "top_p": 0.5, "metadata": {"user_id": "u"}})
    sampling = live.engine.requests[-1].sampling
    assert (sampling.temperature, sampling.top_k, sampling.top_p) == (0.5, 7, 0.5)


def test_a_session_goes_on_under_its_header(live: Live) -> None:
    answer = live.post(PATH, BODY, X_Session_ID="talk")
    assert answer.json()["atlas_stats"]["session_id"] == answer.headers["x-session-id"] == "talk"
    again = live.post(PATH, BODY, X_Session_ID="talk").json()["usage"]
    assert again["cache_read_input_tokens"] > 0
    assert again["cache_read_input_tokens"] + again["input_tokens"] == len(live.engine.requests[-1].prompt)


def test_tokens_are_counted_without_an_answer(live: Live) -> None:
    count = live.post(f"{PATH}/count_tokens", {name: BODY[name] for name in ("model", "messages")})
    assert live.engine.requests == []
    live.post(PATH, BODY)
    assert count.json() == {"input_tokens": len(live.engine.requests[-1].prompt)}


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"max_tokens": None}, "max_tokens"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages[0].role"),
        ({"messages": [{"role": "user", "content": [{"type": "image"}]}]}, "messages[0].content[0].type"),
        ({"messages": [{"role": "user", "content": [{"type": "tool_result"}]}]}, "messages[0].content[0].tool_use_id"),
        ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "messages[0].content[0].text"),
        ({"messages": [*BODY["messages"], {"role": "assistant", "content": "I"}]}, "messages[1].role"),
        ({"messages": [{"role": "user", "content": "x" * 5000}]}, "messages"),
        ({"temperature": 1.5}, "temperature"),
        ({"tools": [{"name": "web_search", "type": "web_search_20250305"}]}, "tools[0].type"),
        ({"tools": [{"name": "f", "input_schema": {"type": "array"}}]}, "tools[0].input_schema.type"),
        ({"tool_choice": {"type": "any"}}, "tool_choice"),
        ({"tool_choice": {"type": "tool"}}, "tool_choice.name"),
        ({"thinking": {"type": "sometimes"}}, "thinking.type"),
        ({"output_config": {"format": {"type": "xml"}}}, "output_config.format.type"),
        ({"output_format": {"type": "json_schema"}}, "output_format.schema"),
        ({"mcp_servers": [{"name": "x"}]}, "mcp_servers"),
        ({"never_heard_of": 1}, "never_heard_of"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_errors_are_anthropics_and_name_the_field(live: Live, fields: dict[str, Any], named: str) -> None:
    answer = live.post(PATH, {**BODY, **fields})
    body = answer.json()
    assert answer.status_code == 400, body
    assert (body["type"], body["error"]["type"]) == ("error", "invalid_request_error")
    assert named in body["error"]["message"]
    assert set(body["error"]) == {"type", "message"}


def test_hints_and_neutral_values_pass(live: Live) -> None:
    hints = {"service_tier": "auto", "tools": [], "tool_choice": {"type": "auto"}, "thinking": {"type": "disabled"}}
    content = [{"type": "thinking", "thinking": "hm"}, {"type": "text", "text": "seen"}]
    messages = [*BODY["messages"], {"role": "assistant", "content": content}, *BODY["messages"]]
    assert live.post(PATH, {**BODY, **hints, "messages": messages}).status_code == 200
    assert prompt_of(live.engine)[1] == ("assistant", "seen")


def test_keys_and_statuses_in_anthropics_words(start: Start, tmp_path: Path) -> None:
    keys = tmp_path / "keys"
    keys.write_text("secret\n")
    live = start(server={"api_keys_file": str(keys), "strict_model": True})
    refused = live.post(PATH, BODY)
    assert (refused.status_code, refused.json()["error"]["type"]) == (401, "authentication_error")
    assert live.post(PATH, {**BODY, "model": "fake-7b"}, x_api_key="secret").status_code == 200
    unknown = live.post(PATH, BODY, x_api_key="secret")
    assert (unknown.status_code, unknown.json()["error"]["type"]) == (404, "not_found_error")
    method = live.http.put(PATH, json={}, headers={"x-api-key": "secret"})
    assert (method.status_code, method.json()["type"]) == (405, "error")


def test_a_failure_in_a_stream_is_an_error_event(live: Live) -> None:
    live.engine.fail_after = 2
    name, data = stream(live)[-1]
    assert name == "error"
    assert data == {"type": "error", "error": {"type": "api_error", "message": "The engine broke"}}


# --- what clients rely on ---------------------------------------------------------------------------------------------
def test_models_are_listed_in_the_words_of_whoever_asks(live: Live) -> None:
    """`/v1/models` is a path of both APIs; clients of Anthropic's say so in a header."""
    headers = {"anthropic-version": "2023-06-01"}
    page = live.http.get("/v1/models", headers=headers).json()
    (model,) = page["data"]
    assert model == {
        "id": "fake-7b",
        "type": "model",
        "display_name": "fake-7b",
        "created_at": "2023-11-14T22:13:20Z",
        "lifecycle": "active",
        "max_input_tokens": 4096,
        "max_tokens": 4096,
    }
    assert (page["has_more"], page["first_id"], page["last_id"]) == (False, "fake-7b", "fake-7b")
    assert live.http.get("/v1/models/fake-7b", headers=headers).json() == model
    assert live.http.get("/v1/models/other", headers=headers).status_code == 404
    assert live.http.get("/v1/models").json()["object"] == "list"


def test_a_prompt_over_the_context_is_refused_in_words_that_make_clients_compact_it(live: Live) -> None:
    long = [{"role": "user", "content": "x" * 5000}]
    refused = live.post(PATH, {**BODY, "messages": long})
    tokens = len("<user\n") + 5000 + 1  # control tokens are one each
    assert refused.status_code == 400
    assert refused.json()["error"] == {
        "type": "invalid_request_error",
        "message": f"messages: prompt is too long: {tokens} tokens > 4096 maximum",
    }
    error = live.post("/v1/chat/completions", {"messages": long}).json()["error"]
    assert error["message"] == f"This model's maximum context length is 4096 tokens, and the prompt has {tokens}"


def test_a_client_that_asks_for_a_thread_is_told_to_go_on_without(live: Live) -> None:
    """Anthropic's tool runner asks for one first, and sends the whole conversation where this is the answer."""
    for kept in ({"type": "create"}, {"type": "continue", "previous_message_id": "msg_1"}):
        refused = live.post(PATH, {**BODY, "thread": kept})
        assert refused.status_code == 400
        details = {"error_code": "thread_unsupported_request", "unsupported": ["thread"]}
        assert refused.json()["error"]["details"] == details
    assert live.post(PATH, {**BODY, "thread": None}).status_code == 200
    assert "details" not in live.post(PATH, {**BODY, "top_p": 7}).json()["error"]


def test_hints_pass(live: Live) -> None:
    kept = {"edits": [{"type": "clear_thinking_20251015", "keep": "all"}]}  # of Claude Code
    assert live.post(PATH, {**BODY, "context_management": kept}).status_code == 200
    hints = {"cache_control": {"type": "ephemeral"}, "service_tier": "auto", "inference_geo": "eu", "speed": "standard"}
    assert live.post(PATH, {**BODY, **hints, "metadata": {"user_id": "a"}}).status_code == 200
