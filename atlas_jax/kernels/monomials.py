"""Polynomial feature maps φ with φ(x)·φ(y) = Σᵢ aᵢ (x·y)ⁱ: all distinct monomials, each once.

ATLAS (arXiv 2505.23735) section 3.1 and equation 5. A degree-i monomial that occurs n times in x^{⊗i} is weighted
√(aᵢ·n), so the map is exact with C(d + p, p) features instead of dᵖ.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from atlas_jax.kernels.cpu import ffi, library
from atlas_jax.typing import Array, Float, Int32


@dataclass(frozen=True)
class MonomialTable:
    """The monomials of a feature map as data.

    Attributes:
      factors: int32 [M, p]; each monomial's variables, where index d means the constant 1.
      weight: float32 [M]; √(aᵢ · multiplicity).
    """

    factors: np.ndarray
    weight: np.ndarray


@functools.lru_cache(maxsize=64)
def monomial_table(dim: int, coefficients: tuple[float, ...]) -> MonomialTable:
    """Lists the monomials of degree 0 … p in `dim` variables.

    Args:
      coefficients: a₀ … a_p ≥ 0; a degree with coefficient 0 has no monomials.

    Raises:
      ValueError: a coefficient is negative or there is none.
    """
    if not coefficients or any(not a >= 0 for a in coefficients):
        raise ValueError(f"coefficients must be non-negative and at least one, got {coefficients}")
    degree = len(coefficients) - 1
    factors: list[tuple[int, ...]] = []
    weight: list[float] = []
    for order, coefficient in enumerate(coefficients):
        if coefficient == 0:
            continue
        for combination in itertools.combinations_with_replacement(range(dim), order):
            repeats = math.prod(math.factorial(len(list(same))) for _, same in itertools.groupby(combination))
            factors.append((*combination, *(dim,) * (degree - order)))
            weight.append(math.sqrt(coefficient * math.factorial(order) / repeats))
    shape = (len(factors), degree)
    return MonomialTable(np.asarray(factors, np.int32).reshape(shape), np.asarray(weight, np.float32))


def feature_count(dim: int, coefficients: Sequence[float]) -> int:
    """Number of features of `polynomial_features` without listing them."""
    return sum(math.comb(dim + order - 1, order) for order, a in enumerate(coefficients) if a > 0)


def polynomial_features(x: Float[Array, "*rows d"], coefficients: Sequence[float]) -> Float[Array, "*rows M"]:
    """φ(x) with φ(x)·φ(y) = Σᵢ coefficients[i] · (x·y)ⁱ.

    Args:
      x: vectors; for unit vectors |φ(x)|² = Σ coefficients.
      coefficients: a₀ … a_p; the paper starts from aᵢ = 1/i!.
    """
    table = monomial_table(x.shape[-1], tuple(float(a) for a in coefficients))
    return gather_monomials(x, jnp.asarray(table.factors), jnp.asarray(table.weight))


def gather_monomials(x: jax.Array, factors: jax.Array, weight: jax.Array) -> jax.Array:
    """Products of the variables named in `factors` ([…, M, p]), times `weight` ([…, M])."""
    extended = jnp.concatenate([x, jnp.ones((*x.shape[:-1], 1), x.dtype)], axis=-1)
    product = weight
    for position in range(factors.shape[-1]):
        product = product * jnp.take(extended, factors[..., position], axis=-1)
    return product


def uses_cpu_kernel(features: int) -> bool:
    """Whether monomials from tables of this length are formed in C."""
    return features % 16 == 0 and library.usable()


def batch_monomials(
    x: Float[Array, "B T R"],
    factors: Int32[Array, "degree M F"],
    weight: Float[Array, "degree M"],
    degree: Int32[Array, B],
) -> Float[Array, "B T M"]:
    """`gather_monomials` with the tables of each row's degree, less one."""
    if uses_cpu_kernel(factors.shape[1]):
        return ffi.monomials(x, factors, weight, degree)
    return jax.vmap(gather_monomials)(x, factors[degree], weight[degree])


def window_monomials(
    x: Float[Array, "W R"],
    factors: Int32[Array, "degree M F"],
    weight: Float[Array, "degree M"],
    degree: Int32[Array, ""],
) -> Float[Array, "W M"]:
    """`gather_monomials` of many vectors with one table, rounded to bfloat16."""
    if uses_cpu_kernel(factors.shape[1]):
        return ffi.monomials(x[None], factors, weight, degree[None], rounded=True)[0]
    extended = jnp.concatenate([x.T, jnp.ones((1, x.shape[0]), x.dtype)])
    product = weight[degree][:, None]
    for position in range(factors.shape[2]):  # contiguous rows of W numbers are multiplied
        product = product * extended[factors[degree, :, position]]
    return product.T.astype(jnp.bfloat16)


def ref_polynomial_features(x: Float[Array, "*rows d"], coefficients: Sequence[float]) -> Float[Array, "*rows M"]:
    """The same kernel from full tensor powers √aᵢ·x^{⊗i}, flattened and concatenated: dᵖ features, each often."""
    parts = []
    power = jnp.ones((*x.shape[:-1], 1), x.dtype)
    for order, coefficient in enumerate(coefficients):
        if order:
            power = (power[..., :, None] * x[..., None, :]).reshape(*x.shape[:-1], -1)
        if coefficient > 0:
            parts.append(math.sqrt(coefficient) * power)
    return jnp.concatenate(parts, axis=-1)
