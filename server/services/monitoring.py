"""What the status, statistics and metrics endpoints answer, and the one sampler behind them."""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from collections.abc import AsyncIterator

import msgspec

from atlas_jax.engine.api import EngineStats, Fitting
from server.admission import Admission
from server.config.settings import Settings
from server.errors import NotEnabled, ServerError, TooManyRequests
from server.middleware.request_context import PARTY
from server.schemas import atlas as schema
from server.services.engine_supervisor import EngineSupervisor
from server.services.runtime_config import RuntimeConfig
from server.services.stats import ServerStats

log = logging.getLogger("atlas.server")
_BACKLOG = 16
_SUBSCRIBERS, _SUBSCRIBERS_PER_PARTY = 256, 64


def fitting_progress(fitting: Fitting | None) -> schema.FittingProgress | None:
    """How far a memory is that is being fitted, as it is shown."""
    if fitting is None:
        return None
    return schema.FittingProgress(
        stage=fitting.stage, progress=round(fitting.share, 3), seconds=round(fitting.seconds, 1)
    )


class Subscriber:
    """A reader of live events; a slow one loses the oldest, so its memory is bounded."""

    def __init__(self) -> None:
        self.party = PARTY.get()
        self._events: deque[bytes] = deque(maxlen=_BACKLOG)
        self._news = asyncio.Event()
        self._closed = False

    def offer(self, event: bytes) -> None:
        """Adds an event."""
        self._events.append(event)
        self._news.set()

    def close(self) -> None:
        """Ends the reader once it has read what is there."""
        self._closed = True
        self._news.set()

    async def read(self) -> AsyncIterator[bytes]:
        """The events as they come."""
        while True:
            while self._events:
                yield self._events.popleft()
            if self._closed:
                return
            self._news.clear()
            await self._news.wait()


