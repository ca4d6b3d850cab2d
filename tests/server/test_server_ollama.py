"""Ollama's API: lines of JSON, options, models, and errors in its words."""

from __future__ import annotations

import json
from datetime import datetime
from typing import Any

import numpy as np
import pytest

from tests.server.fake_engine import embedding_of
from tests.server.live_server import Live, Start
from tests.server.test_server_responses import prompt_of

CHAT: dict[str, Any] = {"model": "fake-7b:latest", "messages": [{"role": "user", "content": "Hello"}]}
ASK: dict[str, Any] = {"model": "fake-7b", "prompt": "Hello"}


def lines(live: Live, path: str, body: dict[str, Any]) -> list[dict[str, Any]]:
    response = live.post(path, body)
    assert response.headers["content-type"].startswith("application/x-ndjson")
    return [json.loads(line) for line in response.text.splitlines()]


def text_of(line: dict[str, Any]) -> str:
    text: str = line["response"] if "response" in line else line["message"]["content"]
    return text


@pytest.mark.parametrize(("path", "body"), [("/api/chat", CHAT), ("/api/generate", ASK)])
def test_an_answer_comes_in_lines_unless_it_is_asked_for_whole(live: Live, path: str, body: dict[str, Any]) -> None:
    *before, last = lines(live, path, body)
    assert [line["done"] for line in before] == [False] * len(before)
    assert (last["done"], last["done_reason"]) == (True, "stop")
    assert "".join(map(text_of, before)) == "user\nHello"
    assert text_of(last) == ""
    assert {line["model"] for line in [*before, last]} == {"fake-7b:latest"}
    datetime.fromisoformat(last["created_at"])
    assert last["prompt_eval_count"] == len(live.engine.requests[-1].prompt)
    assert last["eval_count"] == len("user\nHello")
    assert last["total_duration"] > 0
    assert last["eval_duration"] > 0
    whole = live.post(path, {**body, "stream": False}).json()
    assert text_of(whole) == "user\nHello"
    assert (whole["done"], whole["done_reason"], whole["eval_count"]) == (True, "stop", last["eval_count"])


def test_generate_has_a_system_message_and_raw_text(live: Live) -> None:
    live.post("/api/generate", {**ASK, "system": "Be brief", "stream": False})
    assert prompt_of(live.engine) == [("system", "Be brief"), ("user", "Hello")]
    raw = live.post("/api/generate", {**ASK, "raw": True, "stream": False}).json()
    assert bytes(live.engine.requests[-1].prompt) == b"Hello"
    assert raw["response"] == "Hello"


def test_options_become_sampling_and_unknown_ones_pass(live: Live) -> None:
    options = {
        "temperature": 0.25,
        "top_k": 5,
        "top_p": 0.5,
        "min_p": 0.1,
        "repeat_penalty": 1.25,
        "seed": 7,
        "num_predict": 3,
        "stop": ["zzz"],
        "num_ctx": 2048,
        "mirostat": 0,
        "never_heard_of": [1],
    }
    last = lines(live, "/api/chat", {**CHAT, "options": options, "keep_alive": "5m", "think": False})[-1]
    request = live.engine.requests[-1]
    sampling = request.sampling
    assert (sampling.temperature, sampling.top_k, sampling.top_p, sampling.min_p) == (0.25, 5, 0.5, 0.1)
    assert (sampling.repeat_penalty, sampling.seed, request.max_tokens, request.stop) == (1.25, 7, 3, ("zzz",))
    assert (last["done_reason"], last["eval_count"]) == ("length", 3)
    live.post("/api/chat", {**CHAT, "options": {"num_predict": -2}, "stream": False})
    assert live.engine.requests[-1].max_tokens == live.settings.server.max_answer_tokens


@pytest.mark.parametrize(
    "form", ["json", {"type": "object", "properties": {"a": {"type": "integer"}}, "additionalProperties": True}]
)
def test_a_format_is_a_grammar(live: Live, form: Any) -> None:
    live.post("/api/chat", {**CHAT, "format": form, "stream": False})
    assert live.engine.requests[-1].grammar.schema.wanted == (form if isinstance(form, dict) else {"type": "object"})


@pytest.mark.parametrize(("path", "kind"), [("/api/chat", "message"), ("/api/generate", "response")])
def test_without_a_prompt_the_model_is_there(live: Live, path: str, kind: str) -> None:
    answer = live.post(path, {"model": "fake-7b"}).json()
    assert (answer["done"], answer["done_reason"]) == (True, "load")
    assert kind in answer
    assert live.engine.requests == []


