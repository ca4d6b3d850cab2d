"""Concurrency: how many requests run at once, how many may wait, and whose turn it is."""

from __future__ import annotations

import asyncio
import time
from collections import OrderedDict, deque

from server.errors import TooManyRequests, Unavailable


class Lease:
    """One place among the running requests; `release` is synchronous and idempotent.

    Attributes:
      waited: seconds spent in the queue.
    """

    __slots__ = ("_gate", "waited")

    def __init__(self, gate: Gate, waited: float) -> None:
        self._gate: Gate | None = gate
        self.waited = waited

    def release(self) -> None:
        """Gives the place to the next in turn."""
        if self._gate is not None:
            gate, self._gate = self._gate, None
            gate._released()


class Gate:
    """`running` places and a queue of `waiting`, served round-robin between keys.

    A key that has `per_key` requests waiting is over its share (429); when the whole queue is full, or a request has
    waited `timeout` seconds, the server is overloaded (503).
    """

    def __init__(self, *, running: int, waiting: int, per_key: int, timeout: float) -> None:
        self._places, self._waiting_limit, self._per_key, self._timeout = running, waiting, per_key, timeout
        self._queues: OrderedDict[str, deque[asyncio.Future[None]]] = OrderedDict()
        self.running = 0
        self.waiting = 0

    def check(self, key_id: str) -> None:
        """Raises at once what `acquire` would raise at once."""
        if self.running < self._places and not self.waiting:
            return
        if self.waiting >= self._waiting_limit:
            raise Unavailable("The server is at its limit of requests", code="overloaded", retry_after=1.0)
        if len(self._queues.get(key_id, ())) >= self._per_key:
            raise TooManyRequests("Too many concurrent requests for this key", code="queue_full", retry_after=1.0)

    async def acquire(self, key_id: str) -> Lease:
        """Waits for a place; raises TooManyRequests or Unavailable."""
        self.check(key_id)
        if self.running < self._places and not self.waiting:
            self.running += 1
            return Lease(self, 0.0)
        started = time.perf_counter()
        place: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._queues.setdefault(key_id, deque()).append(place)
        self.waiting += 1
        try:
            async with asyncio.timeout(self._timeout):
                await place
        except BaseException as error:
            if place.done() and not place.cancelled() and place.exception() is None:
                self._released()
            else:
                self._leave(key_id, place)
            if isinstance(error, TimeoutError):
                raise Unavailable("No place became free in time", code="overloaded", retry_after=5.0) from None
            raise
        return Lease(self, time.perf_counter() - started)

    def close(self, error: Exception) -> None:
        """Makes everyone who waits fail with this error."""
        for queue in self._queues.values():
            for place in queue:
                if not place.done():
                    place.set_exception(error)
        self._queues.clear()
        self.waiting = 0

    def _leave(self, key_id: str, place: asyncio.Future[None]) -> None:
        queue = self._queues.get(key_id)
        if queue is None or place not in queue:
            return  # cancelled, and already skipped by a release
        queue.remove(place)
        self.waiting -= 1
        if not queue:
            del self._queues[key_id]

    def _released(self) -> None:
        """Hands a place on: the key at the head of the rotation has one request served and goes to its end."""
        while self._queues:
            key_id, queue = self._queues.popitem(last=False)
            place = queue.popleft()
            self.waiting -= 1
            if queue:
                self._queues[key_id] = queue
            if not place.done():
                place.set_result(None)
                return
        self.running -= 1
