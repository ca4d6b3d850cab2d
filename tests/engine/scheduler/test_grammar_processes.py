"""The processes that JSON schemas are compiled in: what a hostile schema can take, whose turn it is, and how they end."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import CancelledError, Future
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from atlas_jax.engine.api import AnswerShape, InvalidRequest, Overloaded
from atlas_jax.engine.scheduler import grammar_processes, structured_output
from atlas_jax.engine.scheduler.structured_output import Constraint, Grammar, Grammars
from atlas_jax.gguf import GGUFFile, Tokenizer
from tests import tiny_model
from tests.patience import PATIENCE

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="limits and /proc are Linux's")
PERSON = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 4}, "age": {"type": "integer"}},
    "required": ["name", "age"],
}


@pytest.fixture(autouse=True)
def as_long_as_it_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Compiling is bounded by processor time here: on a busy machine a process that others go before gets that late."""
    monkeypatch.setattr(grammar_processes, "_COMPILE_WALL_SECONDS", PATIENCE)


def json_of(grammars: Grammars, schema: dict[str, Any], *, owner: str = "") -> Future[Grammar]:
    return grammars.answers(AnswerShape(wanted=schema), owner=owner)


ENDLESS: dict[str, Any] = {"type": "integer", "multipleOf": 99_999_999}


def optional(count: int) -> dict[str, Any]:
    return {"type": "object", "properties": {f"p{index}": {"type": "integer"} for index in range(count)}}


HOSTILE: dict[str, dict[str, Any]] = {
    "remainders": ENDLESS,
    "fewer remainders": {"type": "integer", "multipleOf": 1_000_003},
    "remainders together": {"anyOf": [{"type": "integer", "multipleOf": prime} for prime in (9973, 9967, 9949, 9941)]},
    "an enumeration": {"enum": [f"{index * 7919 % 1000003:x}" for index in range(20_000)]},
    "a larger one": {"enum": [str(index) for index in range(250_000)]},
    "properties": {"type": "object", "properties": {f"a{index}": optional(6000) for index in range(6)}},
    "a long pattern": {"type": "string", "pattern": "a{100000}"},
    "long alternatives": {"type": "string", "pattern": "(ab|c){1,100000}"},
    "patterns together": {
        "allOf": [{"type": "string", "pattern": f"a{{{index}}}|.*b.{{{index}}}"} for index in range(1, 30)]
    },
    "500 optional properties": optional(500),
    "2000 optional properties": optional(2000),
    "a chain of references": {
        "$defs": {f"d{index}": {"properties": {"x": {"$ref": f"#/$defs/d{index + 1}"}}} for index in range(3000)}
        | {"d3000": {}},
        "$ref": "#/$defs/d0",
    },
    "a tree of references": {
        "$defs": {f"d{index}": {"anyOf": [{"$ref": f"#/$defs/d{index + 1}"}] * 4} for index in range(60)}
        | {"d60": {"type": "integer"}},
        "$ref": "#/$defs/d0",
    },
    "itself": {"$ref": "#"},
    "two that are each other": {
        "$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}},
        "$ref": "#/$defs/a",
    },
    "a list of itself": {"type": "array", "items": {"$ref": "#"}, "minItems": 3},
    "nesting": json.loads('{"properties":{"a":' * 100 + "{}" + "}}" * 100),
    "many items": {"type": "array", "minItems": 10**9, "items": {"type": "integer"}},
    "huge bounds": {"type": "number", "minimum": -1.2345678901234567e300, "maximum": 1.2345e300},
}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    with GGUFFile.open(tiny_model.write_model(tmp_path_factory.mktemp("grammar") / "tiny.gguf")) as file:
        return Tokenizer.from_metadata(file.metadata)


@pytest.fixture
def grammars(tokenizer: Tokenizer) -> Iterator[Grammars]:
    made = Grammars(tokenizer)
    yield made
    made.close()


def wait_for(condition: Callable[[], object]) -> None:
    end = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.01)


def children(pid: int) -> list[int]:
    """Children of a process that still run."""
    found = []
    for folder in Path("/proc").iterdir():
        try:
            state, parent = (folder / "stat").read_text().rpartition(")")[2].split()[:2]
        except OSError:
            continue
        if int(parent) == pid and state != "Z":
            found.append(int(folder.name))
    return found


def templates(of: int) -> set[int]:
    """The processes that all others of this one are forked from."""
    found = children(of)
    return {pid for pid in found if b"atlas_jax.grammar.worker" in Path(f"/proc/{pid}/cmdline").read_bytes()}


