"""Fits a memory to a model that is served already: in a thread of its own, beside the requests and after them.

A part of the work, one group of layers on one page of text, takes a tenth of a second for a model of a billion parameters.
What runs on the device cannot be interrupted, so a stream may lose that long once. From then on the thread rests between
parts while there are requests, eleven times as long as it worked, and streams keep nine tenths of their pace and more.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable
from typing import Any

import jax

from atlas_jax.engine.adapter_finder import CALIBRATING, FittingStopped
from atlas_jax.engine.api import Fitting
from atlas_jax.progress import Progress, ProgressLog

log = logging.getLogger("atlas.engine")

_REST = 11
"""Times as long as it worked a part rests while there are requests: a part then takes at most a twelfth of their time."""
_LOOK_SECONDS = 0.02
_NICE = 10


class BackgroundFit(Progress):
    """A thread that fits a memory, and what is known of how far it is.

    Args:
      work: fits, with this object as its `Progress`; FittingStopped is how it ends early.
      busy: whether there are requests.
    """

    def __init__(
        self,
        work: Callable[[BackgroundFit], None],
        busy: Callable[[], bool],
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._work, self._busy, self._clock = work, busy, clock
        self._log = ProgressLog(CALIBRATING)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="atlas-fitting", daemon=True)
        self._began = self._since = clock()
        self._stage, self._share, self._done = "starting", 0.0, False

    def start(self) -> None:
        """Begins."""
        self._thread.start()

    def stop(self, timeout: float) -> None:
        """Ends it after the part it is at, and waits for that."""
        self._stop.set()
        if self._thread.ident is not None and self._thread is not threading.current_thread():
            self._thread.join(timeout)

    def state(self) -> Fitting | None:
        """How far it is; None once it has ended."""
        if self._done:
            return None
        return Fitting(stage=self._stage, share=self._share, seconds=self._clock() - self._began)

    def __call__(self, stage: str, share: float) -> None:
        """A stage is done to this share."""
        self._stage, self._share = stage, share
        self._log(stage, share)

    def between(self, result: Any = None) -> None:
        """Lets requests have the device; raises FittingStopped when the engine closes."""
        jax.block_until_ready(result)
        until = self._clock() + _REST * (self._clock() - self._since)
        while not self._stop.is_set() and self._busy() and self._clock() < until:
            self._stop.wait(_LOOK_SECONDS)
        if self._stop.is_set():
            raise FittingStopped
        self._since = self._clock()

    def pause(self, seconds: float) -> None:
        """Waits; raises FittingStopped when the engine closes."""
        if self._stop.wait(seconds):
            raise FittingStopped

    def finished(self) -> None:
        """There is nothing left that a client could wait for."""
        self._done = True

    def _run(self) -> None:
        if hasattr(os, "setpriority"):
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _NICE)  # on Linux: this thread alone
        try:
            self._work(self)
        except FittingStopped:
            if not self._done:
                log.info("%s: stopped; the next start does it", CALIBRATING)
        except Exception:
            log.exception("%s failed; the model goes on being served without a memory", CALIBRATING)
        finally:
            self._done = True
