"""What a recall memory says of a key: M φ(k), with φ the key's monomials and M a matrix of its own for every row."""

from __future__ import annotations

from collections.abc import Sequence

import jax.numpy as jnp

from atlas_jax.kernels import tpu
from atlas_jax.kernels.linear import QuantArray, linear_each
from atlas_jax.kernels.monomials import batch_monomials, gather_monomials
from atlas_jax.typing import Array, Float, Int8, Int32

_TPU_TOKENS = 32
"""Tokens per row whose features fit in VMEM beside the memory."""


def uses_tpu_kernel(tokens: int) -> bool:
    """Whether a step of so many tokens per row runs the Mosaic kernel."""
    return tokens <= _TPU_TOKENS and tpu.usable()


def read_out(
    key: Float[Array, "B T R"],
    degree: Int32[Array, B],
    values: Int8[Array, "B C M"],
    scale: Float[Array, "B C"],
    factors: Int32[Array, "degree M F"],
    weight: Float[Array, "degree M"],
    halves: Sequence[int],
) -> Float[Array, "B T C"]:
    """M φ(k), all of it quantised as in `linear_each`.

    Args:
      degree: of each row's features, less one.
      values, scale: the memory in 8 bits.
      factors, weight: the monomials of each degree, for `monomials.gather_monomials`.
      halves: components of a key's half at each degree; the Mosaic kernel forms φ from these alone.
    """
    if uses_tpu_kernel(key.shape[1]):
        from atlas_jax.kernels.tpu import recall_features as mosaic  # importing Pallas takes 0.4 s that only TPUs need

        return mosaic.read_out(key, degree, values, scale, halves, interpret=tpu.interpreted())
    return linear_each(QuantArray(values, scale), batch_monomials(key, factors, weight, degree))


def ref_read_out(
    key: Float[Array, "B T R"],
    degree: Int32[Array, B],
    values: Int8[Array, "B C M"],
    scale: Float[Array, "B C"],
    factors: Int32[Array, "degree M F"],
    weight: Float[Array, "degree M"],
) -> Float[Array, "B T C"]:
    """`read_out` in float32 with plain matrices, row by row: the definition."""
    rows = [
        gather_monomials(key[b], factors[degree[b]], weight[degree[b]]) @ (values[b] * scale[b][:, None]).T
        for b in range(key.shape[0])
    ]
    return jnp.stack(rows)
