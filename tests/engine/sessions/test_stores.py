"""Sessions in a store that knows no files: what the engine needs of a place for sessions is in `sessions.store`."""

from __future__ import annotations

import io
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, BinaryIO

import pytest

from atlas_jax.config import ConfigError
from atlas_jax.engine import Engine
from atlas_jax.engine.api import SessionKey, SessionNotFound, StoredFile
from atlas_jax.engine.sessions import snapshot
from atlas_jax.engine.sessions.journal import Journal, Origin, Turn
from atlas_jax.engine.sessions.store import Found, Place, digest
from tests.engine.offline import ask, memory, request, words


class DictSession:
    """Implements `StoredSession` in main memory."""

    def __init__(self, place: Place) -> None:
        self.place = place
        self.generation = self.deleted = 0
        self.data = self.saved = b""
        self.journal: Journal | None = None

    @property
    def size(self) -> int:
        return len(self.data) + len(self.saved) + (0 if self.journal is None else 100 * len(self.journal.turns))

    @property
    def newest(self) -> int:
        return self.journal.turns[-1].generation if self.journal else self.generation

    def changed(self) -> bool:
        return False

    def found(self) -> Found | None:
        return None

    def read(self, limit: int) -> tuple[bytes | None, Journal | None]:
        return self.data or None, self.journal

    def write(self, generation: int, data: bytes, *, after: int | None = None) -> bool:
        if generation < self.newest or generation <= max(self.generation, self.deleted):
            return False
        self.generation, self.data, self.journal = generation, data, None
        return True

    def append(self, origin: Origin, turn: Turn) -> bool:
        floor = snapshot.read_head(self.data)[0].listing.floor if self.data else 0
        if turn.after != self.newest or 0 < turn.keep < floor:
            return False
        self.journal = self.journal or Journal(origin, [])
        self.journal.turns.append(turn)
        return True

    def sync(self) -> None: ...

    def keep(self) -> int:
        self.saved = self.data
        return len(self.saved)

    def read_saved(self, limit: int) -> bytes | None:
        return self.saved or None

    def restore(self, generation: int) -> None:
        self.generation, self.data, self.journal = generation, self.saved, None

    def move(
        self, target: DictSession, generation: int, data: bytes, saved: bytes | None, *, after: int | None = None
    ) -> None:
        target.write(generation, data)
        target.saved = saved or b""
        self.delete(generation)

    def delete(self, generation: int, *, unless_changed: bool = False) -> None:
        self.__init__(self.place)  # type: ignore[misc]
        self.deleted = generation


