"""What a newcomer meets: the first page, unknown paths, the log, and how a start fails."""

from __future__ import annotations

import html
import json
import logging
import re
import socket
import subprocess
import sys
import threading
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from atlas_jax.engine.api import EngineError, EngineProtocol
from atlas_jax.progress import ProgressLog
from server.serve import StartError, reachable, serve
from server.services.runtime_config import RuntimeConfig
from server.services.stats import ServerStats
from tests.patience import PATIENCE
from tests.server.fake_engine import FakeEngine
from tests.server.live_server import Live, Start, make_settings, wait_for
from tests.server.test_server_settings import ROOT, model_file

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
HELLO = {"messages": [{"role": "user", "content": "hello"}]}
BROWSER = {"Accept": "text/html,application/xhtml+xml,application/xml;q=0.9,*/*;q=0.8"}


# --- the first page -----------------------------------------------------------------------------------------------
class Page(HTMLParser):
    """Checks that tags are balanced, and keeps links and text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.links: list[str] = []
        self.text = ""
        self.inline = False
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.inline |= tag == "script" and not dict(attributes).get("src")
        self.links += [value or "" for name, value in attributes if name in ("href", "src")]
        if tag not in ("meta", "link", "br", "input"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def test_a_browser_sees_a_page_whose_links_and_example_work(live: Live) -> None:
    response = live.http.get("/", headers=BROWSER)
    assert response.headers["content-type"].startswith("text/html")
    assert "default-src 'none'" in response.headers["content-security-policy"]
    page = Page(response.text)
    assert "fake-7b" in page.text
    assert not page.inline
    assert page.links
    for link in page.links:
        assert link.startswith(("/", "#"))  # nothing is fetched from elsewhere
        assert live.http.get(link).status_code == 200, link
    example = re.search(r"curl .*", page.text)
    assert example is not None
    ended = subprocess.run(["sh", "-c", example[0]], capture_output=True, text=True, timeout=PATIENCE)
    assert json.loads(ended.stdout)["model"] == "fake-7b"


@pytest.mark.parametrize("accept", ["*/*", "application/json", "", "text/plain"])
def test_a_program_sees_json(live: Live, accept: str) -> None:
    body = live.http.get("/", headers={"Accept": accept}).json()
    assert (body["name"], body["status"], body["model"], body["memory"]) == ("atlas-jax", "ready", "fake-7b", True)
    paths = set(live.http.get("/schema/openapi.json").json()["paths"])
    assert set(body["endpoints"].values()) <= paths | {"/schema/openapi.json"}


def test_what_a_stranger_sends_or_a_file_is_called_never_becomes_markup(start: Start) -> None:
    live = start(FakeEngine(name="<script>alert(1)</script>"), server={"allowed_hosts": ("*",)})
    text = live.http.get("/", headers=BROWSER).text
    assert "<script>" not in text
    assert html.escape("<script>alert(1)</script>") in text
    raw = live.raw(b"GET / HTTP/1.1\r\nHost: '<img src=x>\r\nAccept: text/html\r\nConnection: close\r\n\r\n")
    assert b"<img" not in raw


def test_with_keys_the_page_tells_no_stranger_what_is_served(start: Start, tmp_path: Path) -> None:
    keys = tmp_path / "keys"
    keys.write_text("secret-key:team\n")
    live = start(server={"api_keys_file": str(keys)})
    page, body = live.http.get("/", headers=BROWSER), live.http.get("/").json()
    assert "fake-7b" not in page.text + json.dumps(body)
    assert "Authorization: Bearer YOUR_KEY" in html.unescape(page.text)
    assert (body["model"], body["memory"], body["status"]) == (None, None, "ready")


def test_while_the_model_loads_the_page_says_so_and_looks_again(start: Start) -> None:
    go, engine = threading.Event(), FakeEngine()

    def load() -> EngineProtocol:
        go.wait(10)
        return engine

    live = start(load)
    assert live.http.get("/").json()["status"] == "loading"
    page = live.http.get("/", headers=BROWSER).text
    assert "loading" in page
    assert 'http-equiv="refresh"' in page
    go.set()
    wait_for(lambda: live.http.get("/").json()["status"] == "ready")
    assert "refresh" not in live.http.get("/", headers=BROWSER).text


# --- paths of other APIs ------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("path", "said"),
    [
        ("/v1/images/generations", "images"),
        ("/v1/audio/speech", "audio"),
        ("/v1/responses/resp_1/compact", "previous_response_id"),
        ("/v1/threads", "atlas.session_id"),
        ("/v1/complete", CHAT),
        ("/generate", COMPLETIONS),
        ("/v1/messages/batches", "uploaded"),
        ("/api/pull", "/api/tags"),
        ("/v1/files", "uploaded"),
        ("/docs", "/schema/openapi.json"),
        ("/v1/chat/completion", "did you mean /v1/chat/completions?"),
        ("/v1/model", "did you mean /v1/models?"),
        ("/v1/atlas/memory/sav", "did you mean /v1/atlas/memory/save?"),
        ("/v1/nothing/like/it", "/schema/openapi.json"),
    ],
)
def test_an_unknown_path_is_told_what_there_is(live: Live, path: str, said: str) -> None:
    for response in (live.http.get(path), live.post(path, {})):
        assert response.status_code == 404
        error = response.json()["error"]
        assert said in (error if path.startswith("/api/") else error["message"])


def test_a_made_up_path_is_not_repeated_and_costs_nothing(live: Live) -> None:
    response = live.http.get("/v1/" + "chat/" * 1500)
    assert response.status_code == 404
    assert "chat/chat" not in response.text


# --- limits and scrapes -------------------------------------------------------------------------------------------
SCRAPES = ("/metrics", "/health", "/v1/health", "/ready", "/v1/atlas/status")


def test_scrapes_are_outside_the_limit_on_requests(start: Start) -> None:
    live = start(server={"rate_limit_requests": 2})
    for path in SCRAPES * 3:
        response = live.http.get(path)
        assert response.status_code == 200, path
        assert "x-ratelimit-remaining-requests" not in response.headers
    assert [live.http.get("/v1/models").status_code for _ in range(3)] == [200, 200, 429]
    assert {live.http.get(path).status_code for path in SCRAPES} == {200}


def test_a_scrape_still_needs_its_key(start: Start, tmp_path: Path) -> None:
    keys = tmp_path / "keys"
    keys.write_text("secret-key\n")
    live = start(server={"api_keys_file": str(keys), "rate_limit_requests": 1})
    assert live.http.get("/metrics").status_code == live.http.get("/v1/atlas/status").status_code == 401
    for _ in range(3):
        assert live.http.get("/metrics", headers={"X-Api-Key": "secret-key"}).status_code == 200


def limited(live: Live) -> dict[str, float]:
    found = re.findall(
        r'^atlas_rate_limited_total\{reason="(\w+)"\} (\S+)$', live.http.get("/metrics").text, re.MULTILINE
    )
    return {reason: float(count) for reason, count in found}


def test_only_refusals_by_a_limit_count_as_limited(start: Start) -> None:
    go, engine = threading.Event(), FakeEngine()

    def load() -> EngineProtocol:
        go.wait(10)
        return engine

    live = start(load, server={"rate_limit_requests": 1}, atlas={"enabled": False})
    for path in ("/ready", "/health", "/ready"):
        assert live.http.get(path).status_code == 503
    go.set()
    wait_for(lambda: live.http.get("/ready").status_code == 200)
    assert live.http.get("/v1/atlas/status").status_code == 503  # not enabled
    assert limited(live) == {}
    assert [live.http.get("/v1/models").status_code for _ in range(3)] == [200, 429, 429]
    assert limited(live) == {"rate_limit_exceeded": 2.0}


def test_a_full_queue_counts_as_limited(start: Start) -> None:
    live = start(FakeEngine(delay=0.02), server={"max_concurrent": 1, "max_waiting": 0, "max_waiting_per_key": 0})
    with live.http.stream(
        "POST", COMPLETIONS, json={"prompt": "x", "max_tokens": -1, "ignore_eos": True, "stream": True}
    ):
        wait_for(lambda: live.admission.running == 1)
        assert live.post(COMPLETIONS, {"prompt": "x"}).status_code == 503
    assert limited(live) == {"overloaded": 1.0}


def test_a_client_that_left_is_no_failure(start: Start) -> None:
    live = start(FakeEngine(delay=0.01))
    endless = {"prompt": "x", "max_tokens": -1, "ignore_eos": True, "stream": True}
    with live.http.stream("POST", COMPLETIONS, json=endless) as response:
        next(response.iter_bytes())
    wait_for(lambda: live.admission.running == 0)
    current = live.http.get("/v1/atlas/metrics").json()["data"]["current"]
    assert (current["total_requests"], current["failed_requests"], current["active_requests"]) == (1, 0, 0)
    live.engine.fail_after = 0
    live.post(COMPLETIONS, {"prompt": "x"})
    assert live.http.get("/v1/atlas/metrics").json()["data"]["current"]["failed_requests"] == 1


# --- intervals and numbers ----------------------------------------------------------------------------------------
def test_the_two_intervals_are_the_two_loops_of_the_contract(start: Start) -> None:
    """`stats_update_interval` paces the averages, `metrics_interval` (`ATLAS_METRICS_INTERVAL`) the live metrics."""
    live = start(atlas={"stats_update_interval": 3_600_000, "metrics_interval": 50})
    wait_for(lambda: live.http.get("/v1/atlas/stats").json()["avg_window_fill_ratio"] == 0.25)
    engine = live.engine
    before = engine.stats
    engine.stats = lambda: before().__class__(**{**_fields(before()), "window_fill_ratio": 1.0})
    with live.http.stream("GET", "/v1/atlas/metrics/stream") as response:
        lines = response.iter_lines()
        events = [json.loads(line[6:]) for line, _ in zip((one for one in lines if one), range(4), strict=False)]
    assert len(events) == 4
    assert live.http.get("/v1/atlas/stats").json()["avg_window_fill_ratio"] == 0.25  # nothing was sampled meanwhile


def _fields(stats: Any) -> dict[str, Any]:
    return {name: getattr(stats, name) for name in stats.__dataclass_fields__}


def test_the_logs_loss_is_the_current_one_and_the_total_is_the_total(
    start: Start, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("DEBUG", "atlas.server")  # its own: other tests may have set its parent's
    engine = FakeEngine()
    before = engine.stats
    engine.stats = lambda: before().__class__(**{**_fields(before()), "omega_loss": 0.5, "omega_loss_total": 40.0})
    live = start(engine, atlas={"log_atlas_operations": True, "stats_update_interval": 50})
    wait_for(lambda: "ATLAS Stats: Memory=50.00%, Window=25.00%, Loss=0.500000, Kept=25.00%" in caplog.text)
    assert "[ATLAS] ATLAS Stats" not in caplog.text
    assert live.http.get("/v1/atlas/stats").json()["total_omega_loss"] == 40.0


def test_every_timestamp_is_a_whole_number_of_seconds(live: Live) -> None:
    save = live.post("/v1/atlas/memory/save", {"context_id": "c", "state": 1}).json()
    load = live.post("/v1/atlas/memory/load", {"context_id": "c"}).json()
    reset = live.post("/v1/atlas/memory/reset", {"session_id": "c"}).json()
    wrong = live.post("/v1/atlas/memory/load", {"context_id": ""}).json()["error"]
    for value in (save["timestamp"], load["loaded_at"], reset["timestamp"], wrong["timestamp"]):
        assert type(value) is int


# --- the log ------------------------------------------------------------------------------------------------------
def server_lines(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [one.getMessage() for one in caplog.records if one.name.startswith("atlas.") and one.levelno >= logging.INFO]


def test_slow_requests_are_told_after_ten_minutes_and_then_once_an_hour(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    now = 1000.0
    stats = ServerStats(RuntimeConfig(make_settings()), 100, clock=lambda: now)
    engine = FakeEngine().stats()

    def use(seconds: int, *added: float) -> list[str]:
        """A second's requests, as often; the lines that came of it."""
        nonlocal now
        caplog.clear()
        for _ in range(seconds):
            now += 1
            for one in added:
                stats.begin()
                stats.end("completed", added_ms=one, request_id="r")
            stats.sample(engine)
        return server_lines(caplog)

    assert use(3600, 1.0, 6.0, 31.5) == [
        "[ATLAS] 1200 of 1800 requests exceeded the latency budget of 5.0ms in the last 10 minutes, "
        "the slowest with 31.5ms"
    ]
    assert stats.over_budget == 7200
    assert use(2 * 3600, 1.0, 6.0) == [
        "[ATLAS] 6600 of 10200 requests exceeded the latency budget of 5.0ms in the last 60 minutes, "
        "the slowest with 31.5ms",
        "[ATLAS] 3600 of 7200 requests exceeded the latency budget of 5.0ms in the last 60 minutes, the slowest with 6.0ms",
    ]
    assert len(use(3600, 1.0)) == 1, "the last of the slow ones"
    assert use(2 * 3600, 1.0) == []
    assert len(use(1200, 8.0)) == 1, "quiet hours were over"


