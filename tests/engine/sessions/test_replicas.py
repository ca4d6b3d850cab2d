"""Engines that share an object store: a client that moves goes on exactly, and none undoes what another has done."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from msgspec.structs import replace

from atlas_jax.engine import Engine
from atlas_jax.engine.api import (
    Delta,
    Event,
    Failed,
    Finished,
    MemoryUnavailable,
    SessionConflict,
    SessionExists,
    SessionNotFound,
)
from tests.engine.offline import Answer, ask, memory, request, words
from tests.patience import PATIENCE, eventually

pytest.importorskip("obstore")

from atlas_jax.engine.sessions._obstore import Bucket as Objects
from tests.engine.sessions.replicas import Bucket, shared


@pytest.fixture(scope="module")
def bucket() -> Bucket:
    return Bucket()


@pytest.fixture(scope="module")
def replicas(opened: Callable[..., Any], bucket: Bucket) -> Iterator[list[Engine]]:
    """Two that wait for the store before an answer ends."""
    with shared(opened, bucket, 2) as found:
        yield found


@pytest.fixture
def reference(engines: Callable[[str], Engine]) -> Engine:
    return engines("float32")


@pytest.fixture(autouse=True)
def clean(replicas: list[Engine], reference: Engine, bucket: Bucket) -> Iterator[None]:
    yield
    bucket.away.clear()
    for engine in (*replicas, reference):
        for row in engine.sessions.list("owner", after=None, limit=99)[0]:
            engine.sessions.delete("owner", row.session_id)


def turn(engine: Engine, seed: int, name: str = "s", length: int = 60, **more: Any) -> Answer:
    return ask(engine, request(words(seed, length), 6, memory=memory(name, **more)))


def listed(engine: Engine) -> dict[str, int]:
    return {row.session_id: row.tokens for row in engine.sessions.list("owner", after=None, limit=99)[0]}


def test_a_client_that_moves_between_replicas_goes_on_exactly(replicas: list[Engine], reference: Engine) -> None:
    """From a journal, from a snapshot, and where the state it left behind is old."""
    for seed in range(6):
        engine = replicas[(0, 1, 0, 0, 1, 1)[seed]]
        wanted = turn(reference, seed).tokens
        assert turn(engine, seed).tokens == wanted
        if seed == 2:
            assert engine.sessions.save_changed() == 0
    assert listed(replicas[0]) == listed(replicas[1]) == listed(reference)


def test_from_a_snapshot_it_is_bit_for_bit_the_same(replicas: list[Engine], reference: Engine) -> None:
    for seed in range(4):
        wanted, engine = turn(reference, seed, length=200).infos, replicas[seed % 2]
        assert turn(engine, seed, length=200).infos == wanted
        engine.sessions.save_changed()


def test_a_client_that_stays_reads_nothing_again(replicas: list[Engine], monkeypatch: pytest.MonkeyPatch) -> None:
    turn(replicas[0], 1)
    hits = replicas[0].stats().session_hits
    large: list[str] = []
    monkeypatch.setattr(Objects, "get_large", lambda self, name: large.append(name))
    assert turn(replicas[0], 2).end.memory.cache_hit  # type: ignore[union-attr]
    assert replicas[0].stats().session_hits == hits + 1
    assert not large


def meanwhile(engine: Engine, seed: int, act: Callable[[], Any]) -> Answer:
    """A turn during which something else happens, once its first token is there."""
    answer, ended, acted = Answer(), threading.Event(), []

    def listen(event: Event) -> None:
        answer.events.append(event)
        if isinstance(event, Delta) and not acted:
            acted.append(act())
        if isinstance(event, Finished | Failed):
            ended.set()

    engine.submit(request(words(seed, 60), 6, memory=memory("s")), listen)
    assert ended.wait(PATIENCE)
    assert acted
    return answer


def test_of_two_turns_at_once_one_is_refused_and_can_be_sent_again(replicas: list[Engine], reference: Engine) -> None:
    for seed in (1, 3, 2):
        wanted = turn(reference, seed).tokens
    turn(replicas[0], 1)
    before = replicas[0].stats().session_conflicts
    answer = meanwhile(replicas[0], 2, lambda: turn(replicas[1], 3))
    with pytest.raises(SessionConflict):
        _ = answer.end
    assert replicas[0].stats().session_conflicts == before + 1
    assert turn(replicas[0], 2).tokens == wanted
    assert listed(replicas[1]) == listed(reference)


def test_two_that_begin_a_session_are_one_too_many(replicas: list[Engine], reference: Engine) -> None:
    turn(reference, 3)
    answer = meanwhile(replicas[0], 2, lambda: turn(replicas[1], 3))
    with pytest.raises(SessionConflict):
        _ = answer.end
    assert turn(replicas[0], 2).tokens == turn(reference, 2).tokens


def test_a_deleted_session_is_new_everywhere(replicas: list[Engine]) -> None:
    first = turn(replicas[0], 1).tokens
    turn(replicas[1], 2)
    replicas[0].sessions.delete("owner", "s")
    assert listed(replicas[1]) == {}
    with pytest.raises(SessionNotFound):
        replicas[1].sessions.delete("owner", "s")
    assert turn(replicas[1], 1).tokens == first
    answer = meanwhile(replicas[1], 2, lambda: replicas[0].sessions.delete("owner", "s"))
    with pytest.raises(SessionConflict):
        _ = answer.end
    assert listed(replicas[0]) == {}
    assert turn(replicas[1], 1).tokens == first


def test_endpoints_see_what_other_replicas_have_done(replicas: list[Engine], reference: Engine) -> None:
    one, other = (engine.sessions for engine in replicas)
    turn(replicas[0], 1)
    assert listed(replicas[1]).keys() == {"s"}
    other.save_context("owner", "s", {"kept": 1})
    turn(replicas[0], 2)
    assert one.load_context("owner", "s") == {"kept": 1}
    wanted = [turn(reference, seed).tokens for seed in (1, 3)][-1]
    assert turn(replicas[1], 3).tokens == wanted
    one.rename("owner", "s", "t")
    assert listed(replicas[1]).keys() == {"t"}
    with pytest.raises(SessionExists):
        other.rename("owner", "t", "t")
    assert other.fork("owner", "t", "u")
    other.save_session("owner", "u")
    assert one.info("owner", "u").kept_pairs == one.info("owner", "t").kept_pairs
    assert turn(replicas[0], 4, "u").tokens == turn(replicas[1], 4, "t").tokens
    saved = other.save_all("owner", "all.atlas")
    assert saved.sessions == 2
    one.reset("owner", None)
    assert listed(replicas[1]) == {"t": 0, "u": 0}
    assert one.load_file("owner", "all.atlas") == 2
    assert all(listed(replicas[1]).values())
    other.delete_file("owner", "all.atlas")
    replicas[0].documents.write("owner", "d", b"text")
    assert replicas[1].documents.read("owner", "d") == b"text"
    assert [one.filename for one in replicas[1].documents.list("owner")] == ["d"]
    replicas[1].documents.delete("owner", "d")
    assert replicas[0].documents.read("owner", "d") is None


def test_what_another_replica_has_used_is_not_deleted_for_age(replicas: list[Engine]) -> None:
    turn(replicas[0], 1)
    turn(replicas[0], 1, "old")
    with replicas[0].sessions._index.lock:
        for entry in replicas[0].sessions._index.entries():
            entry.listing = replace(entry.listing, last_used=1.0)
    turn(replicas[1], 2)
    assert replicas[0].sessions.expire(3600) == 1, "its own word is old for both, the store's for neither but one"
    assert listed(replicas[1]).keys() == {"s"}


def test_a_replica_that_cannot_reach_the_store_begins_no_turn(
    replicas: list[Engine], reference: Engine, bucket: Bucket
) -> None:
    for seed in (1, 2):
        wanted = turn(reference, seed).tokens
    turn(replicas[0], 1)
    bucket.away = {0}
    for _ in range(2):
        with pytest.raises(MemoryUnavailable):
            _ = turn(replicas[0], 2).end
    with pytest.raises(MemoryUnavailable):
        replicas[0].sessions.info("owner", "s")
    assert turn(replicas[1], 2).tokens == wanted
    bucket.away = set()
    assert turn(replicas[0], 3).tokens == turn(reference, 3).tokens


@pytest.mark.parametrize("moves", [False, True])
def test_a_turn_that_could_not_be_stored_says_so_and_is_stored_later(
    replicas: list[Engine], reference: Engine, bucket: Bucket, moves: bool
) -> None:
    """Unless the client has gone on elsewhere: then it is what it was told it might be."""
    turn(replicas[0], 1)
    answer = meanwhile(replicas[0], 2, lambda: bucket.away.add(0))
    assert answer.end.memory is not None
    assert "host memory only" in (answer.end.memory.degraded or "")
    if moves:
        turn(replicas[1], 3)
    bucket.away.clear()
    for seed in (1, 3 if moves else 2):
        turn(reference, seed)
    if not moves:
        assert eventually(lambda: listed(replicas[1]) == listed(reference))
    assert turn(replicas[0], 4).tokens == turn(reference, 4).tokens
    assert turn(replicas[1], 5).tokens == turn(reference, 5).tokens


def test_sessions_that_left_main_memory_are_found(
    opened: Callable[..., Any], bucket: Bucket, reference: Engine, replicas: list[Engine], tmp_path: Path
) -> None:
    """And an engine that is closed has left nothing behind that the next one would need."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("atlas_jax.engine.engine.open_storage", lambda *_, **__: bucket.storage(9))
        how = {"dtype": "float32", "max_concurrent": 2, "memory_path": tmp_path, "journal_sync": 30.0}
        with opened(l2_cache_size=1, **how) as third:
            for seed in (1, 2):
                for name in ("s", "t"):
                    wanted = turn(third, seed, name).tokens
    turn(reference, 1)
    assert turn(reference, 2).tokens == wanted
    assert turn(replicas[0], 3, "t").tokens == turn(reference, 3).tokens
