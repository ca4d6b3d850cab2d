"""Factors and triangular solves beside NumPy's, and that many of them at once end."""

from __future__ import annotations

import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from atlas_jax.kernels.cholesky import cholesky, solve_lower, solve_unit_lower
from tests.patience import PATIENCE

FEW = settings(max_examples=10, deadline=None)
cases = st.tuples(
    st.integers(0, 2**32 - 1), st.sampled_from([(1, 1), (5, 2), (24, 7)]), st.sampled_from([(), (3,), (2, 2)])
)


def lower(random: np.random.Generator, size: int, batch: tuple[int, ...]) -> np.ndarray:
    """Lower triangular matrices far from singular."""
    matrix = np.tril(random.standard_normal((*batch, size, size))) / size
    return matrix + (1 + random.random((*batch, size, 1))) * np.eye(size)


def over(function, dims: int):
    """The function of matrices, over a batch as a memory has it."""
    for _ in range(dims):
        function = jax.vmap(function)
    return function


@FEW
@given(cases)
def test_factors_and_solves_are_numpys(case: tuple) -> None:
    seed, (size, columns), batch = case
    random = np.random.default_rng(seed)
    factor, right = lower(random, size, batch), random.standard_normal((*batch, size, columns))
    whole = factor @ factor.swapaxes(-1, -2)
    for how in (lambda function: function, lambda function: over(function, len(batch))):
        found = how(cholesky)(jnp.asarray(whole, jnp.float32))
        np.testing.assert_allclose(found, np.linalg.cholesky(whole), atol=1e-4)
        given_ = jnp.asarray(factor, jnp.float32), jnp.asarray(right, jnp.float32)
        np.testing.assert_allclose(how(solve_lower)(*given_), np.linalg.solve(factor, right), atol=1e-4)
        transposed = how(lambda a, b: solve_lower(a, b, transposed=True))(*given_)
        np.testing.assert_allclose(transposed, np.linalg.solve(factor.swapaxes(-1, -2), right), atol=1e-4)


@FEW
@given(cases)
def test_a_solve_with_ones_on_the_diagonal_has_the_gradients_of_its_definition(case: tuple) -> None:
    seed, (size, columns), batch = case
    random = np.random.default_rng(seed)
    matrix, right, out = (
        random.standard_normal((*batch, size, n)) / size for n in (size, columns, columns)
    )  # above the diagonal too: it is not read
    inverse = np.linalg.inv(np.tril(matrix, -1) + np.eye(size))
    solved, back = inverse @ right, inverse.swapaxes(-1, -2) @ out
    found, gradient = jax.vjp(
        over(solve_unit_lower, len(batch)), jnp.asarray(matrix, jnp.float32), jnp.asarray(right, jnp.float32)
    )
    np.testing.assert_allclose(found, solved, atol=1e-5)
    by_matrix, by_right = gradient(jnp.asarray(out, jnp.float32))
    np.testing.assert_allclose(by_right, back, atol=1e-5)
    np.testing.assert_allclose(by_matrix, -np.tril(back @ solved.swapaxes(-1, -2), -1), atol=1e-5)


_MANY = """
import jax, jax.numpy as jnp
from atlas_jax.kernels.cholesky import cholesky, solve_lower

def both(x):
    return [jax.vmap(solve_lower)(x, x), jax.vmap(cholesky)(x)]

def again(_, xs):
    return [x + 0 * sum(both(x)) for x in xs]

xs = [jnp.broadcast_to(jnp.eye(64), (8, 64, 64)) * n for n in (1.0, 2.0, 3.0, 4.0, 5.0, 6.0)]
jax.block_until_ready(jax.jit(lambda xs: jax.lax.fori_loop(0, 300, again, xs))(xs))
"""


def test_many_batches_at_once_end() -> None:
    """With LAPACK's own batches this hangs where there are few cores."""
    subprocess.run([sys.executable, "-c", _MANY], check=True, timeout=PATIENCE)
