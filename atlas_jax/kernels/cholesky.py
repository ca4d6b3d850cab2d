"""Cholesky factors and triangular solves of small matrices, for programs that have many of them.

On CPU they are LAPACK's, one matrix at a time. JAX 0.10 would cut a batch into tasks for XLA's own threads and wait for them
on such a thread: as many of these calls at once as there are threads wait for ever (six independent solves of four 64 × 64
matrices each hang two cores within seconds). LAPACK gets one thread, for the whole process: its own spin on after each call,
on the cores that the next programs need (with backward over 2 048 tokens on two devices of one core each, `deltanet` took
0.41 of the time, `mesa` 0.37). Elsewhere a batch is one call.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp

from atlas_jax import _platform
from atlas_jax.kernels import lowering_platform
from atlas_jax.typing import Array, Float


def cholesky(matrix: Float[Array, "*batch n n"]) -> Float[Array, "*batch n n"]:
    """Lower Cholesky factors of symmetric matrices. Not differentiable."""
    return _each(_cholesky, matrix)


def solve_lower(
    matrix: Float[Array, "*batch n n"], right: Float[Array, "*batch n m"], *, transposed: bool = False
) -> Float[Array, "*batch n m"]:
    """Solves `L·x = right`, or `Lᵀ·x = right`, for lower triangular L. Not differentiable."""
    return _each(_solve_transposed if transposed else _solve, matrix, right)


def solve_unit_lower(matrix: Float[Array, "n n"], right: Float[Array, "n m"]) -> Float[Array, "n m"]:
    """Solves `(I + N)·x = right`, where N is what the matrix has below its diagonal."""
    below = jnp.tril(matrix, -1)
    fixed = jax.lax.stop_gradient(below) + jnp.eye(matrix.shape[0], dtype=matrix.dtype)
    return jax.lax.custom_linear_solve(
        lambda x: x + jnp.einsum("tn,nm->tm", below, x),
        right,
        solve=lambda _, b: solve_lower(fixed, b),
        transpose_solve=lambda _, b: solve_lower(fixed, b, transposed=True),
    )


def _each(function: Callable[..., jax.Array], *args: jax.Array) -> jax.Array:
    """The function of matrices; on CPU of one after the other, whichever way they came to be a batch."""
    if lowering_platform.platform() != "cpu":
        return function(*args)
    _platform.limit_lapack()
    one = jax.custom_batching.sequential_vmap(function)
    for _ in range(args[0].ndim - 2):
        one = jax.vmap(one)
    return one(*args)


def _cholesky(matrix: jax.Array) -> jax.Array:
    return jnp.linalg.cholesky(matrix)


def _solve(matrix: jax.Array, right: jax.Array) -> jax.Array:
    return jax.lax.linalg.triangular_solve(matrix, right, left_side=True, lower=True)


def _solve_transposed(matrix: jax.Array, right: jax.Array) -> jax.Array:
    return jax.lax.linalg.triangular_solve(matrix, right, left_side=True, lower=True, transpose_a=True)
