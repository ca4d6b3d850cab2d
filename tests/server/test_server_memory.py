"""The ATLAS endpoints: memory, status, statistics, metrics, run-time configuration."""

from __future__ import annotations

import json
import threading
from typing import Any

import httpx
import pytest

from atlas_jax.engine.api import MemoryUnavailable, SessionConflict, SetAside, SnapshotInvalid, StorageFull
from server.config.settings import SettingsError
from server.schemas.atlas import AtlasDefaults
from server.services.runtime_config import RuntimeConfig
from tests.server.fake_engine import FakeEngine
from tests.server.live_server import Live, Start, make_settings, wait_for

CHAT = "/v1/chat/completions"
HELLO = {"messages": [{"role": "user", "content": "hello"}]}


def error(response: httpx.Response) -> dict[str, Any]:
    found: dict[str, Any] = response.json()["error"]
    return found


# --- memory endpoints ---------------------------------------------------------------------------------------------
def test_save_and_load_by_filename(live: Live) -> None:
    live.post(CHAT, {**HELLO, "atlas": {"session_id": "s"}})
    saved = live.post("/v1/atlas/memory/save").json()
    assert saved["success"] is True
    assert saved["filename"] == "fake-7b_memory.atlas"
    assert saved["context_id"] is None
    assert saved["bytes"] > 0
    live.engine.sessions.live.clear()
    loaded = live.post("/v1/atlas/memory/load", {"filename": "fake-7b_memory.atlas"}).json()
    assert set(loaded) == {"success", "filename", "loaded_at"}
    assert ("local", "s") in live.engine.sessions.live
    assert live.post("/v1/atlas/memory/save", {"filename": "other.atlas"}).json()["filename"] == "other.atlas"
    assert live.post("/v1/atlas/memory/save", {"session_id": "s"}).json()["context_id"] == "s"


def test_an_empty_body_is_an_empty_object(live: Live) -> None:
    for path in ("save", "list"):
        response = live.http.post(f"/v1/atlas/memory/{path}")
        assert response.status_code == 200, response.text
        response = live.http.post(f"/v1/atlas/memory/{path}", content=b"", headers={"content-type": "application/json"})
        assert response.status_code == 200, response.text


@pytest.mark.parametrize("body", [b"", b"{}", b"null", b'{"all": false}', b'{"session_id": null}', b'{"all": null}'])
def test_nothing_said_is_not_everything_reset(live: Live, body: bytes) -> None:
    live.post(CHAT, {**HELLO, "atlas": {"session_id": "kept"}})
    tokens = list(live.engine.sessions.live["local", "kept"].tokens)
    assert tokens
    headers = {"content-type": "application/json"} if body else {}
    refused = live.http.post("/v1/atlas/memory/reset", content=body, headers=headers)
    assert (refused.status_code, error(refused)["param"]) == (400, "session_id")
    assert live.engine.sessions.live["local", "kept"].tokens == tokens
    both = live.post("/v1/atlas/memory/reset", {"all": True, "session_id": "kept"})
    assert (both.status_code, error(both)["param"]) == (400, "all")
    assert live.engine.sessions.live["local", "kept"].tokens == tokens
    answer = live.post("/v1/atlas/memory/reset", {"all": True}).json()
    assert (answer["sessions_reset"], answer["session_id"]) == (1, None)
    assert live.engine.sessions.live["local", "kept"].tokens == []


def test_contexts_carry_the_callers_state(live: Live) -> None:
    state = {"conversation_history": [{"role": "user"}], "user_preferences": {"ü": [1, 2.5, None, True]}}
    saved = live.post("/v1/atlas/memory/save", {"context_id": "user123_conversation", "state": state}).json()
    assert (saved["success"], saved["context_id"]) == (True, "user123_conversation")
    loaded = live.post("/v1/atlas/memory/load", {"context_id": "user123_conversation"}).json()
    assert loaded["state"] == state
    assert set(loaded) == {"success", "context_id", "state", "loaded_at"}
    deleted = live.post("/v1/atlas/memory/delete", {"context_id": "user123_conversation"}).json()
    assert deleted == {"success": True, "context_id": "user123_conversation"}
    missing = live.post("/v1/atlas/memory/load", {"context_id": "user123_conversation"})
    assert missing.status_code == 404
    assert error(missing)["code"] == 404


