"""What clients send to break a server, in bodies, names and paths. Nothing here may be a 500 or a hang."""

from __future__ import annotations

import contextlib
from typing import Any

import httpx
import pytest

from tests.server.live_server import Live, Start

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
JSON = {"content-type": "application/json"}
POST = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\n"


def code_of(response: httpx.Response) -> Any:
    return response.json()["error"]["code"]


# --- bodies -------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"null",
        b"[]",
        b'"x"',
        b"5",
        b"{",
        b'{"prompt": "x"',
        b'{"prompt": "x"} trailing',
        b'{"prompt": NaN}',
        b'{"prompt": "x", "temperature": Infinity}',
        b'{"prompt": "x", "temperature": 1e999}',
        b'\xef\xbb\xbf{"prompt": "x"}',
        b'{"prompt": "\xff\xfe"}',
        b'{"prompt": "\\ud800"}',
        b'{"\xff": 1}',
        b"\x00",
        b"[" * 100_000,
        b'{"prompt":' * 10_000,
        b'{"prompt": "x", "metadata": ' + b'{"a":' * 5_000 + b"1" + b"}" * 5_001,
        b"'prompt'",
        b'{"prompt": "x", "max_tokens": ' + b"9" * 5_000 + b"}",
    ],
)
@pytest.mark.parametrize("path", [COMPLETIONS, "/v1/atlas/memory/delete"])
def test_broken_bodies(live: Live, path: str, body: bytes) -> None:
    response = live.http.post(path, content=body, headers=JSON)
    assert response.status_code == 400
    assert response.json()["error"]["message"]


def test_duplicate_keys_last_one_wins(live: Live) -> None:
    response = live.http.post(COMPLETIONS, content=b'{"prompt":"a","prompt":"b","max_tokens":1}', headers=JSON)
    assert response.json()["choices"][0]["text"] == "b"


def test_large_bodies(live: Live) -> None:
    big = b'{"prompt": "' + b"x" * (5 << 20) + b'"}'
    response = live.http.post(COMPLETIONS, content=big, headers=JSON)
    assert (response.status_code, code_of(response)) == (413, "request_too_large")

    def chunks() -> Any:
        for start in range(0, len(big), 65_536):
            yield big[start : start + 65_536]

    with contextlib.suppress(httpx.WriteError):  # the server may answer and close while the client is still sending
        assert live.http.post(COMPLETIONS, content=chunks(), headers=JSON).status_code == 413
    response = live.http.post("/v1/atlas/memory/save", content=big, headers=JSON)
    assert (response.status_code, code_of(response)) == (413, 413)


def test_many_elements(live: Live) -> None:
    messages = [{"role": "user", "content": "x"}] * 10_000
    assert live.post(CHAT, {"messages": messages}).status_code == 400
    assert live.post(COMPLETIONS, {"prompt": ["x"] * 100_000}).status_code == 400
    assert live.post(COMPLETIONS, {"prompt": "x", "logit_bias": {str(n): 1 for n in range(100_000)}}).status_code == 400
    assert live.post(COMPLETIONS, {"prompt": "x", "stop": ["x"] * 100_000}).status_code == 400
    assert live.post(COMPLETIONS, {"prompt": "x", "stop": "x" * 1_000_000}).status_code == 400
    assert live.post(COMPLETIONS, {"prompt": "x", "metadata": {str(n): 1 for n in range(100_000)}}).status_code == 200
    assert live.post(COMPLETIONS, {"prompt": ["x"] * 100, "n": 100}).status_code == 400
    assert live.post(COMPLETIONS, {"prompt": "x" * 1_000_000}).status_code == 400