class Monitoring:
    """Samples the engine at the configured intervals and hands events to subscribers."""

    def __init__(
        self,
        *,
        supervisor: EngineSupervisor,
        stats: ServerStats,
        config: RuntimeConfig,
        contexts: Admission,
        settings: Settings,
    ) -> None:
        self._contexts = contexts
        self._supervisor, self._stats, self._config, self._settings = supervisor, stats, config, settings.atlas
        self._subscribers: set[Subscriber] = set()
        self._closed = False
        self._silent = False

    # --- sampling ------------------------------------------------------------------------------------------------
    async def run(self) -> None:
        """Samples and publishes until cancelled; the intervals may change meanwhile."""
        sample_at = publish_at = 0.0
        while True:
            now = time.monotonic()
            values = self._config.values
            if now >= sample_at:
                sample_at = now + values.stats_update_interval / 1000
                if (engine := self.engine_stats()) is not None:
                    self._stats.sample(engine)
            if now >= publish_at:
                publish_at = now + values.metrics_interval / 1000
                self._publish()
            # A shorter interval set at run time takes effect within a second.
            await asyncio.sleep(min(1.0, max(0.01, min(sample_at, publish_at) - time.monotonic())))

    def engine_stats(self) -> EngineStats | None:
        """The engine's figures, or None while there is no engine to ask, or it cannot say."""
        try:
            return self._supervisor.engine.stats()
        except ServerError:
            return None
        except Exception:  # figures are no reason to stop the sampler, or a scrape
            if not self._silent:
                log.exception("The engine's figures could not be read")
            self._silent = True
            return None

    def _publish(self) -> None:
        engine = self.engine_stats() if self._subscribers else None
        if engine is None:
            return
        event = schema.MetricsEvent(
            timestamp=int(time.time()),
            active_requests=self._stats.active,
            avg_latency=self._stats.latency.average,
            requests_waiting=engine.requests_waiting,
            completed_requests=self._stats.completed,
            failed_requests=self._stats.failed,
            throughput_tokens_per_sec=engine.tokens_per_second,
            memory_utilization=self._stats.memory_utilization,
            window_fill_ratio=self._stats.window_fill_ratio,
            kept_fill_ratio=self._stats.kept_fill_ratio,
            contexts_in_use=self._contexts.running,
        )
        frame = b"data: " + msgspec.json.encode(event) + b"\n\n"
        for subscriber in self._subscribers:
            subscriber.offer(frame)

    def subscribe(self) -> Subscriber:
        """A new reader; raises NotEnabled or TooManyRequests."""
        self._require()
        self.require_metrics()
        if not self._settings.enable_realtime_stats:
            raise NotEnabled("Real-time statistics are not enabled")
        subscriber = Subscriber()
        mine = sum(other.party == subscriber.party for other in self._subscribers)
        if len(self._subscribers) >= _SUBSCRIBERS or mine >= _SUBSCRIBERS_PER_PARTY:
            raise TooManyRequests("Too many readers of the metrics stream", retry_after=30.0)
        if self._closed:
            subscriber.close()
        self._subscribers.add(subscriber)
        return subscriber

    def unsubscribe(self, subscriber: Subscriber) -> None:
        """Forgets a reader."""
        self._subscribers.discard(subscriber)

    def close(self) -> None:
        """Ends every reader, so that open streams do not hold up a shutdown."""
        self._closed = True
        for subscriber in self._subscribers:
            subscriber.close()

    # --- answers -------------------------------------------------------------------------------------------------
    def _require(self) -> None:
        if not self._settings.enabled:
            raise NotEnabled("ATLAS not enabled")

    def require_metrics(self) -> None:
        """Raises NotEnabled where the operator has turned the metrics off."""
        if not self._settings.enable_metrics:
            raise NotEnabled("Metrics are not enabled")

    def status(self, owner: str) -> schema.StatusResponse:
        """The memory subsystem at a glance, and the owner's sessions that cannot be used."""
        self._require()
        engine = self._supervisor.engine
        model = engine.model
        return schema.StatusResponse(
            status="healthy" if self._supervisor.ready else "draining",
            data=schema.StatusData(
                initialized=model.memory_unavailable is None,
                enabled=True,
                context_pool_size=self._contexts.places,
                contexts_in_use=self._contexts.running,
                metrics_enabled=self._settings.enable_metrics,
                memory_persistence=self._settings.memory_persist,
                uptime_seconds=self._stats.uptime,
                model=model.name,
                memory_layers=list(model.memory_layers),
                memory_dim=model.memory_dim,
                kept_pairs_capacity=model.kept_pairs_capacity,
                state_bytes_per_session=model.state.total,
                **schema.state_fields(model.state),
                adapter=model.adapter,
                memory_unavailable=model.memory_unavailable,
                fitting=fitting_progress(engine.fitting()),
                set_aside=[]
                if model.memory_unavailable is not None
                else [
                    schema.SetAside(name=one.name, kind=one.kind, reason=one.reason)
                    for one in engine.sessions.set_aside(owner)
                ],
            ),
        )

    def statistics(self) -> schema.StatsResponse:
        """Counters since the start and exponential averages."""
        self._require()
        engine = self._supervisor.engine.stats()
        return schema.StatsResponse(
            requests_processed=self._stats.completed,
            avg_memory_utilization=self._stats.memory_utilization,
            avg_window_fill_ratio=self._stats.window_fill_ratio,
            avg_kept_fill_ratio=self._stats.kept_fill_ratio,
            total_muon_iterations=engine.muon_iterations_total,
            total_omega_loss=engine.omega_loss_total,
            uptime_seconds=self._stats.uptime,
            memory_saves=engine.memory_saves,
            memory_loads=engine.memory_loads,
        )

    def metrics(self) -> schema.MetricsResponse:
        """Counts and latencies of this moment."""
        self._require()
        self.require_metrics()
        engine, latency = self._supervisor.engine.stats(), self._stats.latency
        return schema.MetricsResponse(
            status="success",
            data=schema.MetricsData(
                current=schema.CurrentMetrics(
                    total_requests=self._stats.total,
                    active_requests=self._stats.active,
                    completed_requests=self._stats.completed,
                    failed_requests=self._stats.failed,
                    avg_latency_ms=latency.average,
                    max_latency_ms=latency.highest,
                    min_latency_ms=latency.lowest,
                    memory_usage_bytes=engine.memory_bytes,
                    cache_hits=engine.session_hits,
                    cache_misses=engine.session_misses,
                    throughput_tokens_per_sec=engine.tokens_per_second,
                    uptime_seconds=self._stats.uptime,
                ),
                history_size=self._stats.history_size,
                server_health=self._supervisor.ready,
            ),
        )
