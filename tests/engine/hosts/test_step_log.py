"""The log of steps: a runner that is called as another has been is where that one is, bit for bit, and holds no more."""

from __future__ import annotations

import dataclasses
import gc
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from atlas_jax.engine import Engine, EngineConfig
from atlas_jax.engine.api import EngineError
from atlas_jax.engine.compile_cache import CompileCounter
from atlas_jax.engine.hosts.connection import Connection
from atlas_jax.engine.hosts.follower import Follower, follow
from atlas_jax.engine.hosts.group import Group
from atlas_jax.engine.hosts.leader import HostsError, LeaderRunner, StepLog
from atlas_jax.engine.loader import open_model
from atlas_jax.engine.runner.pretrained import PretrainedRunner
from tests.engine.offline import Answer, ask, ask_all, memory, request, words
from tests.patience import PATIENCE


def tcp_pair() -> tuple[socket.socket, socket.socket]:
    """Two ends of a connection of this machine with itself."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        one = socket.create_connection(listener.getsockname())
        return one, listener.accept()[0]


class Pair:
    """An engine whose runner is followed by another, in a thread of this process."""

    def __init__(self, config: EngineConfig, cache: Path) -> None:
        here, there = tcp_pair()
        self.opened = open_model(config, cache)
        other = open_model(config, cache).runner
        assert isinstance(other, PretrainedRunner)
        self.follower, self.error = Follower(other), ""
        self.there = Connection(there)
        self.log = StepLog({1: Connection(here)})
        self.thread = threading.Thread(target=self._follow, args=({"model": "tiny"},))
        self.thread.start()
        self.log.agree({"model": "tiny"})
        assert isinstance(self.opened.runner, PretrainedRunner)
        self.runners = self.opened.runner, other
        leader = LeaderRunner(self.opened.runner, self.log)
        opened = dataclasses.replace(self.opened, runner=leader)
        self.engine = Engine(config, opened, None, CompileCounter(), Group(0, 2, self.log))
        self.engine._serving.scheduler.start()

    def _follow(self, facts: dict[str, str]) -> None:
        try:
            follow(self.follower, self.there, facts)
        except HostsError as error:
            self.error = str(error)


@pytest.fixture
def pair(models: dict[str, tuple[Path, Path]], cache: Path) -> Callable[..., Any]:
    @contextmanager
    def open_pair(**settings: Any) -> Iterator[Pair]:
        model, adapter = models["llama"]
        config = EngineConfig(
            model_path=model,
            adapter_path=adapter,
            max_concurrent=4,
            max_window=256,
            max_context=1024,
            **settings,
        )
        found = Pair(config, cache)
        try:
            yield found
        finally:
            found.engine.close(timeout=PATIENCE)
            found.thread.join(PATIENCE)

    return open_pair


def conversation(engine: Engine) -> list[Answer]:
    """Every kind of request: plain, sampled, scored, one that goes on from a prefix, sessions that are resumed."""
    said, session = words(1, 200), memory("told", blend_ratio=0.9, window_size=128)
    texts = [request(words(2, 300), 8), request(words(3, 40), 8, temperature=0.8, seed=5, top_p=0.9)]
    answers = ask_all(engine, [*texts, request(said * 2, 8, memory=session)])
    answers += ask_all(engine, [request([*words(2, 300), 7, 8], 8), request(words(4, 30), 4, prompt_logprobs=2)])
    told = answers[2].tokens
    answers.append(ask(engine, request([*said * 2, *told, *said], 8, memory=session)))
    return answers


def end_as_one(both: Pair) -> None:
    """Ends both; asserts that they are where the other is."""
    both.engine.close(timeout=PATIENCE)
    both.thread.join(PATIENCE)
    assert not both.error
    here, there = (jax.tree.leaves((runner.sequences, runner.decode_state)) for runner in both.runners)
    for one, other in zip(here, there, strict=True):
        np.testing.assert_array_equal(np.asarray(one), np.asarray(other))


def test_a_follower_goes_with_the_leader(pair: Callable[..., Any]) -> None:
    with pair() as both:
        said, session = words(1, 150), memory("told", window_size=128)
        told = ask(both.engine, request(said, 4, memory=session)).tokens
        ask(both.engine, request([*said, *told, *words(2, 20)], 4, memory=session))
        end_as_one(both)


@pytest.mark.slow
def test_a_follower_is_where_the_leader_is(opened: Callable[..., Any], pair: Callable[..., Any]) -> None:
    with opened() as alone:
        wanted = conversation(alone)
    with pair() as both:
        found = conversation(both.engine)
        gc.collect()
        ask(both.engine, request(words(5, 20), 2))
        end_as_one(both)
        assert both.follower.held < 12, "only what prefixes of the last requests are kept as"
    for one, other in zip(found, wanted, strict=True):
        assert one.infos == other.infos
    assert found[3].end.cached_tokens == wanted[3].end.cached_tokens > 0


def test_the_engine_ends_with_a_follower(pair: Callable[..., Any]) -> None:
    with pair() as both:
        assert both.engine.alive()
        both.there.close()
        both.thread.join(PATIENCE)
        for listener in both.log._listeners:
            listener.join(PATIENCE)
        assert both.log.failure is not None
        assert "Process 1" in both.log.failure
        assert not both.engine.alive()
        with pytest.raises(EngineError):
            ask(both.engine, request(words(1, 20), 2))


def test_a_follower_ends_with_the_leader(pair: Callable[..., Any]) -> None:
    with pair() as both:
        both.log.fail("it is over")
        both.thread.join(PATIENCE)
        assert both.error == "Process 0 has gone"


def test_a_process_that_has_opened_something_else_is_refused() -> None:
    here, there = tcp_pair()
    log = StepLog({1: Connection(here)})
    errors: list[str] = []

    def other() -> None:
        try:
            follow(None, Connection(there), {"model": "b", "kv_dtype": "int8"})  # type: ignore[arg-type]
        except HostsError as error:
            errors.append(str(error))

    thread = threading.Thread(target=other)
    thread.start()
    with pytest.raises(HostsError, match="Process 1 cannot follow: model is b and a in process 0"):
        log.agree({"model": "a", "kv_dtype": "int8"})
    thread.join(PATIENCE)
    assert errors == ["model is b and a in process 0"]
