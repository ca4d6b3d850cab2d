"""PrefillQueue beside streams: how time is divided, who is read first, and what a prompt that is left half read leaves behind."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from atlas_jax.engine import Engine
from atlas_jax.engine.api import Finished
from atlas_jax.engine.scheduler import prefill
from atlas_jax.engine.scheduler.prefill import PrefillPace, PrefillQueue
from atlas_jax.engine.scheduler.request_state import RequestState
from atlas_jax.model import layer_groups
from tests.engine.offline import PATIENCE, Answer, ask, ask_all, memory, request, words

SIZE = (1, 4)


def turns(step: float, part: float, count: int) -> tuple[list[float], int]:
    """What streams and prompts get of a device that works through its programs in order.

    Returns:
      The times between the results of steps, and how many parts were read.
    """
    pace, free, ends = PrefillPace(), 0.0, deque[float]()
    gaps: list[float] = []
    now, last, read = 0.0, 0.0, 0
    for _ in range(count):
        parts = pace.parts(SIZE)
        free = max(free, now) + parts * part + step  # the parts first, then the step
        ends.append(free)
        read += parts
        landed = len(ends) > 1  # a result is looked at while the next step runs
        if landed:
            now = max(now, ends.popleft())
            gaps.append(now - last)
            last = now
        pace.turned(SIZE, parts, now, landed=landed)
    return gaps[1:], read


durations = st.floats(0.001, 0.2)


@settings(max_examples=100, deadline=None)
@given(durations, durations)
def test_streams_and_prompts_share_the_time(step: float, part: float) -> None:
    count = 1000
    gaps, read = turns(step, part, count)
    reading_time, whole = read * part, read * part + count * step
    assert reading_time <= 0.55 * whole
    # eight parts a turn are the most, and every seventeenth turn has none
    assert reading_time >= min(0.35 * whole, 7 * part * count)
    assert max(gaps[20:]) <= step + max(step, part) * 1.34 + 1e-9


def test_a_step_that_has_become_slower_is_noticed() -> None:
    pace = PrefillPace()
    now = 0.0
    for step in [0.01] * 60 + [0.1] * 200:
        parts = pace.parts(SIZE)
        now += step + parts * 0.01
        pace.turned(SIZE, parts, now, landed=True)
    assert pace.parts(SIZE) + pace.parts(SIZE) > 2


def test_nothing_is_read_beside_a_batch_whose_step_nobody_knows() -> None:
    pace = PrefillPace()
    assert pace.parts(SIZE) == 0
    for now in (1.0, 1.1):
        pace.turned(SIZE, 0, now, landed=True)
    assert pace.parts(SIZE) == 1
    assert pace.parts((2, 4)) == 0


def prompts_of(*lengths: int) -> tuple[PrefillQueue, list[RequestState]]:
    works: list[Any] = [
        SimpleNamespace(feed=[1] * length, fed=0, limit=1, number=i) for i, length in enumerate(lengths)
    ]
    works = [_Work(**vars(req)) for req in works]
    prompts = PrefillQueue(None, None, None)  # type: ignore[arg-type]
    for req in works:
        prompts.add(req)
    return prompts, works


class _Work(SimpleNamespace):
    __hash__ = object.__hash__  # type: ignore[assignment]
    __eq__ = object.__eq__  # type: ignore[assignment]


def test_a_short_prompt_goes_before_a_long_one_and_both_are_read() -> None:
    prompts, (book, question) = prompts_of(100_000, 300)
    order = []
    while prompts.ready == []:
        req = prompts.next()
        req.prefilled += 32
        order.append(req is question)
    assert prompts.ready == [question]
    assert book.fed
    assert order.count(True) >= 2 * order.count(False)


@settings(deadline=None)
@given(st.lists(st.integers(1, 2000), min_size=1, max_size=8))
def test_every_prompt_is_read_whatever_shorter_ones_come(lengths: list[int]) -> None:
    prompts, (book,) = prompts_of(50_000)
    coming = deque(lengths * 40)
    for _ in range(40 * sum(length // 32 + 1 for length in lengths)):
        for req in prompts.ready:
            prompts.remove(req)
        while len(prompts) < 4 and coming:
            prompts.add(prompts_of(coming.popleft())[1][0])
        if book not in prompts:
            return
        if len(prompts):
            prompts.next().fed += 32
    assert book.fed > 0


# --- on an engine -------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def parted(opened: Callable[..., Any]) -> Any:
    """An engine whose layers are programs of their own, so that a piece has several parts."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(layer_groups, "_PREFERRED", (1,))
        with opened() as engine:
            yield engine


@pytest.mark.parametrize("parts", [1, 2, 3, 4, 5, 6, 7])
def test_a_prompt_left_half_read_leaves_the_session_in_order(
    parts: int, parted: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a window of one page the third piece begins with a write; a client leaves after so many parts."""
    text = words(17, 420)
    wanted = ask(parted, request(text, 6, memory=memory(f"whole-{parts}")))
    read = PrefillQueue.read
    done = 0

    def count(self: PrefillQueue, req: RequestState) -> None:
        nonlocal done
        read(self, req)
        done += 1
        if done == parts:
            req.cancelled.set()

    monkeypatch.setattr(PrefillQueue, "read", count)
    left = Answer()
    ended = reading_ended(parted, request(text, 6, memory=memory(f"left-{parts}")), left)
    assert ended.reason == "cancelled"
    monkeypatch.setattr(PrefillQueue, "read", read)
    again = ask(parted, request(text, 6, memory=memory(f"left-{parts}")))
    assert again.infos == wanted.infos
    left_behind, whole = (parted.sessions.info("owner", f"{name}-{parts}") for name in ("left", "whole"))
    assert replace(left_behind, last_update_time=None) == replace(whole, last_update_time=None)


def reading_ended(engine: Engine, asked: Any, answer: Answer) -> Finished:
    over = threading.Event()

    def listen(event: Any) -> None:
        answer.events.append(event)
        if isinstance(event, Finished):
            over.set()

    engine.submit(asked, listen)
    assert over.wait(PATIENCE)
    return answer.end


def test_what_runs_between_two_parts_changes_no_bit(parted: Engine) -> None:
    text = words(23, 500)
    alone = ask(parted, request(text, 6, memory=memory("alone")))
    stream = request(words(5, 20), 60)
    stream_alone = ask(parted, stream)
    both = ask_all(parted, [stream, request(text, 6, memory=memory("beside")), request(words(6, 130), 5)])
    assert both[1].infos == alone.infos
    assert both[0].infos == stream_alone.infos


def test_only_so_many_parts_are_on_their_way(parted: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """What comes while a long prompt is read does not wait behind what the host has launched ahead."""
    most = 0
    read = PrefillQueue.read

    def count(self: PrefillQueue, req: RequestState) -> None:
        nonlocal most
        read(self, req)
        most = max(most, len(self._ahead))

    monkeypatch.setattr(PrefillQueue, "read", count)
    ask(parted, request(words(29, 900), 1))
    assert 0 < most <= prefill.AHEAD
