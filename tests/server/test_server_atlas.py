"""The `atlas` object of a request, sessions, and what happens where there is no memory to be had."""

from __future__ import annotations

import dataclasses
import json
import threading
from typing import Any

import httpx
import pytest

from atlas_jax.engine.api import (
    Fitting,
    MemoryUnavailable,
    Overloaded,
    SessionConflict,
    SessionKey,
    SnapshotInvalid,
)
from tests.server.live_server import Live, Start

CHAT = "/v1/chat/completions"
HELLO = {"messages": [{"role": "user", "content": "hello"}]}


def error(response: httpx.Response) -> dict[str, Any]:
    found: dict[str, Any] = response.json()["error"]
    return found


# --- the atlas object ---------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("field", "value", "reason"),
    [
        ("memory_layers", 0, "value must be between 1 and 10"),
        ("memory_layers", 11, "value must be between 1 and 10"),
        ("memory_layers", "3", "expected integer, got string"),
        ("memory_layers", True, "expected integer, got boolean"),
        ("memory_layers", 2.5, "expected integer, got number"),
        ("window_size", 64, "value must be between 128 and 2048"),
        ("window_size", 4096, "value must be between 128 and 2048"),
        ("window_size", 200, "value must be a multiple of 128"),
        ("blend_ratio", 1.5, "value must be between 0 and 1"),
        ("blend_ratio", -0.1, "value must be between 0 and 1"),
        ("learning_rate", 0, "value must be greater than 0 and less than 0.002"),
        ("learning_rate", 0.002, "value must be greater than 0 and less than 0.002"),
        ("learning_rate", 0.005, "value must be greater than 0 and less than 0.002"),
        ("polynomial_degree", 4, "value must be between 1 and 3"),
        ("polynomial_degree", 0, "value must be between 1 and 3"),
        ("use_muon", "yes", "expected boolean, got string"),
        ("warmup_tokens", -1, "value must be between 0 and 2147483648"),
        ("update_frequency", 100, "value must be a multiple of 128"),
        ("omega_window", 64, "value must be at least the update_frequency, 128"),
        ("cache_strategy", "mru", "value must be one of lru, lfu, adaptive"),
        ("batch_size", 33, "value must be between 1 and 32"),
        ("batch_size", 0, "value must be between 1 and 32"),
        ("read", 1, "expected boolean, got integer"),
        ("session_id", 7, "expected string, got integer"),
        ("session_id", "x" * 129, "must have at most 128 characters"),
        ("session_id", "", "must have at least 1 characters"),
        ("memory_dim", 64, "value must be 96, which this server was started with (--atlas-memory-dim)"),
        ("memory_dim", 100, "value must be a multiple of 8 between 8 and 128"),
        ("memory_dim", 256, "value must be a multiple of 8 between 8 and 128"),
        ("memory_dim", "96", "expected integer, got string"),
        ("memory_dimension", 96, "unknown field"),
        ("memory_budget", 0, "value must be between 1 and 1099511627776"),
        ("memory_budget", "16 MiB", "expected integer, got string"),
        ("memory_budget", 1 << 25, "value must be at most 16777216"),  # of the engine that serves
        ("kept_pairs", -1, "value must be between 0 and 1048576"),
        ("kept_pairs", 1.5, "expected integer, got number"),
        ("kept_pairs", 769, "value must be at most 768"),
    ],
)
def test_ranges(live: Live, field: str, value: Any, reason: str) -> None:
    response = live.post(CHAT, {**HELLO, "atlas": {field: value}})
    assert response.status_code == 400
    assert error(response)["message"] == f"Validation error in field 'atlas.{field}': {reason}"
    assert error(response)["param"] == f"atlas.{field}"
    assert error(response)["type"] == "invalid_request_error"


