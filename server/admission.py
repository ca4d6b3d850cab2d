"""Concurrency: how much runs at once, how much may wait, and whose turn it is."""

from __future__ import annotations

import asyncio
import time
from collections import Counter, OrderedDict, deque

from server.errors import TooManyRequests, Unavailable


class Admitted:
    """One of the places; `release` is synchronous and idempotent.

    Attributes:
      waited: seconds spent in the queue.
    """

    __slots__ = ("_admission", "_key_id", "_other", "waited")

    def __init__(self, admission: Admission, key_id: str, waited: float) -> None:
        self._admission: Admission | None = admission
        self._key_id = key_id
        self._other: Admitted | None = None
        self.waited = waited

    def joined(self, other: Admitted) -> Admitted:
        """This place, which now releases the other with it."""
        self._other = other
        return self

    def release(self) -> None:
        """Gives the place to the next in turn."""
        if self._admission is not None:
            admission, self._admission = self._admission, None
            admission._released(self._key_id)
            if self._other is not None:
                self._other.release()


class Admission:
    """`running` places and a queue of `waiting`, served round-robin between keys.

    What runs cannot be taken back, so round-robin alone would let one key hold every place for as long as it likes: the last
    `reserve` places go only to keys that hold none. A key that has `per_key` requests waiting is over its share (429);
    when the whole queue is full, or a request has waited `timeout` seconds, the server is overloaded (503).

    Args:
      exhausted: what is said then, where the places are not those of requests in general.

    Attributes:
      places: how many there are.
    """

    def __init__(
        self,
        *,
        running: int,
        waiting: int,
        per_key: int,
        timeout: float,
        reserve: int = 0,
        exhausted: str | None = None,
    ) -> None:
        self.places, self._waiting_limit, self._per_key, self._timeout = running, waiting, per_key, timeout
        self._full = exhausted or "The server is at its limit of requests"
        self._late = exhausted or "No place became free in time"
        self._reserve = min(reserve, running - 1)
        self._queues: OrderedDict[str, deque[asyncio.Future[None]]] = OrderedDict()
        self._held: Counter[str] = Counter()
        self.running = 0
        self.waiting = 0

    def check(self, key_id: str) -> None:
        """Raises at once what `acquire` would raise at once."""
        if self._at_once(key_id):
            return
        if self.waiting >= self._waiting_limit:
            raise Unavailable(self._full, code="overloaded", retry_after=1.0)
        if len(self._queues.get(key_id, ())) >= self._per_key:
            raise TooManyRequests("Too many concurrent requests for this key", code="queue_full", retry_after=1.0)

    async def acquire(self, key_id: str) -> Admitted:
        """Waits for a place; raises TooManyRequests or Unavailable."""
        self.check(key_id)
        if self._at_once(key_id):
            self._take(key_id)
            return Admitted(self, key_id, 0.0)
        started = time.perf_counter()
        place: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._queues.setdefault(key_id, deque()).append(place)
        self.waiting += 1
        try:
            async with asyncio.timeout(self._timeout):
                await place
        except BaseException as error:
            if place.done() and not place.cancelled() and place.exception() is None:
                self._released(key_id)
            else:
                self._leave(key_id, place)
            if isinstance(error, TimeoutError):
                raise Unavailable(self._late, code="overloaded", retry_after=5.0) from None
            raise
        return Admitted(self, key_id, time.perf_counter() - started)

    def more(self, key_id: str) -> Admitted | None:
        """A place for a key that does not wait for it, or None where it would have to."""
        if not self._at_once(key_id):
            return None
        self._take(key_id)
        return Admitted(self, key_id, 0.0)

    def close(self, error: Exception) -> None:
        """Makes everyone who waits fail with this error."""
        for queue in self._queues.values():
            for place in queue:
                if not place.done():
                    place.set_exception(error)
        self._queues.clear()
        self.waiting = 0

    def _open_to(self, key_id: str) -> bool:
        return self.places - self.running > (self._reserve if self._held[key_id] else 0)

    def _at_once(self, key_id: str) -> bool:
        # Whoever else waits may not have a free place, or would have it already.
        return key_id not in self._queues and self._open_to(key_id)

    def _take(self, key_id: str) -> None:
        self.running += 1
        self._held[key_id] += 1

    def _leave(self, key_id: str, place: asyncio.Future[None]) -> None:
        queue = self._queues.get(key_id)
        if queue is None or place not in queue:
            return  # cancelled, and already skipped by a release
        queue.remove(place)
        self.waiting -= 1
        if not queue:
            del self._queues[key_id]

    def _released(self, key_id: str) -> None:
        """Takes a place back and hands on what is free."""
        self.running -= 1
        self._held[key_id] -= 1
        if not self._held[key_id]:
            del self._held[key_id]
        while (following := next((key for key in self._queues if self._open_to(key)), None)) is not None:
            self._serve(following)

    def _serve(self, key_id: str) -> None:
        """Hands a place to a key's first request; the key goes to the end of the rotation."""
        queue = self._queues.pop(key_id)
        place = queue.popleft()
        self.waiting -= 1
        if queue:
            self._queues[key_id] = queue
        if not place.done():
            self._take(key_id)
            place.set_result(None)