def test_a_session_is_forked_and_the_two_go_on_apart(live: Live) -> None:
    live.post(CHAT, {**HELLO, "atlas": {"session_id": "a"}})
    before = list(live.engine.sessions.live["local", "a"].tokens)
    answer = live.post("/v1/atlas/memory/fork", {"session_id": "a", "target": "b"})
    assert (answer.status_code, answer.json()) == (200, {"success": True, "session_id": "a", "target": "b"})
    assert live.engine.sessions.live["local", "b"].tokens == before
    live.post(CHAT, {"messages": [{"role": "user", "content": "on"}], "atlas": {"session_id": "b"}})
    assert live.engine.sessions.live["local", "a"].tokens == before
    for body, status, param in (
        ({"session_id": "a", "target": "b"}, 400, "target"),
        ({"session_id": "nobody", "target": "c"}, 404, None),
        ({"session_id": "a", "target": "x/y"}, 400, "target"),
        ({"session_id": "a"}, 400, "target"),
        ({"target": "c"}, 400, "session_id"),
        ({}, 400, "session_id"),
        ({"session_id": "a", "target": "c", "to": "d"}, 400, "to"),
    ):
        refused = live.post("/v1/atlas/memory/fork", body)
        assert (refused.status_code, error(refused)["param"]) == (status, param), body
    assert ("local", "c") not in live.engine.sessions.live


def test_list_is_paged(live: Live) -> None:
    for number in range(5):
        live.post("/v1/atlas/memory/save", {"context_id": f"c{number}", "state": number})
    names, after = [], None
    while True:
        page = live.post("/v1/atlas/memory/list", {"limit": 2, "after": after}).json()
        names += [row["context_id"] for row in page["contexts"]]
        after = page["next"]
        if after is None:
            break
    assert names == [f"c{number}" for number in range(5)]
    assert page["contexts"][0]["has_state"] is True


def test_reset_one_and_all(live: Live) -> None:
    for name in ("a", "b"):
        live.post(CHAT, {**HELLO, "atlas": {"session_id": name}})
    assert live.post("/v1/atlas/memory/reset", {"session_id": "a"}).json()["sessions_reset"] == 1
    assert live.engine.sessions.live["local", "a"].tokens == []
    assert live.engine.sessions.live["local", "b"].tokens
    assert live.post("/v1/atlas/memory/reset", {"all": True}).json()["sessions_reset"] == 2
    assert live.post("/v1/atlas/memory/reset", {"session_id": "nobody"}).status_code == 404


def test_memory_info(live: Live) -> None:
    live.post(CHAT, {**HELLO, "atlas": {"session_id": "s"}})
    info = live.http.get("/v1/atlas/memory", params={"session_id": "s"}).json()
    assert info["session_id"] == "s"
    assert {"window_size", "window_fill", "memory_capacity", "memory_used", "total_updates", "last_update_time"} < set(
        info
    )
    assert info["layers"] == [{"layer": 27, "taps": [27, 24], "norm": 1.5, "effective_rank": 2.5, "omega_loss": 0.25}]
    assert live.http.get("/v1/atlas/memory").json()["session_id"] is None
    assert live.http.get("/v1/atlas/memory", params={"session_id": "t"}).status_code == 404
    assert live.http.get("/v1/atlas/memory", params={"session_id": "../t"}).status_code == 400


@pytest.mark.parametrize(
    "name",
    [
        "../x",
        "..",
        ".",
        "/etc/passwd",
        "C:\\x",
        "\\\\host\\share",
        "file:///x",
        "a/b",
        "x..y",
        "x.",
        ".hidden",
        "NUL",
        "con.atlas",
        "a b",
        "x\n",
        "x\u0000",
        "\uff0e\uff0e\uff0fx",
        "%2e%2e%2fx",
        "x" * 129,
    ],
)
def test_file_names_that_are_refused(live: Live, name: str) -> None:
    for path in ("save", "load"):
        response = live.post(f"/v1/atlas/memory/{path}", {"filename": name})
        assert response.status_code == 400
        assert error(response)["param"] == "filename"
    assert live.engine.sessions.files_of == {}


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("save", {"filename": "a", "context_id": "b"}, "context_id"),
        ("save", {"filename": "a", "session_id": "b"}, "session_id"),
        ("save", {"state": {}}, "context_id"),
        ("save", {"file": "a"}, "file"),
        ("load", {}, "filename"),
        ("load", {"filename": "a", "context_id": "b"}, "context_id"),
        ("load", {"session_id": "a"}, "session_id"),
        ("list", {"limit": 0}, "limit"),
        ("list", {"limit": "5"}, "limit"),
        ("delete", {}, "context_id"),
        ("delete", {"context_id": None}, "context_id"),
        ("reset", {"session": "a"}, "session"),
    ],
)
def test_memory_bodies_that_are_refused(live: Live, path: str, body: Any, param: str) -> None:
    response = live.post(f"/v1/atlas/memory/{path}", body)
    assert response.status_code == 400
    assert set(error(response)) == {"code", "message", "type", "param", "timestamp"}
    assert (error(response)["code"], error(response)["type"]) == (400, "validation_error")
    assert error(response)["param"] == param


