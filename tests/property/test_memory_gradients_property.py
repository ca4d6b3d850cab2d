"""Derivatives of every memory rule: those of the NumPy reference, forward as well as backward, twice where asked."""

from __future__ import annotations

import jax
import numpy as np
import pytest

from atlas_jax.memory import PRESETS, _memory, chunked, init_state, scan
from tests.property.memory_support import HEADS, close, draw_params, draw_tokens, expected, jit, preset

LENGTH = 6  # a chunk and a half: padding must have no slope


@pytest.fixture(autouse=True, scope="module")
def _float64():
    with jax.enable_x64(True):
        yield


def case(name):
    rule = preset(name)
    return rule, (draw_params(rule, 5), draw_tokens(rule, 5, LENGTH, extremes=False))


def loss_of(rule, form):
    def loss(params, tokens):
        return (form(rule, params, init_state(rule, params, (HEADS,)), tokens)[1] ** 2).sum()

    return loss


def ways(at, count=2):
    for seed in range(count):
        rng = np.random.default_rng(seed)
        yield jax.tree.map(lambda x: rng.standard_normal(x.shape), at)  # noqa: B023


def moved(at, way, step):
    return jax.tree.map(lambda x, d: x + step * d, at, way)


def slope_of_the_reference(rule, at, way):
    values = [(expected(rule, *moved(at, way, sign * 1e-5)) ** 2).sum() for sign in (1, -1)]
    return (values[0] - values[1]) / 2e-5


def inner(a, b):
    return sum(jax.tree.leaves(jax.tree.map(lambda x, y: float((x * y).sum()), a, b)))


@pytest.mark.parametrize(
    ("name", "form"),
    [
        *((name, chunked) for name in PRESETS),
        *(pytest.param(name, scan, marks=pytest.mark.slow) for name in ("mesa", "atlas")),
    ],
)
def test_gradients_are_those_of_the_reference(name, form):
    """Central differences in a few directions: an operator of a solve, or a slope left out, shows in no forward pass."""
    rule, at = case(name)
    gradient = jit(jax.grad(loss_of(rule, form), argnums=(0, 1)))(*at)
    for way in ways(at):
        assert inner(gradient, way) == pytest.approx(slope_of_the_reference(rule, at, way), rel=1e-5)


@pytest.mark.parametrize("name", ["atlas", "titans", "deltanet", "mesa"])
def test_forward_mode_is_that_of_the_reference(name):
    rule, at = case(name)
    forward = jit(lambda at, way: jax.jvp(loss_of(rule, chunked), at, way)[1])
    for way in ways(at):
        assert float(forward(at, way)) == pytest.approx(slope_of_the_reference(rule, at, way), rel=1e-5)


@pytest.mark.parametrize("name", [pytest.param("titans", marks=pytest.mark.slow), "mesa"])
def test_second_derivatives_are_differences_of_first_ones(name):
    rule, at = case(name)
    gradient = jax.grad(loss_of(rule, chunked), argnums=(0, 1))
    both = jit(lambda at, way: jax.jvp(lambda *at: gradient(*at), at, way))
    (way,) = ways(at, 1)
    ahead, behind = (both(moved(at, way, sign * 1e-5), way)[0] for sign in (1, -1))
    jax.tree.map(
        lambda found, a, b: close(found, (np.asarray(a) - np.asarray(b)) / 2e-5, 1e-4 * max(1.0, np.abs(found).max())),
        both(at, way)[1],
        ahead,
        behind,
    )


def test_a_key_of_padding_has_no_slope_in_float32_either():
    """A division by its length, clipped from below, has an infinite one there."""
    at = np.ones((2, 3), np.float32), np.zeros((2, 3), np.float32)
    for leaf in jax.tree.leaves(jax.jvp(lambda *at: _memory._clip_left(*at, 100.0), at, at[::-1])):
        assert np.isfinite(leaf).all()