def test_the_missions_requests_work_as_written(live: Live) -> None:
    chat = live.post(
        CHAT,
        {
            "model": "fake-7b",
            "messages": [
                {"role": "system", "content": "You are a helpful assistant."},
                {"role": "user", "content": "Hello, how are you?"},
            ],
            "temperature": 0.7,
            "max_tokens": 150,
            "atlas": {
                "memory_layers": 3,
                "cache_strategy": "adaptive",
                "session_id": "unique-session-id",
                "batch_size": 8,
            },
        },
    )
    assert chat.status_code == 200
    completion = live.post(
        "/v1/completions",
        {
            "prompt": "Your text here...",
            "max_tokens": 2048,
            "temperature": 0.7,
            "atlas": {
                "enabled": True,
                "window_size": 512,
                "blend_ratio": 0.5,
                "learning_rate": 0.001,
                "polynomial_degree": 3,
                "use_muon": True,
                "warmup_tokens": 128,
            },
        },
    )
    assert set(completion.json()["atlas_stats"]) == {
        "kept_pairs",
        "kept_pairs_capacity",
        "memory_budget_bytes",
        "state_bytes",
        "window_bytes",
        "kept_bytes",
        "memory_bytes",
        "memory_utilization",
        "window_fill_ratio",
        "omega_loss",
        "muon_iterations",
        "blend_ratio_actual",
        "tokens_absorbed",
        "session_id",
        "cache_hit",
        "history",
        "tokens_reused",
        "writes_skipped",
        "degraded",
    }
    memory = live.engine.requests[-1].memory
    assert (memory.window_size, memory.learning_rate, memory.polynomial_degree) == (512, 0.001, 3)
    assert (memory.use_muon, memory.warmup_tokens, memory.session) == (True, 128, None)
    assert live.engine.requests[0].memory.session == SessionKey("local", "unique-session-id")


def test_an_answer_says_what_each_part_of_the_state_holds_and_takes(live: Live) -> None:
    stats = live.post("/v1/completions", {"prompt": "x" * 300, "max_tokens": 1, "atlas": {}}).json()["atlas_stats"]
    assert (stats["kept_pairs"], stats["kept_pairs_capacity"]) == (300, 768)
    parts = stats["window_bytes"], stats["kept_bytes"], stats["memory_bytes"]
    assert parts == (500, 400, 124)
    assert (sum(parts), stats["memory_budget_bytes"]) == (stats["state_bytes"], 1 << 24)


def test_the_state_of_several_choices_is_that_of_the_first(live: Live) -> None:
    body = {"prompt": ["x" * 10, "x" * 100], "n": 2, "max_tokens": 1, "atlas": {}}
    stats = live.post("/v1/completions", body).json()["atlas_stats"]
    assert (stats["kept_pairs"], stats["state_bytes"]) == (10, 1024)


def test_without_an_atlas_object_it_is_the_plain_model(live: Live) -> None:
    body = live.post(CHAT, HELLO).json()
    assert "atlas_stats" not in body
    assert live.engine.requests[-1].memory is None
    live.post(CHAT, {**HELLO, "atlas": None})
    assert live.engine.requests[-1].memory is None
    live.post(CHAT, {**HELLO, "atlas": {"enabled": False, "session_id": "s"}})
    assert live.engine.requests[-1].memory is None


def test_the_dimension_that_is_served_may_be_named(live: Live) -> None:
    assert live.post(CHAT, {**HELLO, "atlas": {"memory_dim": 96}}).status_code == 200
    assert live.engine.requests[-1].memory is not None


def test_nulls_in_the_atlas_object_are_defaults(live: Live) -> None:
    fields = [
        "enabled", "session_id", "memory_layers", "window_size", "blend_ratio", "learning_rate", "polynomial_degree",
        "use_muon", "warmup_tokens", "update_frequency", "omega_window", "cache_strategy", "batch_size", "read",
        "write", "memory_dim", "memory_budget", "kept_pairs",
    ]  # fmt: skip
    assert live.post(CHAT, {**HELLO, "atlas": dict.fromkeys(fields)}).status_code == 200
    memory = live.engine.requests[-1].memory
    assert (memory.memory_layers, memory.window_size, memory.blend_ratio, memory.use_muon) == (1, 512, 0.5, None)


