"""Intervals against independent computations."""

from __future__ import annotations

import math
import random
import statistics as reference

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from atlas_jax.evaluation.statistics import Estimate, mean, median, ratio_of_means, wilson


@settings(deadline=None)
@given(asked=st.integers(1, 400), share=st.floats(0, 1))
def test_wilsons_bounds_are_the_shares_a_test_just_accepts(asked: int, share: float) -> None:
    found = round(share * asked)
    estimate = wilson(found, asked)
    z = reference.NormalDist().inv_cdf(0.975)
    for bound in (estimate.low, estimate.high):
        # |p̂ − p| = z·sqrt(p(1 − p)/n), squared: what defines the interval
        assert (found / asked - bound) ** 2 == pytest.approx(z**2 * bound * (1 - bound) / asked, abs=1e-9)
    assert 0 <= estimate.low <= estimate.value <= estimate.high <= 1


def test_known_intervals_of_wilson() -> None:
    none, half = wilson(0, 30), wilson(15, 30)
    assert (none.low, none.high) == pytest.approx((0.0, 0.1135), abs=1e-4)
    assert (half.low, half.high) == pytest.approx((0.3315, 0.6685), abs=1e-4)
    assert math.isnan(wilson(0, 0).value)


def test_the_bootstrap_agrees_with_one_written_as_a_loop() -> None:
    rng = random.Random(3)
    pairs = [(rng.gauss(1, 0.5), rng.gauss(2, 0.5)) for _ in range(14)]
    draws = sorted(
        sum(one[0] for one in drawn) / sum(one[1] for one in drawn)
        for drawn in (rng.choices(pairs, k=len(pairs)) for _ in range(6000))
    )
    found = ratio_of_means(pairs)
    assert found.value == pytest.approx(sum(a for a, _ in pairs) / sum(b for _, b in pairs))
    assert found.low == pytest.approx(draws[150], abs=0.02)
    assert found.high == pytest.approx(draws[-151], abs=0.02)


@settings(deadline=None, max_examples=30)
@given(st.lists(st.floats(-10, 10), min_size=2, max_size=12))
def test_a_mean_lies_within_its_interval_and_the_interval_within_the_values(values: list[float]) -> None:
    found = mean(values)
    assert found.value == pytest.approx(reference.fmean(values), abs=1e-9)
    assert min(values) - 1e-9 <= found.low <= found.high <= max(values) + 1e-9
    assert mean(values) == found, "the same values gave another interval"
    middle = median(values)
    assert middle.value == pytest.approx(reference.median(values), abs=1e-9)


def test_where_there_is_no_interval_there_is_none() -> None:
    assert mean([2.0]).text(".1f") == "2.0"
    assert mean([]).text() == "–"
    assert math.isnan(ratio_of_means([(1.0, 0.0)]).low)
    assert Estimate(0.5, 0.4, 0.6, 9).text(".1f") == "0.5 (0.4 to 0.6)"
