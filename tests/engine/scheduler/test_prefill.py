"""Prefill beside decode: how time is divided, which prompt is first, and what one that is left half read leaves behind."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from atlas_jax.engine import Engine
from atlas_jax.engine.api import Finished
from atlas_jax.engine.scheduler import prefill
from atlas_jax.engine.scheduler.prefill import PrefillPace, PrefillQueue
from atlas_jax.engine.scheduler.request_state import DecodeProgress, PrefillProgress, RequestState
from atlas_jax.model import layer_groups
from tests.engine.offline import PATIENCE, Answer, ask, ask_all, memory, request, words

SIZE = (1, 4)


def iterations(decode: float, prefill: float, count: int) -> tuple[list[float], int]:
    """What answers and prompts get of a device that works through its programs in order.

    Returns:
      The times between the results of decode steps, and how many prefill steps were launched.
    """
    pace, free, ends = PrefillPace(), 0.0, deque[float]()
    gaps: list[float] = []
    now, last, launched = 0.0, 0.0, 0
    for _ in range(count):
        steps = pace.steps(SIZE)
        free = max(free, now) + steps * prefill + decode  # the prefill steps first, then the decode step
        ends.append(free)
        launched += steps
        delivered = len(ends) > 1  # a result is looked at while the next step runs
        if delivered:
            now = max(now, ends.popleft())
            gaps.append(now - last)
            last = now
        pace.observe(SIZE, steps, now, delivered=delivered)
    return gaps[1:], launched


durations = st.floats(0.001, 0.2)


@settings(max_examples=100, deadline=None)
@given(durations, durations)
def test_streams_and_prompts_share_the_time(decode: float, prefill: float) -> None:
    count = 1000
    gaps, launched = iterations(decode, prefill, count)
    prefill_time, whole = launched * prefill, launched * prefill + count * decode
    assert prefill_time <= 0.55 * whole
    # eight prefill steps beside one decode step are the most, and every seventeenth has none
    assert prefill_time >= min(0.35 * whole, 7 * prefill * count)
    assert max(gaps[20:]) <= decode + max(decode, prefill) * 1.34 + 1e-9


def test_a_step_that_has_become_slower_is_noticed() -> None:
    pace = PrefillPace()
    now = 0.0
    for step in [0.01] * 60 + [0.1] * 200:
        launched = pace.steps(SIZE)
        now += step + launched * 0.01
        pace.observe(SIZE, launched, now, delivered=True)
    assert pace.steps(SIZE) + pace.steps(SIZE) > 2


def test_nothing_is_read_beside_a_batch_whose_step_nobody_knows() -> None:
    pace = PrefillPace()
    assert pace.steps(SIZE) == 0
    for now in (1.0, 1.1):
        pace.observe(SIZE, 0, now, delivered=True)
    assert pace.steps(SIZE) == 1
    assert pace.steps((2, 4)) == 0


def prompts_of(*lengths: int) -> tuple[PrefillQueue, list[RequestState]]:
    detokenizer: Any = None
    requests = [
        RequestState(
            request([1] * length),
            np.ones(length, np.int32),
            lambda event: None,
            seed=1,
            detokenizer=detokenizer,
            prefill=PrefillProgress(pending_tokens=[1] * length),
            decode=DecodeProgress(limit=1),
        )
        for length in lengths
    ]
    prompts = PrefillQueue(None, None, None)  # type: ignore[arg-type]
    for req in requests:
        prompts.add(req)
    return prompts, requests


def test_a_short_prompt_goes_before_a_long_one_and_both_are_read() -> None:
    prompts, (book, question) = prompts_of(100_000, 300)
    order = []
    while prompts.ready == []:
        req = prompts.next()
        req.advance([1] * 32)
        order.append(req is question)
    assert prompts.ready == [question]
    assert book.prefill.done
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
            prompts.next().advance([1] * 32)
    assert book.prefill.done > 0


# --- on an engine -------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def stepped(opened: Callable[..., Any]) -> Any:
    """An engine whose layers are programs of their own, so that a chunk has several steps."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(layer_groups, "_PREFERRED", (1,))
        with opened() as engine:
            yield engine


@pytest.mark.parametrize("steps", [1, 2, 3, 4, 5, 6, 7])
def test_a_prompt_left_half_read_leaves_the_session_in_order(
    steps: int, stepped: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a window of one page the third chunk begins with a write; a client leaves after so many steps."""
    text = words(17, 420)
    wanted = ask(stepped, request(text, 6, memory=memory(f"whole-{steps}")))
    step = PrefillQueue.step
    done = 0

    def count(self: PrefillQueue, req: RequestState) -> None:
        nonlocal done
        step(self, req)
        done += 1
        if done == steps:
            req.cancelled.set()

    monkeypatch.setattr(PrefillQueue, "step", count)
    left = Answer()
    ended = last_event(stepped, request(text, 6, memory=memory(f"left-{steps}")), left)
    assert ended.reason == "cancelled"
    monkeypatch.setattr(PrefillQueue, "step", step)
    again = ask(stepped, request(text, 6, memory=memory(f"left-{steps}")))
    assert again.infos == wanted.infos
    left_behind, whole = (stepped.sessions.info("owner", f"{name}-{steps}") for name in ("left", "whole"))
    assert replace(left_behind, last_update_time=None) == replace(whole, last_update_time=None)


def last_event(engine: Engine, asked: Any, answer: Answer) -> Finished:
    over = threading.Event()

    def listen(event: Any) -> None:
        answer.events.append(event)
        if isinstance(event, Finished):
            over.set()

    engine.submit(asked, listen)
    assert over.wait(PATIENCE)
    return answer.end


def test_what_runs_between_two_steps_changes_no_bit(stepped: Engine) -> None:
    text = words(23, 500)
    alone = ask(stepped, request(text, 6, memory=memory("alone")))
    stream = request(words(5, 20), 60)
    stream_alone = ask(stepped, stream)
    both = ask_all(stepped, [stream, request(text, 6, memory=memory("beside")), request(words(6, 130), 5)])
    assert both[1].infos == alone.infos
    assert both[0].infos == stream_alone.infos


def test_only_so_many_steps_are_in_flight(stepped: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """What comes while a long prompt is in prefill does not wait behind what the host has launched ahead."""
    most = 0
    step = PrefillQueue.step

    def count(self: PrefillQueue, req: RequestState) -> None:
        nonlocal most
        step(self, req)
        most = max(most, len(self._in_flight))

    monkeypatch.setattr(PrefillQueue, "step", count)
    ask(stepped, request(words(29, 900), 1))
    assert 0 < most <= prefill.MAX_IN_FLIGHT
