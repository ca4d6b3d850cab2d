"""Sessions: they survive restarts and moves, belong to their owner, and move between tiers without being noticed."""

from __future__ import annotations

import itertools
import subprocess
import sys
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from asking import Answer, ask, ask_all, memory, request, words
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from atlas_jax.config import PAGE
from atlas_jax.engine import Engine
from atlas_jax.engine.api import InvalidRequest, SessionNotFound, SnapshotInvalid

LONG = words(11, 4 * PAGE + 37)  # three pages leave a window of one
NEXT = words(12, 20)
names = (f"kept-{number}" for number in itertools.count())


def first_turn(engine: Engine, name: str, owner: str = "owner", prompt: list[int] = LONG) -> Answer:
    return ask(engine, request(prompt, 12, memory=memory(name, owner)))


def next_turn(engine: Engine, name: str, owner: str = "owner") -> Answer:
    return ask(engine, request(NEXT, 12, memory=memory(name, owner)))


@pytest.fixture(scope="session")
def undisturbed(engine: Engine) -> Answer:
    """The second turn of a session that never left the engine."""
    first = first_turn(engine, "undisturbed")
    assert first.end.memory is not None
    assert first.end.memory.tokens_absorbed >= 3 * PAGE
    answer = next_turn(engine, "undisturbed")
    assert answer.end.memory is not None
    assert answer.end.memory.cache_hit
    return answer


@pytest.mark.parametrize("way", ["archive", "named archive", "file", "context"])
def test_a_session_goes_on_after_a_restart_as_if_there_had_been_none(
    opened: Callable[..., Any], undisturbed: Answer, tmp_path: Path, way: str
) -> None:
    with opened(memory_path=tmp_path) as before:
        first_turn(before, "s")
        if way == "file":
            saved = before.sessions.save_session("owner", "s")
        elif way == "context":
            saved = before.sessions.save_context("owner", "s", {"notes": ["kept", 1]})
        else:
            saved = before.sessions.save_all("owner", "mine.atlas" if way == "named archive" else None)
        assert saved.bytes > 0
        info = before.sessions.info("owner", "s")
    with opened(memory_path=tmp_path) as after:
        if way in ("file", "context"):
            assert after.sessions.load_context("owner", "s") == (None if way == "file" else {"notes": ["kept", 1]})
        else:
            assert after.sessions.load_file("owner", saved.filename) == 1
        assert after.sessions.info("owner", "s") == info
        answer = next_turn(after, "s")
    assert answer.infos == undisturbed.infos
    assert answer.end.memory == undisturbed.end.memory or answer.end.memory.session_id == "s"  # type: ignore[union-attr]


def test_a_session_from_a_file_needs_no_program_of_its_own(
    opened: Callable[..., Any], compiled: list[str], tmp_path: Path
) -> None:
    """Its file has three pages; there are programs for four."""
    with opened(memory_path=tmp_path, max_running=2) as engine:
        engine._warm_up.stop(60)  # only what is asked for is compiled
        how = memory("s", window_size=256, update_frequency=256)
        for _ in range(2):
            ask(engine, request(LONG, 6, memory=how))
        ask(engine, request(NEXT, 6, memory=how))
        saved = engine.sessions.save_all("owner", None)
        engine.sessions.load_file("owner", saved.filename)
        before = len(compiled)
        assert before
        assert engine.stats().compilations_total > 0
        ask(engine, request(NEXT, 6, memory=how))
        assert not compiled[before:]


def test_a_session_moves_to_another_engine_through_one_file(
    opened: Callable[..., Any], undisturbed: Answer, tmp_path: Path
) -> None:
    with opened(memory_path=tmp_path) as one, opened(memory_path=tmp_path) as other:
        first_turn(one, "s")
        one.sessions.save_context("owner", "s", None)
        other.sessions.load_context("owner", "s")
        assert next_turn(other, "s").infos == undisturbed.infos
        assert next_turn(one, "s").infos == undisturbed.infos, "the first engine still has its own"


