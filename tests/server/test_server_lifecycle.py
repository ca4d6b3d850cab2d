"""Start, readiness, automatic saving, the engine's death, and the end."""

from __future__ import annotations

import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from atlas_jax.engine.api import EngineProtocol, SnapshotInvalid
from tests.patience import PATIENCE
from tests.server.fake_engine import FakeEngine
from tests.server.fake_sessions import Session
from tests.server.live_server import Live, Start, wait_for

COMPLETIONS = "/v1/completions"
ROOT = Path(__file__).parents[2]


# --- readiness ----------------------------------------------------------------------------------------------------
def test_the_server_listens_while_the_model_loads(start: Start) -> None:
    go, engine = threading.Event(), FakeEngine()

    def load() -> EngineProtocol:
        go.wait(10)
        return engine

    live = start(load)
    for path in ("/health", "/v1/health", "/ready", "/v1/models", "/v1/atlas/status", "/props"):
        response = live.http.get(path)
        assert response.status_code == 503, path
        assert response.json()["error"]["message"] == "The model is still loading"
        assert "retry-after" in response.headers
    assert live.post(COMPLETIONS, {"prompt": "x"}).status_code == 503
    assert live.http.get("/metrics").status_code == 200
    assert live.http.head("/health").status_code == 503
    go.set()
    wait_for(lambda: live.http.get("/ready").status_code == 200)
    assert live.http.get("/health").json() == {"status": "ok"}
    assert live.http.head("/v1/health").status_code == 200
    assert live.post(COMPLETIONS, {"prompt": "x"}).status_code == 200


def test_a_model_that_cannot_be_loaded_ends_the_server(start: Start) -> None:
    def load() -> EngineProtocol:
        raise ValueError("no such file")

    live = start(load)
    live._thread.join(10)
    assert not live._thread.is_alive()
    assert live.lifecycle.supervisor.dead


def test_draining_refuses_new_work(start: Start) -> None:
    live = start()
    live.lifecycle.drain()
    response = live.post(COMPLETIONS, {"prompt": "x"})
    assert (response.status_code, response.json()["error"]["code"]) == (503, "draining")
    assert live.http.get("/ready").status_code == 503
    assert live.http.get("/health").status_code == 200
    assert live.http.get("/v1/atlas/status").json()["status"] == "draining"


def test_the_engines_death(start: Start) -> None:
    live = start(FakeEngine(delay=0.05))
    codes: list[Any] = []

    def run(stream: bool) -> None:
        response = live.post(COMPLETIONS, {"prompt": "x", "max_tokens": -1, "ignore_eos": True, "stream": stream})
        codes.append((response.status_code, "engine_stopped" in response.text))

    threads = [threading.Thread(target=run, args=(stream,)) for stream in (True, False)]
    for thread in threads:
        thread.start()
    wait_for(lambda: [one.sent > 2 for one in live.engine._active] == [True, True])
    live.engine.die()
    started = time.monotonic()
    health = live.http.get("/health")
    fast = live.post(COMPLETIONS, {"prompt": "x"})
    assert (health.status_code, health.json()) == (500, {"status": "error"})
    assert (fast.status_code, fast.json()["error"]["code"]) == (503, "engine_stopped")
    for thread in threads:
        thread.join(5)
    assert time.monotonic() - started < 3
    assert sorted(codes) == [(200, True), (503, True)]
    live._thread.join(5)
    assert not live._thread.is_alive()


