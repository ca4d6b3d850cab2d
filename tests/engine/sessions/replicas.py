"""Engines in one process that share an object store, each with a network of its own."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import obstore
import pytest

from atlas_jax.engine import Engine
from atlas_jax.engine.sessions import object_session
from atlas_jax.engine.sessions._obstore import Bucket as Objects
from atlas_jax.engine.sessions.object_store import ObjectStorage


class Bucket:
    """An object store, and how its replicas reach it.

    Attributes:
      away: replicas that cannot.
      losing: replicas whose next manifest is taken without an answer.
    """

    def __init__(self) -> None:
        self.memory = obstore.store.MemoryStore()
        self.away: set[int] = set()
        self.losing: set[int] = set()

    def storage(self, replica: int) -> ObjectStorage:
        bucket = self

        class Reached(Objects):
            def __getattribute__(self, name: str) -> Any:
                if name not in ("get", "put", "get_large", "put_large", "list"):
                    return super().__getattribute__(name)
                if replica in bucket.away:
                    raise OSError(0, "the network is gone")
                found = super().__getattribute__(name)
                if name == "put" and replica in bucket.losing:
                    bucket.losing.discard(replica)
                    return lambda *args: _lost(found, *args)
                return found

        return ObjectStorage(Reached(self.memory))


def _lost(put: Callable[..., Any], *args: Any) -> Any:
    put(*args)
    raise OSError(0, "the answer is lost")


@contextmanager
def shared(opened: Callable[..., Any], bucket: Bucket, count: int, **settings: Any) -> Iterator[list[Engine]]:
    """Engines on one bucket, of numbers 0, 1, …"""
    with ExitStack() as stack, pytest.MonkeyPatch.context() as patch:
        patch.setattr(object_session, "_PATIENCE", 0.2)
        out = []
        for number in range(count):
            patch.setattr("atlas_jax.engine.engine.open_storage", lambda *_, _at=number, **__: bucket.storage(_at))
            how = {"memory_path": "anywhere", "dtype": "float32", "max_concurrent": 2, **settings}
            out.append(stack.enter_context(opened(**how)))
        yield out


def killed(engine: Engine) -> None:
    """Leaves an engine with what a new process would have: nothing of any session."""
    sessions = engine.sessions
    index, journal = sessions._index, sessions.tiers._journal
    assert journal is not None
    with index.lock:
        while any(entry.busy for entry in index._entries.values()):
            index.freed.wait(1.0)
        with journal._changed:
            journal._behind.clear()
        for entry in list(index._entries.values()):
            index.forget(entry)
        index._absent.clear()
        index._generation = 0


def together(*acts: Callable[[], Any]) -> list[Any]:
    """Does things at the same time; what each returned, or raised."""
    out: list[Any] = [None] * len(acts)
    start = threading.Barrier(len(acts))

    def run(number: int, act: Callable[[], Any]) -> None:
        start.wait()
        try:
            out[number] = act()
        except Exception as error:
            out[number] = error

    threads = [threading.Thread(target=run, args=(number, act)) for number, act in enumerate(acts)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return out
