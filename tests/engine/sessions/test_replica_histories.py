"""Two engines on one store, with kills, cut networks and lost answers in any order: every history is that of one engine."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, rule, run_state_machine_as_test

from atlas_jax.engine import Engine
from atlas_jax.engine.api import MemoryUnavailable, SessionConflict, SessionNotFound
from tests.engine.offline import ask, memory, request, words

pytest.importorskip("obstore")

from tests.engine.sessions.replicas import Bucket, killed, shared, together

Text = tuple[int, ...]
"""A conversation: the seeds of its turns."""


@dataclass(frozen=True)
class Operation:
    """What a client has done, and what it was told.

    Attributes:
      seed: of a turn's words; None deletes the session.
      begin, end: when it was sent, and when the answer came.
      answer: the tokens; None where there was none.
      fate: `done`, `refused` (nothing was kept, as it was told), or `doubt`: it was told that it may be lost, or nothing.
    """

    seed: int | None
    begin: float
    end: float
    answer: tuple[int, ...] | None
    fate: str


def is_linearisable(history: list[Operation], answer_of: Callable[[Text], tuple[int, ...]]) -> bool:
    """Whether one server, doing one thing at a time, could have told the same.

    Every operation takes place at one moment between its begin and its end; one in doubt at any later moment, or never. The
    search is over orders that real time allows, with states that were met before left out (Wing and Gong).

    Args:
      answer_of: what a server answers to the last turn of a conversation.
    """
    done = [one for one in history if one.fate != "refused"]
    met: set[tuple[frozenset[int], Text]] = set()

    def possible(left: frozenset[int], text: Text) -> bool:
        if all(done[at].fate == "doubt" for at in left):
            return True
        if (left, text) in met:
            return False
        met.add((left, text))
        first_end = min(done[at].end for at in left if done[at].fate == "done")
        for at in left:
            one = done[at]
            if one.begin > first_end:
                continue
            after = () if one.seed is None else (*text, one.seed)
            # what was answered in doubt was still answered on the state of some moment
            if one.answer is not None and one.fate == "done" and answer_of(after) != one.answer:
                continue
            if possible(left - {at}, after):
                return True
        return False

    return possible(frozenset(range(len(done))), ())


@pytest.mark.parametrize(
    ("history", "wanted"),
    [
        ([(1, 0, 1, "1"), (2, 2, 3, "12")], True),
        ([(1, 0, 1, "1"), (2, 2, 3, "2")], False),
        ([(1, 0, 3, "21"), (2, 1, 2, "2")], True),
        ([(1, 0, 1, "1"), (2, 2, 3, "2?"), (3, 4, 5, "123")], True),
        ([(1, 0, 1, "1"), (2, 2, 3, "2?"), (3, 4, 5, "13")], True),
        ([(1, 0, 1, "1"), (2, 2, 3, "2?"), (3, 4, 5, "132")], False),
        ([(1, 0, 1, "1"), (2, 2, 3, "!"), (3, 4, 5, "123")], False),
        ([(1, 0, 1, "1"), (None, 2, 3, ""), (3, 4, 5, "3")], True),
        ([(1, 0, 1, "1"), (None, 2, 3, ""), (3, 4, 5, "13")], False),
        ([(1, 0, 1, "1"), (2, 2, 9, "312"), (3, 3, 8, "13")], False),
        ([(1, 0, 1, "1"), (2, 2, 9, "132"), (3, 3, 8, "13")], True),
    ],
)
def test_the_checker_tells_histories_apart(history: list[tuple[int | None, int, int, str]], wanted: bool) -> None:
    """`12` is the answer to turns 1 and 2; `?` is in doubt, `!` was refused."""

    def operation(seed: int | None, begin: int, end: int, said: str) -> Operation:
        fate = "refused" if said == "!" else "doubt" if said.endswith("?") else "done"
        return Operation(seed, begin, end, tuple(map(int, said)) if fate == "done" and seed else None, fate)

    assert is_linearisable([operation(*one) for one in history], lambda text: text) == wanted


class Oracle:
    """What one engine answers to a conversation."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._known: dict[Text, tuple[int, ...]] = {}

    def __call__(self, text: Text) -> tuple[int, ...]:
        if text not in self._known:
            name = "-".join(map(str, text))
            if len(text) > 1:
                self(text[:-1])
                self._engine.sessions.fork("owner", "-".join(map(str, text[:-1])), name)
            self._known[text] = tuple(said(self._engine, text[-1], name).tokens)
        return self._known[text]


def said(engine: Engine, seed: int, name: str) -> Any:
    answer = ask(engine, request(words(seed, 20), 4, memory=memory(name)))
    assert answer.end is not None
    return answer


