"""Arrays of one call, placed alike over devices: a loop's carry must not change its type, which placement is a part of."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Any, TypeVar

import jax
from jax.sharding import PartitionSpec

from atlas_jax.memory._params import Params
from atlas_jax.memory._state import MemoryState

Tree = TypeVar("Tree")


def place_alike(params: Params, state: MemoryState, inputs: Any) -> tuple[Params, MemoryState, Any]:
    """Arguments that differ over devices, or are divided over them, as the one that is most.

    A new state is the same on every device, and so are parameters; tokens are not. Inside `jax.shard_map` they become
    varying over the axes that any of them varies over; on a mesh with explicit axes the batch's axes are divided as any
    of them has it. `phase` is one number for all and stays as it is.
    """
    lead = state.tail_k.ndim - 2
    heads = next(iter(params.weights.values())).ndim - 2
    phase, arrays = state.phase, dataclasses.replace(state, phase=None)  # type: ignore[arg-type]
    leaves = jax.tree.leaves((inputs, arrays, params))
    over = frozenset[Any]().union(*(jax.typeof(x).manual_axis_type.varying for x in (*leaves, phase)))
    batched = [_spec(x)[:lead] for x in jax.tree.leaves((inputs, arrays))]
    by_head = [(None,) * (lead - heads) + _spec(x)[:heads] for x in jax.tree.leaves(params)]
    divided = tuple(_first(names) for names in zip(*batched, *by_head, strict=True))

    def placed(tree: Tree, axes: tuple[Any, ...]) -> Tree:
        return jax.tree.map(lambda x: _divided(_varying(x, over), axes), tree)

    state = dataclasses.replace(placed(arrays, divided), phase=phase)
    return placed(params, divided[lead - heads :]), state, placed(inputs, divided)


def _varying(x: jax.Array, axes: frozenset[Any]) -> jax.Array:
    missing = axes - jax.typeof(x).manual_axis_type.varying
    return jax.lax.pcast(x, tuple(sorted(missing, key=str)), to="varying") if missing else x


def _divided(x: jax.Array, axes: tuple[Any, ...]) -> jax.Array:
    spec = _spec(x)
    wanted = axes + spec[len(axes) :]
    return x if wanted == spec else jax.sharding.reshard(x, PartitionSpec(*wanted))


def _spec(x: jax.Array) -> tuple[Any, ...]:
    """Which axes of an explicit mesh divide each of an array's axes; None for others, and for meshes that are not."""
    spec = tuple(jax.typeof(x).sharding.spec)
    return spec + (None,) * (x.ndim - len(spec))


def _first(names: Iterable[Any]) -> Any:
    return next((name for name in names if name is not None), None)