def test_session_header(live: Live) -> None:
    response = live.post(CHAT, HELLO, X_Session_ID="from-header")
    assert response.headers["x-session-id"] == "from-header"
    assert response.json()["atlas_stats"]["session_id"] == "from-header"
    assert live.post(CHAT, HELLO, X_LiteLLM_Session_ID="of-litellm").headers["x-session-id"] == "of-litellm"
    response = live.post(CHAT, {**HELLO, "atlas": {"session_id": "body"}})
    assert response.headers["x-session-id"] == "body"
    response = live.post(CHAT, {**HELLO, "atlas": {"session_id": "same"}}, X_Session_ID="same")
    assert response.status_code == 200
    response = live.post(CHAT, {**HELLO, "atlas": {"session_id": "one"}}, X_Session_ID="two")
    assert response.status_code == 400
    assert error(response)["param"] == "atlas.session_id"


@pytest.mark.parametrize(
    "name", ["..", ".", "a/b", "../x", "a\\b", "x\ny", "x\u0000", "\u202ex", "a\u2215b", " x", "x "]
)
def test_session_names_that_are_refused(live: Live, name: str) -> None:
    response = live.post(CHAT, {**HELLO, "atlas": {"session_id": name}})
    assert response.status_code == 400
    assert error(response)["param"] == "atlas.session_id"
    response = live.post("/v1/atlas/memory/delete", {"context_id": name})
    assert response.status_code == 400
    assert error(response)["type"] == "validation_error"


def test_session_names_that_differ_are_different(live: Live) -> None:
    for name in ("A", "a", "cafe", "caf\u00e9", "CON", "a:b", "x.y@z"):
        assert live.post(CHAT, {**HELLO, "atlas": {"session_id": name}}).status_code == 200
    assert len(live.engine.sessions.live) == 7


def test_a_session_name_is_one_however_its_accents_are_composed(live: Live) -> None:
    composed, decomposed = "caf\u00e9 \uac00", "cafe\u0301 \u1100\u1161"
    first = live.post(CHAT, {**HELLO, "atlas": {"session_id": composed}})
    again = live.post(CHAT, {**HELLO, "atlas": {"session_id": decomposed}})
    assert (first.status_code, again.status_code) == (200, 200)
    assert again.json()["usage"]["prompt_tokens_details"]["cached_tokens"] > 0
    assert [name for _, name in live.engine.sessions.live] == [composed]
    assert live.http.get("/v1/atlas/memory", params={"session_id": decomposed}).status_code == 200
    assert live.post("/v1/atlas/memory/save", {"session_id": decomposed}).json()["context_id"] == composed
    assert live.post("/v1/atlas/memory/reset", {"session_id": decomposed}).json()["session_id"] == composed
    assert live.post("/v1/atlas/memory/delete", {"context_id": decomposed}).json()["context_id"] == composed


def test_write_false_leaves_the_session_alone(live: Live) -> None:
    live.post(CHAT, {**HELLO, "atlas": {"session_id": "s", "write": False}})
    assert live.engine.sessions.live == {}
    assert live.engine.requests[-1].memory.write is False


def test_choices_and_prompts_run_batch_size_at_once(live: Live) -> None:
    live.engine.delay = 0.005
    seen = 0

    def watch() -> None:
        nonlocal seen
        while not done.is_set():
            seen = max(seen, live.engine.running)
            done.wait(0.001)

    done = threading.Event()
    thread = threading.Thread(target=watch)
    thread.start()
    body = {"prompt": ["a", "b", "c"], "n": 3, "max_tokens": 4, "atlas": {"batch_size": 2}}
    answer = live.post("/v1/completions", body).json()
    done.set()
    thread.join()
    assert [choice["text"] for choice in answer["choices"]] == ["aaaa"] * 3 + ["bbbb"] * 3 + ["cccc"] * 3
    assert seen == 2
    assert [request.choice for request in live.engine.requests] == list(range(9))


