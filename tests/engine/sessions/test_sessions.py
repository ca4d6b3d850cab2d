"""Sessions: they survive restarts and moves, belong to their owner, and move between tiers without being noticed."""

from __future__ import annotations

import itertools
import shutil
import subprocess
import sys
import threading
import time
import zipfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from atlas_jax.config import PAGE, ConfigError
from atlas_jax.engine import Engine
from atlas_jax.engine.api import Finished, InvalidRequest, MemoryUnavailable, SessionKey, SessionNotFound
from atlas_jax.engine.sessions import exports
from atlas_jax.engine.sessions.store import Place
from tests.engine.offline import Answer, ask, ask_all, memory, request, words
from tests.patience import PATIENCE

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


@pytest.mark.parametrize(
    "way",
    [
        "snapshot",
        "export",
        *(pytest.param(way, marks=pytest.mark.slow) for way in ("named export", "save point", "context")),
    ],
)
def test_a_session_goes_on_after_a_restart_as_if_there_had_been_none(
    opened: Callable[..., Any], undisturbed: Answer, tmp_path: Path, way: str
) -> None:
    with opened(memory_path=tmp_path / "one") as before:
        first_turn(before, "s")
        if way == "snapshot":
            assert before.sessions.save_changed() == 0
        elif way == "save point":
            saved = before.sessions.save_session("owner", "s")
        elif way == "context":
            saved = before.sessions.save_context("owner", "s", {"notes": ["kept", 1]})
        else:
            saved = before.sessions.save_all("owner", "mine.atlas" if way == "named export" else None)
        if way != "snapshot":
            assert saved.bytes > 0
        info = before.sessions.info("owner", "s")
    folder = tmp_path / "one"
    if "export" in way:  # an export is all that another machine needs
        (file,) = folder.rglob(saved.filename)
        copy = tmp_path / "other" / file.relative_to(folder)
        copy.parent.mkdir(parents=True)
        folder = shutil.move(file, copy) and tmp_path / "other"
    with opened(memory_path=folder) as after:
        if way in ("save point", "context"):
            wanted = None if way == "save point" else {"notes": ["kept", 1]}
            assert after.sessions.load_context("owner", "s") == wanted
        elif way == "named export":
            assert after.sessions.load_file("owner", saved.filename) == 1
        elif way == "export":
            assert after.sessions.load_default("owner") == 1
        assert after.sessions.info("owner", "s") == info
        answer = next_turn(after, "s")
    assert answer.infos == undisturbed.infos
    assert answer.end.memory is not None
    assert undisturbed.end.memory is not None
    assert replace(answer.end.memory, session_id="") == replace(undisturbed.end.memory, session_id="")


def crashed(folder: Path, to: Path) -> Path:
    """What a process that is killed now would leave of its folder."""
    shutil.copytree(folder, to)
    (to / ".lock").unlink()
    return to


@pytest.mark.parametrize(
    ("dtype", "turns"),
    [
        ("int8", 3),
        *(pytest.param(*case, marks=pytest.mark.slow) for case in (("int8", 1), ("float32", 1), ("float32", 3))),
    ],
)
def test_an_answered_turn_outlives_a_process_that_is_killed(
    opened: Callable[..., Any], engines: Callable[[str], Engine], tmp_path: Path, dtype: str, turns: int
) -> None:
    """Its tokens are in the journal when its last event is sent, and are read again by the next request."""
    how = {"dtype": dtype, "max_concurrent": 2 if dtype == "float32" else 4}
    name = next(names)
    with opened(memory_path=tmp_path / "one", **how) as before:
        for turn in range(turns):
            for engine, session in ((before, "s"), (engines(dtype), name)):
                prompt = LONG if turn == 0 else words(70 + turn, 60)
                end = ask(engine, request(prompt, 12, memory=memory(session))).end
        assert not list(tmp_path.rglob("*.snapshot.atlas")), "nothing but the journal"
        (row,) = before.sessions.list("owner", after=None, limit=2)[0]
        folder = crashed(tmp_path / "one", tmp_path / "two")
    assert end.memory is not None
    with opened(memory_path=folder, **how) as after:
        (found,) = after.sessions.list("owner", after=None, limit=2)[0]
        assert (found.session_id, found.tokens, found.created) == ("s", row.tokens, row.created)
        again, straight = next_turn(after, "s"), next_turn(engines(dtype), name)
    assert again.end.memory is not None
    assert straight.end.memory is not None
    assert again.end.prompt_tokens == straight.end.prompt_tokens
    assert (again.end.memory.history, again.end.memory.tokens_reused) == ("appended", 0)
    if dtype == "float32":
        assert again.tokens == straight.tokens
        for one, other in zip(again.infos, straight.infos, strict=True):
            assert one.logprob == pytest.approx(other.logprob, abs=2e-2)  # the memory's products are bfloat16


