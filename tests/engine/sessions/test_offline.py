"""Folders of sessions looked at, checked and carried away without a model."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from atlas_jax.engine.api import SnapshotInvalid
from atlas_jax.engine.sessions import journal, snapshot
from atlas_jax.engine.sessions.folder_store import MemoryFolder
from atlas_jax.engine.sessions.offline import Fault, StoredSession, faults, sessions
from atlas_jax.engine.sessions.portable import put as bring_in
from atlas_jax.engine.sessions.portable import whole_snapshot
from tests.engine.offline import ask, memory, request, words
from tests.engine.sessions import folders


def contents(root: Path) -> dict[str, tuple[bytes, int]]:
    return {str(path): (path.read_bytes(), path.stat().st_mtime_ns) for path in root.rglob("*") if path.is_file()}


def found_in(root: Path) -> list[Fault]:
    return [one for one in faults(root) if isinstance(one, Fault)]


def test_looking_changes_nothing_and_needs_no_lock(tmp_path: Path) -> None:
    folders.put(tmp_path, "名前", turns=[[9, 8], [7]], saved=True)
    folders.put(tmp_path, "b", owner="ada", model="cd" * 32, generation=0, turns=[[1, 2]])
    with (next(tmp_path.rglob("journal"))).open("ab") as file:
        file.write(b"\x40\0\0\0")  # a record that a crash has cut off, which a server would remove
    before = contents(tmp_path)
    taken = MemoryFolder(tmp_path)
    before |= contents(tmp_path)
    try:
        rows = {one.key.session_id: one for one in sessions(tmp_path) if one.key is not None}
        assert found_in(tmp_path) == []
    finally:
        taken.close()
    assert contents(tmp_path) == before
    assert (rows["名前"].tokens, rows["b"].tokens) == (6, 2)
    assert rows["b"].key is not None
    assert (rows["b"].key.owner, rows["b"].fingerprint) == ("ada", "cd" * 32)
    assert rows["名前"].problem is None


def flipped(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 0xFF
    path.write_bytes(bytes(data))


def session_of(root: Path) -> Path:
    return next(root.glob("*/*/sessions/*/*"))


def snapshot_of(root: Path) -> Path:
    return next(session_of(root).glob("*.snapshot.atlas"))


def another(root: Path, name: str) -> None:
    session_of(root).joinpath(name).write_bytes(folders.made("another"))


DAMAGE: dict[str, tuple[Callable[[Path], Any], str, str]] = {
    "head": (lambda root: flipped(snapshot_of(root), 60), "snapshot", "its head cannot be read"),
    "payload": (lambda root: flipped(snapshot_of(root), -9), "snapshot", "its checksum does not match"),
    "magic": (lambda root: flipped(snapshot_of(root), 0), "snapshot", "not a session snapshot"),
    "version": (lambda root: flipped(snapshot_of(root), 8), "snapshot", "is not supported"),
    "cut off": (
        lambda root: snapshot_of(root).write_bytes(snapshot_of(root).read_bytes()[:-5]),
        "snapshot",
        "checksum",
    ),
    "empty": (lambda root: snapshot_of(root).write_bytes(b""), "snapshot", "truncated"),
    "of another": (
        lambda root: snapshot_of(root).write_bytes(folders.made("x")),
        "snapshot",
        "belongs to another session",
    ),
    "of another model": (
        lambda root: snapshot_of(root).write_bytes(folders.made("s", model="ee" * 32)),
        "snapshot",
        "belongs to another model",
    ),
    "journal": (lambda root: flipped(session_of(root) / "journal", 20), "journal", "checksum does not match"),
    "journal's magic": (lambda root: flipped(session_of(root) / "journal", 1), "journal", "not a journal"),
    "gap": (
        lambda root: (
            session_of(root)
            .joinpath("journal")
            .write_bytes(
                journal.begin(journal.Origin(folders.MODEL, "local", "s", 0.0))
                + journal.encode(journal.Turn(5000, 4000, 3, [1], [], None, None, folders.READING, 0.0))
            )
        ),
        "journal",
        "a turn is missing",
    ),
    "save point": (lambda root: another(root, "saved.atlas"), "save point", "belongs to another session"),
    "link": (
        lambda root: (snapshot_of(root).rename(root / "x"), snapshot_of_link(root)),
        "snapshot",
        "not a regular file",
    ),
}


def snapshot_of_link(root: Path) -> None:
    (session_of(root) / f"{1000:020d}.snapshot.atlas").symlink_to(root / "x")


@pytest.mark.parametrize("kind", DAMAGE)
def test_each_kind_of_damage_is_found_and_named(kind: str, tmp_path: Path) -> None:
    damage, part, reason = DAMAGE[kind]
    root = tmp_path / "memory"
    folders.put(root, "s", turns=[[9, 8], [7]])
    assert found_in(root) == []
    damage(root)
    (fault,) = found_in(root)
    assert fault.part == part
    assert reason in fault.reason
    assert (root / fault.path).parent == session_of(root)


def test_damaged_exports_and_documents_are_found(tmp_path: Path) -> None:
    from atlas_jax.engine.sessions import archive

    folder = MemoryFolder(tmp_path)
    store = folder.store(folders.MODEL)
    data = folders.made("s")
    with store.write_export("local", "good.atlas") as file:
        archive.write(file, folders.MODEL, [(snapshot.read_head(data)[0].listing, data)])
    store.write_document("local", "resp_1.-.x", b"text")
    folder.close()
    assert found_in(tmp_path) == []
    export, document = next(tmp_path.rglob("good.atlas")), next(tmp_path.rglob("resp_1*"))
    export.write_bytes(export.read_bytes().replace(b"ATLASNAP", b"ATLASNIP"))
    document.write_bytes(document.read_bytes().replace(b"text", b"tent"))
    assert [(one.part, one.session) for one in found_in(tmp_path)] == [("export", None), ("document", None)]


def test_folders_of_other_programs_are_let_be(tmp_path: Path) -> None:
    (tmp_path / "six" / "corpora" / "documents").mkdir(parents=True)
    (tmp_path / "six" / "corpora" / "documents" / "alice.txt").write_text("Alice")
    assert list(faults(tmp_path)) == []


def test_a_deleted_session_is_none(tmp_path: Path) -> None:
    place = folders.put(tmp_path, "s")
    place.delete(2000)
    assert list(sessions(tmp_path)) == []


def test_a_session_with_a_journal_is_carried_away_whole(tmp_path: Path) -> None:
    folders.put(tmp_path / "a", "s", turns=[[9, 8], [7, 6, 5]], tokens=130)
    (stored,) = sessions(tmp_path / "a")
    listing, data = whole_snapshot(stored)
    assert (listing.tokens, listing.session_id) == (135, "s")
    _, header, arrays = snapshot.decode(data)
    assert arrays["unread"].tolist() == [9, 8, 7, 6, 5]
    assert [part[0] for part in header["unread"]] == [2, 3]
    assert header["pending"] == 7
    assert (arrays["0.k"] == snapshot.decode(folders.made("s", tokens=130))[2]["0.k"]).all()
    folder = MemoryFolder(tmp_path / "b")
    assert bring_in(folder.store(folders.MODEL), "ada", data)
    assert not bring_in(folder.store(folders.MODEL), "ada", data)
    assert bring_in(folder.store(folders.MODEL), "ada", data, replace=True)
    folder.close()
    (again,) = sessions(tmp_path / "b")
    assert again.key is not None
    assert (again.key.owner, again.tokens, again.problem) == ("ada", 135, None)
    assert found_in(tmp_path / "b") == []


def test_a_journal_alone_has_no_memory_to_carry_away(tmp_path: Path) -> None:
    folders.put(tmp_path, "s", generation=0, turns=[[1, 2]])
    (stored,) = sessions(tmp_path)
    with pytest.raises(SnapshotInvalid, match="no snapshot yet"):
        whole_snapshot(stored)


@pytest.mark.slow
def test_it_goes_on_where_it_was_carried_to(opened: Callable[..., Any], tmp_path: Path) -> None:
    """An engine answers a session that was carried away as it answers the session itself, its journal included."""
    alive, moved, copied = tmp_path / "alive", tmp_path / "moved", tmp_path / "copied"
    with opened(memory_path=alive) as engine:
        ask(engine, request(words(1, 150), max_tokens=6, memory=memory("s")))
        engine.sessions.save_changed()
        ask(engine, request(words(2, 20), max_tokens=6, memory=memory("s")))
        shutil.copytree(alive, copied)  # as a kill would leave it: a snapshot and a journal
    (stored,) = (one for one in sessions(copied) if isinstance(one, StoredSession))
    assert stored.journal is not None
    _, data = whole_snapshot(stored)
    folder = MemoryFolder(moved)
    assert bring_in(folder.store(str(stored.fingerprint)), stored.key.owner, data)  # type: ignore[union-attr]
    folder.close()
    answers = []
    for root in (copied, moved):
        with opened(memory_path=root) as engine:
            answers.append(ask(engine, request(words(3, 20), max_tokens=12, memory=memory("s"))))
    assert answers[0].text == answers[1].text
    assert answers[0].end.memory.history == answers[1].end.memory.history == "appended"
