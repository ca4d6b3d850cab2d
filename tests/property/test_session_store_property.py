"""A folder of sessions: what was written is found again, whatever was cut off or changed; nothing undoes a newer write."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from atlas_jax.config import ConfigError
from atlas_jax.engine.api import SessionKey, SnapshotInvalid, StorageFull
from atlas_jax.engine.sessions import journal, snapshot
from atlas_jax.engine.sessions.folder_store import FolderStore, MemoryFolder
from atlas_jax.engine.sessions.journal import Origin, Reading, Turn
from atlas_jax.engine.sessions.snapshot import Listing
from atlas_jax.engine.sessions.store import Place

READING = Reading(4, 1, 1, 2, 1024, 1 << 24, "exact", 512, 1.0, 0.9)
ORIGIN = Origin("model", "owner", "s", 1.5)
KEY = SessionKey("owner", "s")

turns = st.builds(
    Turn,
    generation=st.integers(0, 2**53),
    after=st.integers(0, 2**53),
    keep=st.integers(0, 2**30),
    tokens=st.lists(st.integers(0, 300_000), max_size=20),
    replies=st.lists(st.tuples(st.integers(0, 99), st.integers(0, 99)), max_size=2),
    preamble=st.none() | st.tuples(st.integers(0, 99), st.binary(min_size=8, max_size=8)),
    pending=st.none() | st.integers(0, 300_000),
    reading=st.builds(
        Reading,
        st.none() | st.integers(1, 16),
        st.integers(1, 4),
        st.integers(1, 10),
        st.integers(1, 3),
        st.integers(0, 1 << 20),
        st.integers(0, 1 << 40),
        st.sampled_from(["exact", "gradient", "muon"]),
        st.integers(1, 512),
        st.floats(0.01, 10),
        st.floats(0.5, 1),
    ),
    time=st.floats(1e9, 2e9),
)


def chain(several: list[Turn]) -> list[Turn]:
    """The same turns, each after the one before."""
    out: list[Turn] = []
    for number, one in enumerate(several):
        values = {name: getattr(one, name) for name in Turn.__struct_fields__}
        out.append(Turn(**{**values, "generation": number + 1, "after": number}))
    return out


def written(several: list[Turn]) -> tuple[bytes, list[int]]:
    """A journal, and where each of its records ends."""
    data, ends = journal.begin(ORIGIN), []
    for one in several:
        data += journal.encode(one)
        ends.append(len(data))
    return data, ends


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.lists(turns, max_size=4).map(chain), st.data())
def test_a_journal_gives_back_every_turn_that_was_whole(several: list[Turn], data: st.DataObject) -> None:
    """Wherever a crash has cut it off, or left blocks of zeros that were not written."""
    whole, ends = written(several)
    found, end = journal.decode(whole)
    assert found is not None
    assert end == len(whole)
    assert found.origin == ORIGIN
    assert [one.generation for one in found.turns] == [one.generation for one in several]
    assert [list(one.tokens) for one in found.turns] == [list(one.tokens) for one in several]
    cut = data.draw(st.integers(0, len(whole)))
    zeros = data.draw(st.sampled_from([0, 1, 8, 100]))
    if not zeros or cut in (len(whole), *ends):
        left, end = journal.decode(whole[:cut] + bytes(zeros))
        kept = sum(end <= cut for end in ends)
        assert (0 if left is None else len(left.turns)) == kept
        if left is not None and kept:
            assert end == ends[kept - 1]


@settings(max_examples=150, deadline=None, derandomize=True)
@given(st.lists(turns, min_size=1, max_size=4).map(chain), st.data())
def test_a_changed_byte_is_noticed_or_cuts_the_journal_there(several: list[Turn], data: st.DataObject) -> None:
    whole, ends = written(several)
    at = data.draw(st.integers(0, len(whole) - 1))
    damaged = bytearray(whole)
    damaged[at] ^= data.draw(st.integers(1, 255))
    try:
        found, _ = journal.decode(bytes(damaged))
    except SnapshotInvalid:
        return
    # only a record's length can do this: it says that the record goes on after the file's end
    intact = sum(end <= at for end in ends)
    assert len([] if found is None else found.turns) == intact


@settings(max_examples=100, deadline=None, derandomize=True)
@given(st.binary(max_size=100), st.booleans())
def test_hostile_bytes_are_refused_or_nothing(payload: bytes, begin: bool) -> None:
    try:
        found, _ = journal.decode((journal.begin(ORIGIN) if begin else b"") + payload)
    except SnapshotInvalid:
        return
    assert found is None or found.turns == []


def test_a_turn_costs_a_few_bytes_a_token() -> None:
    one = Turn(1, 0, 0, list(range(0, 49_000, 49)), [(10, 900)], (9, b"12345678"), 5, READING, 1.7e9)
    assert len(journal.encode(one)) < 3.2 * len(one.tokens)


# --- folders ----------------------------------------------------------------------------------------------------------
def encoded(generation: int, floor: int = 0, session: str = "s") -> bytes:
    listing = Listing("owner", session, generation, 5, floor, 100, 1.5, 2.5, False)
    return snapshot.encode(listing, {"model": "m"}, {"any": generation}, {})


@pytest.fixture
def store(tmp_path: Path) -> Iterator[FolderStore]:
    one = FolderStore(MemoryFolder(tmp_path / "memory"), "model")
    yield one
    one.close()


def again(store: FolderStore) -> FolderStore:
    """The same folder as a new process finds it."""
    store.close()
    return FolderStore(MemoryFolder(store.root), "model")


class Machine(RuleBasedStateMachine):
    """Writes, appends, deletions and restarts in any order, late ones too, against a plain model of what must be there."""

    root: Path

    def __init__(self) -> None:
        super().__init__()
        Machine.count = getattr(Machine, "count", 0) + 1
        self.store = FolderStore(MemoryFolder(self.root / str(Machine.count)), "model")
        self.place = self.store.session(KEY)
        self.clock = 0
        self.snapshot = 0
        self.turns: list[int] = []
        self.floor = 0
        self.deleted = 0

    @initialize()
    def begin(self) -> None:
        self.append(0, 0)

    @property
    def newest(self) -> int:
        return max(self.snapshot, *self.turns, 0)

    @rule(back=st.integers(0, 3), floor=st.integers(0, 9))
    def write(self, back: int, floor: int) -> None:
        """A snapshot of now, or of some time ago: it was encoded before other things happened."""
        self.clock += 1
        generation = max(self.deleted + 1, self.clock - back)
        done = self.place.write(generation, encoded(generation, floor))
        wanted = generation > self.snapshot and generation >= max([*self.turns, 0])
        assert done == wanted
        if wanted:
            self.snapshot, self.turns, self.floor = generation, [], floor

    @rule(keep=st.integers(0, 9), skip=st.integers(0, 1))
    def append(self, keep: int, skip: int) -> None:
        self.clock += 1
        after = self.newest - skip
        done = self.place.append(ORIGIN, Turn(self.clock, after, keep, [1, 2], [], None, None, READING, 2.0))
        wanted = not skip and not 0 < keep < self.floor
        assert done == wanted
        if wanted:
            self.turns.append(self.clock)
            self.floor = 0 if keep == 0 else self.floor

    @rule()
    def sync(self) -> None:
        self.place.sync()

    @rule()
    def delete(self) -> None:
        self.clock += 1
        late = self.place
        late.delete(self.clock)
        assert not late.write(self.clock + 1, encoded(self.clock + 1))
        late.append(ORIGIN, Turn(self.clock + 1, 0, 0, [1], [], None, None, READING, 2.0))
        assert list(self.store.list()) == []
        self.clock += 1
        self.deleted, self.snapshot, self.turns, self.floor = self.clock - 1, 0, [], 0
        self.place = self.store.session(KEY)

    @rule()
    def restart(self) -> None:
        self.store = again(self.store)
        found = list(self.store.list())
        assert len(found) == int(self.newest > 0)
        self.place = found[0].stored if found else self.store.session(KEY)  # type: ignore[assignment]
        if found:
            assert found[0].problem is None
            assert found[0].key == KEY

    @invariant()
    def what_is_there_is_the_newest(self) -> None:
        fresh = self.store.session(KEY)
        head, read = fresh.read_head(), fresh.read_journal()
        assert (0 if head is None else head.listing.generation) == self.snapshot
        assert [one.generation for one in ([] if read is None else read.turns)] == self.turns
        assert (self.store.deletions("owner") != {}) == (self.deleted > 0)
        assert not list(self.store.root.rglob("*.tmp"))

    def teardown(self) -> None:
        self.store.close()


def test_writes_turns_and_deletions_in_any_order(tmp_path: Path) -> None:
    Machine.root = tmp_path
    from hypothesis.stateful import run_state_machine_as_test

    run_state_machine_as_test(
        Machine, settings=settings(max_examples=40, stateful_step_count=20, deadline=None, derandomize=True)
    )


def test_a_save_point_is_kept_and_restored_without_copying(store: FolderStore) -> None:
    place = store.session(KEY)
    assert place.write(1, encoded(1, floor=3))
    place.keep()
    assert place.size == len(encoded(1))
    assert place.write(2, encoded(2))
    assert place.size == len(encoded(1)) + len(encoded(2))
    assert place.read_saved(10_000) == encoded(1, floor=3)
    place.restore(7)
    assert not place.append(ORIGIN, Turn(8, 7, 2, [1], [], None, None, READING, 1.0)), "the floor is the save point's"
    store = again(store)
    (found,) = store.list()
    assert found.head is not None
    assert found.head.listing.generation == 7
    assert found.stored.read(10_000)[0] == encoded(1, floor=3)
    store.close()


@pytest.mark.parametrize("damage", ["head", "foreign", "link", "folder"])
def test_one_damaged_session_is_named_and_the_rest_is_found(store: FolderStore, damage: str, tmp_path: Path) -> None:
    for name in ("s", "t"):
        assert store.session(SessionKey("owner", name)).write(1, encoded(1, session=name))
    place = store.folder(KEY)
    (file,) = place.glob("*.snapshot.atlas")
    if damage == "head":
        file.write_bytes(b"ATLASNAP" + bytes(100))
    elif damage == "foreign":
        file.write_bytes(encoded(1, session="t"))
    else:
        file.unlink()
        file.symlink_to("/etc/hostname") if damage == "link" else file.mkdir()
    store = again(store)
    found = {one.stored.place: one for one in store.list()}
    assert found[Place.of(SessionKey("owner", "t"))].problem is None
    assert found[Place.of(KEY)].problem
    assert found[Place.of(KEY)].key is None
    store.close()


def test_what_a_killed_process_left_half_written_is_removed(store: FolderStore) -> None:
    place = store.session(KEY)
    place.write(1, encoded(1))
    (place.folder / ".abc.tmp").write_bytes(b"half")
    (place.folder / f"{0:020d}.snapshot.atlas").write_bytes(b"an older one")
    store = again(store)
    assert len(list(store.list())) == 1
    assert sorted(path.name for path in place.folder.iterdir()) == [f"{1:020d}.snapshot.atlas"]
    store.close()


def test_sessions_of_another_model_are_left_alone(store: FolderStore) -> None:
    store.session(KEY).write(1, encoded(1))
    store.close()
    other = FolderStore(MemoryFolder(store.root), "another model")
    assert list(other.list()) == []
    assert other.other_models() == 1
    assert other.session(KEY).write(2, encoded(2))
    other.close()
    store = FolderStore(MemoryFolder(store.root), "model")
    (found,) = store.list()
    assert found.head is not None
    assert found.head.listing.generation == 1
    store.close()


def test_a_folder_is_nobody_elses_while_its_process_lives(tmp_path: Path) -> None:
    code = (
        "import sys, pathlib; from atlas_jax.engine.sessions.folder_store import MemoryFolder;"
        "MemoryFolder(pathlib.Path(sys.argv[1])); print('taken', flush=True); sys.stdin.read()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "taken\n"
        with pytest.raises(ConfigError, match=f"in use by another server .process {other.pid}"):
            MemoryFolder(tmp_path)
        other.kill()
        other.wait()
    MemoryFolder(tmp_path).close()
    assert tmp_path.stat().st_mode & 0o777 == 0o700


names = st.text(min_size=1, max_size=20)


@settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(names, names, names)
def test_names_never_choose_where_a_file_lies(store: FolderStore, owner: str, session: str, other: str) -> None:
    place = store.folder(SessionKey(owner, session))
    assert place.is_relative_to(store.root)
    assert ".." not in place.parts
    assert len(place.relative_to(store.root).parts) == 5
    assert (store.folder(SessionKey(other, session)) == place) == (other == owner)
    assert (store.folder(SessionKey(owner, other)) == place) == (other == session)


def test_a_write_that_fails_leaves_everything_as_it_was(store: FolderStore, monkeypatch: pytest.MonkeyPatch) -> None:
    place = store.session(KEY)
    place.write(1, encoded(1))
    assert place.append(ORIGIN, Turn(2, 1, 5, [1], [], None, None, READING, 1.0))

    def full(*_: Any) -> int:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", full)
        with pytest.raises(StorageFull):
            place.append(ORIGIN, Turn(3, 2, 6, [1], [], None, None, READING, 1.0))
    assert place.append(ORIGIN, Turn(4, 2, 6, [1], [], None, None, READING, 1.0))
    read = place.read(10_000)[1]
    assert read is not None
    assert [one.generation for one in read.turns] == [2, 4]