def test_a_damaged_file_is_an_error_of_its_session_alone(opened: Callable[..., Any], tmp_path: Path) -> None:
    with opened(memory_path=tmp_path) as engine:
        first_turn(engine, "s", prompt=LONG[:50])
        engine.sessions.save_session("owner", "s")
        (file,) = tmp_path.rglob("*.atlas")
        data = bytearray(file.read_bytes())
        data[len(data) // 2] ^= 1
        file.write_bytes(bytes(data))
        with pytest.raises(SnapshotInvalid):
            engine.sessions.load_context("owner", "s")
        first_turn(engine, "t", prompt=LONG[:50])
        assert engine.alive()
        assert next_turn(engine, "s").end.memory.cache_hit  # type: ignore[union-attr]


@settings(max_examples=4, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(order=st.lists(st.integers(0, 3), min_size=6, max_size=10), strategy=st.sampled_from(["lru", "lfu", "adaptive"]))
@pytest.mark.parametrize("tier", ["host", "disk"])
def test_moving_between_tiers_is_not_noticed(
    crowded: dict[str, Engine], engine: Engine, tier: str, order: list[int], strategy: str
) -> None:
    """Four sessions take turns where only one fits; each must answer as in an engine with room for all."""
    tag = next(names)
    for turn, who in enumerate(order):
        asked = request(words(who * 100 + turn, 90), 4, memory=memory(f"{tag}-{who}", cache_strategy=strategy))
        assert ask(crowded[tier], asked).infos == ask(engine, asked).infos
    stats = crowded[tier].stats()
    assert stats.sessions_device + stats.sessions_host + stats.sessions_disk >= len(set(order))
    if tier == "disk" and len(set(order)) > 1:
        assert stats.sessions_disk > 0


@pytest.fixture(scope="session")
def crowded(opened: Callable[..., Any], folder: Path) -> Any:
    """Engines whose device, or main memory, holds about one session."""
    with ExitStack() as stack:
        yield {
            "host": stack.enter_context(opened(device_cache_bytes=1 << 20, memory_path=folder / "host")),
            "disk": stack.enter_context(opened(host_cache_bytes=1, memory_path=folder / "disk")),
        }


def test_owners_with_the_same_names_never_meet(engine: Engine) -> None:
    name = next(names)
    alone = [first_turn(engine, next(names), prompt=words(seed, 3 * PAGE)) for seed in (21, 22)]
    for turn, owner in enumerate(("ann", "bob")):
        answer = first_turn(engine, name, owner, prompt=words(21 + turn, 3 * PAGE))
        assert answer.infos == alone[turn].infos
    sessions = engine.sessions
    assert sessions.info("ann", name) != sessions.info("bob", name)
    assert [row.session_id for row in sessions.list("ann", after=None, limit=10)[0]] == [name]
    sessions.delete("ann", name)
    with pytest.raises(SessionNotFound):
        sessions.info("ann", name)
    assert sessions.info("bob", name).total_updates == 3
    for call in (sessions.delete, sessions.info, sessions.reset):
        with pytest.raises(SessionNotFound):
            call("eve", name)


def test_owners_answered_together_never_meet(engine: Engine) -> None:
    name = next(names)
    asked = [request(words(seed, 3 * PAGE), 10, memory=memory(name, f"owner-{seed}")) for seed in range(31, 35)]
    together = ask_all(engine, asked)
    for seed, answer in zip(range(31, 35), together, strict=True):
        same = request(words(seed, 3 * PAGE), 10, memory=memory(next(names)))
        assert answer.infos == ask(engine, same).infos


def test_reset_forgets_the_text_and_keeps_the_name(engine: Engine) -> None:
    name, other = next(names), next(names)
    first_turn(engine, name)
    assert engine.sessions.reset("owner", name) == 1
    assert engine.sessions.info("owner", name).total_updates == 0
    assert name in [row.session_id for row in engine.sessions.list("owner", after=None, limit=1000)[0]]
    prompt = words(41, 3 * PAGE)
    assert first_turn(engine, name, prompt=prompt).infos == first_turn(engine, other, prompt=prompt).infos


def test_a_deleted_session_does_not_come_back_with_the_archive(opened: Callable[..., Any], tmp_path: Path) -> None:
    with opened(memory_path=tmp_path) as before:
        for name in ("kept", "gone"):
            first_turn(before, name, prompt=LONG[:30])
        before.sessions.save_all("owner", None)
        before.sessions.delete("owner", "gone")
        file = before.sessions.default_file
    with opened(memory_path=tmp_path) as after:
        assert after.sessions.load_file("owner", file) == 1
        assert [row.session_id for row in after.sessions.list("owner", after=None, limit=9)[0]] == ["kept"]
        with pytest.raises(SessionNotFound):
            after.sessions.load_file("other", file)


def test_reading_without_writing_leaves_a_session_as_it_was(engine: Engine) -> None:
    name, other = next(names), next(names)
    for one in (name, other):
        first_turn(engine, one)
    before = engine.sessions.info("owner", name)
    asked = memory(name, write=False)
    twice = [ask(engine, request(words(51, 300), 6, memory=asked)) for _ in range(2)]
    assert twice[0].infos == twice[1].infos
    assert engine.sessions.info("owner", name) == before
    assert next_turn(engine, name).infos == next_turn(engine, other).infos


@pytest.mark.parametrize("fresh", [True, False])
def test_every_choice_answers_the_same_session(engine: Engine, fresh: bool) -> None:
    """n answers to one turn go on from the same text; only the first stays."""
    name, other = next(names), next(names)
    if not fresh:
        for one in (name, other):
            first_turn(engine, one)
    how = memory(name)
    choices = ask_all(engine, [request(NEXT, 6, memory=how, choice=choice) for choice in range(3)])
    single = ask(engine, request(NEXT, 6, memory=memory(other)))
    for answer in choices:
        assert answer.infos == single.infos
    follow = [ask(engine, request(words(61, 20), 6, memory=memory(one))) for one in (name, other)]
    assert follow[0].infos == follow[1].infos


def test_a_session_keeps_the_shape_it_was_begun_with(engine: Engine) -> None:
    name = next(names)
    first_turn(engine, name)
    with pytest.raises(InvalidRequest, match="window_size"):
        ask(engine, request(NEXT, memory=memory(name, window_size=256, given=frozenset({"window_size"}))))
    assert ask(engine, request(NEXT, memory=memory(name, window_size=256))).end.memory is not None


_UNCLOSED = """
import sys, threading
import atlas_jax
from atlas_jax.engine import Engine
from atlas_jax.engine.api import Finished, GenerationRequest
engine = Engine.open(model_path=sys.argv[1], adapter_path=sys.argv[2], cache_path=sys.argv[3], max_window=256)
ended = threading.Event()
request = GenerationRequest(prompt=[1, 2, 3], max_tokens=4)
engine.submit(request, lambda event: ended.set() if isinstance(event, Finished) else None)
assert ended.wait(200)
raise SystemExit(3)
"""


def test_a_program_that_leaves_its_engine_open_ends_as_it_wants(
    models: dict[str, tuple[Path, Path]], cache: Path
) -> None:
    command = [sys.executable, "-c", _UNCLOSED, *map(str, models["llama"]), str(cache)]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=250)
    assert ended.returncode == 3, ended.stderr[-2000:]