# --- automatic saving ---------------------------------------------------------------------------------------------
def test_memory_is_loaded_saved_at_intervals_and_at_the_end(start: Start, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    engine = FakeEngine()
    engine.sessions.files_of["local", "fake-7b_memory.atlas"] = json.dumps({"old": [[1, 2], None]})
    atlas = {"auto_load_memory": True, "auto_save_memory": True, "memory_save_interval": 1}
    live = start(engine, atlas=atlas)
    assert engine.sessions.live["local", "old"].tokens == [1, 2]
    live.post(COMPLETIONS, {"prompt": "x", "atlas": {"session_id": "new"}})
    wait_for(lambda: "new" in json.loads(engine.sessions.files_of["local", "fake-7b_memory.atlas"]))
    assert not engine.closed
    engine.sessions.live["local", "last"] = Session()
    live.stop()
    assert engine.closed
    assert "last" in json.loads(engine.sessions.files_of["local", "fake-7b_memory.atlas"])
    text = caplog.text
    assert "Loaded ATLAS memory from fake-7b_memory.atlas" in text
    assert "[ATLAS] Memory state saved to fake-7b_memory.atlas" in text
    assert "[ATLAS] Context pool initialized with 32 contexts" in text


def info_lines(caplog: pytest.LogCaptureFixture, words: str) -> list[str]:
    """What an operator reads of it with the default level."""
    lines = [one.getMessage() for one in caplog.records if one.name.startswith("atlas.") and one.levelname == "INFO"]
    return [line for line in lines if words in line]


def test_saves_that_go_well_are_one_line_at_the_end_for_all_owners(
    start: Start, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    caplog.set_level("DEBUG")
    keys = tmp_path / "keys"
    keys.write_text("first-long-key:anna\nsecond-long-key:ben\nthird-long-key:carla\n")
    engine = FakeEngine()
    for owner in ("anna", "ben", "carla"):
        engine.sessions.files_of[owner, "fake-7b_memory.atlas"] = json.dumps({"old": [[1, 2], None]})
    atlas = {"auto_load_memory": True, "auto_save_memory": True, "memory_save_interval": 1}
    live = start(engine, server={"api_keys_file": str(keys)}, atlas=atlas)
    wait_for(lambda: engine.sessions.saves >= 6, seconds=30)
    assert info_lines(caplog, "Memory state saved") == []
    live.stop()
    assert info_lines(caplog, "Memory state saved") == [
        "[ATLAS] Memory state saved to fake-7b_memory.atlas (3 sessions)"
    ]
    assert info_lines(caplog, "Loaded") == [
        "Loaded ATLAS memory from fake-7b_memory.atlas (3 sessions newer than those stored)"
    ]


@pytest.mark.parametrize("told", [False, True])
def test_what_clients_ask_of_the_memory_is_told_to_operators_who_want_it(
    start: Start, caplog: pytest.LogCaptureFixture, told: bool
) -> None:
    caplog.set_level("DEBUG")
    live = start(atlas={"log_atlas_operations": told, "auto_save_memory": False})
    live.post(COMPLETIONS, {"prompt": "x", "atlas": {"session_id": "s"}})
    for path, body in (
        ("save", {"session_id": "s"}),
        ("save", {}),
        ("load", {"context_id": "s"}),
        ("reset", {"session_id": "s"}),
        ("delete", {"context_id": "s"}),
    ):
        assert live.post(f"/v1/atlas/memory/{path}", body).status_code == 200, path
    assert len(info_lines(caplog, "Memory state ")) == (5 if told else 0)


def test_the_last_line_says_that_the_server_has_stopped_and_what_it_did(
    start: Start, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    live = start()
    for _ in range(3):
        live.post(COMPLETIONS, {"prompt": "x"})
    live.stop()
    (line,) = info_lines(caplog, "Stopped")
    assert line.startswith("Stopped after 0:00:")
    assert line.endswith(": 3 requests, 0 failed, 0 left by their clients")
    ours = [one.getMessage() for one in caplog.records if one.name.startswith("atlas.")]
    assert ours[-1] == line


def test_a_save_that_fails_does_not_stop_the_end(start: Start) -> None:
    engine = FakeEngine()
    live = start(engine, atlas={"auto_save_memory": True})
    engine.sessions.fail = [OSError("disk")]
    live.stop()
    assert engine.closed


def test_a_damaged_file_does_not_stop_the_start(start: Start) -> None:
    engine = FakeEngine()
    engine.sessions.fail = [SnapshotInvalid("damaged")]
    live = start(engine, atlas={"auto_load_memory": True, "memory_file": "mine.atlas"})
    assert live.http.get("/ready").status_code == 200


def test_nothing_is_written_without_persistence(start: Start) -> None:
    engine = FakeEngine()
    live = start(engine, atlas={"auto_save_memory": True, "auto_load_memory": True, "memory_persist": False})
    live.post(COMPLETIONS, {"prompt": "x", "atlas": {"session_id": "s"}})
    live.stop()
    assert engine.sessions.files_of == {}


def test_log_lines_of_the_mission(start: Start, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("DEBUG")
    live = start(atlas={"log_atlas_operations": True, "latency_budget_ms": 0.001, "stats_update_interval": 50})
    live.post(COMPLETIONS, {"prompt": "x", "atlas": {"session_id": "s", "memory_layers": 3}})
    live.post("/v1/atlas/memory/save", {"session_id": "s"})
    wait_for(lambda: "ATLAS Stats: Memory=50.00%, Window=25.00%, Loss=" in caplog.text)
    assert "(memory_layers=3, cache_hit=false)" in caplog.text
    assert "[ATLAS] Request processed in " in caplog.text
    assert "[ATLAS] Memory state saved for session: s" in caplog.text
    wait_for(lambda: "[ATLAS] Metrics updated: 1 requests" in caplog.text)
    assert "exceeded the latency budget: " in caplog.text
    assert "atlas_requests_over_budget_total 1.0" in live.http.get("/metrics").text


# --- the process --------------------------------------------------------------------------------------------------
class Process:
    """The server as a process of its own."""

    def __init__(self, tmp_path: Path, **options: Any) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.log = tmp_path / "log"
        self.memory = tmp_path / "memory"
        code = f"""
import json, logging, sys
logging.basicConfig(level="INFO")
from tests.server.fake_engine import FakeEngine
from pathlib import Path
from server.serve import serve
from server.config.settings import *
options = json.loads({json.dumps(json.dumps(options))})
engine = FakeEngine(delay=options.get("delay", 0), root=Path({str(self.memory)!r}))
engine.on_close = lambda: print("engine closed", file=sys.stderr, flush=True)
if options.get("die"):
    import threading
    threading.Timer(options["die"], engine.die).start()
sys.exit(serve(Settings(server=ServerSection(port={self.port}, shutdown_grace=options.get("grace", 2))), engine))
"""
        environ = {name: value for name, value in os.environ.items() if not name.startswith("ATLAS_")}
        with self.log.open("w") as log:
            self.process = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stderr=log, stdout=log, env=environ)
        wait_for(self._up)

    def _up(self) -> bool:
        try:
            return self.request("GET", "/ready")[0] == 200
        except OSError:
            assert self.process.poll() is None, self.log.read_text()
            return False

    def open(self, method: str, path: str, body: Any = None) -> http.client.HTTPResponse:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=PATIENCE)
        data = None if body is None else json.dumps(body)
        connection.request(method, path, data, {"Content-Type": "application/json"})
        return connection.getresponse()

    def request(self, method: str, path: str, body: Any = None) -> tuple[int, str]:
        response = self.open(method, path, body)
        return response.status, response.read().decode()

    def end(self, *signals: int) -> tuple[int, float]:
        """Sends the signals; the exit code and how long it took."""
        started = time.monotonic()
        for number in signals:
            self.process.send_signal(number)
            time.sleep(0.2 if len(signals) > 1 else 0)
        return self.process.wait(15), time.monotonic() - started


@pytest.fixture
def process(tmp_path: Path) -> Iterator[Any]:
    running: list[Process] = []

    def begin(**options: Any) -> Process:
        running.append(Process(tmp_path, **options))
        return running[-1]

    yield begin
    for one in running:
        if one.process.poll() is None:
            one.process.kill()
            one.process.wait()


def test_sigterm_with_endless_streams_saves_and_ends_in_time(process: Any) -> None:
    server = process(delay=0.01)
    server.request("POST", COMPLETIONS, {"prompt": "x", "atlas": {"session_id": "kept"}})
    endless = {"prompt": "x", "max_tokens": -1, "ignore_eos": True}
    stream = server.open("POST", COMPLETIONS, {**endless, "stream": True})
    live = server.open("GET", "/v1/atlas/metrics/stream")
    answers: list[tuple[int, str]] = []
    waiting = threading.Thread(target=lambda: answers.append(server.request("POST", COMPLETIONS, endless)))
    waiting.start()
    time.sleep(0.3)
    code, seconds = server.end(signal.SIGTERM)
    assert code == -signal.SIGTERM
    assert seconds < 8
    tail = stream.read().decode()
    assert '"code":"shutting_down"' in tail.split("data: ")[-1]
    live.read()
    waiting.join(5)
    assert answers[0][0] == 503
    assert "engine closed" in server.log.read_text()
    saved = json.loads((server.memory / "local-fake-7b_memory.atlas").read_text())
    assert "kept" in saved
    again = process()
    answer = json.loads(again.request("POST", COMPLETIONS, {"prompt": "x", "atlas": {"session_id": "kept"}})[1])
    assert answer["usage"]["prompt_tokens_details"]["cached_tokens"] == 1


def test_a_request_that_ends_in_time_is_finished(process: Any) -> None:
    server = process(delay=0.02, grace=3)
    answers: list[tuple[int, str]] = []
    body = {"prompt": "abc", "max_tokens": 30}
    thread = threading.Thread(target=lambda: answers.append(server.request("POST", COMPLETIONS, body)))
    thread.start()
    time.sleep(0.2)
    code, seconds = server.end(signal.SIGTERM)
    thread.join(5)
    assert (code, answers[0][0]) == (-signal.SIGTERM, 200)
    assert json.loads(answers[0][1])["choices"][0]["text"] == "abc" * 10
    assert seconds < 3


def test_a_second_ctrl_c_hurries_and_still_saves(process: Any) -> None:
    server = process(delay=0.01, grace=5)
    stream = server.open("POST", COMPLETIONS, {"prompt": "x", "max_tokens": -1, "ignore_eos": True, "stream": True})
    time.sleep(0.1)
    code, seconds = server.end(signal.SIGINT, signal.SIGINT)
    assert code == 130
    assert seconds < 3
    assert b"shutting_down" in stream.read()
    assert "engine closed" in server.log.read_text()
    assert (server.memory / "local-fake-7b_memory.atlas").exists()


def test_the_process_fails_when_the_engine_dies(process: Any) -> None:
    server = process(die=2.0)
    assert server.process.wait(10) == 1
    assert "engine thread has died" in server.log.read_text()


def test_live_stop_is_quick(start: Start) -> None:
    live: Live = start()
    started = time.monotonic()
    live.stop()
    assert time.monotonic() - started < 2


def test_a_call_that_waits_for_the_disk_is_told_that_the_server_stops(start: Start) -> None:
    engine = FakeEngine()
    live = start(engine, server={"shutdown_grace": 2})
    begun, free = threading.Event(), threading.Event()

    def slow(owner: str, filename: str | None) -> Any:
        begun.set()
        free.wait(30)
        raise OSError("too late")

    engine.sessions.save_all = slow  # type: ignore[method-assign, assignment]
    answers: list[httpx.Response] = []
    caller = threading.Thread(target=lambda: answers.append(live.post("/v1/atlas/memory/save", {})))
    caller.start()
    assert begun.wait(30)
    live.server.should_exit = True
    caller.join(30)
    free.set()
    live.stop()
    assert answers[0].status_code == 503
    assert "shutting down" in answers[0].json()["error"]["message"]
