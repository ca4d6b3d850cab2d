"""Newton–Schulz orthogonalisation: the step of Muon, with the Gram form for tall matrices
(Jordan et al., Muon, 2024; ATLAS, arXiv 2505.23735, equation 32).

An odd polynomial applied to a matrix acts on its singular values alone. Five steps of a quintic take values in
[0.01, 1] close to 1 and leave singular vectors and rank as they are.
"""

from __future__ import annotations

import functools
from typing import Literal

import jax
import jax.numpy as jnp

from atlas_jax.kernels import tpu
from atlas_jax.kernels.reductions import row_max, row_sum
from atlas_jax.typing import Array, Float

CoefficientTable = Literal["jordan", "polar_express"] | tuple[tuple[float, float, float], ...]
"""A name of `COEFFICIENTS`, or rows of a table of one's own."""

COEFFICIENTS: dict[str, tuple[tuple[float, float, float], ...]] = {
    # Jordan et al., Muon: the same quintic every step; singular values end in [0.68, 1.13]
    "jordan": ((3.4445, -4.7750, 2.0315),) * 5,
    # Polar Express (arXiv 2505.16932): the best quintic for what each step can receive
    "polar_express": (
        (8.156554524902461, -22.48329292557795, 15.878769915207462),
        (4.042929935166739, -2.808917465908714, 0.5000178451051316),
        (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
        (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
        (2.3465413258596377, -1.7097828382687081, 0.42323551169305323),
    ),
}

_Row = tuple[float, float, float]

SINGULAR_BAND: dict[str, tuple[float, float]] = {"jordan": (0.681, 1.135), "polar_express": (0.858, 1.142)}
"""Where five steps take singular values that are at least 0.01 of the Frobenius norm."""


def uses_tpu_kernel(shape: tuple[int, ...]) -> bool:
    """Whether matrices of this shape are iterated by the Mosaic kernel."""
    return 4 * shape[-2] * shape[-1] <= tpu.MATRIX_BYTES and tpu.usable_undivided()


def orthogonalize(
    matrix: Float[Array, "*batch m n"],
    *,
    steps: int = 5,
    table: CoefficientTable = "jordan",
) -> Float[Array, "*batch m n"]:
    """Replaces the singular values of a matrix by values near 1, keeping its singular vectors: ≈ U·Vᵀ.

    Works on the smaller side: for m ≫ n every step multiplies n×n matrices only. With X₀ the normalised matrix, each
    iterate is X₀·Q with Q an n×n polynomial of the Gram matrix X₀ᵀX₀, so X₀ itself enters two matmuls in all. A matrix
    that is square or nearly so is iterated itself: 3 matmuls of that size a step, not 4.

    Args:
      matrix: any shape of at least two axes; leading axes are a batch.
      steps: quintic iterations; more than the table has repeat its last row.

    Returns:
      The orthogonalised matrix; zero, with zero gradient, where the input is zero.

    References:
      Jordan et al., Muon (2024); ATLAS, arXiv 2505.23735, equation 32.
    """
    return _mosaic(steps, table, matrix) if uses_tpu_kernel(matrix.shape) else _iterate(matrix, steps, table)


def gram_polynomial(
    gram: Float[Array, "*batch n n"], *, steps: int = 5, table: CoefficientTable = "jordan"
) -> Float[Array, "*batch n n"]:
    """The n×n matrix Q with `orthogonalize(X) = X·Q`, from the Gram matrix XᵀX of a normalised X.

    Step i maps X to X·P with P = a·I + b·G + c·G²; then Q ← Q·P and G ← P·G·P, all symmetric and commuting.
    """
    identity = jnp.eye(gram.shape[-1], dtype=gram.dtype)
    q = identity
    for a, b, c in _coefficients(steps, table):
        p = a * identity + b * gram + c * (gram @ gram)
        q = p if q is identity else q @ p
        gram = p @ gram @ p
    return q


def ref_orthogonalize(
    matrix: Float[Array, "*batch m n"], *, steps: int = 5, table: CoefficientTable = "jordan"
) -> Float[Array, "*batch m n"]:
    """`orthogonalize` as its definition: X ← aX + (bA + cA²)X with A = XXᵀ, no short cuts."""
    x = _normalize(matrix)
    for a, b, c in _coefficients(steps, table):
        outer = x @ jnp.swapaxes(x, -1, -2)
        x = a * x + (b * outer + c * (outer @ outer)) @ x
    return x


def _iterate(matrix: Float[Array, "*batch m n"], steps: int, table: CoefficientTable) -> Float[Array, "*batch m n"]:
    if matrix.shape[-2] < matrix.shape[-1]:
        return jnp.swapaxes(_iterate(jnp.swapaxes(matrix, -1, -2), steps, table), -1, -2)
    x = _normalize(matrix)
    if 2 * matrix.shape[-2] < 3 * matrix.shape[-1]:
        for row in _coefficients(steps, table):
            x = _quintic(row, x)
        return x
    gram = jnp.einsum("...mi,...mj->...ij", x, x)
    return jnp.einsum("...mi,...ij->...mj", x, gram_polynomial(gram, steps=steps, table=table))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _mosaic(steps: int, table: CoefficientTable, matrix: jax.Array) -> jax.Array:
    """`_iterate` by a TPU kernel; its gradient is that of `_iterate`, recomputed."""
    from atlas_jax.kernels.tpu import newton_schulz as mosaic  # importing Pallas takes 0.4 s that only TPUs need

    return mosaic.orthogonalize(matrix, _coefficients(steps, table), interpret=tpu.interpreted())


def _mosaic_forward(steps: int, table: CoefficientTable, matrix: jax.Array) -> tuple[jax.Array, jax.Array]:
    return _mosaic(steps, table, matrix), matrix


def _mosaic_backward(steps: int, table: CoefficientTable, matrix: jax.Array, slope: jax.Array) -> tuple[jax.Array]:
    return jax.vjp(lambda x: _iterate(x, steps, table), matrix)[1](slope)


_mosaic.defvjp(_mosaic_forward, _mosaic_backward)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _quintic(row: _Row, x: Float[Array, "*batch m n"]) -> Float[Array, "*batch m n"]:
    """One step on the matrix itself, X·P with P as in `gram_polynomial`."""
    return _quintic_parts(row, x)[0]


def _quintic_parts(row: _Row, x: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    a, b, c = row
    gram = jnp.einsum("...mi,...mj->...ij", x, x)
    p = b * gram + c * (gram @ gram)
    return a * x + x @ p, gram, p


@_quintic.defjvp
def _quintic_jvp(row: _Row, primals: tuple[jax.Array], tangents: tuple[jax.Array]) -> tuple[jax.Array, jax.Array]:
    """P and the Gram matrix are symmetric, and so are their tangents: 4 matmuls, forward and transposed, not 6."""
    a, b, c = row
    (x,), (moved,) = primals, tangents
    y, gram, p = _quintic_parts(row, x)
    of_gram = 2 * _symmetric(jnp.einsum("...mi,...mj->...ij", x, moved))
    of_p = b * of_gram + 2 * c * _symmetric(gram @ of_gram)
    return y, a * moved + moved @ p + x @ of_p


def _symmetric(x: jax.Array) -> jax.Array:
    return (x + jnp.swapaxes(x, -1, -2)) / 2


def _normalize(matrix: jax.Array) -> jax.Array:
    """Divides by the Frobenius norm, so that no singular value exceeds 1.

    Scaled by the largest entry first: the squares of very small or very large entries would leave float32's range. The
    result does not depend on that scale, so no gradient need flow through it.
    """
    peak = row_max(row_max(jnp.abs(jax.lax.stop_gradient(matrix))))[..., None, None]
    x = matrix / jnp.where(peak > 0, peak, 1.0)
    square = row_sum(row_sum(x * x))[..., None, None]
    return x * jax.lax.rsqrt(jnp.where(peak > 0, square, 1.0))


def _coefficients(steps: int, table: CoefficientTable) -> tuple[tuple[float, float, float], ...]:
    if steps < 0:
        raise ValueError(f"steps must not be negative, got {steps}")
    rows = COEFFICIENTS[table] if isinstance(table, str) else table
    return (rows + rows[-1:] * steps)[:steps]
