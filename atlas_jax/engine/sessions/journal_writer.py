"""The thread that writes what was answered, before the answer's last event is sent, and the one that syncs it.

The engine's thread never waits for a disk: it hands a turn over and goes on. One slow write delays the ends of answers, not
their tokens.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Protocol

from atlas_jax.engine.api import SessionConflict

log = logging.getLogger("atlas.engine")
_RETRY_SECONDS = 1.0
"""Seconds before a write that failed is tried again, where each is synced at once."""


class Syncs(Protocol):
    """Something whose writes can be brought to the disk."""

    def sync(self) -> None:
        """Waits until they are there."""


Write = Callable[[], Syncs | None]
Done = Callable[[Exception | None], None]


class JournalWriter:
    """Runs writes in the order they came; makes them durable together.

    Args:
      sync_seconds: how far the disk may be behind; 0 syncs each write before it is called done.
      width: writes that run at once, where they wait for a network; two for one journal are not given at once.
    """

    def __init__(self, sync_seconds: float, width: int = 1) -> None:
        self._seconds = sync_seconds
        self._changed = threading.Condition()
        self._queue: deque[tuple[Write, Done]] = deque()
        self._at_work = 0
        self._pool = ThreadPoolExecutor(width, thread_name_prefix="atlas-journal-sync") if width > 1 else None
        self._behind: dict[Syncs, None] = {}
        self._closing = False
        self._threads = [
            *(threading.Thread(target=self._write_all, name="atlas-journal", daemon=True) for _ in range(width)),
            threading.Thread(target=self._sync_all, name="atlas-journal-sync", daemon=True),
        ]
        for thread in self._threads:
            thread.start()

    def submit(self, write: Write, done: Done) -> None:
        """Queues a write; `done` is called from the journal's thread with what went wrong, or None."""
        with self._changed:
            self._queue.append((write, done))
            self._changed.notify_all()

    @property
    def pending(self) -> int:
        """Writes that have not been called done."""
        return len(self._queue) + self._at_work

    def close(self, timeout: float) -> bool:
        """Writes what is left, syncs as much as there is time for, and ends; tells whether all was written.

        What was written and not synced outlives this process, not a failure of power.
        """
        end = time.monotonic() + timeout
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        for thread in self._threads:
            thread.join(max(0.0, end - time.monotonic()))
        if self._pool is not None:
            self._pool.shutdown(wait=False, cancel_futures=True)
        return not self.pending

    def _write_all(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: bool(self._queue) or self._closing)
                if not self._queue:
                    return
                write, done = self._queue.popleft()
                self._at_work += 1
            failure: Exception | None = None
            written: Syncs | None = None
            try:
                written = write()
                if written is not None and self._seconds == 0:
                    written.sync()
            except Exception as error:
                failure = error
            try:
                done(failure)
            except Exception:
                log.exception("A turn's end could not be told")
            with self._changed:
                self._at_work -= 1
                if written is not None and (self._seconds > 0 or isinstance(failure, OSError)):
                    self._behind[written] = None
                self._changed.notify_all()

    def _sync_all(self) -> None:
        failing: set[Syncs] = set()
        while True:
            with self._changed:
                self._changed.wait_for(lambda: bool(self._behind) or (self._closing and not self.pending))
                if not self._behind:
                    return
                self._changed.wait_for(lambda: self._closing, self._seconds or _RETRY_SECONDS)
                behind, self._behind = self._behind, {}
            failed: set[Syncs] = set()
            for one, error in zip(behind, self._map(_sync, behind), strict=True):
                if error is not None:
                    failed.add(one)
                    if one not in failing:  # it is tried every second, and said once
                        log.error(
                            "[ATLAS] A session's journal could not be brought to the session store: %s", error.strerror
                        )
            failing = failed
            with self._changed:
                if not self._closing:
                    self._behind |= dict.fromkeys(failed)

    def _map(self, work: Callable[[Syncs], OSError | None], several: Iterable[Syncs]) -> Iterable[OSError | None]:
        return map(work, several) if self._pool is None else self._pool.map(work, several)


def _sync(one: Syncs) -> OSError | None:
    """Brings one to the disk; returns what stands in the way where that is to be tried again."""
    try:
        one.sync()
    except SessionConflict:
        log.error("[ATLAS] Turns that were answered are lost: another server has gone on with their session")
    except OSError as error:
        return error
    return None
