"""The parts that can be tested without a server: buckets, budgets, the admission, hosts, the bridge."""

from __future__ import annotations

import asyncio
import gc
import json
import threading
import weakref
from collections.abc import Callable
from typing import Any, TypeVar

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from atlas_jax.engine.api import Delta, Finished
from server.admission import Admission, Admitted
from server.errors import BadRequest, TooLarge, TooManyRequests, Unavailable
from server.gc_pauses import Settled
from server.middleware.bodies import Bodies
from server.middleware.hosts import HostCheck
from server.middleware.rate_limits import FailureBudget, KeyLimits, TokenBucket
from server.middleware.request_context import PARTY
from server.services.event_bridge import EventBridge, Mailbox
from server.services.monitoring import Subscriber
from server.services.response_builder import timings_of, usage_of
from server.services.thread_pools import ThreadPools
from tests.patience import PATIENCE

T = TypeVar("T")


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
def gate(**options: float) -> Admission:
    return Admission(**{"running": 1, "waiting": 10, "per_key": 10, "timeout": 5.0, **options})  # type: ignore[arg-type]


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

        async def pass_on(task: asyncio.Task[Admitted]) -> None:
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


def test_what_runs_for_one_key_leaves_room_for_the_others() -> None:
    async def run() -> None:
        door = gate(running=8, reserve=2)
        greedy = [await door.acquire("greedy") for _ in range(6)]
        waiting = asyncio.create_task(door.acquire("greedy"))
        await asyncio.sleep(0)
        assert (door.running, door.waiting) == (6, 1)
        # Those who hold none get the reserved places, though somebody waits; a second one each they do not get.
        others = [await door.acquire(key) for key in ("b", "c")]
        assert (door.running, door.waiting) == (8, 1)
        second = asyncio.create_task(door.acquire("b"))
        await asyncio.sleep(0)
        late = asyncio.create_task(door.acquire("d"))
        await asyncio.sleep(0)
        assert (door.running, door.waiting) == (8, 3)
        greedy.pop().release()  # one place is free: it goes to who holds none, past those before it in the queue
        others.append(await late)
        assert (door.running, door.waiting) == (8, 2)
        for lease in others[:2]:
            lease.release()
        assert (door.running, door.waiting) == (7, 1)  # b, who holds none again, and not the greedy key
        (await second).release()
        assert (door.running, door.waiting) == (6, 1)
        others[2].release()
        greedy.append(await waiting)
        for lease in greedy:
            lease.release()
        assert (door.running, door.waiting) == (0, 0)

    asyncio.run(run())


@settings(deadline=None)
@given(
    places=st.integers(1, 6),
    reserve=st.integers(0, 8),
    steps=st.lists(st.tuples(st.sampled_from("abc"), st.sampled_from(["ask", "leave", "end"])), max_size=40),
)
def test_no_place_is_lost_and_none_stands_empty_for_nobody(
    places: int, reserve: int, steps: list[tuple[str, str]]
) -> None:
    async def run() -> None:
        door = gate(running=places, reserve=reserve, waiting=1000, per_key=1000)
        kept = min(reserve, places - 1)
        asked: list[tuple[str, asyncio.Task[Admitted]]] = []
        for key, action in steps:
            mine = [item for item in asked if item[0] == key]
            if action == "ask":
                asked.append((key, asyncio.create_task(door.acquire(key))))
            elif action == "end" and (done := [item for item in mine if item[1].done()]):
                done[0][1].result().release()
                asked.remove(done[0])
            elif action == "leave" and (open_ := [item for item in mine if not item[1].done()]):
                open_[0][1].cancel()
                asked.remove(open_[0])
            for _ in range(5):
                await asyncio.sleep(0)
            holding = [key for key, task in asked if task.done()]
            waiting = [key for key, task in asked if not task.done()]
            assert (door.running, door.waiting) == (len(holding), len(waiting))
            assert len(holding) <= places
            free = places - len(holding)
            assert not any(free > (kept if key in holding else 0) for key in waiting)
            # Whoever holds several left the reserve to those who hold one.
            assert all(holding.count(key) <= max(1, places - kept) for key in holding)
        for _, task in asked:
            task.cancel()
        await asyncio.gather(*(task for _, task in asked), return_exceptions=True)

    asyncio.run(run())


# --- threads ------------------------------------------------------------------------------------------------------
def test_a_party_that_blocks_its_threads_leaves_some_to_the_others() -> None:
    async def run() -> None:
        pools, release, begun = ThreadPools(), threading.Event(), threading.Semaphore(0)

        def block() -> None:
            begun.release()
            release.wait(10)

        async def as_party(party: str, work: Callable[[], T]) -> T:
            PARTY.set(party)
            return await pools.run("sessions", work)

        stuck = [asyncio.create_task(as_party("greedy", block)) for _ in range(80)]
        await asyncio.sleep(0.05)
        assert all(begun.acquire(timeout=PATIENCE) for _ in range(16))
        assert not begun.acquire(timeout=0.05)  # the rest waits in its own line
        assert await asyncio.wait_for(as_party("other", lambda: "served"), PATIENCE) == "served"
        with pytest.raises(TooManyRequests) as refused:
            await as_party("greedy", block)
        assert refused.value.retry_after
        # Whoever gives up waiting leaves the line; what runs keeps its thread until it has ended.
        for task in stuck[:40]:
            task.cancel()
        await asyncio.gather(*stuck[:40], return_exceptions=True)
        assert not begun.acquire(timeout=0.05)
        release.set()
        await asyncio.gather(*stuck[40:])
        assert await as_party("greedy", lambda: 5) == 5

    asyncio.run(run())


def test_what_a_thread_raises_is_raised_to_who_asked() -> None:
    async def run() -> None:
        pools = ThreadPools()
        for _ in range(200):
            with pytest.raises(KeyError, match="broken"):
                await pools.run("texts", lambda: {}["broken"])

    asyncio.run(run())


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
        bridge, boxes = EventBridge(loop), [Mailbox() for _ in range(32)]
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
        bridge, box = EventBridge(asyncio.get_running_loop()), Mailbox()
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


def test_a_reader_that_comes_back_late_gets_its_events_a_few_at_a_time() -> None:
    async def run() -> None:
        bridge, box = EventBridge(asyncio.get_running_loop()), Mailbox()
        listener = bridge.listener(box, 0)
        for number in range(5000):
            listener(Delta(str(number)))
        seen: list[str] = []
        while len(seen) < 5000:
            some = await box.take(1.0)
            assert 0 < len(some) <= 200
            seen += [event.text for _, event in some if isinstance(event, Delta)]
        assert seen == [str(number) for number in range(5000)]

    asyncio.run(run())


def test_events_after_the_loop_has_closed_are_dropped() -> None:
    loop = asyncio.new_event_loop()
    bridge = EventBridge(loop)
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
