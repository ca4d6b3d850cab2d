"""Banks: all matrices of one shape in one stack, so that they are orthogonalised together and shared out evenly."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from atlas_jax.optim.axes import MatrixAxes
from atlas_jax.typing import Array, Float

Banks = dict[str, Float[Array, "count tall short"]]


@dataclass(frozen=True)
class _Entry:
    path: str
    shape: tuple[int, ...]
    axes: MatrixAxes
    flipped: bool
    start: int
    stop: int


@dataclass(frozen=True)
class BankLayout:
    """Where each matrix of a parameter tree lies in the banks.

    Attributes:
      entries: bank name → its parameters in order; a bank is named by its matrices' shape.
      sizes: bank name → matrices, padded to a multiple of `shards`.
    """

    entries: dict[str, tuple[_Entry, ...]]
    sizes: dict[str, int]

    @classmethod
    def of(cls, tree: Any, axes: dict[str, MatrixAxes], shards: int = 1) -> BankLayout:
        """Lays out the leaves of a tree.

        Raises:
          ValueError: a leaf has no axes, or axes of another number.
        """
        entries: dict[str, list[_Entry]] = {}
        for path, leaf in _leaves(tree):
            if path not in axes:
                raise ValueError(f"parameter {path} of shape {leaf.shape} has no matrix axes")
            spec = axes[path]
            count, fan_in, fan_out = jax.eval_shape(spec.to_matrices, leaf).shape
            bank = entries.setdefault(f"{max(fan_in, fan_out)}x{min(fan_in, fan_out)}", [])
            start = bank[-1].stop if bank else 0
            bank.append(_Entry(path, leaf.shape, spec, fan_in < fan_out, start, start + count))
        sizes = {name: -(-bank[-1].stop // shards) * shards for name, bank in entries.items()}
        return cls({name: tuple(bank) for name, bank in entries.items()}, sizes)

    def pack(self, tree: Any) -> Banks:
        """Stacks the matrices of a tree, in float32 or wider; padding is zero."""
        leaves = dict(_leaves(tree))
        banks = {}
        for name, entries in self.entries.items():
            parts = []
            for entry in entries:
                matrices = entry.axes.to_matrices(leaves[entry.path])
                matrices = matrices.astype(jnp.promote_types(matrices.dtype, jnp.float32))
                parts.append(jnp.swapaxes(matrices, 1, 2) if entry.flipped else matrices)
            stack = jnp.concatenate(parts)
            banks[name] = jnp.pad(stack, ((0, self.sizes[name] - len(stack)), (0, 0), (0, 0)))
        return banks

    def unpack(self, banks: Banks, like: Any) -> Any:
        """Puts matrices back where `pack` found them in a tree."""
        found: dict[str, jax.Array] = {}
        for name, entries in self.entries.items():
            for entry in entries:
                matrices = banks[name][entry.start : entry.stop]
                matrices = jnp.swapaxes(matrices, 1, 2) if entry.flipped else matrices
                found[entry.path] = entry.axes.from_matrices(matrices, entry.shape)
        return jax.tree_util.tree_map_with_path(
            lambda path, leaf: found[jax.tree_util.keystr(path)].astype(leaf.dtype), like
        )


def _leaves(tree: Any) -> list[tuple[str, jax.Array]]:
    return [(jax.tree_util.keystr(path), leaf) for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]]