def test_edited_and_regenerated_turns_are_replayed_as_they_were(
    opened: Callable[..., Any], engines: Callable[[str], Engine], tmp_path: Path
) -> None:
    """Also where an edit goes back further than the snapshot on disk can be set back."""
    how = {"dtype": "float32", "max_concurrent": 2}
    name = next(names)
    texts: dict[str, list[int]] = {}
    with opened(memory_path=tmp_path / "one", **how) as before:
        for engine, session in ((before, "s"), (engines("float32"), name)):
            texts[session] = LONG[:200]
            history: list[list[int]] = []
            for turn in range(5):
                answer = ask(engine, request(texts[session], 12, memory=memory(session)))
                history.append([*texts[session], *answer.tokens])
                if turn == 1 and engine is before:
                    before.sessions.save_changed()
                texts[session] = [*history[0 if turn == 2 else -1], *words(80 + turn, 200 if turn < 3 else 20)]
        folder = crashed(tmp_path / "one", tmp_path / "two")
    assert texts["s"] == texts[name]
    with opened(memory_path=folder, **how) as after:
        again, straight = (
            ask(engine, request(texts[session], 12, memory=memory(session)))
            for engine, session in ((after, "s"), (engines("float32"), name))
        )
    assert again.tokens == straight.tokens
    assert again.end.memory is not None
    assert straight.end.memory is not None
    assert again.end.memory.history == straight.end.memory.history == "continued"
    assert again.end.memory.tokens_reused <= straight.end.memory.tokens_reused, "what is replayed is read again"


def test_a_request_that_is_cancelled_while_text_is_replayed_loses_none_of_it(
    opened: Callable[..., Any], tmp_path: Path
) -> None:
    with opened(memory_path=tmp_path / "one") as before:
        ask(before, request(words(90, 9 * PAGE), 4, memory=memory("s")))
        (row,) = before.sessions.list("owner", after=None, limit=2)[0]
        folder = crashed(tmp_path / "one", tmp_path / "two")
    with opened(memory_path=folder) as after:
        ended = threading.Event()
        handle = after.submit(
            request(NEXT, 4, memory=memory("s")), lambda event: isinstance(event, Finished) and ended.set()
        )
        handle.cancel()
        assert ended.wait(60)
        assert after.sessions.list("owner", after=None, limit=2)[0][0].tokens == row.tokens
        next_turn(after, "s")
        assert after.sessions.list("owner", after=None, limit=2)[0][0].tokens == row.tokens + 1 + len(NEXT) + 11


def test_a_session_from_a_file_needs_no_program_of_its_own(
    opened: Callable[..., Any], compiled: list[str], tmp_path: Path
) -> None:
    """Its file has three pages; there are programs for four."""
    with opened(memory_path=tmp_path, max_concurrent=2) as engine:
        engine._serving.warm_up.stop(60)  # only what is asked for is compiled
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


def test_a_folder_belongs_to_one_engine(opened: Callable[..., Any], tmp_path: Path) -> None:
    with opened(memory_path=tmp_path) as one:
        first_turn(one, "s", prompt=LONG[:50])
        with pytest.raises(ConfigError, match="in use by another server"), opened(memory_path=tmp_path):
            pass
        next_turn(one, "s")
    with opened(memory_path=tmp_path) as other:
        assert [row.session_id for row in other.sessions.list("owner", after=None, limit=9)[0]] == ["s"]


