"""How far a request opens the gate of its memory."""

from __future__ import annotations

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from atlas_jax.engine.api import MemoryParams
from atlas_jax.engine.runner.step_inputs import memory_settings


def odds(blend: float) -> float:
    return float(memory_settings(MemoryParams(blend_ratio=blend), 1, 2).log_odds[0])


@settings(deadline=None)
@given(blend=st.floats(0.001, 0.999))
def test_the_blend_is_its_odds(blend: float) -> None:
    assert odds(blend) == pytest.approx(math.log(blend / (1 - blend)), abs=1e-5)


def test_at_its_ends_the_blend_shuts_the_memory_out_and_lets_nothing_else_in() -> None:
    assert not memory_settings(MemoryParams(blend_ratio=0.0), 1, 2).read[0]
    assert odds(0.0) < -25
    assert odds(1.0) == pytest.approx(27.6, abs=0.2)


def test_a_request_that_does_not_read_leaves_the_memory_out() -> None:
    assert not memory_settings(MemoryParams(read=False), 1, 2).read[0]
    assert not memory_settings(None, 1, 2).read[0]
