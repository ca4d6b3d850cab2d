"""The process with the real engine: it ends in time, keeps its sessions, and works without a memory."""

from __future__ import annotations

import json
import signal
import threading
from dataclasses import dataclass, field
from typing import Any

import pytest

from tests.e2e.conftest import Launch
from tests.e2e.real_server import STOP_SECONDS, RealServer, content, conversation, remember, text

FIRST = text("restart", 200)
SECOND = "And what came first?"


@dataclass
class Restart:
    """A server that was ended in mid-stream, and the one that took over its memory folder.

    Attributes:
      undisturbed: the second turn of a session of the same first turn, before the restart.
      first: the first turn of the session that goes on after it.
      stream: what the client of the running stream received.
    """

    undisturbed: Any
    first: Any
    code: int
    seconds: float
    log: str
    files: list[str]
    after: RealServer
    stream: list[str] = field(default_factory=list)


@pytest.fixture(scope="module")
def restart(launch: Launch) -> Restart:
    before = launch(folder="restarted")
    twin = before.chat(FIRST, session="twin")
    undisturbed = before.chat(FIRST, content(twin), SECOND, session="twin")
    first = before.chat(FIRST, session="kept")
    lines: list[str] = []
    flows = threading.Event()

    def read() -> None:
        body = {
            "model": before.name,
            "messages": conversation(text("stream", 200)),
            "max_tokens": 1_000_000,
            "ignore_eos": True,
            "stream": True,
            "atlas": remember("streaming"),
        }
        with before.http.stream("POST", "/v1/chat/completions", json=body) as response:
            for line in response.iter_lines():
                lines.append(line)
                if len(lines) > 20:
                    flows.set()

    reader = threading.Thread(target=read, daemon=True)
    reader.start()
    assert flows.wait(120)
    code, seconds = before.end()
    reader.join(5)
    assert not reader.is_alive()
    before.kill()
    files = [path.name for path in before.memory.rglob("*.atlas")]
    return Restart(undisturbed, first, code, seconds, before.log, files, launch(folder="restarted"), lines)


def test_sigterm_ends_the_process_in_time(restart: Restart) -> None:
    assert restart.code == -signal.SIGTERM
    assert restart.seconds < STOP_SECONDS
    assert "tiny_memory.atlas" in restart.files
    assert "Traceback" not in restart.log


def test_sigterm_ends_a_running_stream_cleanly(restart: Restart) -> None:
    events = [line.removeprefix("data: ") for line in restart.stream if line.startswith("data: ")]
    assert len(events) > 5
    if events[-1] == "[DONE]":
        assert json.loads(events[-2])["choices"][0]["finish_reason"]
    else:
        assert json.loads(events[-1])["error"]["code"] == "shutting_down"


def test_a_session_goes_on_after_a_restart_as_if_there_had_been_none(restart: Restart) -> None:
    answer = restart.after.chat(FIRST, content(restart.first), SECOND, session="kept")
    assert content(answer) == content(restart.undisturbed)
    assert answer.usage == restart.undisturbed.usage
    stats, expected = answer.atlas_stats, restart.undisturbed.atlas_stats
    assert restart.first.atlas_stats["tokens_absorbed"] >= 2 * 128
    assert expected["cache_hit"]
    assert stats == {**expected, "session_id": "kept"}


def test_the_session_of_a_cut_stream_is_kept(restart: Restart) -> None:
    after = restart.after
    row = after.contexts()["streaming"]
    assert row["tokens"] > 2 * 128
    body = {"model": after.name, "prompt": "and go on", "max_tokens": 4, "atlas": remember("streaming")}
    assert after.post("/v1/completions", body).json()["atlas_stats"]["cache_hit"]
    assert after.contexts()["streaming"]["tokens"] > row["tokens"]


def test_the_second_server_did_not_complain(restart: Restart) -> None:
    assert restart.after.trouble == []
    assert "Loaded ATLAS memory from tiny_memory.atlas (0 sessions newer than those stored)" in restart.after.log


@pytest.mark.parametrize(("number", "expected"), [(signal.SIGTERM, -signal.SIGTERM), (signal.SIGINT, 130)])
def test_a_signal_while_the_model_loads(launch: Launch, number: int, expected: int) -> None:
    loading = launch(wait=False)
    code, seconds = loading.end(number)
    assert (code, loading.trouble) == (expected, [])
    assert seconds < STOP_SECONDS


@pytest.mark.slow
def test_without_a_memory_the_model_answers(launch: Launch) -> None:
    plain = launch("--no-atlas")
    answer = plain.chat("Hello")
    assert content(answer)
    assert not hasattr(answer, "atlas_stats")
    chat = {"model": plain.name, "messages": conversation("Hello"), "max_tokens": 2}
    refused = plain.post("/v1/chat/completions", {**chat, "atlas": {"session_id": "s"}})
    assert (refused.status_code, refused.json()["error"]["message"]) == (503, "ATLAS not enabled")
    for path in ("memory", "status", "stats"):
        response = plain.http.get(f"/v1/atlas/{path}")
        assert (response.status_code, response.json()["error"]["message"]) == (503, "ATLAS not enabled")
    assert plain.post("/v1/atlas/memory/save").status_code == 503
    code, seconds = plain.end()
    assert code == -signal.SIGTERM
    assert seconds < STOP_SECONDS
    assert not plain.memory.exists()


def test_a_port_that_is_taken_ends_the_server(restart: Restart, launch: Launch) -> None:
    port = str(restart.after.http.base_url.port)
    with pytest.raises(AssertionError, match="address already in use"):
        launch("--port", port)
