"""Polynomial features and Newton–Schulz by the identities that define them."""

from __future__ import annotations

import functools
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from atlas_jax.kernels.monomials import feature_count, monomial_table, polynomial_features, ref_polynomial_features
from atlas_jax.kernels.newton_schulz import COEFFICIENTS, gram_polynomial, orthogonalize, ref_orthogonalize

DIM = 6
seeds = st.integers(0, 2**32 - 1)
tables = pytest.mark.parametrize("table", ["jordan", "polar_express"])


@functools.cache
def feature_map(coefficients: tuple[float, ...]) -> object:
    return jax.jit(functools.partial(polynomial_features, coefficients=coefficients))


@pytest.mark.parametrize(
    "coefficients", [(0.0, 1.0), (0.0, 0.0, 1.0), (0.0, 0.0, 0.0, 1.0), (1.0, 1.0, 0.5, 1 / 6), (0.3, 0.0, 2.0)]
)
@settings(max_examples=30, deadline=None, derandomize=True)
@given(seeds, st.sampled_from([0.0, 1e-3, 1.0, 10.0]))
def test_features_multiply_to_the_polynomial_of_the_product(
    coefficients: tuple[float, ...], seed: int, size: float
) -> None:
    x, y = (np.random.default_rng(seed).standard_normal((2, DIM)) * size).astype(np.float32)
    left, right = np.asarray(feature_map(coefficients)(np.stack([x, y])), np.float64)
    inner = x.astype(np.float64) @ y.astype(np.float64)
    wanted = sum(a * inner**order for order, a in enumerate(coefficients))
    lengths = np.linalg.norm(x.astype(np.float64)) * np.linalg.norm(y.astype(np.float64))
    bound = 3e-6 * sum(a * lengths**order for order, a in enumerate(coefficients))
    assert abs(left @ right - wanted) <= bound
    assert left.size == feature_count(DIM, coefficients)


@pytest.mark.parametrize("coefficients", [(0.0, 0.0, 1.0), (1.0, 1.0, 0.5, 1 / 6)])
def test_distinct_monomials_make_the_kernel_of_the_tensor_powers(coefficients: tuple[float, ...]) -> None:
    x = np.random.default_rng(0).standard_normal((5, DIM)).astype(np.float32)
    small, full = polynomial_features(x, coefficients), ref_polynomial_features(x, coefficients)
    np.testing.assert_allclose(small @ small.T, full @ full.T, rtol=2e-5, atol=1e-5)
    assert small.shape[1] <= full.shape[1]


@settings(max_examples=40, deadline=None, derandomize=True)
@given(st.integers(1, 7), st.lists(st.sampled_from([0.0, 0.5, 1.0, 2.0]), min_size=1, max_size=4))
def test_every_monomial_is_listed_once_with_its_multiplicity(dim: int, coefficients: list[float]) -> None:
    table = monomial_table(dim, tuple(coefficients))
    found = {}
    for factors, weight in zip(table.factors, table.weight, strict=True):
        variables = tuple(sorted(int(f) for f in factors if f != dim))
        assert variables not in found
        found[variables] = float(weight)
    wanted: dict[tuple[int, ...], float] = {}
    for order, coefficient in enumerate(coefficients):
        for variables in itertools.product(range(dim), repeat=order):
            key = tuple(sorted(variables))
            if coefficient:
                wanted[key] = wanted.get(key, 0.0) + coefficient
    assert found.keys() == wanted.keys()
    for key, weight in found.items():
        assert math.isclose(weight**2, wanted[key], rel_tol=1e-5)


@pytest.mark.parametrize("coefficients", [(), (-1.0,), (1.0, float("nan"))])
def test_coefficients_that_make_no_kernel_are_refused(coefficients: tuple[float, ...]) -> None:
    with pytest.raises(ValueError, match="non-negative"):
        monomial_table(3, coefficients)


# --- Newton–Schulz ----------------------------------------------------------------------------------------------------
ROWS, COLUMNS = 24, 8


