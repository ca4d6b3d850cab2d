"""Figures about the server itself: request counts, the latency it adds, and averages sampled over time."""

from __future__ import annotations

import logging
import math
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from atlas_jax.engine.api import EngineStats
from server.services.runtime_config import RuntimeConfig

log = logging.getLogger("atlas.server")
Outcome = Literal["completed", "failed", "cancelled"]
_OLD, _NEW = 0.9, 0.1
# An operator wants to know that requests are slow, soon and not of each: a machine that stays busy says so once an hour.
_FIRST_REPORT_SECONDS, _REPORT_SECONDS = 600.0, 3600.0


@dataclass(frozen=True, slots=True)
class Latency:
    """What the server added to the latest requests, in milliseconds; zeros before the first."""

    average: float
    highest: float
    lowest: float


class ServerStats:
    """Counts generation requests from their arrival to the last byte of their answer.

    Attributes:
      failed: requests that ended with an error of the server; clients that left are `cancelled`.
    """

    def __init__(self, config: RuntimeConfig, history: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._config, self._clock = config, clock
        self._latencies: deque[float] = deque(maxlen=history)
        self.started_at = clock()
        self.total = 0
        self.active = 0
        self.completed = 0
        self.failed = 0
        self.cancelled = 0
        self.over_budget = 0
        self.memory_utilization = 0.0
        self.window_fill_ratio = 0.0
        self.kept_fill_ratio = 0.0
        self._sampled = False
        self._measured = self._slow = self._told = 0
        self._slowest = 0.0
        self._since, self._report_after = self.started_at, _FIRST_REPORT_SECONDS

    @property
    def uptime(self) -> float:
        """Seconds since the server started."""
        return round(self._clock() - self.started_at, 3)

    @property
    def history_size(self) -> int:
        """How many requests the latency figures cover."""
        return len(self._latencies)

    @property
    def latency(self) -> Latency:
        """The latency figures of the latest requests."""
        if not self._latencies:
            return Latency(0.0, 0.0, 0.0)
        mean = math.fsum(self._latencies) / len(self._latencies)
        return Latency(round(mean, 3), round(max(self._latencies), 3), round(min(self._latencies), 3))

    def begin(self) -> None:
        """A request has arrived."""
        self.total += 1
        self.active += 1

    def end(self, outcome: Outcome, *, added_ms: float | None, request_id: str) -> None:
        """A request has ended; `added_ms` is what the server added to it, where that could be measured."""
        self.active -= 1
        self.completed += outcome == "completed"
        self.failed += outcome == "failed"
        self.cancelled += outcome == "cancelled"
        if added_ms is None:
            return
        self._latencies.append(added_ms)
        self._measured += 1
        budget = self._config.values.latency_budget_ms
        if added_ms > budget:
            self.over_budget += 1
            log.debug("[ATLAS] Request exceeded the latency budget: %.1fms (request_id=%s)", added_ms, request_id)
            self._slow += 1
            self._slowest = max(self._slowest, added_ms)

    def report_slow(self) -> None:
        """Logs how many requests were over the latency budget: ten minutes after quiet ones, then once an hour."""
        now = self._clock()
        if now - self._since < self._report_after:
            return
        if self._slow:
            log.warning(
                "[ATLAS] %d of %d requests exceeded the latency budget of %.1fms in the last %.0f minutes, "
                "the slowest with %.1fms",
                self._slow,
                self._measured,
                self._config.values.latency_budget_ms,
                (now - self._since) / 60,
                self._slowest,
            )
        self._report_after = _REPORT_SECONDS if self._slow else _FIRST_REPORT_SECONDS
        self._measured, self._slow, self._slowest, self._since = 0, 0, 0.0, now

    def sample(self, engine: EngineStats) -> None:
        """Takes one sample of the engine's gauges into the exponential averages."""
        self.report_slow()
        old, new = (_OLD, _NEW) if self._sampled else (0.0, 1.0)
        self._sampled = True
        self.memory_utilization = old * self.memory_utilization + new * engine.memory_utilization
        self.window_fill_ratio = old * self.window_fill_ratio + new * engine.window_fill_ratio
        kept_fill = engine.kept_pairs / max(engine.kept_pairs_capacity, 1)
        self.kept_fill_ratio = old * self.kept_fill_ratio + new * kept_fill
        if self.total != self._told:  # a line a second would bury all others
            log.debug("[ATLAS] Metrics updated: %d requests, %.1fms avg latency", self.total, self.latency.average)
            self._told = self.total
        if self._config.values.log_atlas_operations:
            log.debug(
                "ATLAS Stats: Memory=%.2f%%, Window=%.2f%%, Loss=%.6f, Kept=%.2f%%",
                engine.memory_utilization * 100,
                engine.window_fill_ratio * 100,
                engine.omega_loss,
                kept_fill * 100,
            )
