"""The parts that can be tested without a server: buckets, budgets, the collector, bodies, hosts, figures."""

from __future__ import annotations

import asyncio
import gc
import json
import weakref
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from atlas_jax.engine.api import Finished
from server.errors import BadRequest, TooLarge, TooManyRequests
from server.gc_pauses import Settled
from server.middleware.bodies import Bodies
from server.middleware.hosts import HostCheck
from server.middleware.rate_limits import FailureBudget, KeyLimits, TokenBucket
from server.services.monitoring import Subscriber
from server.services.response_builder import timings_of, usage_of
from server.services.thread_pools import ThreadPools


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


# --- buckets ------------------------------------------------------------------------------------------------------
def test_a_bucket_refills_and_never_overflows() -> None:
    clock = Clock()
    bucket = TokenBucket(rate=2, burst=4, clock=clock)
    assert all(bucket.take(1) for _ in range(4))
    assert not bucket.take(1)
    assert bucket.wait(1) == 0.5
    clock.now = 0.5
    assert bucket.take(1)
    clock.now = 1000
    assert bucket.level == 4


def test_a_clock_that_goes_back_gives_nothing() -> None:
    clock = Clock()
    clock.now = 100
    bucket = TokenBucket(rate=1, burst=10, clock=clock)
    bucket.take(10)
    clock.now = 50
    assert bucket.level == 0


def test_a_request_larger_than_the_bucket_waits_for_a_full_one_and_leaves_a_debt() -> None:
    clock = Clock()
    bucket = TokenBucket(rate=1, burst=10, clock=clock)
    assert bucket.take(25)
    assert bucket.level == -15
    assert not bucket.take(25)
    assert bucket.wait(25) == 25
    clock.now = 25
    assert bucket.take(25)


def test_key_limits_are_separate_and_settled() -> None:
    clock = Clock()
    limits = KeyLimits(requests=60, tokens=100, clock=clock)
    limits.reserve("a", 100)
    with pytest.raises(TooManyRequests) as caught:
        limits.reserve("a", 1)
    assert caught.value.retry_after == pytest.approx(0.6)
    limits.reserve("b", 1)
    limits.settle("a", reserved=100, used=10)
    assert limits.quota("a")["tokens"].remaining == 90
    assert limits.quota("a")["requests"].limit == 60
    assert KeyLimits(0, 0).quota("a") == {}


def test_failures_are_counted_by_network() -> None:
    budget = FailureBudget(2, clock=Clock())
    for peer in ("2001:db8::1", "2001:db8::ffff"):
        budget.failed(peer)
    with pytest.raises(TooManyRequests):
        budget.failed("2001:db8::abcd")
    budget.failed("2001:db8:0:1::1")
    budget.failed("::ffff:10.0.0.1")
    budget.failed("10.0.0.1")
    with pytest.raises(TooManyRequests):
        budget.failed("10.0.0.1")


def test_the_failure_table_is_bounded_and_eviction_refills_nobody() -> None:
    clock = Clock()
    budget = FailureBudget(1, addresses=10, clock=clock)
    for number in range(10):
        budget.failed(f"10.0.0.{number}")
    budget.failed("10.0.1.0")  # shares one bucket with every other newcomer
    with pytest.raises(TooManyRequests):
        budget.failed("10.0.1.1")
    with pytest.raises(TooManyRequests):
        budget.failed("10.0.0.3")
    assert len(budget._buckets) == 10
    clock.now = 61
    budget.failed("10.0.1.2")
    assert len(budget._buckets) <= 10


# --- the collector ------------------------------------------------------------------------------------------------
def test_what_stays_is_walked_once() -> None:
    class Node:
        pass

    before, callback = gc.get_freeze_count(), Settled()
    gc.callbacks.append(callback)
    try:
        stays: list[Any] = [[number] for number in range(200_000)]
        gc.collect()
        assert gc.get_freeze_count() - before >= 100_000
        first, frozen = Node(), gc.get_freeze_count()
        stays[0].append(first)
        there = weakref.ref(first)
        del first, stays  # and it is freed when nobody has it any more
        assert there() is None
        assert gc.get_freeze_count() < frozen
        # A cycle that comes and goes is collected as ever.
        cycle = Node()
        cycle.self, gone = cycle, weakref.ref(cycle)  # type: ignore[attr-defined]
        del cycle
        gc.collect()
        assert gone() is None
    finally:
        gc.callbacks.remove(callback)
        gc.unfreeze()


# --- bodies -------------------------------------------------------------------------------------------------------
def json_values() -> st.SearchStrategy[Any]:
    text = st.text(st.sampled_from('ab"\\[]{},:\n\u00e9'), max_size=6)
    return st.recursive(
        st.none() | st.booleans() | st.integers(-9, 9) | text,
        lambda inner: st.lists(inner, max_size=4) | st.dictionaries(text, inner, max_size=4),
        max_leaves=20,
    )


def contents(value: Any) -> tuple[int, int]:
    """Strings (keys as well), arrays and objects of a value, and all its values."""
    if isinstance(value, str):
        return 1, 1
    if not isinstance(value, list | dict):
        return 0, 1
    inner = [contents(one) for one in (value.values() if isinstance(value, dict) else value)]
    keys = len(value) if isinstance(value, dict) else 0
    return 1 + keys + sum(one for one, _ in inner), 1 + keys + sum(every for _, every in inner)


