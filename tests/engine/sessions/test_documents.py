"""Documents that are kept for owners: whole or not at all, bound to whose they are, within the owner's quota."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from atlas_jax.engine.api import SnapshotInvalid, StorageFull
from atlas_jax.engine.sessions import documents, files
from atlas_jax.engine.sessions.budgets import Budgets, Usage
from atlas_jax.engine.sessions.documents import Documents
from atlas_jax.engine.sessions.folder_store import FolderStore, MemoryFolder


class Index:
    """What documents need of the sessions' index."""

    def __init__(self, owner: int) -> None:
        import threading

        self.lock = threading.RLock()
        self.usage = Usage(Budgets(0, 0, 10_000, owner))


@pytest.fixture
def store(tmp_path: Path) -> Iterator[FolderStore]:
    folder = MemoryFolder(tmp_path)
    yield folder.store("model")
    folder.close()


def names(found: Documents, owner: str) -> list[str]:
    return [file.filename for file in found.list(owner)]


def paths(root: Path) -> list[Path]:
    return sorted(path for path in root.rglob("documents/*"))


@pytest.mark.parametrize("kept", ["in a folder", "in memory"])
def test_what_was_written_is_read_until_it_is_deleted(store: FolderStore, kept: str) -> None:
    found = Documents(store) if kept == "in a folder" else Documents()
    found.write("one", "a.b-c_d", b"first")
    found.write("one", "a.b-c_d", b"second")
    found.write("one", "e", b"")
    found.write("two", "a.b-c_d", b"theirs")
    assert names(found, "one") == ["a.b-c_d", "e"]
    assert [found.read(owner, "a.b-c_d") for owner in ("one", "two", "three")] == [b"second", b"theirs", None]
    assert found.read("one", "e") == b""
    found.delete("one", "a.b-c_d")
    found.delete("one", "never there")
    assert names(found, "one") == ["e"]
    assert found.read("one", "a.b-c_d") is None
    assert found.read("two", "a.b-c_d") == b"theirs"


def test_they_are_there_after_a_restart_and_for_every_model(tmp_path: Path) -> None:
    for model in ("one model", "another"):
        folder = MemoryFolder(tmp_path)
        found = Documents(folder.store(model))
        assert [found.read("owner", name) for name in names(found, "owner")] == ([] if model == "one model" else [b"x"])
        found.write("owner", "doc", b"x")
        folder.close()


@pytest.mark.parametrize("damage", ["a bit", "cut", "empty", "another owner's", "another name"])
def test_a_damaged_or_foreign_file_is_not_read(store: FolderStore, damage: str) -> None:
    writer = Documents(store)
    writer.write("one", "doc", b"content")
    writer.write("one", "other", b"content of another")
    writer.write("two", "doc", b"content of another owner")
    place = next(path for path in paths(store.root) if path.read_bytes().endswith(b"content"))
    data = place.read_bytes()
    foreign = {path.read_bytes()[-7:]: path.read_bytes() for path in paths(store.root)}
    place.write_bytes(
        {
            "a bit": data[:-1] + bytes([data[-1] ^ 1]),
            "cut": data[:-3],
            "empty": b"",
            "another owner's": foreign[b"r owner"],
            "another name": foreign[b"another"],
        }[damage]
    )
    with pytest.raises(SnapshotInvalid):
        Documents(store).read("one", "doc")


def test_a_write_that_fails_leaves_what_was_there(store: FolderStore, monkeypatch: pytest.MonkeyPatch) -> None:
    found = Documents(store)
    found.write("one", "doc", b"before")

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files.os, "fsync", full)
    with pytest.raises(StorageFull):
        found.write("one", "doc", b"after")
    monkeypatch.undo()
    assert (found.read("one", "doc"), len(paths(store.root))) == (b"before", 1)


def test_they_count_in_the_owners_quota_also_after_a_restart(store: FolderStore) -> None:
    index = Index(owner=100)
    found = Documents(store)
    found.write("one", "a", b"x" * 60)  # before anybody counts
    found.count_in(index)  # type: ignore[arg-type]
    with pytest.raises(StorageFull):
        found.write("one", "b", b"x" * 60)
    found.write("one", "a", b"x" * 90)  # in the place of what is there
    found.write("two", "b", b"x" * 60)
    again = Documents(store)
    again.count_in(Index(owner=100))  # type: ignore[arg-type]
    with pytest.raises(StorageFull):
        again.write("one", "c", b"x" * 20)
    found.delete("one", "a")
    found.write("one", "b", b"x" * 60)


def test_in_memory_the_oldest_go_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(documents, "_IN_MEMORY", 100)
    found = Documents()
    for name in "abcd":
        found.write("one", name, b"x" * 30)
    assert names(found, "one") == ["b", "c", "d"]
    assert found.read("one", "a") is None


@pytest.mark.parametrize("name", ["", ".hidden", "a/b", "..", "x" * 201, "é", "a\n"])
def test_names_never_lead_elsewhere(store: FolderStore, name: str) -> None:
    with pytest.raises(ValueError, match="name of a document"):
        Documents(store).write("one", name, b"x")
    assert Documents(store).read("one", name) is None
