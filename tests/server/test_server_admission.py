"""Admission and the threads it hands out: turns, shares, limits, and places that are never lost."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from typing import TypeVar

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from server.admission import Admission, Admitted
from server.errors import TooManyRequests, Unavailable
from server.middleware.request_context import PARTY
from server.services.thread_pools import ThreadPools

T = TypeVar("T")


def make_admission(**options: float) -> Admission:
    return Admission(**{"running": 1, "waiting": 10, "per_key": 10, "timeout": 5.0, **options})  # type: ignore[arg-type]


def test_admission_serves_keys_round_robin() -> None:
    async def run() -> list[str]:
        admission, order = make_admission(), []
        lease = await admission.acquire("a")

        async def one(key: str) -> None:
            mine = await admission.acquire(key)
            order.append(key)
            mine.release()

        tasks = [asyncio.create_task(one(key)) for key in ("a", "a", "a", "a", "b", "c", "b")]
        await asyncio.sleep(0)
        lease.release()
        await asyncio.gather(*tasks)
        assert (admission.running, admission.waiting) == (0, 0)
        return order

    assert asyncio.run(run()) == ["a", "b", "c", "a", "b", "a", "a"]


def test_admission_refuses_a_key_over_its_share_and_everyone_when_full() -> None:
    async def run() -> None:
        admission = make_admission(waiting=3, per_key=2)
        lease = await admission.acquire("a")
        tasks = [asyncio.create_task(admission.acquire(key)) for key in ("a", "a")]
        await asyncio.sleep(0)
        with pytest.raises(TooManyRequests) as over:
            await admission.acquire("a")
        assert over.value.code == "queue_full"
        tasks.append(asyncio.create_task(admission.acquire("b")))
        await asyncio.sleep(0)
        with pytest.raises(Unavailable) as full:
            await admission.acquire("c")
        assert full.value.code == "overloaded"
        lease.release()
        lease.release()  # twice is once
        assert admission.running == 1

        async def pass_on(task: asyncio.Task[Admitted]) -> None:
            (await task).release()

        await asyncio.gather(*(pass_on(task) for task in tasks))
        assert (admission.running, admission.waiting) == (0, 0)

    asyncio.run(run())


def test_cancelled_and_late_waiters_leak_no_place() -> None:
    async def run() -> None:
        admission = make_admission(timeout=0.02)
        lease = await admission.acquire("a")
        waiting = asyncio.create_task(admission.acquire("a"))
        await asyncio.sleep(0)
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting
        assert admission.waiting == 0
        with pytest.raises(Unavailable):
            await admission.acquire("a")
        # Cancelled in the very moment its place has come.
        waiting = asyncio.create_task(admission.acquire("a"))
        await asyncio.sleep(0)
        lease.release()
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting
        assert (admission.running, admission.waiting) == (0, 0)
        # Cancelled first, released before the cancellation is seen.
        lease = await admission.acquire("a")
        waiting = asyncio.create_task(admission.acquire("a"))
        await asyncio.sleep(0)
        waiting.cancel()
        lease.release()
        with pytest.raises(asyncio.CancelledError):
            await waiting
        assert (admission.running, admission.waiting) == (0, 0)

    asyncio.run(run())


def test_closing_admission_fails_everyone_who_waits() -> None:
    async def run() -> None:
        admission = make_admission()
        await admission.acquire("a")
        waiting = asyncio.create_task(admission.acquire("b"))
        await asyncio.sleep(0)
        admission.close(Unavailable("closing"))
        with pytest.raises(Unavailable, match="closing"):
            await waiting
        assert (admission.running, admission.waiting) == (1, 0)

    asyncio.run(run())


def test_what_runs_for_one_key_leaves_room_for_the_others() -> None:
    async def run() -> None:
        admission = make_admission(running=8, reserve=2)
        greedy = [await admission.acquire("greedy") for _ in range(6)]
        waiting = asyncio.create_task(admission.acquire("greedy"))
        await asyncio.sleep(0)
        assert (admission.running, admission.waiting) == (6, 1)
        # Those who hold none get the reserved places, though somebody waits; a second one each they do not get.
        others = [await admission.acquire(key) for key in ("b", "c")]
        assert (admission.running, admission.waiting) == (8, 1)
        second = asyncio.create_task(admission.acquire("b"))
        await asyncio.sleep(0)
        late = asyncio.create_task(admission.acquire("d"))
        await asyncio.sleep(0)
        assert (admission.running, admission.waiting) == (8, 3)
        greedy.pop().release()  # one place is free: it goes to who holds none, past those before it in the queue
        others.append(await late)
        assert (admission.running, admission.waiting) == (8, 2)
        for lease in others[:2]:
            lease.release()
        assert (admission.running, admission.waiting) == (7, 1)  # b, who holds none again, and not the greedy key
        (await second).release()
        assert (admission.running, admission.waiting) == (6, 1)
        others[2].release()
        greedy.append(await waiting)
        for lease in greedy:
            lease.release()
        assert (admission.running, admission.waiting) == (0, 0)

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
        admission = make_admission(running=places, reserve=reserve, waiting=1000, per_key=1000)
        kept = min(reserve, places - 1)
        asked: list[tuple[str, asyncio.Task[Admitted]]] = []
        for key, action in steps:
            mine = [item for item in asked if item[0] == key]
            if action == "ask":
                asked.append((key, asyncio.create_task(admission.acquire(key))))
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
            assert (admission.running, admission.waiting) == (len(holding), len(waiting))
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
        assert all(begun.acquire(timeout=5) for _ in range(16))
        assert not begun.acquire(timeout=0.05)  # the rest waits in its own line
        assert await asyncio.wait_for(as_party("other", lambda: "served"), 5) == "served"
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
                await pools.run("tokenization", lambda: {}["broken"])

    asyncio.run(run())