class Histories(RuleBasedStateMachine):
    """Clients of a session each, or of one together, on two engines."""

    engines: list[Engine]
    bucket: Bucket
    oracle: Oracle
    runs = 0

    @initialize()
    def begin(self) -> None:
        Histories.runs += 1
        self.names = [f"run{Histories.runs}-{name}" for name in "ab"]
        self.histories: dict[str, list[Operation]] = {name: [] for name in self.names}
        self.seed = 0

    def turn(self, replica: int, name: str, seed: int) -> Operation:
        begin = time.monotonic()
        answer, fate = None, "done"
        try:
            found = said(self.engines[replica], seed, name)
            answer = tuple(found.tokens)
            if found.end.memory.degraded:
                fate = "doubt"
        except (SessionConflict, MemoryUnavailable):
            fate = "refused"
        return Operation(seed, begin, time.monotonic(), answer, fate)

    def next(self) -> int:
        self.seed += 1
        return self.seed

    @rule(replica=st.integers(0, 1), name=st.integers(0, 1))
    def takes_a_turn(self, replica: int, name: int) -> None:
        self.histories[self.names[name]].append(self.turn(replica, self.names[name], self.next()))

    @rule(name=st.integers(0, 1), replicas=st.sampled_from([(0, 1), (1, 0), (0, 0)]))
    def two_at_once(self, name: int, replicas: tuple[int, int]) -> None:
        seeds, whose = (self.next(), self.next()), self.names[name]
        acts = [lambda at=at, seed=seed: self.turn(at, whose, seed) for at, seed in zip(replicas, seeds, strict=True)]
        for one in together(*acts):
            assert isinstance(one, Operation), one
            self.histories[whose].append(one)

    @rule(replica=st.integers(0, 1), name=st.integers(0, 1))
    def deletes(self, replica: int, name: int) -> None:
        begin = time.monotonic()
        try:
            self.engines[replica].sessions.delete("owner", self.names[name])
            fate = "done"
        except (SessionNotFound, MemoryUnavailable):
            return
        except OSError:
            fate = "doubt"
        self.histories[self.names[name]].append(Operation(None, begin, time.monotonic(), None, fate))

    @rule(replica=st.integers(0, 1))
    def is_killed(self, replica: int) -> None:
        killed(self.engines[replica])

    @rule(replica=st.integers(0, 1))
    def is_drained(self, replica: int) -> None:
        self.engines[replica].sessions.save_changed()
        killed(self.engines[replica])

    @rule(replica=st.integers(0, 1))
    def is_cut_off(self, replica: int) -> None:
        self.bucket.away ^= {replica}

    @rule(replica=st.integers(0, 1), name=st.integers(0, 1))
    def is_cut_off_while_it_answers(self, replica: int, name: int) -> None:
        if replica in self.bucket.away:
            return
        whose, seed = self.names[name], self.next()
        acts = [lambda: self.turn(replica, whose, seed), lambda: self.bucket.away.add(replica)]
        self.histories[whose].append(together(*acts)[0])

    @rule(replica=st.integers(0, 1))
    def loses_an_answer(self, replica: int) -> None:
        self.bucket.losing.add(replica)

    def teardown(self) -> None:
        self.bucket.away.clear()
        self.bucket.losing.clear()
        if not hasattr(self, "names"):
            return
        for name in self.names:
            for replica in (0, 1):
                for _ in range(3):  # one that was cut off may write at this moment what it still had
                    self.histories[name].append(self.turn(replica, name, self.next()))
                    if self.histories[name][-1].fate == "done":
                        break
                assert self.histories[name][-1].fate == "done", "with its network back every replica goes on"
            assert is_linearisable(self.histories[name], self.oracle), self.histories[name]


@pytest.fixture(scope="module")
def two(opened: Callable[..., Any]) -> Iterator[tuple[list[Engine], Bucket]]:
    bucket = Bucket()
    with shared(opened, bucket, 2) as engines:
        yield engines, bucket


@pytest.mark.slow  # three engines to compile; test_replicas.py has its rules one by one
@pytest.mark.parametrize("examples", [150])
def test_every_history_is_that_of_one_engine(
    two: tuple[list[Engine], Bucket], engines: Callable[[str], Engine], examples: int
) -> None:
    Histories.engines, Histories.bucket = two
    Histories.oracle = Oracle(engines("float32"))
    run_state_machine_as_test(
        Histories,
        settings=settings(
            max_examples=examples,
            stateful_step_count=12,
            deadline=None,
            derandomize=True,
            database=None,
            suppress_health_check=list(HealthCheck),
        ),
    )