def test_atlas_stats_ride_on_the_last_chunk(live: Live) -> None:
    text = live.post(CHAT, {**HELLO, "stream": True, "atlas": {}}).text
    chunks = [json.loads(line[6:]) for line in text.splitlines() if line.startswith("data: {")]
    assert [("atlas_stats" in chunk) for chunk in chunks] == [False] * (len(chunks) - 1) + [True]
    assert chunks[-1]["choices"][0]["finish_reason"] == "stop"


# --- degradation --------------------------------------------------------------------------------------------------
def test_without_a_context_a_request_without_a_session_degrades(live: Live) -> None:
    live.engine.submit_errors = [MemoryUnavailable("No available ATLAS contexts")]
    response = live.post(CHAT, {**HELLO, "atlas": {"memory_layers": 2}})
    assert response.status_code == 200
    assert response.json()["atlas_stats"]["degraded"] == "No available ATLAS contexts"
    assert response.json()["choices"][0]["message"]["content"] == "user\nhello"
    assert live.engine.requests[-1].memory is None


def test_without_a_context_a_session_is_refused(live: Live) -> None:
    live.engine.submit_errors = [MemoryUnavailable("No available ATLAS contexts", retry_after=3)] * 4
    response = live.post(CHAT, {**HELLO, "atlas": {"session_id": "s"}})
    assert response.status_code == 503
    assert error(response)["code"] == "memory_unavailable"
    assert response.headers["retry-after"] == "3"


def test_sequences_the_engine_has_no_room_for_wait_for_their_turn(live: Live) -> None:
    original, room = live.engine.submit, 2

    def submit(request: Any, listener: Any) -> Any:
        if live.engine.running >= room:
            raise Overloaded("The queue is full")
        return original(request, listener)

    live.engine.submit = submit
    try:
        answer = live.post("/v1/completions", {"prompt": "ab", "n": 6, "max_tokens": 4, "temperature": 0}).json()
    finally:
        live.engine.submit = original
    assert [choice["text"] for choice in answer["choices"]] == ["abab"] * 6


def test_a_failure_that_passes_is_retried(live: Live) -> None:
    live.engine.submit_errors = [MemoryUnavailable("The store is away")] * 2
    response = live.post(CHAT, {**HELLO, "atlas": {"session_id": "s"}})
    assert response.status_code == 200
    assert response.json()["atlas_stats"]["degraded"] is None


def test_a_memory_that_fails_before_the_first_token_degrades_too(live: Live) -> None:
    live.engine.fail_after, live.engine.failure = 0, MemoryUnavailable("The memory is gone")
    original = live.engine.submit

    def submit(request: Any, listener: Any) -> Any:
        if request.memory is None:
            live.engine.fail_after = None
        return original(request, listener)

    live.engine.submit = submit
    try:
        response = live.post(CHAT, {**HELLO, "atlas": {}})
    finally:
        live.engine.submit = original
    assert response.json()["atlas_stats"]["degraded"] == "The memory is gone"


@pytest.mark.parametrize("path", [CHAT, "/v1/messages", "/api/chat", "/v1/responses"])
def test_a_turn_that_another_server_has_overtaken_can_be_sent_again(live: Live, path: str) -> None:
    live.engine.fail_after, live.engine.failure = (
        2,
        SessionConflict("Another server has changed this session meanwhile"),
    )
    length = {"options": {"num_predict": 8}} if path == "/api/chat" else {"max_tokens": 8}
    body = {"input": "x"} if path == "/v1/responses" else {**HELLO, **length, "stream": False}
    response = live.post(path, {**body, "model": "any"})
    assert response.status_code == 409
    assert (response.headers["Retry-After"], response.headers["retry-after-ms"]) == ("1", "500")
    assert "Another server" in response.text
    if path == CHAT:
        assert response.json()["error"]["code"] == "session_conflict"
        stream = live.post(path, {**body, "stream": True})
        assert "session_conflict" in stream.text
    live.engine.fail_after = None
    assert live.post(path, {**body, "model": "any"}).status_code == 200