@settings(max_examples=300, deadline=None)
@given(value=json_values(), limit=st.integers(1, 30), indent=st.sampled_from([None, 1]))
def test_a_body_is_refused_exactly_where_it_holds_too_many_objects(value: Any, limit: int, indent: int | None) -> None:
    body = json.dumps(value, indent=indent).encode()
    bodies = Bodies(ThreadPools(), max_bytes=32 * limit)  # so many objects, and eight times as many values
    objects, values = contents(value)
    if objects > limit:
        with pytest.raises(TooLarge):
            asyncio.run(bodies.decode(body))
    elif values <= 8 * limit:
        assert asyncio.run(bodies.decode(body)) == value


def test_a_body_of_numbers_is_bounded_as_well() -> None:
    bodies = Bodies(ThreadPools(), max_bytes=4000)
    assert asyncio.run(bodies.decode(b"[" + b"1," * 900 + b"1]")) == [1] * 901
    with pytest.raises(TooLarge):
        asyncio.run(bodies.decode(b"[" + b"1," * 1000 + b"1]"))


# --- hosts --------------------------------------------------------------------------------------------------------
PRIVATE_NAMES = (
    b"atlas:8080",
    b"ATLAS",
    b"atlas-0.atlas.default.svc.cluster.local",
    b"printer.local:80",
    b"atlas.corp.internal",
    b"atlas.internal.",
    b"atlas.home.arpa",
    b"localhost",
    b"atlas.localhost",
    b"host.docker.internal",
)
PUBLIC_NAMES = (
    *(
        b"evil.example",
        b"10.1.2.3.evil.example",
        b"atlas.dev",
        b"atlas.default",
        b"local.evil.example",
        b"notlocal.com",
    ),
    *(b"", b"[::1", b"x:y", b".local", b"a..local", b"evil.example.", b"0x7f000001", b"2130706433"),
)


@pytest.mark.parametrize("bound", ["0.0.0.0", "::", "", "192.168.0.5"])
def test_a_server_on_a_network_accepts_names_that_nobody_can_register(bound: str) -> None:
    check = HostCheck((), bound=bound)
    for host in PRIVATE_NAMES:
        check.check([host])
    for host in PUBLIC_NAMES:
        with pytest.raises(BadRequest):
            check.check([host])


@pytest.mark.parametrize("bound", ["127.0.0.1", "localhost", "::1", "127.0.0.2"])
def test_a_server_on_the_loopback_accepts_its_own_names_alone(bound: str) -> None:
    check = HostCheck((), bound=bound)
    for host in (b"localhost:1", b"127.0.0.1", b"[::1]", b"x.localhost", b"host.docker.internal:8080"):
        check.check([host])
    for host in (*PUBLIC_NAMES, b"atlas", b"atlas.local", b"atlas.internal", b"10.0.0.1"):
        with pytest.raises(BadRequest):
            check.check([host])


def test_a_server_on_every_interface_accepts_every_address() -> None:
    for host in (b"10.1.2.3:8080", b"[2001:db8::1]", b"127.0.0.1"):
        HostCheck((), bound="0.0.0.0").check([host])


def test_a_bound_address_is_a_name() -> None:
    HostCheck((), bound="2001:db8::5").check([b"[2001:db8::5]:80"])
    with pytest.raises(BadRequest):
        HostCheck((), bound="192.168.0.5").check([b"192.168.0.6"])


# --- figures ------------------------------------------------------------------------------------------------------
def test_a_slow_subscriber_loses_events_and_no_memory() -> None:
    async def run() -> list[bytes]:
        subscriber = Subscriber()
        for number in range(1000):
            subscriber.offer(str(number).encode())
        subscriber.close()
        return [event async for event in subscriber.read()]

    assert asyncio.run(run()) == [str(number).encode() for number in range(984, 1000)]


def test_usage_counts_a_prompt_once_and_timings_everything() -> None:
    def finished(prompt: int, cached: int, drafted: int = 0) -> Finished:
        return Finished(
            reason="stop",
            prompt_tokens=prompt,
            completion_tokens=3,
            cached_tokens=cached,
            seed=0,
            prompt_seconds=0.5,
            decode_seconds=1.5,
            drafted_tokens=drafted,
            accepted_tokens=drafted // 2,
        )

    ended = {2: finished(7, 1), 0: finished(5, 2), 3: finished(7, 7), 1: finished(5, 5, drafted=4)}
    usage = usage_of(ended, 2)
    assert (usage.prompt_tokens, usage.completion_tokens, usage.total_tokens) == (12, 12, 24)
    assert usage.prompt_tokens_details.cached_tokens == 3
    timings = timings_of(ended.values())
    assert (timings.cache_n, timings.prompt_n, timings.predicted_n) == (15, 9, 12)
    assert (timings.prompt_ms, timings.predicted_per_second) == (2000.0, 2.0)
    assert (timings.draft_n, timings.draft_n_accepted) == (4, 2)
