"""What goes wrong with one request, or beside all of them, ends no other request and not the engine."""

from __future__ import annotations

import errno
import os
import resource
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from atlas_jax.engine import Engine
from atlas_jax.engine.api import EngineError, Failed, Finished, MemoryUnavailable
from atlas_jax.engine.host_memory import give_back, resident_bytes
from atlas_jax.engine.scheduler import admission, endings, scheduler
from tests.engine.offline import PATIENCE, Answer, ask, memory, request, words


@pytest.fixture(scope="module")
def engine(opened: Callable[..., Any]) -> Iterator[Engine]:
    """An engine of its own: a fault that was not contained would end it."""
    with opened() as engine:
        yield engine


@contextmanager
def no_descriptors() -> Iterator[None]:
    """The process may open no further file."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    spare = os.open(os.devnull, os.O_RDONLY)
    os.close(spare)
    resource.setrlimit(resource.RLIMIT_NOFILE, (spare, hard))
    held = []
    try:
        try:
            while True:
                held.append(os.open(os.devnull, os.O_RDONLY))
        except OSError as error:
            if error.errno != errno.EMFILE:
                raise
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        for descriptor in held:
            os.close(descriptor)


def test_without_descriptors_nobody_knows_how_much_memory_is_held() -> None:
    with no_descriptors():
        assert resident_bytes() == 0
        assert give_back(1000) == 1000
    assert resident_bytes() > 0


def test_an_idle_engine_outlives_a_shortage_of_descriptors(
    engine: Engine, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    rested = threading.Semaphore(0)
    before = scheduler.give_back

    def give(held: int) -> int:
        try:
            with no_descriptors():
                return before(held)
        finally:
            rested.release()

    monkeypatch.setattr(scheduler, "give_back", give)
    monkeypatch.setattr(scheduler, "_REST_AFTER", 0.01)
    for _ in range(2):
        ask(engine, request(words(1, 20), 2))
        assert rested.acquire(timeout=PATIENCE)
    assert len(ask(engine, request(words(1, 20), 2)).tokens) == 2
    with no_descriptors():
        assert engine.stats().memory_bytes == 0
    assert not caplog.records


def test_an_engine_that_cannot_rest_goes_on_and_says_so_once(
    engine: Engine, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    tried = threading.Semaphore(0)

    def refuse(_: int) -> int:
        tried.release()
        raise MemoryError

    monkeypatch.setattr(scheduler, "give_back", refuse)
    monkeypatch.setattr(scheduler, "_REST_AFTER", 0.01)
    for _ in range(3):
        assert len(ask(engine, request(words(1, 20), 2)).tokens) == 2
        assert tried.acquire(timeout=PATIENCE)
    assert len(ask(engine, request(words(1, 20), 2)).tokens) == 2
    assert len([record for record in caplog.records if "memory back" in record.getMessage()]) == 1


class Once:
    """Raises in the first call for one request, and does what it replaces in every other."""

    def __init__(self, target: Any, name: str, monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
        self._before, self._error = getattr(target, name), error
        self.raised = False
        monkeypatch.setattr(target, name, self)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if not self.raised:
            self.raised = True
            raise self._error
        return self._before(*args, **kwargs)


def ended(engine: Engine, asked: Any) -> Any:
    """The last event of a request."""
    over, events = threading.Event(), Answer().events

    def listen(event: Any) -> None:
        events.append(event)
        if isinstance(event, Finished | Failed):
            over.set()

    engine.submit(asked, listen)
    assert over.wait(PATIENCE)
    assert sum(isinstance(event, Finished | Failed) for event in events) == 1
    return events[-1]


FAULTS: dict[str, Callable[[Engine], tuple[Any, str]]] = {
    "taking the session": lambda engine: (engine.sessions.tiers, "acquire"),
    "starting": lambda engine: (admission, "start_session"),
    "prefill": lambda engine: (engine._serving.scheduler._prefilling, "step"),
    "joining the batch": lambda engine: (engine._serving.scheduler._batch, "add"),
    "keeping the session": lambda engine: (endings, "kept_session"),
    "putting the session back": lambda engine: (engine.sessions.tiers, "release"),
}


@pytest.mark.parametrize("where", FAULTS)
def test_a_fault_in_one_request_ends_that_one_alone(
    where: str, engine: Engine, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    neighbour, began = Answer(), threading.Event()
    over = threading.Event()

    def listen(event: Any) -> None:
        neighbour.events.append(event)
        began.set()
        if isinstance(event, Finished | Failed):
            over.set()

    asked = request(words(3, 30), 120)
    alone = ask(engine, asked)
    engine.submit(asked, listen)
    assert began.wait(PATIENCE)
    key = f"fault-{where}"
    fault = Once(*FAULTS[where](engine), monkeypatch, RuntimeError("/secret/path"))
    last = ended(engine, request(words(4, 200), 4, memory=memory(key)))
    assert fault.raised
    assert isinstance(last, Failed)
    assert isinstance(last.error, EngineError)
    assert "secret" not in str(last.error)
    assert isinstance(last.error, MemoryUnavailable) == (where == "taking the session")
    assert over.wait(PATIENCE)
    assert neighbour.infos == alone.infos
    assert engine.alive()
    assert "secret" in caplog.text
    # the session can be used again, and nothing of the request is left
    assert len(ask(engine, request(words(4, 200), 4, memory=memory(key))).tokens) == 4
    assert (engine.stats().requests_running, engine.stats().requests_waiting) == (0, 0)