def scalar(values: np.ndarray, table: str, steps: int) -> np.ndarray:
    """What the polynomials make of a singular value."""
    rows = (COEFFICIENTS[table] + COEFFICIENTS[table][-1:] * steps)[:steps]
    for a, b, c in rows:
        values = a * values + b * values**3 + c * values**5
    return values


@functools.cache
def compiled(table: str, steps: int = 5) -> object:
    return jax.jit(functools.partial(orthogonalize, table=table, steps=steps))


def matrix(seed: int, condition: float, size: float = 1.0) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """A matrix with singular values spread from 1/condition to 1, and its parts, in float64."""
    random = np.random.default_rng(seed)
    u = np.linalg.qr(random.standard_normal((ROWS, COLUMNS)))[0]
    v = np.linalg.qr(random.standard_normal((COLUMNS, COLUMNS)))[0]
    values = np.sort(condition ** -random.random(COLUMNS))[::-1]
    return (u * values) @ v.T * size, u, values, v


@tables
@settings(max_examples=40, deadline=None, derandomize=True)
@given(seeds, st.sampled_from([1.0, 3.0, 30.0]))
def test_newton_schulz_acts_on_singular_values_alone(table: str, seed: int, condition: float) -> None:
    x, u, values, v = matrix(seed, condition)
    wanted = (u * scalar(values / np.linalg.norm(values), table, 5)) @ v.T
    found = np.asarray(compiled(table)(x.astype(np.float32)), np.float64)
    np.testing.assert_allclose(found, wanted, atol=3e-3)
    spectrum = np.linalg.svd(found, compute_uv=False)
    assert spectrum.max() < 1.21
    assert spectrum.min() > 0.67


@tables
@settings(max_examples=25, deadline=None, derandomize=True)
@given(seeds, st.sampled_from([1e-12, 1e-3, 7.0, 1e15]))
def test_newton_schulz_is_odd_and_knows_no_scale(table: str, seed: int, size: float) -> None:
    x = matrix(seed, 10.0)[0].astype(np.float32)
    found = compiled(table)(x)
    assert np.array_equal(compiled(table)(-x), -found)
    np.testing.assert_allclose(compiled(table)(x * np.float32(size)), found, atol=2e-3)
    assert np.array_equal(compiled(table)(x * np.float32(4.0)), found), "powers of two change no digit"
    np.testing.assert_allclose(orthogonalize(x.T, table=table), found.T, atol=2e-3)
    assert not np.asarray(compiled(table)(np.zeros_like(x))).any()


@tables
@settings(max_examples=20, deadline=None, derandomize=True)
@given(seeds)
def test_the_gram_form_is_the_direct_one(table: str, seed: int) -> None:
    x = matrix(seed, 10.0)[0].astype(np.float32)
    direct = ref_orthogonalize(x, table=table)
    np.testing.assert_allclose(compiled(table)(x), direct, atol=5e-3)
    unit = x / np.linalg.norm(x)
    np.testing.assert_allclose(unit @ gram_polynomial(jnp.asarray(unit.T @ unit), table=table), direct, atol=5e-3)


def test_a_batch_is_orthogonalised_matrix_by_matrix() -> None:
    batch = np.stack([matrix(seed, 10.0, size)[0] for seed, size in ((0, 1.0), (1, 1e3), (2, 1e-6))]).astype(np.float32)
    batch = np.concatenate([batch, np.zeros_like(batch[:1])])
    together = np.asarray(orthogonalize(batch))
    for one, found in zip(batch, together, strict=True):
        np.testing.assert_allclose(found, orthogonalize(one), atol=1e-4)


def test_no_steps_only_normalise() -> None:
    x = matrix(0, 3.0)[0].astype(np.float32)
    np.testing.assert_allclose(orthogonalize(x, steps=0), x / np.linalg.norm(x), atol=1e-6)
    with pytest.raises(ValueError, match="negative"):
        orthogonalize(x, steps=-1)