def test_an_hour_within_the_budget_says_nothing(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    now, engine = 0.0, FakeEngine().stats()
    stats = ServerStats(RuntimeConfig(make_settings()), 100, clock=lambda: now)
    for second in range(3600):
        now = float(second)
        stats.begin()
        stats.end("completed", added_ms=4.9, request_id="r")
        stats.sample(engine)
    assert server_lines(caplog) == []


def test_an_idle_hour_says_nothing_at_debug_level_either(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("DEBUG")
    stats, engine = ServerStats(RuntimeConfig(make_settings()), 100), FakeEngine().stats()
    for _ in range(3600):
        stats.sample(engine)
    assert caplog.records == []
    stats.begin()
    stats.end("completed", added_ms=1.0, request_id="r")
    for _ in range(60):
        stats.sample(engine)
    assert [one.getMessage() for one in caplog.records] == ["[ATLAS] Metrics updated: 1 requests, 1.0ms avg latency"]


def test_ordinary_use_adds_no_line_a_request(start: Start, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    live = start(atlas={"latency_budget_ms": 0.001, "stats_update_interval": 50})
    for number in range(60):
        live.post(CHAT, {**HELLO, "model": "gpt-4"})
        live.post(COMPLETIONS, {"prompt": "x", "max_tokens": 3, "atlas": {"session_id": f"s{number % 5}"}})
        live.post(COMPLETIONS, {"prompt": "x", "max_tokens": 2, "stream": True})
        live.post(COMPLETIONS, {"prompt": "x", "temperature": -1})
        live.post("/v1/atlas/memory/list")
        for path in ("/metrics", "/ready", "/v1/models", "/v1/embeddings", "/"):
            live.http.get(path)
    lines = server_lines(caplog)
    assert len(lines) <= 3, lines


def test_the_last_line_of_a_start_says_where_to_go(start: Start, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    go, engine = threading.Event(), FakeEngine()

    def load() -> EngineProtocol:
        go.wait(10)
        return engine

    live = start(load)
    assert server_lines(caplog) == [f"Listening on {live.url}; the model is being loaded"]
    go.set()
    wait_for(lambda: any("Ready" in line for line in server_lines(caplog)))
    line = server_lines(caplog)[-1]
    assert line.startswith(f"Ready: {live.url} (model fake-7b, memory on). Try: curl ")
    ended = subprocess.run(["sh", "-c", line.partition("Try: ")[2]], capture_output=True, text=True, timeout=PATIENCE)
    assert json.loads(ended.stdout)["model"] == "fake-7b"


def test_a_start_on_every_interface_names_an_address_that_can_be_opened() -> None:
    with socket.create_server(("0.0.0.0", 0)) as one:
        assert reachable(one) == f"127.0.0.1:{one.getsockname()[1]}"


def test_long_work_tells_how_far_it_is(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    now = 0.0
    progress = ProgressLog("[ATLAS] Calibrating", clock=lambda: now)
    for step in range(1, 41):
        now += 1.0
        progress("reading", step / 40)
    assert server_lines(caplog) == [
        "[ATLAS] Calibrating: reading, 25 %, about 30 s left",
        "[ATLAS] Calibrating: reading, 50 %, about 20 s left",
        "[ATLAS] Calibrating: reading, 75 %, about 10 s left",
    ]
    caplog.clear()
    progress("fitting the gate", 0.5)
    now += 20
    progress("fitting the gate", 0.75)
    assert server_lines(caplog) == [
        "[ATLAS] Calibrating: fitting the gate, 50 %",
        "[ATLAS] Calibrating: fitting the gate, 75 %, about 20 s left",
    ]


# --- a start that fails -------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("error", "said"),
    [
        (ValueError("architecture 'mamba' is not supported"), "architecture 'mamba' is not supported"),
        (FileNotFoundError(2, "No such file or directory", "m.gguf"), "m.gguf: No such file or directory"),
        (KeyError("x"), "KeyError: 'x' (--log-level debug shows where)"),
        (EngineError(""), "EngineError:  (--log-level debug shows where)"),
        (MemoryError(), "MemoryError:  (--log-level debug shows where)"),
    ],
)
def test_a_model_that_cannot_be_loaded_is_a_reason_and_no_traceback(
    error: Exception, said: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")

    def load() -> EngineProtocol:
        raise error

    with pytest.raises(StartError) as caught:
        serve(make_settings(server={"port": 0}), load)
    assert str(caught.value) == f"the model cannot be served: {said}"
    assert "Traceback" not in caplog.text
    assert not any(record.exc_info for record in caplog.records if record.levelno > logging.DEBUG)


def test_the_process_prints_the_reason_as_its_only_error(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "server", "--model", model_file(tmp_path), "--port", "0", "--log-level", "warning"]
    command += ["--atlas-memory-path", str(tmp_path / "memory")]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=PATIENCE)
    assert ended.returncode == 1
    lines = ended.stderr.splitlines()
    assert len(lines) == 1, ended.stderr
    assert lines[0].startswith("atlas-jax: error: the model cannot be served: ")
