"""The sequences of one HTTP request on the engine: submitted at most so many at once, retried, cancelled together."""

from __future__ import annotations

import asyncio
import dataclasses
import logging
import time
from collections.abc import Callable, Sequence

from atlas_jax.engine.api import (
    Delta,
    EngineError,
    EngineProtocol,
    Event,
    Failed,
    Finished,
    GenerationRequest,
    Handle,
    MemoryStats,
    MemoryUnavailable,
    Overloaded,
)
from server.admission import Admitted
from server.errors import ServerError, Unavailable
from server.services.engine_supervisor import EngineSupervisor
from server.services.event_bridge import Mailbox

log = logging.getLogger("atlas.server")
_RETRY_SECONDS = (0.05, 0.15, 0.4)
_WAKE = Delta("")


class RequestGroup:
    """Runs several engine requests for one caller and gives out their events in the order they came.

    One sequence runs in the caller's place; every other that decodes beside it takes a place of its own, where there is
    one, so that a request of many sequences gets no more of the engine than as many requests of one.

    Where the memory cannot be had, a sequence without a session runs on the plain model and says so in its statistics
    (`degraded`). One with a session is tried again, with growing pauses, and then fails: its answer would silently
    forget.

    Attributes:
      submitted_at: when the first sequence had been handed to the engine (`time.perf_counter`), 0 before.
      finished: what the engine reported at the end of each sequence, by index.
    """

    def __init__(
        self,
        supervisor: EngineSupervisor,
        requests: Sequence[GenerationRequest],
        *,
        width: int,
        more: Callable[[], Admitted | None],
        degraded: str | None = None,
    ) -> None:
        self._supervisor = supervisor
        self._requests = list(requests)
        self._width, self._more = width, more
        self._places: list[Admitted] = []
        self._mailbox = Mailbox()
        self._handles: dict[int, Handle] = {}
        self._started: set[int] = set()
        self._degraded = {} if degraded is None else dict.fromkeys(range(len(self._requests)), degraded)
        self._retries = 0
        self._next = 0
        self._error: Exception | None = None
        self.submitted_at = 0.0
        self.finished: dict[int, Finished] = {}

    @property
    def done(self) -> bool:
        """Whether every sequence has finished."""
        return len(self.finished) == len(self._requests)

    @property
    def last_end(self) -> float:
        """When the engine finished a sequence most recently."""
        return self._mailbox.last_end

    async def start(self) -> None:
        """Submits the first sequences; raises what the engine raises."""
        self._supervisor.joined(self)
        await self._fill(self._supervisor.accepting)
        self.submitted_at = time.perf_counter()

    async def next(self, timeout: float) -> list[tuple[int, Event]]:
        """The next events, empty after `timeout` seconds without one; raises what went wrong."""
        while self._error is None:
            arrivals = await self._mailbox.take(timeout)
            if not arrivals:
                return []
            out: list[tuple[int, Event]] = []
            try:
                for index, event in arrivals:
                    if self._error is None:
                        await self._arrived(index, event, out)
            except Exception as error:
                self._error = error  # what came before the failure is delivered first
            if out:
                return out
        raise self._error

    def degrade(self, reason: str) -> None:
        """Takes the memory away from every sequence, before the first is submitted."""
        self._requests = [dataclasses.replace(request, memory=None) for request in self._requests]
        self._degraded = dict.fromkeys(range(len(self._requests)), reason)

    def abort(self, error: ServerError) -> None:
        """Makes the reader fail with this error."""
        self._error = error
        self._mailbox.put((-1, _WAKE))
        self._mailbox.wake()

    def close(self) -> None:
        """Cancels what still runs; idempotent."""
        self._supervisor.left(self)
        self._next = len(self._requests)
        handles, self._handles = self._handles, {}
        for handle in handles.values():
            handle.cancel()
        self._give_back()

    async def _fill(self, engine: EngineProtocol) -> None:
        """Submits while there is room; what there is no room for waits for one of ours to finish."""
        self._give_back()
        while self._next < len(self._requests) and len(self._handles) < self._width:
            if len(self._handles) > len(self._places):
                place = self._more()
                if place is None:
                    return
                self._places.append(place)
            try:
                await self._submit(engine, self._next)
            except MemoryUnavailable:
                raise
            except Overloaded:
                if not self._handles:
                    raise
                return
            self._next += 1

    def _give_back(self) -> None:
        """Gives back the places that none of the running sequences needs."""
        while len(self._places) > max(0, len(self._handles) - 1):
            self._places.pop().release()

    async def _submit(self, engine: EngineProtocol, index: int) -> None:
        while True:
            try:
                listener = self._supervisor.bridge.listener(self._mailbox, index)
                self._handles[index] = engine.submit(self._requests[index], listener)
                return
            except MemoryUnavailable as error:
                await self._without_memory(index, error)

    async def _arrived(self, index: int, event: Event, out: list[tuple[int, Event]]) -> None:
        if isinstance(event, Failed):
            await self._failed(index, event)
            return
        self._started.add(index)
        if not isinstance(event, Finished):
            out.append((index, event))
            return
        out.append((index, self._ended(index, event)))
        await self._fill(self._supervisor.engine)

    async def _failed(self, index: int, event: Failed) -> None:
        self._handles.pop(index, None)
        if not isinstance(event.error, MemoryUnavailable) or index in self._started:
            raise event.error
        await self._without_memory(index, event.error)
        await self._submit(self._supervisor.engine, index)

    async def _without_memory(self, index: int, error: MemoryUnavailable) -> None:
        """Takes the memory away from a request without a session; waits for one that has a session, a few times."""
        request = self._requests[index]
        if request.memory is None or (request.memory.session is not None and self._retries == len(_RETRY_SECONDS)):
            raise error
        if request.memory.session is not None:
            self._retries += 1
            await asyncio.sleep(_RETRY_SECONDS[self._retries - 1])
            return
        log.warning("[ATLAS] No available ATLAS contexts: a request without a session runs on the plain model")
        self._degraded[index] = str(error)
        self._requests[index] = dataclasses.replace(request, memory=None)

    def _ended(self, index: int, event: Finished) -> Finished:
        self._handles.pop(index, None)
        if event.reason == "cancelled":
            raise Unavailable("The server is shutting down", code="shutting_down", retry_after=5.0)
        if event.reason == "error":
            raise EngineError("The engine could not finish this request")
        if index in self._degraded:
            event = dataclasses.replace(event, memory=degraded_stats(self._degraded[index]))
        self.finished[index] = event
        return event


def degraded_stats(reason: str) -> MemoryStats:
    """The statistics of a request that asked for a memory and ran without."""
    return MemoryStats(
        memory_utilization=0.0,
        window_fill_ratio=0.0,
        omega_loss=0.0,
        muon_iterations=0,
        blend_ratio_actual=0.0,
        tokens_absorbed=0,
        session_id=None,
        cache_hit=False,
        degraded=reason,
    )
