"""Which axes of a parameter are the two sides of a matrix, by name: `"lehd: e -> hd"`."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from atlas_jax.typing import Array, Float

AxesTree = Any
"""A pytree like the parameters, with a string for each matrix and None for everything else."""

AxesSource = AxesTree | Callable[[Any], AxesTree] | None


@dataclass(frozen=True)
class MatrixAxes:
    """A parameter read as a batch of matrices that map inputs to outputs.

    Attributes:
      inputs, outputs: axes of the two sides, in the order they are flattened.
      batch: all other axes; every index of them is a matrix of its own.
    """

    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    batch: tuple[int, ...]

    @classmethod
    def parse(cls, spec: str) -> MatrixAxes:
        """Reads `"names: inputs -> outputs"`, one letter per axis as in einsum; names in neither side are a batch.

        Raises:
          ValueError: not of that form, a repeated or unknown letter, or an empty side.
        """
        names, colon, sides = (part.strip() for part in spec.partition(":"))
        inputs, arrow, outputs = (part.strip() for part in sides.partition("->"))
        if not (colon and arrow and inputs and outputs and (names + inputs + outputs).isalpha()):
            raise ValueError(f"matrix axes must look like 'lehd: e -> hd', got {spec!r}")
        used = inputs + outputs
        if len(set(names)) != len(names) or len(set(used)) != len(used) or not set(used) <= set(names):
            raise ValueError(f"matrix axes {spec!r} repeat a letter or use one that is no axis")
        batch = tuple(i for i, name in enumerate(names) if name not in used)
        return cls(tuple(map(names.index, inputs)), tuple(map(names.index, outputs)), batch)

    def fans(self, shape: tuple[int, ...]) -> tuple[int, int]:
        """Numbers of inputs and outputs of one matrix."""
        return math.prod(shape[i] for i in self.inputs), math.prod(shape[i] for i in self.outputs)

    def to_matrices(self, x: Float[Array, ...]) -> Float[Array, "count inputs outputs"]:
        """The parameter as a stack of matrices.

        Raises:
          ValueError: it has another number of axes.
        """
        if x.ndim != len(self._order):
            raise ValueError(f"matrix axes name {len(self._order)} axes, the parameter has shape {x.shape}")
        return jnp.transpose(x, self._order).reshape(-1, *self.fans(x.shape))

    def from_matrices(self, matrices: Float[Array, "count inputs outputs"], shape: tuple[int, ...]) -> jax.Array:
        """The inverse of `to_matrices` for a parameter of that shape."""
        back = sorted(range(len(shape)), key=self._order.__getitem__)
        return jnp.transpose(matrices.reshape([shape[i] for i in self._order]), back)

    @property
    def _order(self) -> tuple[int, ...]:
        return self.batch + self.inputs + self.outputs


def resolve_axes(source: AxesSource, params: Any) -> dict[str, MatrixAxes]:
    """Axes of each matrix among the parameters, by path; with no source, of every parameter that has two axes."""
    if source is None:
        source = jax.tree.map(lambda x: "io: i -> o" if jnp.ndim(x) == 2 else None, params)
    elif callable(source):
        source = source(params)
    found = jax.tree_util.tree_flatten_with_path(source)[0]
    return {jax.tree_util.keystr(path): MatrixAxes.parse(spec) for path, spec in found}
