"""How an optimiser shares its work between devices: two functions around the work on each device's share."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from atlas_jax.typing import Array, Float

_Move = Callable[[Float[Array, "count *rest"]], Float[Array, "share *rest"]]


@dataclass(frozen=True)
class GradientSharding:
    """Where gradients come from and where an optimiser's state lives.

    Attributes:
      shards: equal parts the leading axis of a stack is cut into.
      scatter: gradients as the devices have them → this device's share of their mean.
      gather: this device's share of the updates → all of them.
      mean: gradients as the devices have them → their mean, everywhere, for what is not shared out.
    """

    shards: int
    scatter: _Move
    gather: _Move
    mean: Callable[[Any], Any]


def _same(x: Any) -> Any:
    return x


LOCAL = GradientSharding(shards=1, scatter=_same, gather=_same, mean=_same)
"""One device, or every device doing all of the work on gradients that are already equal."""


def mapped(axis_name: str, shards: int) -> GradientSharding:
    """Inside `jax.pmap` or `jax.shard_map`: each device holds the gradient of its own part of the batch.

    A reduce-scatter gives each device the mean gradient of its share only, and an all-gather spreads the updates: what
    one all-reduce of the gradients would move. Momentum never leaves its device.
    """
    return GradientSharding(
        shards=shards,
        scatter=lambda x: jax.lax.psum_scatter(x, axis_name, scatter_dimension=0, tiled=True) / shards,
        gather=lambda x: jax.lax.all_gather(x, axis_name, axis=0, tiled=True),
        mean=lambda tree: jax.lax.pmean(tree, axis_name),
    )


def sharded(mesh: Mesh, axis_name: str = "data") -> GradientSharding:
    """Inside `jax.jit` over a mesh: gradients are logically whole, and constraints tell XLA who does what."""
    share, whole = NamedSharding(mesh, PartitionSpec(axis_name)), NamedSharding(mesh, PartitionSpec())
    return GradientSharding(
        shards=mesh.shape[axis_name],
        scatter=lambda x: jax.lax.with_sharding_constraint(x, share),
        gather=lambda x: jax.lax.with_sharding_constraint(x, whole),
        mean=_same,
    )


def average_gradients(sharding: GradientSharding) -> optax.GradientTransformation:
    """Gradients as the devices have them → their mean, everywhere: the first link of a chain that shares no work."""
    return optax.stateless(lambda updates, params: sharding.mean(updates))