@pytest.mark.parametrize(
    ("field", "values"),
    [
        ("max_tokens", [-2, 2**31 + 1, 2**63, 2**80, 1e30, "5", True, 5.0, [], {}]),
        ("n", [0, -1, 129, 10**6, "1", True, 1.0]),
        ("best_of", [0, -1, 2]),
        ("logprobs", [-1, 6, True, "1"]),
        ("temperature", [-1, -0.001, 1e308, "1", True]),
        ("top_p", [-1, 2, "1"]),
        ("top_k", [-2, 1.5, "1", 2**40]),
        ("min_p", [-0.1, 1.1]),
        ("typical_p", [-0.1, 1.1]),
        ("repeat_penalty", [0, -1, 1e9]),
        ("presence_penalty", [-1e9, 1e9, 2.1]),
        ("frequency_penalty", [-1e9, 1e9, -2.1]),
        ("seed", [2**63, 2**64, -(2**64), "1", 1.5]),
        ("stop", [5, {}, [5], [None], [["x"]]]),
        ("logit_bias", [[], {"x": 1}, {"-1": 1}, {"260": 1}, {"1.0": 1}, {"1": 101}, {"1": "x"}]),
        ("logit_bias", [{"9" * 99: 1}, {"\u0661": 1}, {"": 1}]),
        ("stream", ["true", 1, "yes"]),
        ("stream_options", [5, {"include_usage": "x"}]),
        ("echo", ["x", 1]),
        ("ignore_eos", [1, "x"]),
        ("cache_prompt", [1, "x"]),
        ("model", [5, [], "x" * 513]),
        ("user", [5, "x" * 2000]),
        ("atlas", [5, [], "x", True]),
        ("prompt", [5, {}, True, [True], [1.5], ["x", 1], [["x"]], [[]], [], "", [1, [2]], [None]]),
        ("prompt", [[-1], [260], [2**40], [[1], [-1]]]),
        ("suffix", ["x"]),
    ],
)  # fmt: skip
def test_values_out_of_range(live: Live, field: str, values: list[Any]) -> None:
    for value in values:
        response = live.post(COMPLETIONS, {"prompt": "x", field: value})
        assert response.status_code == 400, (field, value, response.text)
        error = response.json()["error"]
        assert error["param"].split("[")[0].split(".")[0] == field, (field, value, error)
        assert error["type"] == "invalid_request_error"
    assert live.engine.requests == []


@pytest.mark.parametrize(
    ("fields", "values"),
    [
        ("max_tokens", [0, 1, None]),
        ("temperature", [0, 1e-45, 1, 100, None]),
        ("top_p", [0, 1]),
        ("top_k", [-1, 0, 1, 2**31]),
        ("seed", [-1, 0, -5, 2**63 - 1, -(2**63)]),
        ("logit_bias", [{}, {"0": -100, "259": 100}, {str(n): -100 for n in range(260)}]),
        ("stop", ["", [""], [], ["a", "a"], "(a+)+$"]),
        ("logprobs", [0, 5]),
        ("best_of", [1]),
        ("suffix", ["", None]),
        ("prompt", [[0], [[259]], "\u0000", "\ufeff", "\U0001f600", "<|im_end|>"]),
    ],
)
def test_values_at_the_edge(live: Live, fields: str, values: list[Any]) -> None:
    for value in values:
        response = live.post(COMPLETIONS, {"prompt": "x", "max_tokens": 2, fields: value})
        assert response.status_code == 200, (fields, value, response.text)


def test_temperatures_that_would_overflow_are_greedy(live: Live) -> None:
    live.post(COMPLETIONS, {"prompt": "x", "temperature": 1e-45})
    assert live.engine.requests[-1].sampling.temperature == 0.0


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({}, "messages"),
        ({"messages": None}, "messages"),
        ({"messages": []}, "messages"),
        ({"messages": "x"}, "messages"),
        ({"messages": [5]}, "messages[0]"),
        ({"messages": [{}]}, "messages[0].role"),
        ({"messages": [{"role": "root", "content": "x"}]}, "messages[0].role"),
        ({"messages": [{"role": "user"}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": 5}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": [{"type": "zzz"}]}]}, "messages[0].content[0].type"),
        ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "messages[0].content[0].text"),
        ({"messages": [{"role": "user", "content": "x"}], "top_logprobs": 21, "logprobs": True}, "top_logprobs"),
        ({"messages": [{"role": "user", "content": "x"}], "top_logprobs": 2}, "top_logprobs"),
        ({"messages": [{"role": "user", "content": "x"}], "max_tokens": 1, "max_completion_tokens": 2}, "max_tokens"),
        ({"messages": [{"role": "user", "content": "x"}], "tool_choice": "required"}, "tool_choice"),
        ({"messages": [{"role": "user", "content": "x"}], "response_format": "json"}, "response_format"),
        ({"messages": [{"role": "user", "content": "x"}], "response_format": {"type": "xml"}}, "response_format.type"),
        ({"messages": [{"role": "user", "content": "x"}], "response_format": {"type": ["x"]}}, "response_format.type"),
        (
            {"messages": [{"role": "user", "content": "x"}], "response_format": {"type": "json_schema"}},
            "response_format.json_schema",
        ),
        (
            {
                "messages": [{"role": "user", "content": "x"}],
                "response_format": {"type": "json_schema", "json_schema": {"schema": "x"}},
            },
            "response_format.json_schema.schema",
        ),
        ({"messages": [{"role": "user", "content": "x"}], "chat_template_kwargs": {"__class__": 1}}, None),
    ],
)
def test_chat_bodies_that_are_refused(live: Live, body: Any, param: str | None) -> None:
    response = live.post(CHAT, body)
    assert response.status_code == 400
    if param:
        assert response.json()["error"]["param"] == param


