"""The recall memory's polynomial features on TPU, formed in VMEM where they are used.

φ of a key joins each monomial of its state with all numbers of its context (`recall.adapter`), so it is that context,
times one number after another, laid side by side. XLA's program gathers every factor by its index in a table of 9216 × 3 a
row.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from atlas_jax.kernels.linear import from_terms, terms_of
from atlas_jax.kernels.monomials import monomial_table
from atlas_jax.typing import Array, Float, Int8, Int32

_SUBLANES = 8
_EXACT = 1024
"""Products of two 8-bit numbers whose sum float32 holds exactly: 1024 · 128² = 2²⁴. Some TPUs multiply no integers."""


def read_out(
    key: Float[Array, "B T R"],
    degree: Int32[Array, B],
    values: Int8[Array, "B C M"],
    scale: Float[Array, "B C"],
    halves: Sequence[int],
    *,
    interpret: bool = False,
) -> Float[Array, "B T C"]:
    """M φ(k) of a memory in 8 bits.

    φ is quantised to two 8-bit terms with one unit per token and sums are exact, as in XLA's program: the result has the
    same bits. Per row it reads M once, 2.4 MB for 9216 features and 256 dimensions, and writes the result.

    Args:
      key: a state and a context, each zero from `halves[degree]` on.
      degree: polynomial degree, less one.
      halves: components of a key's half at each degree.
      interpret: run as an XLA program on any platform, for tests.
    """
    batch, tokens, size = key.shape
    code_dim, features = values.shape[1:]
    rows = -(-tokens // _SUBLANES) * _SUBLANES
    pad = ((0, 0), (0, rows - tokens), (0, 0))

    def row(*shape: int) -> pl.BlockSpec:
        return pl.BlockSpec((1, *shape), lambda b, _: (b, *(0,) * len(shape)))

    grid = pltpu.PrefetchScalarGridSpec(
        num_scalar_prefetch=1,
        grid=(batch,),
        in_specs=[row(rows, size), row(code_dim, features), row(1, code_dim)],
        out_specs=row(rows, code_dim),
        scratch_shapes=[pltpu.VMEM((rows, features), jnp.float32)],
    )
    out = pl.pallas_call(
        functools.partial(_read_kernel, tuple(halves)),
        grid_spec=grid,
        out_shape=jax.ShapeDtypeStruct((batch, rows, code_dim), jnp.float32),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel",)),
        cost_estimate=pl.CostEstimate(
            flops=4 * batch * rows * code_dim * features,
            transcendentals=0,
            bytes_accessed=batch * (code_dim * features + 4 * rows * (size + code_dim)),
        ),
        interpret=interpret,
        name="memory_read",
    )(degree, jnp.pad(key, pad), values, scale[:, None])
    return out[:, :tokens]


def _read_kernel(
    halves: tuple[int, ...],
    degree: jax.Array,
    key: jax.Array,
    values: jax.Array,
    scale: jax.Array,
    out: jax.Array,
    phi: jax.Array,
) -> None:
    """One row of the batch: all its tokens."""
    used = degree[pl.program_id(0)]
    for index, half in enumerate(halves):

        @pl.when(used == index)
        def _form(index: int = index, half: int = half) -> None:
            end = 0
            for variables, weight, start in _joins(index, half, key.shape[2] // 2):
                product = jnp.full((phi.shape[0], 1), weight, jnp.float32)
                for variable in variables:
                    product = product * key[0, :, variable : variable + 1]
                phi[:, end : end + half] = product * key[0, :, start : start + half]
                end += half
            if end < phi.shape[1]:
                phi[:, end:] = jnp.zeros((phi.shape[0], phi.shape[1] - end), jnp.float32)

    peak = jnp.maximum(jnp.max(jnp.abs(phi[...]), axis=1, keepdims=True), 1e-30)
    high, low, unit = terms_of(phi[...], peak)
    terms = jnp.concatenate([high, low]).astype(jnp.bfloat16)
    whole = jnp.zeros((terms.shape[0], values.shape[1]), jnp.int32)
    for start in range(0, phi.shape[1], _EXACT):
        part = slice(start, min(start + _EXACT, phi.shape[1]))
        block = values[0, :, part].astype(jnp.float32).astype(jnp.bfloat16)
        sums = jax.lax.dot_general(terms[:, part], block, (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32)
        whole = whole + sums.astype(jnp.int32)
    out[0] = from_terms(whole[: phi.shape[0]], whole[phi.shape[0] :]) * (unit * scale[0])


def _joins(index: int, half: int, mean: int) -> list[tuple[tuple[int, ...], float, int]]:
    """The parts of φ in their order: the state's variables, their weight, and where what they are joined with begins."""
    if index == 0:  # nothing to join: both halves as they are
        return [((), math.sqrt(0.5), 0), ((), math.sqrt(0.5), mean)]
    table = monomial_table(half, (0.0,) * index + (1.0,))
    return [(tuple(row), float(weight), mean) for row, weight in zip(table.factors, table.weight, strict=True)]
