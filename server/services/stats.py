"""Figures about the server itself: request counts, the latency it adds, and averages sampled over time."""

from __future__ import annotations

import logging
import math
import time
from collections import deque
from dataclasses import dataclass
from typing import Literal

from atlas_jax.engine.api import EngineStats
from server.services.runtime_config import RuntimeConfig

log = logging.getLogger("atlas.server")
Outcome = Literal["completed", "failed", "cancelled"]
_OLD, _NEW = 0.9, 0.1
_REPORT_SECONDS = 10.0


@dataclass(frozen=True, slots=True)
class Latency:
    """What the server added to the latest requests, in milliseconds; zeros before the first."""

    average: float
    highest: float
    lowest: float


class ServerStats:
    """Counts generation requests from their arrival to the last byte of their answer."""

    def __init__(self, config: RuntimeConfig, history: int) -> None:
        self._config = config
        self._latencies: deque[float] = deque(maxlen=history)
        self.started_at = time.monotonic()
        self.total = 0
        self.active = 0
        self.completed = 0
        self.failed = 0
        self.over_budget = 0
        self.memory_utilization = 0.0
        self.window_fill_ratio = 0.0
        self._sampled = False
        self._slow: list[float] = []
        self._reported = -math.inf

    @property
    def uptime(self) -> float:
        """Seconds since the server started."""
        return round(time.monotonic() - self.started_at, 3)

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
        if outcome == "completed":
            self.completed += 1
        else:
            self.failed += 1
        if added_ms is None:
            return
        self._latencies.append(added_ms)
        budget = self._config.values.latency_budget_ms
        if added_ms > budget:
            self.over_budget += 1
            log.debug("[ATLAS] Request exceeded the latency budget: %.1fms (request_id=%s)", added_ms, request_id)
            self._slow.append(added_ms)
            self.report_slow()

    def report_slow(self) -> None:
        """Logs the requests over the latency budget, at most one line in ten seconds however many there were."""
        now = time.monotonic()
        if self._slow and now - self._reported >= _REPORT_SECONDS:
            log.warning(
                "[ATLAS] %d requests exceeded the latency budget of %.1fms, the slowest with %.1fms",
                len(self._slow),
                self._config.values.latency_budget_ms,
                max(self._slow),
            )
            self._slow.clear()
            self._reported = now

    def sample(self, engine: EngineStats) -> None:
        """Takes one sample of the engine's gauges into the exponential averages."""
        self.report_slow()
        old, new = (_OLD, _NEW) if self._sampled else (0.0, 1.0)
        self._sampled = True
        self.memory_utilization = old * self.memory_utilization + new * engine.memory_utilization
        self.window_fill_ratio = old * self.window_fill_ratio + new * engine.window_fill_ratio
        log.debug("[ATLAS] Metrics updated: %d requests, %.1fms avg latency", self.total, self.latency.average)
        if self._config.values.log_atlas_operations:
            log.debug(
                "[ATLAS] ATLAS Stats: Memory=%.2f%%, Window=%.2f%%, Loss=%.6f",
                engine.memory_utilization * 100,
                engine.window_fill_ratio * 100,
                engine.omega_loss_total,
            )
