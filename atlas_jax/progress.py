"""What long work tells of itself while it runs, and lines in the log: how far it is, and about how long it will take."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import Any

_LOG = logging.getLogger("atlas.engine")
_EVERY_SECONDS = 10.0


class Progress:
    """Is told how far long work is, and asked between its parts whether it may go on; this one does not care."""

    def __call__(self, stage: str, share: float) -> None:
        """A stage is done to this share."""

    def between(self, result: Any = None) -> None:
        """Called after every part of the work: may wait, and may raise to end the work.

        Args:
          result: arrays that the part computes, perhaps still on their way.
        """


class ProgressLog(Progress):
    """Tells of the stages of one piece of work, at most once in ten seconds.

    Args:
      what: begins every line.
      log: where they go.
    """

    def __init__(self, what: str, clock: Callable[[], float] = time.monotonic, *, log: logging.Logger = _LOG) -> None:
        self._what, self._clock, self._log = what, clock, log
        self._told = clock()
        self._stage, self._began, self._first = "", 0.0, 0.0

    def __call__(self, stage: str, share: float) -> None:
        """A stage is done to this share."""
        now = self._clock()
        if stage != self._stage:
            self._stage, self._began, self._first = stage, now, share
        if now - self._told < _EVERY_SECONDS or share >= 1:
            return
        self._told = now
        done = share - self._first
        left = f", about {(now - self._began) * (1 - share) / done:.0f} s left" if done > 0 else ""
        self._log.info("%s: %s, %.0f %%%s", self._what, stage, share * 100, left)
