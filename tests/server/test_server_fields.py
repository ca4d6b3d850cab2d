"""One rule for request fields that the server does not act on, numbers at the ends of the schema, and lines of streams."""

from __future__ import annotations

import json
from typing import Any

import pytest

from atlas_jax.engine.api import MAX_LOGIT_BIAS
from atlas_jax.kernels.sampling import BIAS_SLOTS
from tests.server.live_server import Live

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
BODIES: dict[str, dict[str, Any]] = {
    CHAT: {"messages": [{"role": "user", "content": "x"}], "max_tokens": 2},
    COMPLETIONS: {"prompt": "x", "max_tokens": 2},
}
both = pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
CHANGING = {
    "stop_regex": "x",
    "structural_tag": "x",
    "min_new_tokens": 3,
    "max_new_tokens": 5,
    "repeat_last_n": 64,
    "skip_special_tokens": False,
    "mirostat_mode": 2,
    "format": "json",
    "options": {"temperature": 0},
    "logits_processors": ["x"],
    "lora_path": "a/b",
    "documents": [{"text": "x"}],
    "prefix": "Sure",
    "top_n_sigma": 1.5,
    "tool_choice": "required",
    "response_format": {"type": "xml"},
    "use_beam_search": True,
    "chat_template": "x",
}
NEUTRAL = {
    "repeat_last_n": -1,
    "skip_special_tokens": True,
    "min_new_tokens": 0,
    "mirostat_mode": 0,
    "mirostat_tau": 5.0,
    "top_n_sigma": -1,
    "response_format": {"type": "text"},
    "tools": [],
    "tool_choice": "auto",
    "functions": None,
    "logits_processors": [],
    "regex": "",
    "best_of": 1,
    "echo": False,
    "top_logprobs": 0,
    "num_beams": 1,
}
HINTS = {
    "user": "u",
    "store": True,
    "metadata": {"a": "b"},
    "service_tier": "auto",
    "safety_identifier": "x",
    "prompt_cache_key": "k",
    "parallel_tool_calls": False,
    "reasoning_effort": "low",
    "id_slot": 1,
}


@both
@pytest.mark.parametrize("name", CHANGING)
def test_fields_that_would_change_the_answer_are_refused_by_name(live: Live, path: str, name: str) -> None:
    response = live.post(path, {**BODIES[path], name: CHANGING[name]})
    assert response.status_code == 400, response.text
    assert response.json()["error"]["param"].split(".")[0] == name
    assert live.engine.requests == []


@pytest.mark.parametrize(
    ("path", "name", "value"),
    [
        (COMPLETIONS, "messages", [{"role": "user", "content": "x"}]),
        (COMPLETIONS, "max_completion_tokens", 5),
        (COMPLETIONS, "tools", [{"type": "function", "function": {"name": "f"}}]),
        (COMPLETIONS, "functions", [{"name": "f"}]),
        (COMPLETIONS, "add_special_tokens", False),
        (CHAT, "add_special_tokens", True),
        (CHAT, "prompt", "x"),
        (CHAT, "echo", True),
        (CHAT, "best_of", 3),
        (CHAT, "suffix", "x"),
        (COMPLETIONS, "suffix", "x"),
    ],
)
def test_fields_of_the_other_endpoint_are_refused_by_name(live: Live, path: str, name: str, value: Any) -> None:
    error = live.post(path, {**BODIES[path], name: value}).json()["error"]
    assert (error["param"], error["code"]) == (name, "unsupported_parameter")


@both
def test_neutral_values_nulls_and_hints_pass(live: Live, path: str) -> None:
    for fields in (NEUTRAL, HINTS, dict.fromkeys(CHANGING), {"never_heard_of": None}):
        response = live.post(path, {**BODIES[path], **fields})
        assert response.status_code == 200, response.text


@both
@pytest.mark.parametrize(
    ("name", "hint"),
    [("temprature", "temperature"), ("Top_K", "top_k"), ("max_token", "max_tokens"), ("stops", "stop"), ("qqq", None)],
)
def test_unknown_fields_are_refused_with_the_nearest_name(live: Live, path: str, name: str, hint: str | None) -> None:
    response = live.post(path, {**BODIES[path], name: 1})
    error = response.json()["error"]
    assert (response.status_code, error["param"], error["code"]) == (400, name, "unknown_field")
    said = f"unknown field; did you mean '{hint}'?" if hint else "unknown field"
    assert error["message"] == f"Validation error in field '{name}': {said}"
    long = live.post(path, {**BODIES[path], "x" * 10_000: 1}).json()["error"]
    assert len(long["message"]) < 300


def test_the_schemas_limit_on_biases_is_the_engines(live: Live) -> None:
    assert MAX_LOGIT_BIAS == BIAS_SLOTS
    many = {str(token): 1 for token in range(MAX_LOGIT_BIAS + 1)}
    response = live.post(COMPLETIONS, {"prompt": "x", "logit_bias": many})
    assert response.json()["error"]["message"] == (
        f"Validation error in field 'logit_bias': must have at most {MAX_LOGIT_BIAS} entries"
    )


@both
def test_a_stream_survives_every_way_of_splitting_lines(live: Live, path: str) -> None:
    ends = "a\x0b\x0c\x1c\x1d\x1e\x85\u2028\u2029\r\n\rb"
    fields = {"prompt": ends} if path == COMPLETIONS else {"messages": [{"role": "user", "content": ends}]}
    response = live.post(path, {**fields, "stream": True, "temperature": 0, "max_tokens": len(ends.encode()) + 5})
    lines = [line for line in response.content.decode().splitlines() if line]
    assert lines == [line for line in response.content.decode().split("\n") if line]
    assert all(line.startswith("data: ") for line in lines)
    chunks = [json.loads(line[6:]) for line in lines if line != "data: [DONE]"]
    parts = [chunk["choices"][0] for chunk in chunks]
    text = "".join(part["text"] if path == COMPLETIONS else part["delta"].get("content", "") for part in parts)
    assert ends in text