def test_the_models(live: Live) -> None:
    (model,) = live.http.get("/api/tags").json()["models"]
    assert (model["name"], model["model"], model["size"]) == ("fake-7b:latest", "fake-7b:latest", 8)
    assert model["details"]["family"] == "llama"
    datetime.fromisoformat(model["modified_at"])
    (running,) = live.http.get("/api/ps").json()["models"]
    assert running["name"] == model["name"]
    shown = live.post("/api/show", {"model": "fake-7b:latest"}).json()
    assert shown["model_info"]["llama.context_length"] == 4096
    assert shown["capabilities"] == ["completion", "tools", "embedding"]
    assert live.http.get("/api/version").json()["version"]


def test_embeddings(live: Live) -> None:
    answer = live.post("/api/embed", {"model": "fake-7b", "input": ["alpha", "beta"]}).json()
    wanted = [embedding_of(text.encode()) for text in ("alpha", "beta")]
    np.testing.assert_allclose(answer["embeddings"], wanted, rtol=1e-6)
    assert answer["prompt_eval_count"] == 9


def test_one_embedding_in_the_older_form(live: Live) -> None:
    answer = live.post("/api/embeddings", {"model": "fake-7b", "prompt": "alpha"}).json()
    np.testing.assert_allclose(answer["embedding"], embedding_of(b"alpha"), rtol=1e-6)
    refused = live.post("/api/embeddings", {"model": "fake-7b", "prompt": ["alpha"]})
    assert refused.status_code == 400
    assert "prompt" in refused.json()["error"]


@pytest.mark.parametrize("kind", [None, "application/x-www-form-urlencoded", "text/plain"])
def test_bodies_need_not_say_that_they_are_json_unless_a_web_page_sends_them(live: Live, kind: str | None) -> None:
    """`curl -d` as Ollama's documentation has it."""
    headers = {} if kind is None else {"Content-Type": kind}
    whole = json.dumps({**CHAT, "stream": False}).encode()
    answer = live.http.post("/api/chat", content=whole, headers=headers)
    assert (answer.status_code, answer.json()["message"]["content"]) == (200, "user\nHello")
    for browser in ({"Origin": live.url}, {"Sec-Fetch-Site": "same-origin"}):
        assert live.http.post("/api/chat", content=whole, headers={**headers, **browser}).status_code == 415


@pytest.mark.parametrize(
    ("path", "body", "named"),
    [
        ("/api/chat", {"messages": []}, "model"),
        ("/api/chat", {**CHAT, "tools": [{"type": "function"}]}, "tools"),
        ("/api/chat", {**CHAT, "think": True}, "think"),
        ("/api/chat", {**CHAT, "format": "xml"}, "format"),
        ("/api/chat", {**CHAT, "options": {"temperature": "hot"}}, "options.temperature"),
        ("/api/chat", {**CHAT, "messages": [{"role": "user", "images": ["x"]}]}, "messages[0].images"),
        ("/api/chat", {**CHAT, "messages": [{"role": "bot"}]}, "messages[0].role"),
        ("/api/chat", {**CHAT, "messages": [{"role": "user", "content": "x" * 5000}]}, "messages"),
        ("/api/chat", {**CHAT, "never_heard_of": 1}, "never_heard_of"),
        ("/api/generate", {**ASK, "suffix": "x"}, "suffix"),
        ("/api/generate", {**ASK, "images": ["x"]}, "images"),
        ("/api/generate", {**ASK, "context": [1]}, "context"),
        ("/api/generate", {**ASK, "template": "x"}, "template"),
        ("/api/generate", {**ASK, "raw": True, "system": "x"}, "system"),
        ("/api/generate", {**ASK, "raw": True, "prompt": "x" * 5000}, "prompt"),
        ("/api/embed", {"model": "fake-7b"}, "input"),
        ("/api/show", {}, "model"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_errors_are_ollamas_and_name_the_field(live: Live, path: str, body: dict[str, Any], named: str) -> None:
    answer = live.post(path, body)
    assert answer.status_code == 400, answer.text
    assert set(answer.json()) == {"error"}
    assert named in answer.json()["error"]


def test_a_failure_in_a_stream_is_its_last_line(live: Live) -> None:
    live.engine.fail_after = 2
    assert lines(live, "/api/chat", CHAT)[-1] == {"error": "The engine broke"}


def test_a_strict_server_knows_its_model_with_and_without_the_tag(start: Start) -> None:
    live = start(server={"strict_model": True})
    for path, body in (("/api/chat", CHAT), ("/api/generate", ASK), ("/api/show", {"model": "fake-7b:latest"})):
        assert live.post(path, body).status_code == 200
        unknown = live.post(path, {**body, "model": "other"})
        assert (unknown.status_code, set(unknown.json())) == (404, {"error"})