@pytest.mark.parametrize("body", [[], "x", 5, True])
def test_bodies_that_are_no_object(live: Live, body: Any) -> None:
    for path in ("/v1/atlas/memory/save", "/v1/atlas/config", CHAT, "/tokenize"):
        response = live.http.post(path, json=body)
        assert response.status_code == 400
        assert error(response)["message"] == "The request body must be a JSON object"


def test_store_errors(live: Live) -> None:
    live.engine.sessions.fail = [StorageFull("The disk has no room")]
    assert live.post("/v1/atlas/memory/save").status_code == 507
    live.engine.sessions.fail = [SnapshotInvalid("Made by another model")]
    response = live.post("/v1/atlas/memory/load", {"filename": "x.atlas"})
    assert (response.status_code, error(response)["message"]) == (400, "Made by another model")
    live.engine.sessions.fail = [MemoryUnavailable("away")] * 2
    assert live.post("/v1/atlas/memory/save").status_code == 200
    live.engine.sessions.fail = [SessionConflict("overtaken")] * 2
    assert live.post("/v1/atlas/memory/save").status_code == 200
    live.engine.sessions.fail = [SessionConflict("overtaken")] * 9
    assert live.post("/v1/atlas/memory/save").status_code == 409
    live.engine.sessions.fail = [OSError("/secret/path: I/O error")]
    response = live.post("/v1/atlas/memory/save")
    assert (response.status_code, error(response)["message"]) == (503, "Failed to save context state")
    assert "Retry-After" in response.headers
    assert "/secret" not in response.text


def test_a_save_without_a_state_keeps_the_one_that_is_stored(live: Live) -> None:
    live.post("/v1/atlas/memory/save", {"context_id": "c", "state": {"kept": 1}})
    assert live.post("/v1/atlas/memory/save", {"context_id": "c"}).status_code == 200
    assert live.post("/v1/atlas/memory/load", {"context_id": "c"}).json()["state"] == {"kept": 1}
    live.post("/v1/atlas/memory/save", {"context_id": "c", "state": None})
    assert live.post("/v1/atlas/memory/load", {"context_id": "c"}).json()["state"] is None


def test_files_are_listed_and_deleted(live: Live) -> None:
    live.post(CHAT, {**HELLO, "atlas": {"session_id": "s"}})
    live.post("/v1/atlas/memory/save", {"filename": "mine.atlas"})
    listed = live.post("/v1/atlas/memory/list").json()
    assert [row["filename"] for row in listed["files"]] == ["mine.atlas"]
    assert live.post("/v1/atlas/memory/delete", {"filename": "mine.atlas"}).json() == {
        "success": True,
        "filename": "mine.atlas",
    }
    assert live.post("/v1/atlas/memory/list").json()["files"] == []
    assert live.post("/v1/atlas/memory/delete", {"filename": "mine.atlas"}).status_code == 404
    assert live.post("/v1/atlas/memory/delete", {}).status_code == 400


def test_the_status_names_what_was_set_aside_to_its_owner(live: Live) -> None:
    live.engine.sessions.aside["local"] = [SetAside(name="s", kind="session", reason="snapshot is damaged")]
    live.engine.sessions.aside["other"] = [SetAside(name="t", kind="session", reason="snapshot is damaged")]
    status = live.http.get("/v1/atlas/status").json()["data"]
    live.engine.sessions.aside.clear()
    assert status["set_aside"] == [{"name": "s", "kind": "session", "reason": "snapshot is damaged"}]


def test_endpoints_and_persistence_can_be_turned_off(start: Start) -> None:
    live = start(atlas={"enable_memory_endpoints": False, "enable_realtime_stats": False})
    assert live.post("/v1/atlas/memory/list").status_code == 503
    assert live.http.get("/v1/atlas/memory").status_code == 503
    assert live.http.get("/v1/atlas/metrics/stream").status_code == 503
    live = start(atlas={"memory_persist": False})
    assert live.post("/v1/atlas/memory/save").status_code == 503
    assert live.post("/v1/atlas/memory/list").status_code == 200
    assert live.http.get("/v1/atlas/status").json()["data"]["memory_persistence"] is False


