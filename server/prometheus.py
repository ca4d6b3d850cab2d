"""Prometheus metrics in a registry of their own; labels are route templates and fixed words, never client data."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from atlas_jax.engine.api import EngineStats

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_LONG = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)
_SHORT = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5)
_ADDED = (0.0005, 0.001, 0.002, 0.003, 0.005, 0.0075, 0.01, 0.025, 0.05, 0.1, 0.5)

_COUNTERS = (
    ("atlas_prompt_tokens", "Prompt tokens of finished requests", "prompt_tokens_total"),
    ("atlas_cached_tokens", "Prompt tokens that did not have to be processed again", "cached_tokens_total"),
    ("atlas_generation_tokens", "Tokens generated", "generated_tokens_total"),
    ("atlas_drafted_tokens", "Draft tokens of speculative decoding", "drafted_tokens_total"),
    ("atlas_accepted_tokens", "Draft tokens that were accepted", "accepted_tokens_total"),
    ("atlas_engine_requests", "Sequences submitted to the engine", "requests_total"),
    ("atlas_engine_steps", "Compiled steps run", "steps_total"),
    ("atlas_engine_step_seconds", "Time spent in compiled steps", "step_seconds_total"),
    ("atlas_jit_compilations", "Compilations", "compilations_total"),
    ("atlas_session_hits", "Requests whose session was on the device", "session_hits"),
    ("atlas_session_misses", "Requests whose session had to be fetched", "session_misses"),
    ("atlas_memory_updates", "Writes to session memories", "memory_updates_total"),
    ("atlas_memory_writes_skipped", "Writes that diverged and were not taken", "writes_skipped_total"),
    ("atlas_muon_iterations", "Iterations of the inner optimiser", "muon_iterations_total"),
    ("atlas_memory_omega_loss", "Sum of the Omega losses of all writes", "omega_loss_total"),
    ("atlas_snapshot_saves", "Sessions and files written", "memory_saves"),
    ("atlas_snapshot_loads", "Sessions and files read", "memory_loads"),
    ("atlas_snapshot_failures", "Writes and reads that failed", "snapshot_failures"),
    ("atlas_session_conflicts", "Changes refused since another server had changed the session", "session_conflicts"),
)
_GAUGES = (
    ("atlas_num_requests_running", "Sequences decoding", "requests_running"),
    ("atlas_num_requests_waiting", "Sequences queued in the engine", "requests_waiting"),
    ("atlas_tokens_per_second", "Tokens generated a second, lately", "tokens_per_second"),
    ("atlas_memory_utilization", "Share of the memories' capacity in use", "memory_utilization"),
    ("atlas_window_fill_ratio", "Share of the exact windows in use", "window_fill_ratio"),
    ("atlas_kept_pairs", "Pairs kept of what has left the window, per KV head and on average per layer", "kept_pairs"),
    (
        "atlas_kept_pairs_capacity",
        "Pairs that may be kept, per KV head and on average per layer",
        "kept_pairs_capacity",
    ),
    ("atlas_memory_current_omega_loss", "Omega loss of the latest write", "omega_loss"),
    ("atlas_memory_bytes", "Main memory the process holds", "memory_bytes"),
)


class Metrics:
    """Everything `/metrics` shows.

    Args:
      engine: the engine's figures, or None while there is no engine.
      server: figures of the server itself, as families of their own.
    """

    def __init__(
        self,
        *,
        engine: Callable[[], EngineStats | None],
        server: Callable[[], Iterable[Metric]],
    ) -> None:
        self.registry = CollectorRegistry(auto_describe=False)
        self.registry.register(_EngineCollector(engine, server))
        self.http = Counter(
            "atlas_http_requests", "HTTP requests", ("route", "method", "status"), registry=self.registry
        )
        self.http_seconds = Histogram(
            "atlas_http_request_seconds", "HTTP requests", ("route",), buckets=_LONG, registry=self.registry
        )
        self.limited = Counter("atlas_rate_limited", "Requests refused by a limit", ("reason",), registry=self.registry)
        self.finished = Counter(
            "atlas_request_success", "Sequences by how they ended", ("finished_reason",), registry=self.registry
        )
        self.outcomes = Counter(
            "atlas_requests", "Generation requests by outcome", ("outcome",), registry=self.registry
        )
        self.first_token = Histogram(
            "atlas_time_to_first_token_seconds",
            "Time to first token (TTFT): arrival to first text",
            buckets=_LONG,
            registry=self.registry,
        )
        self.inter_token = Histogram(
            "atlas_inter_token_latency_seconds", "Between two chunks of text", buckets=_SHORT, registry=self.registry
        )
        self.latency = Histogram(
            "atlas_e2e_request_latency_seconds", "Arrival to last byte", buckets=_LONG, registry=self.registry
        )
        self.queue = Histogram(
            "atlas_request_queue_time_seconds", "Waiting for a place", buckets=_LONG, registry=self.registry
        )
        self.added = Histogram(
            "atlas_added_latency_seconds",
            "What the server adds to the engine",
            buckets=_ADDED,
            registry=self.registry,
        )
        self.save_seconds = Histogram(
            "atlas_snapshot_save_seconds", "Saving memory", buckets=_LONG, registry=self.registry
        )
        self.load_seconds = Histogram(
            "atlas_snapshot_load_seconds", "Loading memory", buckets=_LONG, registry=self.registry
        )

    def render(self) -> bytes:
        """The exposition text."""
        return generate_latest(self.registry)


class _EngineCollector(Collector):
    """Reads the engine's counters when they are scraped, so that nothing has to be counted twice."""

    def __init__(self, engine: Callable[[], EngineStats | None], server: Callable[[], Iterable[Metric]]) -> None:
        self._engine, self._server = engine, server

    def collect(self) -> Iterable[Metric]:
        yield from self._server()
        stats = self._engine()
        if stats is None:
            return
        for name, text, attribute in _COUNTERS:
            yield CounterMetricFamily(name, text, value=float(getattr(stats, attribute)))
        for name, text, attribute in _GAUGES:
            yield GaugeMetricFamily(name, text, value=float(getattr(stats, attribute)))
        parts = GaugeMetricFamily("atlas_session_state_bytes", "State of a session by part", labels=("part",))
        for part in ("window", "kept", "memory"):
            parts.add_metric((part,), getattr(stats.state, part))
        yield parts
        yield GaugeMetricFamily(
            "atlas_memory_budget_bytes", "What the state of a session has to fit into", value=stats.state.budget
        )
        tiers = GaugeMetricFamily("atlas_memory_sessions_resident", "Sessions in memory by tier", labels=("tier",))
        tiers.add_metric(("device",), stats.sessions_device)
        tiers.add_metric(("host",), stats.sessions_host)
        yield tiers
        yield GaugeMetricFamily("atlas_memory_sessions_stored", "Sessions on disk", value=stats.sessions_disk)