def test_a_session_that_cannot_be_read_is_refused(live: Live) -> None:
    live.engine.submit_errors = [SnapshotInvalid("checksum of /secret/path is wrong")]
    response = live.post(CHAT, {**HELLO, "atlas": {"session_id": "s"}})
    assert response.status_code == 503
    assert "/secret/path" not in response.text


def test_a_model_without_a_memory_is_served_and_says_why(start: Start) -> None:
    why = "No memory could be fitted to this model"
    live = start()
    live.engine.model = dataclasses.replace(live.engine.model, memory_unavailable=why)
    assert live.post(CHAT, HELLO).status_code == 200
    degraded = live.post(CHAT, {**HELLO, "atlas": {"memory_layers": 2}})
    assert degraded.json()["atlas_stats"]["degraded"] == why
    assert live.engine.requests[-1].memory is None
    refused = live.post(CHAT, {**HELLO, "atlas": {"session_id": "s"}})
    assert (refused.status_code, error(refused)["message"]) == (503, why)
    assert refused.headers["x-should-retry"] == "false"
    assert error(live.post("/v1/atlas/memory/list", {}))["message"] == why
    status = live.http.get("/v1/atlas/status").json()
    assert (status["status"], status["data"]["initialized"], status["data"]["memory_unavailable"]) == (
        "healthy",
        False,
        why,
    )


def test_with_the_memory_off_everything_else_works(start: Start) -> None:
    live = start(atlas={"enabled": False})
    for path in ("status", "memory", "stats", "metrics", "metrics/stream", "config"):
        response = live.http.get(f"/v1/atlas/{path}")
        assert (response.status_code, error(response)["message"]) == (503, "ATLAS not enabled")
        assert response.headers["x-should-retry"] == "false"
    for path in ("memory/save", "memory/load", "memory/list", "memory/reset", "config"):
        assert live.post(f"/v1/atlas/{path}", {}).status_code == 503
    assert live.post(CHAT, HELLO).status_code == 200
    degraded = live.post(CHAT, {**HELLO, "atlas": {"memory_layers": 2}})
    assert degraded.json()["atlas_stats"]["degraded"] == "ATLAS not enabled"
    assert live.engine.requests[-1].memory is None
    refused = live.post(CHAT, {**HELLO, "atlas": {"session_id": "s"}})
    assert (refused.status_code, error(refused)["message"]) == (503, "ATLAS not enabled")
    assert live.post(CHAT, {**HELLO, "atlas": {"enabled": False, "session_id": "s"}}).status_code == 200


def test_while_a_memory_is_fitted_the_model_is_served_and_says_how_far_it_is(start: Start) -> None:
    live = start()
    served = live.engine.model
    live.engine.model = dataclasses.replace(served, memory_unavailable="The memory is still being fitted to this model")
    live.engine.fitting_now = Fitting(stage="reading", share=0.4242, seconds=12.34)
    plain = live.post(CHAT, {**HELLO, "atlas": {}})
    assert plain.json()["atlas_stats"]["degraded"] == "The memory is still being fitted to this model"
    for response in (
        live.post(CHAT, {**HELLO, "atlas": {"session_id": "s"}}),
        live.http.post(CHAT, json=HELLO, headers={"X-Session-ID": "s"}),
        live.http.get("/v1/atlas/memory"),
        live.post("/v1/atlas/memory/list", {}),
    ):
        assert response.status_code == 503
        assert "reading, 42%, for 12 s" in error(response)["message"]
        assert int(response.headers["retry-after"]) >= 1
        assert response.headers.get("x-should-retry") != "false"
    told = {"stage": "reading", "progress": 0.424, "seconds": 12.3}
    assert live.http.get("/ready").json() == {"status": "ready", "fitting": told}
    assert live.http.get("/v1/atlas/status").json()["data"]["fitting"] == told
    live.engine.model, live.engine.fitting_now = served, None
    assert live.post(CHAT, {**HELLO, "atlas": {"session_id": "s"}}).status_code == 200
    assert live.http.get("/ready").json() == {"status": "ready"}
    assert live.http.get("/v1/atlas/status").json()["data"]["fitting"] is None
