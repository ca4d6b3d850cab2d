"""Who leaves a full tier: LRU and LFU against their definitions, ARC by what sets it apart."""

from __future__ import annotations

from collections.abc import Iterable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from atlas_jax.engine.api import CacheStrategy, SessionKey
from atlas_jax.engine.sessions.eviction import Eviction

NAMES = 8
names = st.integers(0, NAMES - 1)
moves = st.lists(st.tuples(st.sampled_from(["use", "use", "use", "evict", "forget"]), names), max_size=60)


def key(name: int) -> SessionKey:
    return SessionKey("owner", str(name))


def replay(steps: Iterable[tuple[str, int]], strategy: CacheStrategy = "lru") -> tuple[Eviction, list[int], dict]:
    """Runs a history; also gives the resident keys, least recently used first, and their number of uses."""
    eviction, order, uses = Eviction(), [], dict.fromkeys(range(NAMES), 0)
    for move, name in steps:
        if move == "use":
            eviction.use(key(name))
            order = [other for other in order if other != name] + [name]
            uses[name] += 1
        elif move == "forget":
            eviction.forget(key(name))
            order = [other for other in order if other != name]
            uses[name] = 0
        else:
            victim = eviction.victim(strategy, lambda _: True)
            assert (victim is None) == (not order)
            if victim is not None:
                eviction.evicted(victim)
                order.remove(int(victim.session_id))
    return eviction, order, uses


@settings(max_examples=200, deadline=None, derandomize=True)
@given(moves, st.frozensets(names))
def test_lru_sends_the_one_unused_longest(steps: list[tuple[str, int]], allowed: frozenset[int]) -> None:
    eviction, order, _ = replay(steps)
    victim = eviction.victim("lru", lambda k: int(k.session_id) in allowed)
    wanted = next((name for name in order if name in allowed), None)
    assert victim == (None if wanted is None else key(wanted))


@settings(max_examples=200, deadline=None, derandomize=True)
@given(moves, st.frozensets(names))
def test_lfu_sends_the_one_used_least_and_of_equals_the_oldest(
    steps: list[tuple[str, int]], allowed: frozenset[int]
) -> None:
    eviction, order, uses = replay(steps)
    victim = eviction.victim("lfu", lambda k: int(k.session_id) in allowed)
    wanted = min((name for name in order if name in allowed), key=lambda name: uses[name], default=None)
    assert victim == (None if wanted is None else key(wanted))


@pytest.mark.parametrize("strategy", ["lru", "lfu", "adaptive"])
@settings(max_examples=100, deadline=None, derandomize=True)
@given(moves, st.frozensets(names))
def test_only_residents_that_may_leave_are_named(
    strategy: CacheStrategy, steps: list[tuple[str, int]], allowed: frozenset[int]
) -> None:
    eviction, order, _ = replay(steps, strategy)
    victim = eviction.victim(strategy, lambda k: int(k.session_id) in allowed)
    may = [name for name in order if name in allowed]
    assert (victim is None) == (not may)
    assert victim is None or int(victim.session_id) in may


def test_arc_lets_a_scan_pass_without_losing_what_is_used_again() -> None:
    eviction = Eviction()
    for name in range(3):
        eviction.use(key(name))
        eviction.use(key(name))
    for name in range(100, 200):
        eviction.use(key(name))
        victim = eviction.victim("adaptive", lambda _: True)
        assert victim == key(name), "the scan pushes out only itself"
        eviction.evicted(victim)


def test_arc_learns_that_recent_keys_come_back() -> None:
    """Keys evicted from the recent side that return early give it room: then the frequent side pays."""
    eviction = Eviction()
    for name in range(4):
        eviction.use(key(name))
        eviction.use(key(name))
    for name in (10, 11, 12):
        eviction.use(key(name))
    for name in (10, 11, 12):
        assert eviction.victim("adaptive", lambda _: True) == key(name)
        eviction.evicted(key(name))
    for name in (10, 11, 12):
        eviction.use(key(name))  # returns: frequent now, and the recent side may hold more
    eviction.use(key(20))
    assert eviction.victim("adaptive", lambda _: True) == key(0), "the least recent of the frequent side"


def test_what_is_remembered_of_evicted_keys_is_bounded() -> None:
    eviction = Eviction()
    for name in range(2000):
        eviction.use(key(name))
        eviction.evicted(key(name))
    held = sum(len(part) for part in vars(eviction).values() if hasattr(part, "__len__"))
    assert held < 200
