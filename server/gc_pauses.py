"""Keeps the pauses of Python's garbage collector short."""

from __future__ import annotations

import gc
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

_SECONDS = 0.005
"""Of processor time: a pause that a stream hardly notices, and that some 50 000 objects take."""


class Settled:
    """A callback of the collector that lets it forget what has survived a full collection, where that is much.

    A model and its compiled programs are a million objects that stay. Every full collection walks them, for 0.1 s on an
    idle core and 2 s on a busy one, and no other thread runs meanwhile: neither the event loop nor the engine. What is
    forgotten is freed all the same when nothing refers to it; only cycles stay, and those that are garbage already have
    just been collected.
    """

    def __init__(self) -> None:
        self._began = 0.0

    def __call__(self, phase: str, info: dict[str, Any]) -> None:
        if info["generation"] < 2:
            return
        if phase == "start":
            self._began = time.thread_time()
        elif time.thread_time() - self._began > _SECONDS:  # get_objects would hand out tuples that are being made
            gc.freeze()


@contextmanager
def settled() -> Iterator[None]:
    """Sets the collector up while a server runs, and as it was afterwards."""
    callback = Settled()
    gc.callbacks.append(callback)
    try:
        yield
    finally:
        gc.callbacks.remove(callback)
        gc.unfreeze()
