"""The simulation of many replicas, where its answers are known without it."""

from __future__ import annotations

import math
import statistics
from dataclasses import replace

import pytest

from benchmarks.scale.simulation import Costs, Counts, Habits, Simulation

COSTS = Costs(store_latency=0.01, store_tail=0.0101)
HABITS = Habits()


def simulated(costs: Costs = COSTS, sessions: int = 200, replicas: int = 2, load: float = 0.3, **how: object) -> Counts:
    lose = how.pop("lose", 0)
    assert isinstance(lose, int)
    simulation = Simulation(costs, HABITS, sessions, replicas, load, bool(how.pop("affinity", True)), seed=3)
    return simulation.run(2000, lose)


def test_sessions_that_fit_stay_in_memory_on_their_own_replica() -> None:
    assert simulated().kinds.keys() == {"memory"}


def test_any_of_two_replicas_has_what_it_answered_last() -> None:
    """Half of all turns; what the other has on disk is an older state, or the newest."""
    counts = simulated(affinity=False)
    assert counts.kinds["memory"] / counts.turns == pytest.approx(0.5, abs=0.05)


def test_more_replicas_without_affinity_hit_in_proportion() -> None:
    counts = simulated(replicas=8, affinity=False)
    assert counts.kinds["memory"] / counts.turns == pytest.approx(1 / 8, abs=0.04)


def test_an_idle_server_takes_what_its_parts_take() -> None:
    counts = simulated(load=0.001, replicas=1)
    assert statistics.median(counts.first) == pytest.approx(0.01 + HABITS.text / COSTS.prefill_rate, rel=0.1)


def test_a_full_store_path_reads_the_snapshot_and_what_came_after_it() -> None:
    """No main memory, no disk, a snapshot after each turn: one read of the manifest asked for, the manifest and the state."""
    costs = replace(COSTS, host_bytes=0.0, copies_bytes=0.0)
    counts = simulated(costs, load=0.001, replicas=1)
    assert counts.kinds.keys() == {"store"}
    assert statistics.median(counts.resumed) == pytest.approx(
        0.03 + costs.snapshot_bytes / costs.store_bandwidth, rel=0.1
    )
    assert counts.read == pytest.approx(counts.turns * costs.snapshot_bytes, rel=0.02)


def test_throughput_is_what_was_asked_and_load_makes_queues() -> None:
    light, heavy = simulated(load=0.1, sessions=5000), simulated(load=0.9, sessions=5000)
    assert statistics.mean(heavy.first) > 1.3 * statistics.mean(light.first)
    rate = {counts.turns / (counts.until - counts.since) for counts in (light, heavy)}
    assert max(rate) / min(rate) == pytest.approx(9, rel=0.25)


def test_after_a_kill_everything_is_answered_from_the_store() -> None:
    counts = simulated(replicas=4, lose=1)
    assert counts.turns >= 1400
    assert set(counts.kinds) - {"memory", "disk"} == {"store"}
    assert not any(map(math.isnan, counts.resumed))


def test_one_seed_gives_one_run() -> None:
    assert simulated() == simulated()
