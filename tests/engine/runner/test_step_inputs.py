"""How far a request opens the gate of its memory."""

from __future__ import annotations

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from atlas_jax.engine.api import MemoryParams
from atlas_jax.engine.runner.step_inputs import memory_settings


def odds(blend: float, *, asked: bool) -> float:
    return float(memory_settings(MemoryParams(blend_ratio=blend, asked=asked), 1, 2).log_odds[0])


@settings(deadline=None)
@given(blend=st.floats(0.001, 0.999))
def test_the_blend_is_its_odds_and_nine_times_as_much_where_somebody_asks(blend: float) -> None:
    assert odds(blend, asked=False) == pytest.approx(math.log(blend / (1 - blend)), abs=1e-5)
    assert odds(blend, asked=True) == pytest.approx(math.log(9 * blend / (1 - blend)), abs=1e-5)


@pytest.mark.parametrize("asked", [False, True])
def test_the_ends_of_the_blend_mean_the_same_whoever_asks(asked: bool) -> None:
    off = memory_settings(MemoryParams(blend_ratio=0.0, asked=asked), 1, 2)
    assert not off.read[0]
    assert odds(0.0, asked=asked) < -25
    assert odds(1.0, asked=asked) == pytest.approx(27.6 if not asked else 29.8, abs=0.2)


def test_a_request_that_does_not_read_leaves_the_memory_out_of_a_chat_too() -> None:
    assert not memory_settings(MemoryParams(read=False, asked=True), 1, 2).read[0]
    assert not memory_settings(None, 1, 2).read[0]
