"""Fixtures: a server for the module, and servers with settings of their own."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import openai
import pytest

from atlas_jax.engine.api import TemplateFacts
from server.app import EngineSource
from tests.server.fake_engine import FakeEngine
from tests.server.live_server import Live, Start, make_settings, wait_for


@pytest.fixture
def start() -> Iterator[Start]:
    """Starts servers with settings of their own and stops them after the test."""
    running: list[Live] = []

    def begin(
        engine: EngineSource | None = None,
        *,
        server: dict[str, Any] | None = None,
        atlas: dict[str, Any] | None = None,
    ) -> Live:
        running.append(Live(make_settings(server=server, atlas=atlas), engine or FakeEngine()))
        return running[-1]

    yield begin
    for live in running:
        live.stop()


@pytest.fixture(scope="module")
def _shared() -> Iterator[Live]:
    live = Live(make_settings(), FakeEngine())
    yield live
    live.stop()


@pytest.fixture
def live(_shared: Live) -> Iterator[Live]:
    """The module's server, with an engine that remembers nothing of the test before."""
    engine: FakeEngine = _shared.engine
    wait_for(lambda: engine.running == 0)
    engine.requests.clear()
    engine.sessions.live.clear()
    engine.sessions.forks.clear()
    engine.sessions.files_of.clear()
    yield _shared
    engine.submit_errors.clear()
    engine.sessions.fail.clear()
    engine.documents.fail.clear()
    engine.fail_after, engine.delay = None, 0.0
    engine.script.clear()
    engine.template, engine.grammar_fault = TemplateFacts(), None
    wait_for(lambda: engine.running == 0 and _shared.admission.running == 0)


@pytest.fixture
def client(live: Live) -> openai.OpenAI:
    """The official client, pointed at the module's server."""
    return live.openai()
