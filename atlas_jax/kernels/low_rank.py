"""What LoRA adapters add to a linear layer: a product of two thin matrices, with a scale for every row and adapter."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp

from atlas_jax.kernels.linear import Weight, linear
from atlas_jax.typing import Array, Bool, Float, Int32


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class LowRank:
    """What adapters add to one weight, the columns of all of them side by side.

    Attributes:
      a: [columns, in]; of token embeddings the table, [V, columns].
      b: [out, columns], its columns of one size, so that one scale an output serves all adapters.
      gain: what each column is multiplied with.
      owner: which adapter each column belongs to.
    """

    a: Weight
    b: Weight
    gain: Float[Array, columns]
    owner: Int32[Array, columns]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class RowScales:
    """How far each row of a step uses each adapter.

    Attributes:
      scales: 0 leaves an adapter out.
      used: rows that use any, and that the step reads something of.
    """

    scales: Float[Array, "B adapters"]
    used: Bool[Array, B]


def add_low_rank(
    out: Float[Array, "B T out"],
    weights: LowRank,
    rows: RowScales,
    inner: Callable[[Weight], Float[Array, "B T columns"]],
) -> Float[Array, "B T out"]:
    """`out + (inner(a) · gain · scale) @ b.T`; rows without an adapter keep their bits, and if no row has one nothing runs.

    Args:
      inner: the layer's input times a matrix.
    """

    def added() -> jax.Array:
        columns = rows.scales[:, weights.owner] * weights.gain
        more = linear(weights.b, inner(weights.a) * columns[:, None])
        return jnp.where(rows.used[:, None, None], out + more, out)

    return jax.lax.cond(rows.used.any(), added, lambda: out)