OTHERS: set[int] = set()


@pytest.fixture(autouse=True)
def others() -> None:
    """Notes the processes of engines that other tests keep open."""
    OTHERS.clear()
    OTHERS.update(templates(os.getpid()))


def template(of: int | None = None) -> int:
    """The process that all others of the test's own are forked from."""
    (found,) = templates(of or os.getpid()) - OTHERS
    return found


def resident(pid: int | str = "self") -> int:
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def runs(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def first_tokens(grammars: Grammars, schema: dict[str, Any], owner: str = "") -> np.ndarray:
    """Which tokens may begin an answer, a byte each."""
    constraint = json_of(grammars, schema, owner=owner).result(PATIENCE).begin()
    constraint.open()
    try:
        assert constraint.look(PATIENCE)
        row = np.zeros(grammars.words, np.int32)
        constraint.allow(row)
    finally:
        constraint.close()
    return np.unpackbits(row.view(np.uint8), bitorder="little")


def outcome(grammars: Grammars, schema: dict[str, Any]) -> InvalidRequest | None:
    """Why a schema was refused, if it was."""
    try:
        json_of(grammars, schema).result(PATIENCE)
    except InvalidRequest as error:
        return error
    return None


@pytest.mark.parametrize(
    "schema",
    [
        pytest.param(
            schema, id=name, marks=[pytest.mark.slow] if name in ("fewer remainders", "remainders together") else []
        )
        for name, schema in HOSTILE.items()
    ],
)
def test_a_hostile_schema_is_compiled_or_refused_and_the_server_keeps_its_memory(
    grammars: Grammars, schema: dict[str, Any]
) -> None:
    before = resident()
    error = outcome(grammars, schema)
    if error is not None:
        assert error.param == "response_format"
        assert "JSON schema" in str(error)
        assert len(str(error)) < 300
    assert resident() - before < 64 << 20
    assert first_tokens(grammars, PERSON).sum() >= 1  # others are served as before


@pytest.mark.parametrize("name", ["remainders", "patterns together", "a larger one", "2000 optional properties"])
def test_a_schema_that_is_too_large_is_called_so(grammars: Grammars, name: str) -> None:
    with pytest.raises(InvalidRequest, match="too large"):
        json_of(grammars, HOSTILE[name]).result(PATIENCE)


def test_a_schema_that_was_refused_costs_nothing_when_it_comes_again(grammars: Grammars) -> None:
    with pytest.raises(InvalidRequest) as first:
        json_of(grammars, ENDLESS).result(PATIENCE)
    os.kill(template(), signal.SIGSTOP)  # nothing can be compiled now
    with pytest.raises(InvalidRequest, match="too large") as second:
        json_of(grammars, ENDLESS).result(PATIENCE)
    assert str(second.value) == str(first.value)
    os.kill(template(), signal.SIGCONT)


def test_one_schema_twice_is_compiled_once_and_owners_share_nothing(grammars: Grammars) -> None:
    for owner, processes in (("a", 1), ("a", 1), ("b", 2)):
        first_tokens(grammars, PERSON, owner)
        assert len(children(template())) == processes


def test_schemas_nobody_uses_any_more_are_let_go_and_compiled_again_when_needed(grammars: Grammars) -> None:
    kept = json_of(grammars, PERSON).result(PATIENCE)
    for index in range(12):
        first_tokens(grammars, {"const": index})
    wait_for(lambda: len(children(template())) == 8)
    constraint = kept.begin()
    constraint.open()
    assert constraint.look(PATIENCE)
    constraint.close()


def test_processes_that_nobody_needs_end_and_start_again(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(structured_output, "_REST_SECONDS", 0.2)
    grammars = Grammars(tokenizer)
    try:
        constraint = json_of(grammars, PERSON).result(PATIENCE).begin()
        constraint.open()
        assert constraint.look(PATIENCE)
        everyone = [template(), *children(template())]
        time.sleep(1.0)  # as often as the rest would be over; an answer is under way
        assert all(map(runs, everyone))
        constraint.close()
        wait_for(lambda: not any(map(runs, everyone)))
        assert first_tokens(grammars, PERSON).any()
    finally:
        grammars.close()


def test_a_client_that_leaves_ends_the_compilation(grammars: Grammars) -> None:
    first_tokens(grammars, PERSON)
    running = json_of(grammars, ENDLESS, owner="gone")
    wait_for(lambda: len(children(template())) == 2)
    assert running.cancel()
    with pytest.raises(CancelledError):
        running.result(0)
    wait_for(lambda: len(children(template())) == 1)
    assert first_tokens(grammars, {"type": "integer"}, "gone").any()


def test_no_owner_keeps_another_from_compiling(grammars: Grammars) -> None:
    first_tokens(grammars, PERSON)
    theirs = [json_of(grammars, {**ENDLESS, "multipleOf": 99_999_999 - index}, owner="a") for index in range(6)]
    assert first_tokens(grammars, {"type": "integer"}, "b").any()
    assert sum(future.done() for future in theirs) < len(theirs) - 2
    for future in theirs:
        future.cancel()


def test_a_process_that_was_killed_is_started_again(grammars: Grammars) -> None:
    first_tokens(grammars, PERSON)
    before = template()
    os.kill(before, signal.SIGKILL)
    wait_for(lambda: not runs(before))
    assert first_tokens(grammars, {"type": "integer"}).any()
    assert first_tokens(grammars, PERSON).any()
    assert template() != before


def go_on(constraint: Constraint) -> None:
    constraint.take(0)
    constraint.look(PATIENCE)


def test_an_answer_whose_process_has_ended_says_so(grammars: Grammars) -> None:
    constraint = json_of(grammars, PERSON).result(PATIENCE).begin()
    constraint.open()
    assert constraint.look(PATIENCE)
    (process,) = children(template())
    os.kill(process, signal.SIGKILL)
    wait_for(lambda: not runs(process))
    constraint.allow(np.zeros(grammars.words, np.int32))
    with pytest.raises(InvalidRequest, match="JSON schema"):
        go_on(constraint)
    constraint.close()


def test_processes_hold_nothing_of_the_servers_and_never_load_jax(grammars: Grammars) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listening, tempfile.TemporaryFile() as file:
        for held in (listening, file):
            os.set_inheritable(held.fileno(), True)
        first_tokens(grammars, PERSON)
        for process in (template(), *children(template())):
            links = [os.readlink(link) for link in Path(f"/proc/{process}/fd").iterdir()]
            assert all(link == "/dev/null" or link.startswith("socket:") for link in links), links
            assert os.readlink(f"/proc/self/fd/{listening.fileno()}") not in links
            assert "jaxlib" not in Path(f"/proc/{process}/maps").read_text()


def test_closing_ends_every_process(tokenizer: Tokenizer) -> None:
    grammars = Grammars(tokenizer)
    first_tokens(grammars, PERSON)
    running = json_of(grammars, ENDLESS, owner="other")
    wait_for(lambda: len(children(template())) == 2)
    everyone = [template(), *children(template())]
    grammars.close()
    wait_for(lambda: not any(map(runs, everyone)))
    with pytest.raises((CancelledError, Overloaded)):
        running.result(PATIENCE)
    with pytest.raises(Overloaded):
        json_of(grammars, PERSON)
    grammars.close()


_HOST = """
import sys, time
from pathlib import Path
from atlas_jax.engine.api import AnswerShape
from atlas_jax.engine.scheduler.structured_output import Constraint, Grammar, Grammars
from atlas_jax.gguf import GGUFFile, Tokenizer

with GGUFFile.open(sys.argv[1]) as file:
    grammars = Grammars(Tokenizer.from_metadata(file.metadata))
grammars.answers(AnswerShape(wanted={"type": "integer"})).result(120)
busy = grammars.answers(AnswerShape(wanted={"type": "integer", "multipleOf": 99999999}), owner="other")
print("ready", flush=True)
time.sleep(600)
"""


def test_processes_die_with_the_server(tmp_path: Path) -> None:
    model = tiny_model.write_model(tmp_path / "tiny.gguf")
    host = subprocess.Popen([sys.executable, "-c", _HOST, str(model)], stdout=subprocess.PIPE)
    try:
        assert host.stdout is not None
        assert host.stdout.readline() == b"ready\n"
        everyone = [template(host.pid), *children(template(host.pid))]
        assert len(everyone) >= 2
    finally:
        host.kill()
        host.wait()
        host.stdout.close()
    wait_for(lambda: not any(map(runs, everyone)))


def test_a_model_without_an_end_token_is_refused_clearly() -> None:
    tokenizer: Any = SimpleNamespace(vocab_size=256, eog_ids=frozenset())
    with pytest.raises(InvalidRequest, match="end-of-generation") as caught:
        json_of(Grammars(tokenizer), PERSON)
    assert caught.value.param == "response_format"
