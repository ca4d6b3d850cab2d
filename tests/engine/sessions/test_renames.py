"""Sessions that are given another name: nothing of them is lost, nobody's name is taken."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

from atlas_jax.engine import Engine
from atlas_jax.engine.api import Finished, SessionExists, SessionKey, SessionNotFound, StorageFull
from atlas_jax.engine.sessions import files
from atlas_jax.engine.sessions.folder_store import FolderStore, MemoryFolder
from tests.engine.offline import ask, memory, request, words
from tests.patience import PATIENCE
from tests.property.test_session_store_property import encoded

LONG, NEXT = words(11, 200), words(12, 20)


def turn(engine: Engine, name: str, prompt: list[int], owner: str = "owner") -> list[Any]:
    return ask(engine, request(prompt, 6, memory=memory(name, owner))).infos


def listed(engine: Engine, owner: str = "owner") -> dict[str, int]:
    return {row.session_id: row.tokens for row in engine.sessions.list(owner, after=None, limit=99)[0]}


def test_a_renamed_session_goes_on_with_its_save_point_and_a_branch_by_itself(
    opened: Callable[..., Any], engine: Engine, tmp_path: Path
) -> None:
    turn(engine, "unnamed", LONG)
    wanted = turn(engine, "unnamed", NEXT)
    with opened(memory_path=tmp_path) as first:
        sessions = first.sessions
        turn(first, "old", LONG)
        sessions.save_context("owner", "old", {"kept": [1, 2]})
        sessions.save_all("owner", None)
        assert sessions.fork("owner", "old", "branch")
        sessions.save_session("owner", "branch")
        assert turn(first, "old", NEXT) == wanted
        sessions.rename("owner", "old", "new")
        assert listed(first).keys() == {"new", "branch"}
        with pytest.raises(SessionNotFound):
            sessions.info("owner", "old")
        turn(first, "old", words(13, 9))  # a session of its own
        for source, target in (("old", "new"), ("new", "old"), ("new", "new")):
            with pytest.raises(SessionExists):
                sessions.rename("owner", source, target)
        for owner, source in (("owner", "nobody"), ("stranger", "new")):
            with pytest.raises(SessionNotFound):
                sessions.rename(owner, source, "free")
        sessions.delete("owner", "old")
        texts = listed(first)
    with opened(memory_path=tmp_path) as second:
        assert second.sessions.load_default("owner") == 0, "the export still knows the old name"
        assert listed(second) == texts
        assert turn(second, "branch", NEXT) == wanted
        assert second.sessions.load_context("owner", "new") == {"kept": [1, 2]}
        assert turn(second, "new", NEXT) == wanted, "from its save point"
        second.sessions.rename("owner", "new", "old")  # a name that was left can be taken again
    with opened(memory_path=tmp_path) as third:
        assert listed(third).keys() == {"old", "branch"}
        assert third.sessions.load_context("owner", "old") == {"kept": [1, 2]}


def test_a_rename_waits_for_the_answer_that_is_being_written(engine: Engine) -> None:
    turn(engine, "busy", LONG)
    begun, ended = threading.Event(), threading.Event()

    def listen(event: object) -> None:
        (ended if isinstance(event, Finished) else begun).set()

    engine.submit(request(NEXT, 60, memory=memory("busy")), listen)
    assert begun.wait(PATIENCE)
    engine.sessions.rename("owner", "busy", "no-longer-busy")
    assert ended.is_set()
    assert listed(engine)["no-longer-busy"] >= len(LONG) + len(NEXT) + 60
    assert "busy" not in listed(engine)
    engine.sessions.delete("owner", "no-longer-busy")


@pytest.mark.slow  # an engine of its own
def test_where_there_is_no_room_nothing_is_left_of_the_other_name(
    opened: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with opened(memory_path=tmp_path) as engine:
        turn(engine, "old", LONG)
        engine.sessions.save_context("owner", "old", "state")
        before = listed(engine)

        def full(*args: object) -> None:
            raise StorageFull("no room")

        with monkeypatch.context() as patch:
            patch.setattr("atlas_jax.engine.sessions.folder_session.FolderSession.write", full)
            with pytest.raises(StorageFull):
                engine.sessions.rename("owner", "old", "new")
            assert listed(engine) == before
        assert engine.sessions.load_context("owner", "old") == "state"
        engine.sessions.rename("owner", "old", "new")
        assert engine.sessions.load_context("owner", "new") == "state"


# --- a folder, and a process that is killed at any moment -------------------------------------------------------------
OLD, NEW = SessionKey("owner", "old"), SessionKey("owner", "new")
SAVED, PRESENT, RENAMED = encoded(1, session="old"), encoded(2, session="old"), encoded(3, session="new")
SAVED_NEW = encoded(1, session="new")


class Killed(BaseException):
    """The process is gone."""


@contextmanager
def killed_before(step: int) -> Iterator[list[int]]:
    """Nothing that would change the disk happens from the given change on; counts them."""
    done = [0]

    def counted(real: Callable[..., Any]) -> Callable[..., Any]:
        def change(*args: Any, **keywords: Any) -> Any:
            if done[0] >= step:
                raise Killed
            done[0] += 1
            return real(*args, **keywords)

        return change

    with pytest.MonkeyPatch.context() as patch:
        for owner, name in (
            *((Path, name) for name in ("unlink", "replace", "mkdir", "rmdir")),
            (files.tempfile, "mkstemp"),
            (files.os, "fsync"),
            (files.os, "link"),
        ):
            patch.setattr(owner, name, counted(getattr(owner, name)))
        yield done


def folder(root: Path) -> FolderStore:
    """A session of two snapshots, the first of them its save point."""
    store = FolderStore(MemoryFolder(root), "model")
    stored = store.session(OLD)
    stored.write(1, SAVED)
    stored.keep()
    stored.write(2, PRESENT)
    return store


def found(root: Path) -> dict[str, tuple[bytes | None, bytes | None]]:
    """Snapshots and save points by name, as the next process finds them."""
    store = FolderStore(MemoryFolder(root), "model")
    out = {}
    for one in store.list():
        assert (one.key, one.problem) == (one.key, None)
        assert one.key is not None
        out[one.key.session_id] = one.stored.read(1 << 20)[0], one.stored.read_saved(1 << 20)
    marks = store.deletions("owner")
    assert bool(marks) == ("old" not in out)
    store.close()
    return out


def test_a_session_has_one_name_wherever_its_renaming_is_cut_off(tmp_path: Path) -> None:
    before, after = {"old": (PRESENT, SAVED)}, {"new": (RENAMED, SAVED_NEW)}
    ends = []
    for step in range(100):
        store = folder(tmp_path / str(step))
        with killed_before(step) as done, suppress(Killed):
            store.session(OLD).move(store.session(NEW), 3, RENAMED, SAVED_NEW)
        store.close()
        ends.append(found(tmp_path / str(step)))
        assert ends[-1] in (before, after), step
        assert found(tmp_path / str(step)) == ends[-1]
        if done[0] < step:
            break
    else:
        raise AssertionError("it never ended")
    assert (ends[0], ends[-1]) == (before, after)
    assert len(ends) > 8


def test_a_session_begun_under_the_old_name_is_not_taken_for_the_one_that_left(tmp_path: Path) -> None:
    """The old name's files could not be removed, and a new session has been begun under it since."""
    store = folder(tmp_path)
    stored = store.session(OLD)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(stored), "delete", lambda self, generation: (_ for _ in ()).throw(OSError("no disk")))
        stored.move(store.session(NEW), 3, RENAMED, None)
    anew = store.session(OLD)
    assert anew.write(5, encoded(5, session="old"))
    store.close()
    assert {name: data for name, (data, _) in found_any(tmp_path).items()} == {
        "new": RENAMED,
        "old": encoded(5, session="old"),
    }


def found_any(root: Path) -> dict[str, tuple[bytes | None, bytes | None]]:
    store = FolderStore(MemoryFolder(root), "model")
    out = {
        one.key.session_id: (one.stored.read(1 << 20)[0], one.stored.read_saved(1 << 20))
        for one in store.list()
        if one.key is not None
    }
    store.close()
    return out
