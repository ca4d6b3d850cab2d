"""How long a test waits for what must happen: a bound on hanging, not a statement about speed.

With eight runnable processes a core everything takes some ten times as long as alone.
"""

from __future__ import annotations

import time
from collections.abc import Callable

PATIENCE = 1200.0
"""Seconds; less than pytest's own time-out, so that the test says what did not happen."""


def eventually(condition: Callable[[], bool], seconds: float = 30.0) -> bool:
    """Waits for a condition; tells whether it holds."""
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.01)
    return condition()
