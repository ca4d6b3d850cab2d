"""The parts that can be tested without a server: buckets, budgets, the gate, hosts, the bridge."""

from __future__ import annotations

import asyncio
import threading

import pytest

from atlas_jax.engine.api import Delta, Finished
from server.errors import BadRequest, TooManyRequests, Unavailable
from server.gate import Gate, Lease
from server.hosts import HostCheck
from server.limits import FailureBudget, KeyLimits, TokenBucket
from server.services.bridge import Bridge, Mailbox
from server.services.observer import Subscriber
from server.services.writers import timings_of, usage_of


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


# --- the gate -----------------------------------------------------------------------------------------------------
def gate(**options: float) -> Gate:
    return Gate(**{"running": 1, "waiting": 10, "per_key": 10, "timeout": 5.0, **options})  # type: ignore[arg-type]


def test_the_gate_serves_keys_round_robin() -> None:
    async def run() -> list[str]:
        door, order = gate(), []
        lease = await door.acquire("a")

        async def one(key: str) -> None:
            mine = await door.acquire(key)
            order.append(key)
            mine.release()

        tasks = [asyncio.create_task(one(key)) for key in ("a", "a", "a", "a", "b", "c", "b")]
        await asyncio.sleep(0)
        lease.release()
        await asyncio.gather(*tasks)
        assert (door.running, door.waiting) == (0, 0)
        return order

    assert asyncio.run(run()) == ["a", "b", "c", "a", "b", "a", "a"]


def test_the_gate_refuses_a_key_over_its_share_and_everyone_when_full() -> None:
    async def run() -> None:
        door = gate(waiting=3, per_key=2)
        lease = await door.acquire("a")
        tasks = [asyncio.create_task(door.acquire(key)) for key in ("a", "a")]
        await asyncio.sleep(0)
        with pytest.raises(TooManyRequests) as over:
            await door.acquire("a")
        assert over.value.code == "queue_full"
        tasks.append(asyncio.create_task(door.acquire("b")))
        await asyncio.sleep(0)
        with pytest.raises(Unavailable) as full:
            await door.acquire("c")
        assert full.value.code == "overloaded"
        lease.release()
        lease.release()  # twice is once
        assert door.running == 1

        async def pass_on(task: asyncio.Task[Lease]) -> None:
            (await task).release()

        await asyncio.gather(*(pass_on(task) for task in tasks))
        assert (door.running, door.waiting) == (0, 0)

    asyncio.run(run())


def test_cancelled_and_late_waiters_leak_no_place() -> None:
    async def run() -> None:
        door = gate(timeout=0.02)
        lease = await door.acquire("a")
        waiting = asyncio.create_task(door.acquire("a"))
        await asyncio.sleep(0)
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting
        assert door.waiting == 0
        with pytest.raises(Unavailable):
            await door.acquire("a")
        # Cancelled in the very moment its place has come.
        waiting = asyncio.create_task(door.acquire("a"))
        await asyncio.sleep(0)
        lease.release()
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting
        assert (door.running, door.waiting) == (0, 0)
        # Cancelled first, released before the cancellation is seen.
        lease = await door.acquire("a")
        waiting = asyncio.create_task(door.acquire("a"))
        await asyncio.sleep(0)
        waiting.cancel()
        lease.release()
        with pytest.raises(asyncio.CancelledError):
            await waiting
        assert (door.running, door.waiting) == (0, 0)

    asyncio.run(run())


def test_closing_the_gate_fails_everyone_who_waits() -> None:
    async def run() -> None:
        door = gate()
        await door.acquire("a")
        waiting = asyncio.create_task(door.acquire("b"))
        await asyncio.sleep(0)
        door.close(Unavailable("closing"))
        with pytest.raises(Unavailable, match="closing"):
            await waiting
        assert (door.running, door.waiting) == (1, 0)

    asyncio.run(run())


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


# --- the bridge ---------------------------------------------------------------------------------------------------
def test_the_bridge_wakes_the_loop_once_for_many_events() -> None:
    async def run() -> None:
        loop = asyncio.get_running_loop()
        wakeups = 0
        original = loop.call_soon_threadsafe

        def counted(*args: object) -> object:
            nonlocal wakeups
            wakeups += 1
            return original(*args)  # type: ignore[arg-type]

        loop.call_soon_threadsafe = counted  # type: ignore[method-assign,assignment]
        bridge, boxes = Bridge(loop), [Mailbox() for _ in range(32)]
        listeners = [bridge.listener(box, number) for number, box in enumerate(boxes)]

        def engine() -> None:
            for step in range(10):
                for listener in listeners:
                    listener(Delta(str(step)))

        thread = threading.Thread(target=engine)
        thread.start()
        thread.join()
        for number, box in enumerate(boxes):
            assert await box.take(1.0) == [(number, Delta(str(step))) for step in range(10)]
        assert wakeups == 1
        assert await boxes[0].take(0.01) == []

    asyncio.run(run())


def test_the_bridge_loses_nothing_under_contention() -> None:
    async def run() -> int:
        bridge, box = Bridge(asyncio.get_running_loop()), Mailbox()
        listener, count = bridge.listener(box, 0), 20_000

        def engine() -> None:
            for _ in range(count):
                listener(Delta("x"))

        thread = threading.Thread(target=engine)
        thread.start()
        seen = 0
        while seen < count:
            seen += len(await box.take(2.0))
        thread.join()
        return seen

    assert asyncio.run(run()) == 20_000


def test_events_after_the_loop_has_closed_are_dropped() -> None:
    loop = asyncio.new_event_loop()
    bridge = Bridge(loop)
    loop.close()
    bridge.listener(Mailbox(), 0)(Delta("x"))


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
