"""Offline (batch) generation: several requests at once, and all answers together."""

from __future__ import annotations

import threading
from collections.abc import Sequence

from atlas_jax.engine.api import Delta, Event, Failed, Finished, GenerationRequest, Listener
from atlas_jax.engine.engine import Engine


def ask(engine: Engine, requests: Sequence[GenerationRequest]) -> list[list[Event]]:
    """Runs requests together and returns the events of each.

    Raises:
      EngineError: one of them failed.
    """
    events: list[list[Event]] = [[] for _ in requests]
    left = threading.Semaphore(0)

    def listener(received: list[Event]) -> Listener:
        def listen(event: Event) -> None:
            received.append(event)
            if isinstance(event, Finished | Failed):
                left.release()

        return listen

    for received, request in zip(events, requests, strict=True):
        engine.submit(request, listener(received))
    for _ in requests:
        left.acquire()
    for received in events:
        last = received[-1]
        if isinstance(last, Failed):
            raise last.error
    return events


def text_of(events: Sequence[Event]) -> str:
    """The text of an answer."""
    return "".join(event.text for event in events if isinstance(event, Delta))
