"""Memory contexts that may be in use at once, apart from the requests that may; and the switch of all metrics."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import httpx
import pytest

from tests.patience import PATIENCE
from tests.server.fake_engine import FakeEngine
from tests.server.live_server import Live, Start, wait_for

COMPLETIONS = "/v1/completions"
NONE_LEFT = "No available ATLAS contexts"
ENDLESS = {"prompt": "x", "max_tokens": -1, "ignore_eos": True, "stream": True}


class Holder:
    """A stream that goes on until it is ended."""

    def __init__(self, live: Live, atlas: dict[str, Any] | None) -> None:
        body = ENDLESS if atlas is None else {**ENDLESS, "atlas": atlas}
        self._over = threading.Event()
        self._began = threading.Event()
        self._thread = threading.Thread(target=self._read, args=(live, body))
        self._thread.start()
        assert self._began.wait(10)

    def _read(self, live: Live, body: dict[str, Any]) -> None:
        with (
            httpx.Client(base_url=live.url, timeout=PATIENCE) as client,
            client.stream("POST", COMPLETIONS, json=body) as answer,
        ):
            for _ in answer.iter_lines():
                self._began.set()
                if self._over.is_set():
                    return

    def end(self) -> None:
        self._over.set()
        self._thread.join(10)


def status(live: Live) -> dict[str, Any]:
    found: dict[str, Any] = live.http.get("/v1/atlas/status").json()["data"]
    return found


def ask(live: Live, atlas: dict[str, Any] | None, **fields: Any) -> httpx.Response:
    body = {"prompt": "hello", "max_tokens": 3, **fields}
    return httpx.post(
        live.url + COMPLETIONS, json=body if atlas is None else {**body, "atlas": atlas}, timeout=PATIENCE
    )


def later(work: Callable[[], httpx.Response]) -> Future[httpx.Response]:
    pool = ThreadPoolExecutor(1)
    future = pool.submit(work)
    pool.shutdown(wait=False)
    return future


def test_contexts_are_as_many_as_requests_unless_said_otherwise(start: Start) -> None:
    assert status(start(server={"max_concurrent": 3}))["context_pool_size"] == 3
    assert status(start(server={"max_concurrent": 3}, atlas={"context_pool_size": 7}))["context_pool_size"] == 7


def test_when_the_contexts_are_used_up(start: Start) -> None:
    live = start(FakeEngine(delay=0.005), server={"max_concurrent": 4}, atlas={"context_pool_size": 1})
    holder = Holder(live, {"session_id": "first"})
    assert (status(live)["context_pool_size"], status(live)["contexts_in_use"]) == (1, 1)
    # What needs no context is not held up, and what can do without one says that it had none.
    assert "atlas_stats" not in ask(live, None).json()
    assert ask(live, {}).json()["atlas_stats"]["degraded"] == NONE_LEFT
    assert live.engine.requests[-1].memory is None
    waiting = later(lambda: ask(live, {"session_id": "second"}))
    wait_for(lambda: live.lifecycle._contexts.waiting == 1)
    wait_for(lambda: live.admission.running == 1)  # whoever waits for a context keeps no place from others
    assert "atlas_contexts_waiting 1.0" in live.http.get("/metrics").text
    holder.end()
    answer = waiting.result(10).json()
    assert answer["atlas_stats"]["degraded"] is None
    assert answer["atlas_stats"]["session_id"] == "second"
    wait_for(lambda: status(live)["contexts_in_use"] == 0)


def test_a_session_that_waited_too_long_for_a_context_is_refused(start: Start) -> None:
    live = start(FakeEngine(delay=0.005), server={"queue_timeout": 0.1}, atlas={"context_pool_size": 1})
    holder = Holder(live, {})
    refused = ask(live, {"session_id": "second"})
    assert (refused.status_code, refused.json()["error"]["message"]) == (503, NONE_LEFT)
    assert int(refused.headers["retry-after"]) > 0
    assert not live.engine.sessions.live
    holder.end()
    wait_for(lambda: status(live)["contexts_in_use"] == live.admission.running == 0)
    assert ask(live, {"session_id": "second"}).status_code == 200


def test_sequences_of_one_request_share_the_contexts_there_are(start: Start) -> None:
    live = start(FakeEngine(delay=0.002), server={"max_concurrent": 8}, atlas={"context_pool_size": 2})
    most = 0
    submit = live.engine.submit

    def counted(request: Any, listener: Any) -> Any:
        nonlocal most
        most = max(most, live.engine.running + 1)
        return submit(request, listener)

    live.engine.submit = counted
    answer = ask(live, {}, n=6, temperature=0).json()
    assert len(answer["choices"]) == 6
    assert answer["atlas_stats"]["degraded"] is None
    assert most == 2
    assert all(request.memory is not None for request in live.engine.requests)


@pytest.mark.parametrize("session", [False, True])
def test_by_default_nothing_degrades_or_waits_but_for_its_place(start: Start, session: bool) -> None:
    live = start(FakeEngine(delay=0.001), server={"max_concurrent": 2})
    with ThreadPoolExecutor(8) as pool:
        names = [{"session_id": f"s{number}"} if session else {} for number in range(8)]
        answers = list(pool.map(lambda atlas: ask(live, atlas), names))
    assert [answer.json()["atlas_stats"]["degraded"] for answer in answers] == [None] * 8
    wait_for(lambda: live.admission.running == live.lifecycle._contexts.running == 0)


def test_who_waits_for_a_context_is_told_when_the_server_ends(start: Start) -> None:
    live = start(FakeEngine(delay=0.005), atlas={"context_pool_size": 1})
    holder = Holder(live, {"session_id": "first"})
    waiting = later(lambda: ask(live, {"session_id": "second"}))
    wait_for(lambda: live.lifecycle._contexts.waiting == 1)
    live.stop()
    refused = waiting.result(10)
    assert (refused.status_code, refused.json()["error"]["code"]) == (503, "shutting_down")
    holder.end()


# --- metrics ------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("path", ["/metrics", "/v1/atlas/metrics", "/v1/atlas/metrics/stream"])
def test_one_switch_turns_every_metric_off(start: Start, path: str) -> None:
    live = start(atlas={"enable_metrics": False})
    refused = live.http.get(path)
    assert (refused.status_code, refused.json()["error"]["message"]) == (503, "Metrics are not enabled")
    assert refused.headers["x-should-retry"] == "false"


def test_the_status_says_whether_there_are_metrics(start: Start) -> None:
    assert status(start())["metrics_enabled"] is True
    assert status(start(atlas={"enable_realtime_stats": False}))["metrics_enabled"] is True
    off = start(atlas={"enable_metrics": False})
    assert status(off)["metrics_enabled"] is False
    assert off.http.get("/v1/atlas/stats").status_code == 200
