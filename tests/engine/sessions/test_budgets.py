"""What sessions may take: main memory, disk and each owner's share of it keep their bounds, and nothing is lost at them."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from atlas_jax.config import PAGE
from atlas_jax.engine import Engine
from atlas_jax.engine.api import Overloaded, StorageFull
from atlas_jax.model.transformer import QUERY_SAMPLES
from tests.engine.offline import ask, memory, request, words
from tests.patience import eventually

TEXT = words(31, 40)


def turn(engine: Engine, name: str, owner: str = "owner", prompt: list[int] = TEXT) -> int:
    return ask(engine, request(prompt, 4, memory=memory(name, owner, kept_pairs=None))).end.completion_tokens


def takes(engine: Engine, name: str) -> bool:
    """Whether the disk has room for a session; its first turn is answered once it has."""
    with contextlib.suppress(StorageFull):
        if name not in names(engine):
            turn(engine, name)
    return name in names(engine)


def names(engine: Engine, owner: str = "owner") -> dict[str, int]:
    return {row.session_id: row.tokens for row in engine.sessions.list(owner, after=None, limit=1000)[0]}


def on_disk(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def in_memory(engine: Engine) -> int:
    rows = engine.sessions.list("owner", after=None, limit=1000)[0]
    return sum(row.bytes for row in rows if row.resident != "disk")


@pytest.fixture(scope="module")
def one_session(opened: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory) -> tuple[int, int]:
    """Bytes a short session takes of main memory and of the disk."""
    folder = tmp_path_factory.mktemp("one")
    with opened(memory_path=folder) as engine:
        turn(engine, "s")
        engine.sessions.save_changed()
        return engine.sessions.list("owner", after=None, limit=1)[0][0].bytes, on_disk(folder)


def test_full_tiers_refuse_before_they_break_and_lose_nothing(
    opened: Callable[..., Any], tmp_path: Path, one_session: tuple[int, int]
) -> None:
    """Forty sessions where the disk has room for some fifteen and main memory for four."""
    resident, stored = one_session
    host, disk = 4 * resident, 5 * resident + 10 * stored
    how = {"memory_path": tmp_path, "l2_cache_size": host, "l3_cache_size": disk}
    kept: dict[str, int] = {}
    waits: list[float] = []
    with opened(**how) as engine:
        for number in range(40):
            try:
                turn(engine, f"s{number}")
                kept[f"s{number}"] = len(TEXT) + 3
            except StorageFull as error:
                waits.append(error.retry_after)
            # what has just been answered is on its way out
            assert eventually(lambda: in_memory(engine) <= host + resident)
        assert 8 <= len(kept) < 40
        assert len(waits) == 40 - len(kept)
        assert min(waits) > 0
        assert on_disk(tmp_path) <= disk
        turn(engine, "s0", prompt=words(32, 20))
        kept["s0"] += 1 + 20 + 3
        assert names(engine) == kept
        engine.sessions.delete("owner", "s1")
        del kept["s1"]
        # once who has to make room for "s0" is written and counts as no more than its snapshot
        assert eventually(lambda: takes(engine, "new"))
        kept["new"] = len(TEXT) + 3
    with opened(**how) as after:
        assert names(after) == kept


def test_a_session_that_has_kept_nothing_takes_no_room_for_pairs(opened: Callable[..., Any], tmp_path: Path) -> None:
    """Of main memory and of the disk: little more than one on a server that keeps none."""
    taken = []
    for budget in (None, 0):
        folder = tmp_path / str(budget)
        with opened(memory_path=folder, memory_budget=budget) as engine:
            turn(engine, "s")
            (row,) = engine.sessions.list("owner", after=None, limit=1)[0]
            assert engine.sessions.save_changed() == 0
            taken.append((row.bytes, on_disk(folder)))
            room = row.state.kept
    assert room == 0
    queries = 2 * QUERY_SAMPLES * 4 * (16 + 4)  # layers, four heads of 16 numbers in 8 bits, and their scales
    assert taken[0][0] - taken[1][0] == queries
    assert 0 < taken[0][1] - taken[1][1] < queries + 4096


def test_a_session_that_keeps_none_leaves_the_servers_room_unused(engine: Engine) -> None:
    sizes = []
    for name, kept in (("none", 0), ("some", PAGE)):
        ask(engine, request(words(33, 3 * PAGE), 4, memory=memory(name, "owner", kept_pairs=kept)))
        rows = engine.sessions.list("owner", after=None, limit=1000)[0]
        sizes.append(next(row.bytes for row in rows if row.session_id == name))
        engine.sessions.delete("owner", name)
    assert sizes[0] < sizes[1]


def test_an_owners_share_is_its_own(opened: Callable[..., Any], tmp_path: Path, one_session: tuple[int, int]) -> None:
    quota = 3 * max(one_session)
    with opened(memory_path=tmp_path, owner_quota=quota) as engine:
        refused = 0
        for number in range(8):
            try:
                turn(engine, f"s{number}", "greedy")
            except StorageFull:
                refused += 1
        assert refused >= 4
        for number in range(2):
            turn(engine, f"s{number}", "modest")
        assert len(names(engine, "modest")) == 2
        with pytest.raises(StorageFull, match="share"):
            engine.sessions.save_context("greedy", "another", {"x": 1})
        for name in list(names(engine, "greedy"))[:2]:
            engine.sessions.delete("greedy", name)
        engine.sessions.save_context("greedy", "another", {"x": 1})


def test_a_callers_json_counts_and_is_listed(opened: Callable[..., Any], tmp_path: Path) -> None:
    with opened(memory_path=tmp_path, owner_quota=3 << 20) as engine:
        engine.sessions.save_context("owner", "a", {"text": "x" * (1 << 20)})
        assert engine.sessions.list("owner", after=None, limit=1)[0][0].bytes > 1 << 20
        engine.sessions.save_context("owner", "b", {"text": "x" * (1 << 20)})
        with pytest.raises(StorageFull):
            engine.sessions.save_context("owner", "c", {"text": "x" * (2 << 20)})
        assert engine.sessions.load_context("owner", "a") == {"text": "x" * (1 << 20)}


def test_without_a_disk_main_memory_has_a_bound(opened: Callable[..., Any], one_session: tuple[int, int]) -> None:
    with opened(l2_cache_size=2 * one_session[0]) as engine:
        answered, waits = 0, []
        for number in range(8):
            try:
                turn(engine, f"s{number}")
                answered += 1
            except Overloaded as error:
                waits.append(error.retry_after)
        assert min(waits) > 0
        assert 2 <= answered <= 4
        turn(engine, "s0")


def test_what_nobody_uses_is_deleted_and_what_is_used_stays(opened: Callable[..., Any], tmp_path: Path) -> None:
    with opened(memory_path=tmp_path) as engine:
        for name in ("old", "new"):
            turn(engine, name)
        engine.sessions.save_all("owner", None)
        time.sleep(0.3)
        turn(engine, "new")
        assert engine.sessions.expire(3600.0) == 0
        assert engine.sessions.expire(0.25) == 1
        assert list(names(engine)) == ["new"]
    with opened(memory_path=tmp_path) as after:
        assert after.sessions.load_default("owner") == 0
        assert list(names(after)) == ["new"]


def test_a_stop_leaves_in_the_journals_what_there_is_no_time_to_write(
    opened: Callable[..., Any], tmp_path: Path
) -> None:
    with opened(memory_path=tmp_path) as engine:
        for number in range(6):
            turn(engine, f"s{number}", prompt=words(number, PAGE + number))
        assert engine.sessions.save_changed(timeout=0.0) == 6
        assert engine.sessions.save_default("owner", timeout=0.0) is None
        wanted = names(engine)
    assert not list(tmp_path.rglob("*.atlas"))
    with opened(memory_path=tmp_path) as after:
        assert names(after) == wanted
        assert after.sessions.save_changed() == 0, "what has not been read again is in its journal as it was"
        for name in wanted:
            turn(after, name)
        assert after.sessions.save_changed() == 0
        assert len(list(tmp_path.rglob("*.snapshot.atlas"))) == 6


def test_a_disk_that_fails_is_told_and_the_next_turn_is_written_whole(
    opened: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> int:
        raise OSError(28, "No space left on device")

    with opened(memory_path=tmp_path) as engine:
        turn(engine, "s")
        with monkeypatch.context() as patch:
            patch.setattr(os, "pwrite", full)
            answer = ask(engine, request(TEXT, 4, memory=memory("s", kept_pairs=None)))
        assert answer.end.memory is not None
        assert "could not be written" in str(answer.end.memory.degraded)
        end = ask(engine, request(TEXT, 4, memory=memory("s", kept_pairs=None))).end
        assert end.memory is not None
        assert end.memory.degraded is None
        wanted = names(engine)
    with opened(memory_path=tmp_path) as after:
        assert names(after) == wanted
        assert wanted["s"] == 3 * (len(TEXT) + 4) - 1


def test_a_save_that_the_disk_refuses_is_one_line_however_many_sessions_it_left(
    opened: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    with opened(memory_path=tmp_path) as engine:
        for name in ("a", "b", "c"):
            turn(engine, name)
        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", full)
            assert engine.sessions.save_changed() == 3
        lines = [one.getMessage() for one in caplog.records if one.name == "atlas.engine" and one.levelname == "ERROR"]
        assert lines == ["[ATLAS] Failed to save 3 of 3 sessions: no space left for session snapshots"]
        assert engine.stats().snapshot_failures == 3
        assert engine.sessions.save_changed() == 0