# --- status, statistics, metrics ----------------------------------------------------------------------------------
def test_status(live: Live) -> None:
    body = live.http.get("/v1/atlas/status").json()
    assert body["status"] == "healthy"
    data = body["data"]
    assert (data["initialized"], data["enabled"], data["context_pool_size"]) == (True, True, 32)
    assert (data["model"], data["memory_layers"], data["state_bytes_per_session"]) == ("fake-7b", [1, 0], 1024)
    assert data["memory_dim"] == 96
    assert (data["memory_budget_bytes"], data["kept_pairs_capacity"]) == (1 << 24, 768)
    assert data["state_bytes"] == data["window_bytes"] + data["kept_bytes"] + data["memory_bytes"] == 1024
    assert data["uptime_seconds"] > 0


def test_figures_that_cannot_be_read_stop_nothing(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    live = start(atlas={"metrics_interval": 50})
    asked = 0

    def stats() -> None:
        nonlocal asked
        asked += 1
        raise OSError(24, "Too many open files")

    with monkeypatch.context() as patch:
        patch.setattr(live.engine, "stats", stats)
        wait_for(lambda: asked >= 2)
        scrape = live.http.get("/metrics")
        assert scrape.status_code == 200
        assert "atlas_http_requests" in scrape.text
    live.post(CHAT, HELLO)
    wait_for(lambda: live.http.get("/v1/atlas/stats").json()["avg_memory_utilization"] > 0)


def test_stats_and_metrics_count(start: Start) -> None:
    live = start(atlas={"stats_update_interval": 50})
    for _ in range(3):
        live.post(CHAT, HELLO)
    live.post("/v1/atlas/memory/save")
    live.engine.fail_after = 1
    live.post(CHAT, HELLO)
    wait_for(lambda: live.http.get("/v1/atlas/stats").json()["avg_memory_utilization"] > 0)
    stats = live.http.get("/v1/atlas/stats").json()
    assert (stats["requests_processed"], stats["memory_saves"]) == (3, 1)
    assert stats["avg_memory_utilization"] == pytest.approx(0.5)
    body = live.http.get("/v1/atlas/metrics").json()
    current = body["data"]["current"]
    assert body["status"] == "success"
    assert body["data"]["server_health"] is True
    assert body["data"]["history_size"] == 3
    assert (current["total_requests"], current["completed_requests"], current["failed_requests"]) == (4, 3, 1)
    assert 0 < current["min_latency_ms"] <= current["avg_latency_ms"] <= current["max_latency_ms"]


def test_metrics_stream(start: Start) -> None:
    live = start(atlas={"metrics_interval": 50})
    with live.http.stream("GET", "/v1/atlas/metrics/stream") as response:
        assert response.headers["content-type"].startswith("text/event-stream")
        lines = response.iter_lines()
        events = [json.loads(next(lines)[6:]) for _ in range(1)]
        next(lines)
        events.append(json.loads(next(lines)[6:]))
    assert {"timestamp", "active_requests", "avg_latency"} < set(events[0])
    assert all(type(event["timestamp"]) is int for event in events)
    monitoring = live.lifecycle._monitoring
    wait_for(lambda: not monitoring._subscribers)


def test_every_part_of_the_state_is_told_wherever_sessions_are(start: Start) -> None:
    live = start(atlas={"stats_update_interval": 50, "metrics_interval": 50})
    live.post(CHAT, {**HELLO, "atlas": {"session_id": "s"}})
    sizes = {"state_bytes": 1024, "window_bytes": 500, "kept_bytes": 400, "memory_bytes": 124}
    sizes |= {"memory_budget_bytes": 1 << 24, "kept_pairs_capacity": 768, "window_size": 512}
    memory = live.http.get("/v1/atlas/memory", params={"session_id": "s"}).json()
    (row,) = live.post("/v1/atlas/memory/list").json()["contexts"]
    for found in (memory, row):
        assert sizes.items() <= found.items()
    assert (memory["kept_pairs"], row["kept_pairs"], row["window_fill"]) == (memory["memory_used"], 5, 7)
    wait_for(lambda: live.http.get("/v1/atlas/stats").json()["avg_kept_fill_ratio"] == 0.25)
    with live.http.stream("GET", "/v1/atlas/metrics/stream") as response:
        assert json.loads(next(response.iter_lines())[6:])["kept_fill_ratio"] == 0.25
    lines = live.http.get("/metrics").text.splitlines()
    for line in (
        "atlas_kept_pairs 192.0",
        "atlas_kept_pairs_capacity 768.0",
        'atlas_session_state_bytes{part="window"} 500.0',
        'atlas_session_state_bytes{part="kept"} 400.0',
        'atlas_session_state_bytes{part="memory"} 124.0',
        "atlas_memory_budget_bytes 1.6777216e+07",
    ):
        assert line in lines


# --- run-time configuration ---------------------------------------------------------------------------------------
def test_config_changes_defaults_at_once(start: Start) -> None:
    live = start()
    before = live.http.get("/v1/atlas/config").json()["data"]
    assert (before["window_size"], before["memory_save_interval"]) == (512, 300)
    changed = live.post("/v1/atlas/config", {"window_size": 256, "use_muon": True, "latency_budget_ms": 7.5}).json()
    assert changed["status"] == "success"
    assert changed["data"] == {**before, "window_size": 256, "use_muon": True, "latency_budget_ms": 7.5}
    live.post(CHAT, {**HELLO, "atlas": {}})
    memory = live.engine.requests[-1].memory
    assert (memory.window_size, memory.use_muon) == (256, True)
    assert live.post("/v1/atlas/config", {"use_muon": None}).json()["data"]["use_muon"] is None
    live.post("/v1/atlas/config", {"enabled": False})
    live.post(CHAT, {**HELLO, "atlas": {"memory_layers": 2}})
    assert live.engine.requests[-1].memory is None


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"window_size": 100_000}, "window_size"),
        ({"blend_ratio": 0.25, "window_size": 130}, "window_size"),
        ({"blend_ratio": 0.25, "memory_layers": 11}, "memory_layers"),
        ({"blend_ratio": 0.25, "memory_path": "/tmp"}, "memory_path"),
        ({"blend_ratio": 0.25, "model": "x"}, "model"),
        ({"blend_ratio": 0.25, "metrics_interval": 0}, "metrics_interval"),
        ({"blend_ratio": 0.25, "memory_save_interval": -1}, "memory_save_interval"),
        ({"blend_ratio": 0.25, "session_id": "x"}, "session_id"),
        ({"blend_ratio": 0.25, "memory_dim": 64}, "memory_dim"),
        ({"blend_ratio": 0.25, "memory_dim": 7}, "memory_dim"),
        ({"blend_ratio": 0.25, "update_frequency": 1024}, "update_frequency"),
        ({"blend_ratio": 0.25, "memory_budget": 1 << 25}, "memory_budget"),
        ({"blend_ratio": 0.25, "kept_pairs": 769}, "kept_pairs"),
    ],
)
def test_config_is_all_or_nothing(live: Live, change: dict[str, Any], param: str) -> None:
    before = live.http.get("/v1/atlas/config").json()
    response = live.post("/v1/atlas/config", change)
    assert response.status_code == 400
    assert error(response)["param"] == param
    assert live.http.get("/v1/atlas/config").json() == before