def test_odd_but_valid_conversations(live: Live) -> None:
    for messages in (
        [{"role": "system", "content": "x"}],
        [{"role": "assistant", "content": "x"}, {"role": "assistant", "content": "y"}],
        [{"role": "user", "content": ""}],
        [{"role": "tool", "content": "x", "tool_call_id": "1"}],
        [{"role": "user", "content": []}],
    ):
        assert live.post(CHAT, {"messages": messages, "max_tokens": 1}).status_code == 200


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/tokenize", {}),
        ("/tokenize", {"content": 5}),
        ("/tokenize", {"content": None}),
        ("/detokenize", {"tokens": [-1]}),
        ("/detokenize", {"tokens": [260]}),
        ("/detokenize", {"tokens": [2**70]}),
        ("/detokenize", {"tokens": "x"}),
        ("/detokenize", {}),
        ("/apply-template", {"messages": []}),
        ("/apply-template", {"messages": [{"role": "user", "content": "x"}], "chat_template_kwargs": {"x": 1}}),
    ],
)
def test_llamacpp_bodies_that_are_refused(live: Live, path: str, body: Any) -> None:
    assert live.post(path, body).status_code == 400


# --- models and paths ---------------------------------------------------------------------------------------------
OTHER_MODELS = ("", "gpt-4", "your-model", "../x", "/etc/passwd", "x" * 512, "fake-7b ", "FAKE-7B", "\u202efake")


def test_any_model_name_is_answered_by_the_model_that_is_there(live: Live) -> None:
    for name in (*OTHER_MODELS, None):
        for path, body in ((COMPLETIONS, {"prompt": "x"}), (CHAT, {"messages": [{"role": "user", "content": "x"}]})):
            response = live.post(path, {**body, "model": name, "max_tokens": 1})
            assert (response.status_code, response.json()["model"]) == (200, "fake-7b")
            assert "etc" not in response.text


def test_a_strict_server_has_no_other_model(start: Start) -> None:
    live = start(server={"strict_model": True, "model_alias": ("nice",)})
    for name in OTHER_MODELS:
        response = live.post(COMPLETIONS, {"prompt": "x", "model": name})
        assert (response.status_code, code_of(response)) == (404, "model_not_found")
    for name in ("fake-7b", "nice", None):
        assert live.post(COMPLETIONS, {"prompt": "x", "model": name, "max_tokens": 1}).status_code == 200


def test_models_that_are_not_listed(live: Live) -> None:
    for path in ("/v1/models/a/b", "/v1/models/%2e%2e", "/v1/models/a%2Fb", "/v1/models/%ff", "/v1/models/%00"):
        response = live.http.get(path)
        assert (response.status_code, code_of(response)) == (404, "model_not_found")
    assert live.http.get("/v1/models/fake-7b").status_code == 200
    assert live.http.get("/models/fake-7b").status_code == 200


def test_an_alias_is_a_model(start: Start) -> None:
    live = start(server={"model_alias": ("org/nice", "gpt-4o", "fake-7b")})
    assert live.post(COMPLETIONS, {"prompt": "x", "model": "org/nice"}).json()["model"] == "org/nice"
    assert live.http.get("/v1/models/org%2Fnice").json()["id"] == "org/nice"
    assert [model["id"] for model in live.http.get("/models").json()["data"]] == ["fake-7b", "org/nice", "gpt-4o"]


def test_unknown_paths_and_methods(live: Live) -> None:
    for path in ("/v1", "/v1/unknown", "/v2/completions", "/v1/images"):
        assert (live.http.get(path).status_code, code_of(live.http.get(path))) == (404, "not_found")
    assert code_of(live.http.get("/v1/atlas/unknown")) == 404
    assert live.post("/v1/atlas/memory/explode").status_code == 404
    for method in ("PUT", "DELETE", "PATCH", "TRACE"):
        response = live.http.request(method, CHAT, headers=JSON)
        assert response.status_code in (404, 405), method
    assert live.http.get(CHAT).status_code == 405
    override = live.http.get(CHAT, headers={"X-HTTP-Method-Override": "POST"})
    assert override.status_code == 405


@pytest.mark.parametrize("path", [COMPLETIONS, CHAT])
def test_aliases_without_v1_behave_the_same(live: Live, path: str) -> None:
    text = {"prompt": "x"} if path == COMPLETIONS else {"messages": [{"role": "user", "content": "x"}]}
    body = {**text, "max_tokens": 2, "seed": 1}
    one, two = live.post(path, body).json(), live.post(path.removeprefix("/v1"), body).json()
    assert one["choices"] == two["choices"]
    bad = {**body, "temperature": -1, "stream": True}
    assert live.post(path.removeprefix("/v1"), bad).status_code == 400
