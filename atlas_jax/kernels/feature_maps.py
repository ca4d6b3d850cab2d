"""Feature maps φ of the inner memory: monomials without gathers, their sketch, exponential and elementwise features
(ATLAS, arXiv 2505.23735, section 3.1).

`monomials.py` evaluates a table of monomials that is data; here the degree is static, so a block of monomials is built
from slices of the block one degree lower and its gradient needs no scatter.
"""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np

from atlas_jax.kernels.monomials import monomial_table
from atlas_jax.typing import Array, Float

_BLOCK = 8
"""Variables that `polynomial_blocks` takes together."""


def monomial_count(dim: int, degree: int) -> int:
    """Monomials of degree 0 … p in `dim` variables, C(dim + p, p)."""
    return math.comb(dim + degree, degree)


def exponential_scale(degree: int) -> np.ndarray:
    """1/√i! for i = 0 … p, [p + 1]: with it `polynomial` is φ* of equation 22, cut at degree p."""
    return np.asarray([1 / math.sqrt(math.factorial(i)) for i in range(degree + 1)])


def polynomial(x: Float[Array, "*rows d"], scale: Float[Array, " orders"]) -> Float[Array, "*rows M"]:
    """φ(x) with φ(x)·φ(y) = Σᵢ scale[i]²·(x·y)ⁱ: every distinct monomial of degree 0 … p once (ATLAS, equation 5).

    Args:
      scale: √aᵢ for i = 0 … p; learning the root keeps aᵢ ≥ 0. The paper starts from aᵢ = 1/i!.
    """
    degree = scale.shape[0] - 1
    blocks = [jnp.ones((*x.shape[:-1], 1), x.dtype)]
    for order in range(degree):
        blocks.append(_raise(x, blocks[-1], order))
    weight = _multiplicity(x.shape[-1], degree)
    parts, start = [], 0
    for order, block in enumerate(blocks):
        stop = start + block.shape[-1]
        parts.append(block * (scale[order] * jnp.asarray(weight[start:stop], x.dtype)))
        start = stop
    return jnp.concatenate(parts, axis=-1)


def polynomial_blocks(x: Float[Array, "*rows d"], degree: int) -> Float[Array, "*rows N"]:
    """Monomials of degree 0 … p for a matmul with `projection_blocks`: variables are taken eight at a time.

    Outer products of eight variables and a suffix of the degree below have some monomials twice, 10 % more than
    `polynomial` in 64 variables, but they and their gradients are 8 array operations per degree instead of 64.
    """
    lower = x
    parts = [jnp.ones((*x.shape[:-1], 1), x.dtype), x][: degree + 1]
    for starts in _block_starts(x.shape[-1], degree):
        blocks = [
            x[..., first : first + _BLOCK, None] * lower[..., None, start:]
            for first, start in zip(range(0, x.shape[-1], _BLOCK), starts, strict=True)
        ]
        lower = jnp.concatenate(
            [block.reshape(*x.shape[:-1], math.prod(block.shape[-2:])) for block in blocks], axis=-1
        )
        parts.append(lower)
    return jnp.concatenate(parts, axis=-1)


def projection_blocks(
    projection: Float[Array, "M width"], scale: Float[Array, " orders"], dim: int
) -> Float[Array, "N width"]:
    """The matrix whose matmul with `polynomial_blocks` is that of `polynomial` with the projection.

    Args:
      scale: as for `polynomial`.
    """
    index, weight, order = _block_table(dim, scale.shape[0] - 1)
    return projection[index] * (scale[order] * jnp.asarray(weight, scale.dtype))[:, None]


def polynomial_sketch(
    x: Float[Array, "*rows d"], scale: Float[Array, " orders"], width: int, seed: int
) -> Float[Array, "*rows width"]:
    """`polynomial` squeezed into `width` features: degrees 0 and 1 exact, higher ones as products of random signs.

    A feature of degree i is Πⱼ(ωⱼ·x)/√m with independent ωⱼ ∈ {±1}ᵈ; its kernel is (x·y)ⁱ in expectation (Kar and
    Karnick, random Maclaurin features, arXiv 1201.6530).

    Raises:
      ValueError: `width` leaves no feature for a degree.
    """
    dim, degree = x.shape[-1], scale.shape[0] - 1
    parts = [jnp.broadcast_to(scale[0], (*x.shape[:-1], 1)).astype(x.dtype), scale[1] * x]
    for order, share in zip(range(2, degree + 1), sketch_shares(dim, degree, width), strict=True):
        signs = jnp.asarray(_signs(dim, order, share, seed), x.dtype)
        # not jnp.prod, whose gradient is longer than the product
        product = math.prod(jnp.einsum("...d,dm->...m", x, factor) for factor in signs)
        parts.append(scale[order] * share**-0.5 * product)
    return jnp.concatenate(parts, axis=-1)