def test_a_default_that_no_request_could_be_served_with_stops_the_start() -> None:
    with pytest.raises(SettingsError, match=r"'atlas\.default_config\.kept_pairs': value must be at most 768"):
        RuntimeConfig(make_settings(atlas={"default_config": AtlasDefaults(kept_pairs=769)})).check(FakeEngine())
    RuntimeConfig(make_settings(atlas={"default_config": AtlasDefaults(kept_pairs=768)})).check(FakeEngine())
    off = {"enabled": False, "default_config": AtlasDefaults(kept_pairs=769)}
    RuntimeConfig(make_settings(atlas=off)).check(FakeEngine())


def test_config_shows_the_dimension_that_is_served(live: Live) -> None:
    shown = live.http.get("/v1/atlas/config").json()["data"]
    assert shown["memory_dim"] == 96
    assert live.post("/v1/atlas/config", {"memory_dim": 96}).json()["data"] == shown


def test_config_shows_no_paths_and_no_keys(live: Live) -> None:
    names = set(live.http.get("/v1/atlas/config").json()["data"])
    assert not any("path" in name or "key" in name or "file" in name or name == "model" for name in names)


def test_concurrent_clients_with_different_settings(start: Start) -> None:
    live = start(FakeEngine(delay=0.001))

    def run(number: int) -> None:
        body = {
            "prompt": f"{number:02d}",
            "max_tokens": 4,
            "atlas": {"session_id": f"s{number}", "memory_layers": number % 10 + 1},
        }
        answers[number] = live.post("/v1/completions", body).json()

    answers: dict[int, Any] = {}
    threads = [threading.Thread(target=run, args=(number,)) for number in range(50)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert {number: answer["choices"][0]["text"] for number, answer in answers.items()} == {
        number: f"{number:02d}" * 2 for number in range(50)
    }
    assert all(answer["atlas_stats"]["session_id"] == f"s{number}" for number, answer in answers.items())
    layers = {request.memory.session.session_id: request.memory.memory_layers for request in live.engine.requests}
    assert layers == {f"s{number}": number % 10 + 1 for number in range(50)}