def test_a_folder_that_cannot_be_used_is_said_at_once(opened: Callable[..., Any], tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(ConfigError, match=r"atlas\.memory_path"), opened(memory_path=tmp_path / "file"):
        pass


@pytest.mark.parametrize("where", ["head", "state", "journal", "journal's end"])
def test_a_damaged_session_is_set_aside_and_all_others_load(
    opened: Callable[..., Any], tmp_path: Path, where: str
) -> None:
    with opened(memory_path=tmp_path) as before:
        for name in ("s", "t"):
            first_turn(before, name, prompt=LONG[:50])
        if "journal" not in where:
            before.sessions.save_changed()
        else:
            next_turn(before, "s")
        (file,) = tmp_path.glob(f"*/*/sessions/*/{Place.of(SessionKey('owner', 's')).session}")
        file /= "journal" if "journal" in where else next(file.glob("*.snapshot.atlas")).name
    data = bytearray(file.read_bytes())
    if where == "journal's end":
        data[-3:] = b""
    else:
        data[60 if where != "state" else -10] ^= 1
    file.write_bytes(bytes(data))
    with opened(memory_path=tmp_path) as after:
        aside = after.sessions.set_aside("owner")
        if where == "journal's end":  # a turn that was cut off was never acknowledged
            assert not aside
            assert {row.session_id: row.tokens for row in after.sessions.list("owner", after=None, limit=9)[0]} == {
                "s": 61,
                "t": 61,
            }
            return
        assert after.sessions.set_aside("eve") == ()
        for _ in range(2):
            with pytest.raises(MemoryUnavailable, match="cannot be used"):
                next_turn(after, "s")
        (aside,) = after.sessions.set_aside("owner")
        assert aside.name == "s"
        assert "damaged" in aside.reason
        assert file.read_bytes() == bytes(data), "it is kept as it is"
        assert next_turn(after, "t").end.memory.history == "appended"  # type: ignore[union-attr]
        after.sessions.reset("owner", "s")
        assert not after.sessions.set_aside("owner")
        assert next_turn(after, "s").end.memory.history == "new"  # type: ignore[union-attr]


def test_a_damaged_export_is_kept_and_what_is_good_of_it_loads(opened: Callable[..., Any], tmp_path: Path) -> None:
    with opened(memory_path=tmp_path / "one") as before:
        for name in ("r", "s", "t"):
            first_turn(before, name, prompt=LONG[:50])
        before.sessions.save_all("owner", None)
        (export,) = tmp_path.rglob(before.sessions.default_file)
    data = bytearray(export.read_bytes())
    with zipfile.ZipFile(export) as archive:
        data[archive.infolist()[1].header_offset + 1000] ^= 1
    copy = tmp_path / "two" / export.relative_to(tmp_path / "one")
    copy.parent.mkdir(parents=True)
    copy.write_bytes(bytes(data))
    with opened(memory_path=tmp_path / "two") as after:
        assert after.sessions.load_default("owner") == 2
        assert len(after.sessions.list("owner", after=None, limit=9)[0]) == 2
        (aside,) = after.sessions.set_aside("owner")
        assert aside.kind == "file"
        after.sessions.save_all("owner", None)
        (kept,) = (path for path in copy.parent.iterdir() if path != copy)
        assert kept.read_bytes() == bytes(data)
        assert after.sessions.set_aside("owner")[0].name == kept.name
        assert zipfile.ZipFile(copy).testzip() is None


def test_an_export_that_takes_too_long_leaves_the_old_one(opened: Callable[..., Any], tmp_path: Path) -> None:
    with opened(memory_path=tmp_path) as engine:
        first_turn(engine, "s", prompt=LONG[:50])
        engine.sessions.save_all("owner", None)
        (export,) = tmp_path.rglob(engine.sessions.default_file)
        before = export.read_bytes()
        next_turn(engine, "s")
        with pytest.raises(TimeoutError):
            engine.sessions._exports.save("owner", None, deadline=time.monotonic())
        assert export.read_bytes() == before
        assert [path.name for path in export.parent.iterdir()] == [export.name]
        assert engine.stats().snapshot_failures == 0
        engine.sessions.save_all("owner", None)
        assert export.read_bytes() != before


def test_an_older_export_never_takes_the_place_of_a_newer_one(
    opened: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where a session was deleted in between, the next start would bring it back from the older one."""
    begun, go_on = threading.Event(), threading.Event()
    write = exports.archive.write

    def slow_at_first(*args: Any) -> Any:
        found = write(*args)
        if not begun.is_set():
            begun.set()
            go_on.wait(PATIENCE)
        return found

    with opened(memory_path=tmp_path) as engine, ThreadPoolExecutor(2) as pool:
        for name in ("stays", "goes"):
            first_turn(engine, name)
        monkeypatch.setattr(exports.archive, "write", slow_at_first)
        older = pool.submit(engine.sessions.save_all, "owner", None)
        assert begun.wait(PATIENCE)
        engine.sessions.delete("owner", "goes")
        newer = pool.submit(engine.sessions.save_all, "owner", None)
        time.sleep(0.2)  # enough for it to overtake the older one where it may
        go_on.set()
        older.result(PATIENCE)
        newer.result(PATIENCE)
    with opened(memory_path=tmp_path) as engine:
        engine.sessions.load_default("owner")
        assert [one.session_id for one in engine.sessions.list("owner", limit=10, after=None)[0]] == ["stays"]


def test_a_save_of_what_has_not_changed_writes_nothing(opened: Callable[..., Any], tmp_path: Path) -> None:
    def written() -> dict[Path, tuple[int, int]]:
        files = (path for path in tmp_path.rglob("*") if path.is_file())
        return {path: (path.stat().st_ino, path.stat().st_mtime_ns) for path in files}

    with opened(memory_path=tmp_path) as engine:
        first_turn(engine, "s")
        first = engine.sessions.save_session("owner", "s")
        engine.sessions.save_all("owner", None)
        before = written()
        assert engine.sessions.save_session("owner", "s").bytes == first.bytes
        engine.sessions.save_all("owner", None)
        assert engine.sessions.save_changed() == 0
        assert written() == before


def test_a_save_point_stays_what_it_was(opened: Callable[..., Any], tmp_path: Path) -> None:
    def answers(engine: Engine) -> Any:
        engine.sessions.load_context("owner", "s")
        return next_turn(engine, "s").infos

    with opened(memory_path=tmp_path) as engine:
        first_turn(engine, "s")
        engine.sessions.save_context("owner", "s", {"at": 1})
        wanted = answers(engine)
        next_turn(engine, "s")
        engine.sessions.save_changed()
        engine.sessions.save_all("owner", None)
        assert answers(engine) == wanted
        next_turn(engine, "s")
    with opened(memory_path=tmp_path) as engine:
        assert engine.sessions.load_context("owner", "s") == {"at": 1}
        assert answers(engine) == wanted


@settings(max_examples=4, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(order=st.lists(st.integers(0, 3), min_size=6, max_size=10), strategy=st.sampled_from(["lru", "lfu", "adaptive"]))
@pytest.mark.parametrize("tier", [pytest.param("host", marks=pytest.mark.slow), "disk"])
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
            "host": stack.enter_context(opened(l1_cache_size=1 << 20, memory_path=folder / "host")),
            "disk": stack.enter_context(opened(l2_cache_size=1, memory_path=folder / "disk")),
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


def test_a_deleted_session_does_not_come_back(opened: Callable[..., Any], tmp_path: Path) -> None:
    with opened(memory_path=tmp_path) as before:
        for name in ("kept", "gone"):
            first_turn(before, name, prompt=LONG[:30])
        before.sessions.save_all("owner", None)
        before.sessions.delete("owner", "gone")
    with opened(memory_path=tmp_path) as after:
        assert after.sessions.load_default("owner") == 0
        assert [row.session_id for row in after.sessions.list("owner", after=None, limit=9)[0]] == ["kept"]
        assert after.sessions.load_default("other") is None
        first_turn(after, "gone", prompt=LONG[:20])
        after.sessions.save_all("owner", None)
    with opened(memory_path=tmp_path) as again:
        assert again.sessions.load_default("owner") == 0
        found = {row.session_id: row.tokens for row in again.sessions.list("owner", after=None, limit=9)[0]}
        assert found == {"kept": 41, "gone": 31}


def test_a_session_that_is_deleted_while_it_answers_stays_deleted(opened: Callable[..., Any], tmp_path: Path) -> None:
    with opened(memory_path=tmp_path) as engine:
        first_turn(engine, "s", prompt=LONG[:30])
        begun, ended = threading.Event(), threading.Event()

        def listen(event: object) -> None:
            (ended if isinstance(event, Finished) else begun).set()

        engine.submit(request(NEXT, 200, memory=memory("s")), listen)
        assert begun.wait(60)
        engine.sessions.delete("owner", "s")
        assert ended.wait(60)
        assert not engine.sessions.list("owner", after=None, limit=9)[0]
    with opened(memory_path=tmp_path) as after:
        assert not after.sessions.list("owner", after=None, limit=9)[0]


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
    ended = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE)
    assert ended.returncode == 3, ended.stderr[-2000:]


def test_a_fork_goes_on_where_the_other_was_and_neither_sees_the_others_turns(
    opened: Callable[..., Any], undisturbed: Answer, tmp_path: Path
) -> None:
    with opened(memory_path=tmp_path) as before:
        first_turn(before, "trunk")
        sessions = before.sessions
        assert sessions.fork("owner", "trunk", "branch")
        assert not sessions.fork("owner", "trunk", "branch")
        assert not sessions.fork("owner", "nobody", "other")
        assert not sessions.fork("stranger", "trunk", "other")
        ask(before, request(words(99, 9), 4, memory=memory("trunk")))
        branch = next_turn(before, "branch")
        assert branch.infos == undisturbed.infos
        assert branch.end.memory is not None
        assert (branch.end.memory.cache_hit, branch.end.memory.session_id) == (True, "branch")
        back = ask(before, request([*LONG, *words(97, 5)], 4, memory=memory("branch", whole=True)))
        assert back.end.memory is not None
        assert (back.end.memory.history, back.end.memory.cache_hit) == ("rolled_back", True)
        assert back.end.cached_tokens >= len(LONG) - PAGE
        assert sessions.fork("owner", "branch", "twig")  # nothing of it is on disk when the engine ends
        texts = {row.session_id: row.tokens for row in sessions.list("owner", after=None, limit=9)[0]}
        assert texts.pop("twig") == texts["branch"]
    with opened(memory_path=tmp_path) as after:
        assert {row.session_id: row.tokens for row in after.sessions.list("owner", after=None, limit=9)[0]} == texts
        again = ask(after, request(words(98, 9), 6, memory=memory("branch")))
        assert again.end.memory is not None
        assert again.end.memory.cache_hit
