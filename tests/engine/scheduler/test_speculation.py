"""When draft tokens are fed: streams that find them right as often as one likes, against always and never feeding them."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from atlas_jax.engine.scheduler.speculation import DraftRecord, StepWidths

TOKENS = 400
DRAFTS = 2


class Stream:
    """A row whose drafts are right with a chance each; a step takes 1, or `ratio` with drafts."""

    def __init__(self, right: float, ratio: float, seed: int) -> None:
        self.rng = random.Random(seed)
        self.right = right
        self.ratio = ratio
        self.record = DraftRecord()
        self.drafts: list[bool] = []

    def step(self, width: int) -> tuple[int, float]:
        """Tokens drawn, and the time it took."""
        fed = self.rightness() if width > 1 else []
        drawn = 1 + (fed.index(False) if False in fed else len(fed))
        self.next = self.rightness()
        # token 1 is what a right draft says, token 0 what a wrong one does
        self.record.note(1 + len(fed), [1] * drawn, [int(one) for one in self.next])
        return drawn, self.ratio if width > 1 else 1.0

    def rightness(self) -> list[bool]:
        return [self.rng.random() < self.right for _ in range(DRAFTS)]


def rate(widths: StepWidths | int, right: float, ratio: float, seed: int) -> float:
    """Tokens in the time of a step without drafts."""
    stream, tokens, taken = Stream(right, ratio, seed), 0, 0.0
    while tokens < TOKENS:
        width = widths if isinstance(widths, int) else widths.choose(1, (1, 3), [stream.record.rate])
        drawn, seconds = stream.step(width)
        if isinstance(widths, StepWidths):
            widths.measured(1, width, seconds)
        tokens, taken = tokens + drawn, taken + seconds
    return tokens / taken


def warm(ratio: float) -> StepWidths:
    """A machine whose steps have been measured."""
    widths = StepWidths()
    for width, seconds in ((1, 1.0), (3, ratio)):
        for _ in range(5):
            widths.measured(1, width, seconds)
    return widths


chances, ratios, seeds = st.floats(0.0, 1.0), st.floats(1.05, 1.8), st.integers(0, 1000)


@settings(max_examples=150, deadline=None, derandomize=True)  # simulated streams are short: rarely one is unlucky
@given(chances, ratios, seeds)
def test_guessing_costs_next_to_nothing_and_brings_what_there_is(right: float, ratio: float, seed: int) -> None:
    always = sum(rate(3, right, ratio, seed + i) for i in range(3)) / 3
    chosen = sum(rate(warm(ratio), right, ratio, seed + i) for i in range(3)) / 3
    assert chosen >= 0.96 * max(1.0, 0.97 * always)  # 0.97 within what three short streams can tell


@settings(max_examples=50, deadline=None, derandomize=True)
@given(ratios, seeds)
def test_wrong_drafts_cost_little_on_a_machine_not_measured_yet(ratio: float, seed: int) -> None:
    assert rate(StepWidths(), 0.0, ratio, seed) >= 0.97


@given(st.lists(st.sampled_from([0, 1, 2]), min_size=60, max_size=60))
def test_what_is_not_fed_is_counted_as_if_it_had_been(right: list[int]) -> None:
    """Each step's drafts, right for the next `right` tokens, are judged by the tokens that come."""
    fed, shadow = DraftRecord(), DraftRecord()
    for number, count in enumerate(right):
        fed.note(3, [number] * (1 + count), [])
        tokens = [number + 1, number + 2]
        shadow.note(1, [number], [token if place < count else -1 for place, token in enumerate(tokens)])
    shadow.note(1, [len(right)], [])
    shadow.note(1, [len(right) + 1], [])
    assert shadow.rate == pytest.approx(fed.rate, abs=0.25)  # the last ones in another order


def test_one_width_leaves_no_choice_and_constrained_rows_take_no_drafts() -> None:
    widths = StepWidths()
    assert {widths.choose(1, (3,), [0.0]) for _ in range(300)} == {3}
    assert {widths.choose(1, (1, 3), [0.0, 0.0]) for _ in range(300)} == {1}
