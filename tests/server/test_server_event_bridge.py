"""The way of the engine's events to the event loop."""

from __future__ import annotations

import asyncio
import threading

from atlas_jax.engine.api import Delta
from server.services.event_bridge import EventBridge, Mailbox


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
