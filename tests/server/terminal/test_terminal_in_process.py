"""A server without a socket: answers come as they are made, and a client that leaves is noticed."""

from __future__ import annotations

from pathlib import Path

import pytest

from atlas_jax.gguf import GGUFError
from server.terminal.client import ApiError, Client
from server.terminal.in_process import ADDRESS, InProcess
from tests.server.fake_engine import FakeEngine
from tests.server.live_server import make_settings, wait_for

ASKED = {"messages": [{"role": "user", "content": "go"}]}


def test_a_stream_comes_while_it_is_made_and_ends_when_nobody_listens() -> None:
    engine = FakeEngine(delay=0.002)
    with InProcess(make_settings(), engine) as server:
        client = Client(ADDRESS, place="the model", transport=server.transport)
        engine.script = ["x" * 4000]
        events = client.stream("/v1/chat/completions", ASKED)
        first = [next(events) for _ in range(4)]
        assert "x" in str(first)
        assert engine.running == 1
        events.close()  # type: ignore[attr-defined]
        wait_for(lambda: engine.running == 0)
        assert engine.cancels == 1
        engine.script, engine.delay = ["ja"], 0.0
        answer = client.post("/v1/chat/completions", ASKED)
        assert answer["choices"][0]["message"]["content"] == "ja"
        with pytest.raises(ApiError, match="temperature") as caught:
            client.post("/v1/chat/completions", {**ASKED, "temperature": 1000})
        assert caught.value.status == 400
    assert engine.closed


def test_queries_have_any_names() -> None:
    engine = FakeEngine()
    with InProcess(make_settings(), engine) as server:
        client = Client(ADDRESS, place="the model", transport=server.transport)
        client.post("/v1/chat/completions", {**ASKED, "atlas": {"session_id": "ü & 名前"}})
        assert client.get("/v1/atlas/memory", session_id="ü & 名前")["session_id"] == "ü & 名前"


def test_what_stands_in_the_way_is_raised() -> None:
    def broken() -> FakeEngine:
        raise GGUFError("not a model")

    with pytest.raises(GGUFError, match="not a model"):
        InProcess(make_settings(), broken).__enter__()


def test_sessions_are_saved_at_the_end(tmp_path: Path) -> None:
    engine = FakeEngine(root=tmp_path)
    saved = []
    engine.sessions.save_changed = lambda timeout=None: saved.append(timeout) or 0  # type: ignore[method-assign,func-returns-value]
    with InProcess(make_settings(), engine) as server:
        server.save()
        assert len(saved) == 1
    assert engine.closed