def sketch_shares(dim: int, degree: int, width: int) -> tuple[int, ...]:
    """Features that each degree from 2 on gets in `polynomial_sketch`.

    Raises:
      ValueError: the width has no room for one feature of each.
    """
    left, orders = width - 1 - dim, degree - 1
    if orders < 1 or left < orders:
        raise ValueError(f"a sketch of degree {degree} in {dim} variables needs a width of at least {dim + degree}")
    return tuple(left // orders + (index < left % orders) for index in range(orders))


def random_exponential(x: Float[Array, "*rows d"], width: int, seed: int) -> Float[Array, "*rows width"]:
    """Positive random features whose kernel is exp(x·y) in expectation: exp(ω·x − |x|²/2)/√m (arXiv 2009.14794)."""
    directions = jnp.asarray(_normals(x.shape[-1], width, seed), x.dtype)
    exponent = jnp.einsum("...d,dm->...m", x, directions) - 0.5 * jnp.sum(x * x, axis=-1, keepdims=True)
    return jnp.exp(exponent) * width**-0.5


def elementwise(x: Float[Array, "*rows d"], coefficients: Float[Array, " orders"]) -> Float[Array, "*rows d"]:
    """Σᵢ coefficients[i − 1]·xⁱ in each component, i = 1 … p: keeps the width and adds no rank. For comparison only."""
    result = jnp.zeros_like(x)
    for coefficient in coefficients[::-1]:
        result = (result + coefficient) * x
    return result


def ref_polynomial(x: Float[Array, "*rows d"], scale: Float[Array, " orders"]) -> Float[Array, "*rows M"]:
    """`polynomial` from the table of monomials, one product of gathered variables each."""
    dim, degree = x.shape[-1], scale.shape[0] - 1
    table = monomial_table(dim, (1.0,) * (degree + 1))
    extended = jnp.concatenate([x, jnp.ones((*x.shape[:-1], 1), x.dtype)], axis=-1)
    orders = (table.factors < dim).sum(axis=1)
    return jnp.prod(extended[..., table.factors], axis=-1) * _multiplicity(dim, degree) * scale[orders]


def _raise(x: jax.Array, block: jax.Array, order: int) -> jax.Array:
    """The monomials of degree `order` + 1 from those of degree `order`, both in lexicographic order.

    Those whose first variable is x_i are x_i times the monomials without x_0 … x_{i−1}: a suffix of the lower block.
    """
    dim = x.shape[-1]
    suffix = [math.comb(dim - i + order - 1, order) for i in range(dim)]
    return jnp.concatenate([x[..., i : i + 1] * block[..., -size:] for i, size in enumerate(suffix)], axis=-1)


def _block_starts(dim: int, degree: int) -> list[list[int]]:
    """For degrees 2 … p: where, in the degree below, the monomials begin whose first variable is in a block or later."""
    levels, starts, length = [], list(range(0, dim, _BLOCK)), dim
    for _ in range(degree - 1):
        levels.append(starts)
        sizes = [min(_BLOCK, dim - i * _BLOCK) * (length - start) for i, start in enumerate(starts)]
        length = sum(sizes)
        starts = np.cumsum([0, *sizes[:-1]]).tolist()
    return levels


@functools.lru_cache(maxsize=64)
def _block_table(dim: int, degree: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Of each monomial of `polynomial_blocks`: its row in `polynomial`, its weight there or 0 for a repeat, its degree."""
    place = {
        tuple(sorted(row)): number for number, row in enumerate(monomial_table(dim, (1.0,) * (degree + 1)).factors)
    }
    lower = np.arange(dim)[:, None]
    rows = [np.zeros((1, 0), int), lower][: degree + 1]
    for starts in _block_starts(dim, degree):
        lower = np.concatenate(
            [
                np.concatenate([np.full((len(lower) - start, 1), variable), lower[start:]], axis=1)
                for first, start in zip(range(0, dim, _BLOCK), starts, strict=True)
                for variable in range(first, min(first + _BLOCK, dim))
            ]
        )
        rows.append(lower)
    index = [place[(*sorted(row), *(dim,) * (degree - len(row)))] for block in rows for row in block]
    first_time = [bool(np.all(np.diff(row) >= 0)) for block in rows for row in block]
    order = [block.shape[1] for block in rows for _ in block]
    return np.asarray(index), _multiplicity(dim, degree)[index] * first_time, np.asarray(order)


@functools.lru_cache(maxsize=64)
def _multiplicity(dim: int, degree: int) -> np.ndarray:
    """Square root of how often each monomial occurs in x^{⊗i}, float64 [M]."""
    return np.sqrt(np.rint(monomial_table(dim, (1.0,) * (degree + 1)).weight.astype(np.float64) ** 2))


@functools.lru_cache(maxsize=64)
def _signs(dim: int, order: int, width: int, seed: int) -> np.ndarray:
    return np.random.default_rng((seed, order)).integers(0, 2, (order, dim, width)) * 2.0 - 1.0


@functools.lru_cache(maxsize=64)
def _normals(dim: int, width: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((dim, width))
