"""How long a test waits for what must happen: a bound on hanging, not a statement about speed.

With eight runnable processes a core everything takes some ten times as long as alone.
"""

from __future__ import annotations

PATIENCE = 1200.0
"""Seconds; less than pytest's own time-out, so that the test says what did not happen."""
