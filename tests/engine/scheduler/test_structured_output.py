"""Answers under a JSON schema, and those beside them."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from atlas_jax.engine import Engine
from atlas_jax.engine.api import AnswerShape, Delta, EngineError, Event, Failed, Finished, InvalidRequest
from tests.engine.offline import PATIENCE, ask, ask_all, memory, request, words

PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 6},
        "age": {"type": "integer", "minimum": 0, "maximum": 120},
        "tags": {"type": "array", "items": {"enum": ["a", "b"]}, "maxItems": 3},
    },
    "required": ["name", "age", "tags"],
    "additionalProperties": False,
}


def is_person(value: Any) -> bool:
    return (
        list(value) == ["name", "age", "tags"]
        and len(value["name"]) <= 6
        and 0 <= value["age"] <= 120
        and len(value["tags"]) <= 3
        and set(value["tags"]) <= {"a", "b"}
    )


def compiled(engine: Engine, schema: dict[str, Any], owner: str = "") -> Any:
    return engine.answer_grammar(AnswerShape(wanted=schema), owner=owner).result(PATIENCE)


@settings(max_examples=6, deadline=None, derandomize=True)
@given(
    seed=st.integers(0, 1000),
    temperature=st.sampled_from([0.0, 1.0, 3.0]),
    with_memory=st.booleans(),
    ignore_eos=st.booleans(),
)
def test_an_answer_is_what_its_schema_allows_and_ends(
    engine: Engine, seed: int, temperature: float, with_memory: bool, ignore_eos: bool
) -> None:
    asked = request(
        words(seed, 40),
        400,
        temperature=temperature,
        seed=seed,
        grammar=compiled(engine, PERSON),
        memory=memory() if with_memory else None,
        ignore_eos=ignore_eos,
    )
    answer = ask(engine, asked)
    assert answer.end.reason == "stop"
    assert is_person(json.loads(answer.text))
    assert ask(engine, asked).text == answer.text


def test_neighbours_of_a_constrained_answer_are_free(engine: Engine) -> None:
    free = request(words(1, 50), 30, temperature=0.8, seed=5)
    bound = request(words(2, 20), 300, temperature=0.8, seed=6, grammar=compiled(engine, PERSON))
    one, two, three = ask_all(engine, [free, bound, bound])
    assert one.tokens == ask(engine, free).tokens
    assert is_person(json.loads(two.text))
    assert two.text == three.text == ask(engine, bound).text


def grammar_processes() -> list[int]:
    """The processes of compiled schemas, which are forks of a child of this one."""
    me = os.getpid()
    found = [(pid, parent) for pid, parent in parents() if b"atlas_jax.grammar.worker" in command(pid)]
    templates = {pid for pid, parent in found if parent == me}
    return [pid for pid, parent in found if parent in templates]


def parents() -> Iterator[tuple[int, int]]:
    for folder in Path("/proc").iterdir():
        with contextlib.suppress(OSError, ValueError):
            state, parent = (folder / "stat").read_text().rpartition(")")[2].split()[:2]
            if state != "Z":
                yield int(folder.name), int(parent)


def command(pid: int) -> bytes:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    return b""


@pytest.mark.skipif(sys.platform != "linux", reason="finds processes in /proc")
@pytest.mark.parametrize("ends", [False, True])
def test_a_grammar_that_takes_its_time_holds_up_nobody_else(engine: Engine, ends: bool) -> None:
    schema = {**PERSON, "title": f"slow {ends}"}
    free = request(words(7, 30), 60, temperature=0.8, seed=8)
    bound = request(words(8, 30), 300, temperature=0.8, seed=9, grammar=compiled(engine, schema))
    alone = [ask(engine, one) for one in (free, bound)]
    before = grammar_processes()
    grammar = compiled(engine, {**schema, "title": f"slower {ends}"})
    (process,) = set(grammar_processes()) - set(before)
    os.kill(process, signal.SIGSTOP)  # the longest a mask can take
    ended = threading.Semaphore(0)
    events: list[Event] = []

    def listen(event: Event) -> None:
        events.append(event)
        if isinstance(event, Finished | Failed):
            ended.release()

    engine.submit(replace(bound, grammar=grammar), listen)
    for _ in range(3):
        assert ask(engine, free).tokens == alone[0].tokens
    assert not events
    os.kill(process, signal.SIGKILL if ends else signal.SIGCONT)
    assert ended.acquire(timeout=PATIENCE)
    if ends:
        (failed,) = events
        assert isinstance(failed, Failed)
        assert isinstance(failed.error, InvalidRequest)
    else:
        assert "".join(event.text for event in events if isinstance(event, Delta)) == alone[1].text


@pytest.mark.skipif(sys.platform != "linux", reason="finds processes in /proc")
def test_a_client_that_leaves_frees_the_row_of_an_answer_whose_grammar_does_not_come(engine: Engine) -> None:
    before = grammar_processes()
    grammar = compiled(engine, {**PERSON, "title": "left"})
    (process,) = set(grammar_processes()) - set(before)
    os.kill(process, signal.SIGSTOP)
    ended = threading.Event()
    handle = engine.submit(
        request(words(9, 30), 300, grammar=grammar),
        lambda event: ended.set() if isinstance(event, Finished) and event.reason == "cancelled" else None,
    )
    ask(engine, request(words(9, 30), 3))
    handle.cancel()
    assert ended.wait(PATIENCE)
    os.kill(process, signal.SIGCONT)
    assert is_person(json.loads(ask(engine, request(words(9, 30), 300, temperature=1.0, grammar=grammar)).text))


def test_an_answer_that_becomes_complete_with_its_last_token_has_ended_by_itself(engine: Engine) -> None:
    grammar = compiled(engine, PERSON)
    whole = ask(engine, request(words(2, 20), 300, temperature=0.8, seed=6, grammar=grammar))
    again = ask(engine, request(words(2, 20), whole.end.completion_tokens, temperature=0.8, seed=6, grammar=grammar))
    assert (again.text, again.end.reason) == (whole.text, "stop")
    cut = ask(engine, request(words(2, 20), whole.end.completion_tokens - 1, temperature=0.8, seed=6, grammar=grammar))
    assert cut.end.reason == "length"
    assert whole.text.startswith(cut.text)


def test_stop_strings_end_a_constrained_answer(engine: Engine) -> None:
    answer = ask(engine, request(words(3, 20), 300, grammar=compiled(engine, PERSON), stop=('"age"',)))
    assert answer.end.reason == "stop"
    assert answer.text.rstrip().endswith(",")


def test_a_bounded_answer_may_be_cut_by_its_limit(engine: Engine) -> None:
    answer = ask(engine, request(words(3, 20), 3, grammar=compiled(engine, PERSON)))
    assert answer.end.reason == "length"
    assert answer.text.startswith("{")


@pytest.mark.parametrize(
    "schema",
    [
        {"$ref": "http://somewhere/schema.json"},
        {"type": "nothing"},
        {"type": "string", "pattern": "("},
        {"enum": ["x" * 300_000]},
        json.loads('{"properties":{"a":' * 100 + "{}" + "}}" * 100),
    ],
)
def test_a_schema_that_cannot_be_had_is_refused(engine: Engine, schema: dict[str, Any]) -> None:
    with pytest.raises(InvalidRequest) as caught:
        compiled(engine, schema)
    assert caught.value.param == "response_format"
    assert len(str(caught.value)) < 300


@pytest.mark.parametrize(
    "schema",
    [
        {"type": "array", "minItems": 10**9, "items": {"type": "integer"}},
        {"type": "string", "pattern": "(a*)*b"},
        {"$ref": "#"},
        {"anyOf": [{"const": str(number) * 9} for number in range(5000)]},
    ],
)
def test_a_hostile_schema_takes_no_more_than_its_answer(engine: Engine, schema: dict[str, Any]) -> None:
    with contextlib.suppress(EngineError):
        answer = ask(engine, request(words(4, 20), 12, grammar=compiled(engine, schema)))
        assert len(answer.tokens) <= 12
    assert ask(engine, request(words(4, 20), 3)).end.completion_tokens == 3