class DictStore:
    """Implements `Storage` and, for one model, `Store`; what it holds outlives its engines."""

    shared = False

    def __init__(self) -> None:
        self.sessions: dict[Place, DictSession] = {}
        self.files: dict[tuple[str, str], bytes] = {}
        self.kept: dict[tuple[str, str], bytes] = {}

    def store(self, model: str) -> DictStore:
        return self

    def list(self) -> Iterator[Found]:
        for stored in self.sessions.values():
            head = None
            if stored.data:
                head = snapshot.with_generation(snapshot.read_head(stored.data)[0], stored.generation)
            owner = head.listing if head else stored.journal.origin if stored.journal else None
            if owner is not None:
                yield Found(SessionKey(owner.owner, owner.session_id), stored, head, stored.journal)

    def session(self, key: SessionKey) -> DictSession:
        return self.sessions.setdefault(Place.of(key), DictSession(Place.of(key)))

    def changes(self, owner: str | None, known: Any) -> Iterator[Any]:
        return iter(())

    def collect(self, known: Any) -> int:
        return 0

    def other_models(self) -> int:
        return 0

    def deletions(self, owner: str) -> dict[str, int]:
        return {
            place.session: stored.deleted
            for place, stored in self.sessions.items()
            if place.owner == digest(owner) and stored.deleted
        }

    def forget_deletions(self, owner: str, until: int | None = None) -> None:
        for name, generation in self.deletions(owner).items():
            if until is None or generation <= until:
                self.sessions[Place(digest(owner), name)].deleted = 0

    def exports(self, owner: str) -> tuple[StoredFile, ...]:
        found = (self.find_export(owner, name) for whose, name in sorted(self.files) if whose == owner)
        return tuple(one for one in found if one is not None)

    def find_export(self, owner: str, name: str) -> StoredFile | None:
        data = self.files.get((owner, name))
        return None if data is None else StoredFile(filename=name, bytes=len(data), modified=time.time())

    @contextmanager
    def read_export(self, owner: str, name: str) -> Iterator[BinaryIO]:
        if (owner, name) not in self.files:
            raise FileNotFoundError
        yield io.BytesIO(self.files[owner, name])

    @contextmanager
    def write_export(self, owner: str, name: str) -> Iterator[BinaryIO]:
        file = io.BytesIO()
        yield file
        self.files[owner, name] = file.getvalue()

    def rename_export(self, owner: str, name: str, new: str) -> None:
        self.files[owner, new] = self.files.pop((owner, name))

    def documents(self, owner: str) -> dict[str, StoredFile]:
        return {
            name: StoredFile(filename=name, bytes=len(data), modified=0.0)
            for (whose, name), data in self.kept.items()
            if whose == owner
        }

    def read_document(self, owner: str, name: str, limit: int) -> bytes | None:
        return self.kept.get((owner, name))

    def write_document(self, owner: str, name: str, data: bytes) -> None:
        self.kept[owner, name] = data

    def delete_document(self, owner: str, name: str) -> None:
        self.kept.pop((owner, name), None)

    def delete_export(self, owner: str, name: str) -> None:
        if self.files.pop((owner, name), None) is None:
            raise FileNotFoundError

    def close(self) -> None: ...


def turn(engine: Engine, seed: int, name: str = "s", length: int = 200) -> Any:
    return ask(engine, request(words(seed, length), 6, memory=memory(name)))


def test_sessions_live_in_any_store(
    opened: Callable[..., Any], engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Journals, snapshots, save points, exports and deletions, and an engine whose host memory holds no session."""
    kept = DictStore()
    monkeypatch.setattr("atlas_jax.engine.engine.open_storage", lambda *_, **__: kept)
    wanted = [turn(engine, seed, "in-any-store").infos for seed in (1, 2, 3)]
    with opened(memory_path="anywhere", l2_cache_size=1) as first:
        assert turn(first, 1).infos == wanted[0]
        assert turn(first, 2).infos == wanted[1]
        turn(first, 9, "gone")
        first.sessions.save_session("owner", "s")
        first.sessions.save_all("owner", None)
        first.sessions.delete("owner", "gone")
    with opened(memory_path="anywhere") as second:
        assert second.sessions.load_default("owner") == 0, "deleted after the export was written"
        assert [row.session_id for row in second.sessions.list("owner", after=None, limit=9)[0]] == ["s"]
        assert turn(second, 3).infos == wanted[2]
        second.sessions.load_context("owner", "s")
        assert turn(second, 3).infos == wanted[2], "from its save point"
        (file,) = second.sessions.files("owner")
        second.sessions.delete("owner", "s")
        assert second.sessions.load_file("owner", file.filename) == 0
        second.sessions.save_all("owner", "mine.atlas")
        second.sessions.delete_file("owner", file.filename)
        with pytest.raises(SessionNotFound):
            second.sessions.load_file("owner", file.filename)
        assert [one.filename for one in second.sessions.files("owner")] == ["mine.atlas"]
        assert second.stats().snapshot_failures == 0


@pytest.mark.parametrize("location", ["tape://1", "s3:/bucket", "s3://", "bucket"])
def test_a_store_that_does_not_exist_is_said_by_name(opened: Callable[..., Any], location: str) -> None:
    with pytest.raises(ConfigError, match="session_store"), opened(memory_path="any", session_store=location):
        pass
