"""Carries the engine's events from its thread to the event loop."""

from __future__ import annotations

import asyncio
import time
from collections import deque

from atlas_jax.engine.api import Event, Failed, Finished, Listener

Arrival = tuple[int, Event]
# A reader that comes back after a while finds thousands of events; encoded in one go they would hold up everybody else.
_AT_ONCE = 128


class Mailbox:
    """The events of one HTTP request, whichever of its sequences they belong to; used on the event loop only.

    Attributes:
      last_end: when the engine reported the end of a sequence most recently (`time.perf_counter`), 0 before.
    """

    __slots__ = ("_arrivals", "_waiter", "last_end")

    def __init__(self) -> None:
        self._arrivals: list[Arrival] = []
        self._waiter: asyncio.Future[None] | None = None
        self.last_end = 0.0

    def put(self, arrival: Arrival) -> None:
        """Adds an event; the reader sleeps on until `wake`."""
        self._arrivals.append(arrival)

    def wake(self) -> None:
        """Wakes the reader."""
        waiter = self._waiter
        if waiter is not None and not waiter.done():
            waiter.set_result(None)

    async def take(self, timeout: float) -> list[Arrival]:
        """What has arrived, some at a time, waiting for something to; empty after `timeout` seconds."""
        if not self._arrivals:
            loop = asyncio.get_running_loop()
            waiter = self._waiter = loop.create_future()
            alarm = loop.call_later(timeout, _wake, waiter)
            try:
                await waiter
            finally:
                alarm.cancel()
                self._waiter = None
        arrivals = self._arrivals[:_AT_ONCE]
        del self._arrivals[:_AT_ONCE]
        return arrivals


class EventBridge:
    """Carries events from the engine's thread to the loop, with one wake-up for however many events are pending."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._pending: deque[tuple[Mailbox, Arrival]] = deque()
        self._armed = False

    def listener(self, mailbox: Mailbox, index: int) -> Listener:
        """A callback for the engine that delivers to `mailbox` under `index`."""

        def listen(event: Event) -> None:
            if isinstance(event, Finished | Failed):
                mailbox.last_end = time.perf_counter()
            self._pending.append((mailbox, (index, event)))
            # The loop clears the flag before it empties the queue, so an event that sees it set will be delivered.
            if not self._armed:
                self._armed = True
                try:
                    self._loop.call_soon_threadsafe(self._deliver)
                except RuntimeError:
                    self._pending.clear()  # the loop has closed: nobody is left to read

        return listen

    def _deliver(self) -> None:
        self._armed = False
        # One step of the engine brings a token to every stream; those that end with it do not wait for the others.
        ending: dict[Mailbox, None] = {}
        others: dict[Mailbox, None] = {}
        for _ in range(len(self._pending)):  # what comes meanwhile wakes the loop again
            mailbox, arrival = self._pending.popleft()
            mailbox.put(arrival)
            (ending if isinstance(arrival[1], Finished | Failed) else others)[mailbox] = None
        for mailbox in ending:
            mailbox.wake()
        for mailbox in others:
            mailbox.wake()


def _wake(waiter: asyncio.Future[None]) -> None:
    if not waiter.done():
        waiter.set_result(None)
