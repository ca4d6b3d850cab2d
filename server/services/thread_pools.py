"""Blocking work in threads, so much of each kind and so much for each party at once."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import threading
from collections.abc import Callable
from typing import Any, Literal, TypeVar

from server.admission import Admission
from server.middleware.request_context import PARTY

log = logging.getLogger("atlas.server")
T = TypeVar("T")
Purpose = Literal["bodies", "tokenization", "sessions"]
_WAIT_SECONDS = 60.0


class ThreadPools:
    """Threads for what would hold up the event loop, by purpose: what waits for a session delays no tokenising.

    Within a purpose parties take turns (`Admission`): one alone gets at most half the threads, and one that has none always
    gets one while any is free, for a call that blocks for minutes cannot be taken back. A party with too much waiting
    is told so (429).
    """

    def __init__(self) -> None:
        cores = max(2, os.cpu_count() or 1)
        self._running: set[asyncio.Future[Any]] = set()
        self._admissions: dict[Purpose, Admission] = {
            # Their work is the interpreter's, so more threads would only be in each other's way.
            "bodies": Admission(running=cores, waiting=64, per_key=16, timeout=_WAIT_SECONDS, reserve=cores // 2),
            "tokenization": Admission(running=2 * cores, waiting=256, per_key=64, timeout=_WAIT_SECONDS, reserve=cores),
            # These wait: for the disk, or for a session that another request is using.
            "sessions": Admission(running=32, waiting=512, per_key=64, timeout=_WAIT_SECONDS, reserve=16),
        }

    async def run(self, purpose: Purpose, work: Callable[[], T]) -> T:
        """The result of `work`, done in a thread in the current party's turn.

        Work that has begun goes on when the caller is cancelled, and keeps its thread until it has ended.

        Raises:
          TooManyRequests: this party has too much of this kind waiting.
          Unavailable: no thread became free in time.
        """
        place = await self._admissions[purpose].acquire(PARTY.get())
        loop = asyncio.get_running_loop()

        def run() -> T:
            try:
                return work()
            finally:
                with contextlib.suppress(RuntimeError):  # the loop has closed
                    loop.call_soon_threadsafe(place.release)

        try:
            result = in_thread(run, name=f"atlas-{purpose}")
            self._running.add(result)
            result.add_done_callback(self._running.discard)
        except BaseException:  # no thread could be started
            place.release()
            raise
        return await result

    def close(self, error: Exception) -> None:
        """Makes every caller fail with this error; work that has begun goes on."""
        for admission in self._admissions.values():
            admission.close(error)
        for future in list(self._running):
            if not future.done():
                future.set_exception(error)


def in_thread(work: Callable[[], T], *, name: str) -> asyncio.Future[T]:
    """Starts `work` in a daemon thread: unlike the loop's own executor, a hung one cannot keep the process alive."""
    loop = asyncio.get_running_loop()
    future: asyncio.Future[T] = loop.create_future()

    def run() -> None:
        try:
            result = work()
        except BaseException as error:
            _report(loop, future, None, error)
        else:
            _report(loop, future, result, None)

    threading.Thread(target=run, name=name, daemon=True).start()
    return future


def _report(
    loop: asyncio.AbstractEventLoop, future: asyncio.Future[T], result: T | None, error: BaseException | None
) -> None:
    def settle() -> None:
        if future.done():
            return
        if error is not None:
            future.set_exception(error if isinstance(error, Exception) else RuntimeError(type(error).__name__))
        else:
            future.set_result(result)  # type: ignore[arg-type]

    try:
        loop.call_soon_threadsafe(settle)
    except RuntimeError:
        log.debug("The event loop closed before a thread had finished")
