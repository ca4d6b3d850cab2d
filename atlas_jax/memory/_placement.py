"""Arrays of one call, placed alike over devices: a loop's carry must not change its type, which placement is a part of."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from typing import Any

import jax
import numpy as np
from jax.sharding import PartitionSpec

from atlas_jax.memory._params import Params
from atlas_jax.memory._state import MemoryState

Rule = Callable[[Params, MemoryState, Any], tuple[MemoryState, Any]]


def placed_alike(function: Rule) -> Rule:
    """A function whose arguments may be placed differently: a new state and parameters as a program has them, tokens divided.

    Inside `jax.shard_map` all become varying over the axes that any of them varies over. Where a mesh with explicit
    axes divides the batch of any of them, each device computes its own part. `phase` is one number for all and stays
    as it is.
    """

    def placed(params: Params, state: MemoryState, inputs: Any) -> tuple[MemoryState, Any]:
        phase, arrays = state.phase, dataclasses.replace(state, phase=None)  # type: ignore[arg-type]
        lead, heads = state.tail_k.ndim - 2, next(iter(params.weights.values())).ndim - 2
        specs = [_spec(x)[:lead] for x in jax.tree.leaves((inputs, arrays))]
        specs += [(None,) * (lead - heads) + _spec(x)[:heads] for x in jax.tree.leaves(params)]
        axes = tuple(map(_first, zip(*specs, strict=True)))
        if any(axes):
            return _on_each_device(placed, axes, axes[lead - heads :])(params, state, inputs)
        leaves = jax.tree.leaves((params, arrays, inputs, phase))
        over = frozenset[Any]().union(*(jax.typeof(x).manual_axis_type.varying for x in leaves))
        params, arrays, inputs = jax.tree.map(lambda x: _varying(x, over), (params, arrays, inputs))
        return function(params, dataclasses.replace(arrays, phase=phase), inputs)

    return placed


def _on_each_device(function: Rule, axes: tuple[Any, ...], of_params: tuple[Any, ...]) -> Rule:
    """The function by `jax.shard_map` over the axes of an explicit mesh that divide a batch."""
    rows, heads, same = PartitionSpec(*axes), PartitionSpec(*of_params), PartitionSpec()
    of_state: Any = MemoryState(rows, rows, rows, rows, rows, rows, rows, rows, same)  # type: ignore[arg-type]
    names = {name for axis in axes if axis for name in (axis if isinstance(axis, tuple) else (axis,))}

    def divided(params: Params, state: MemoryState, inputs: Any) -> tuple[MemoryState, Any]:
        phase, arrays = state.phase, dataclasses.replace(state, phase=None)  # type: ignore[arg-type]
        known = isinstance(phase, np.ndarray)  # stays so by closure; an argument is traced

        def own(params: Params, state: MemoryState, inputs: Any) -> tuple[MemoryState, Any]:
            return function(params, dataclasses.replace(state, phase=phase) if known else state, inputs)

        params = jax.tree.map(lambda x: _divided(x, of_params), params)
        arrays, inputs = jax.tree.map(lambda x: _divided(x, axes), (arrays, inputs))
        run = jax.shard_map(own, in_specs=(heads, of_state, rows), out_specs=(of_state, rows), axis_names=names)
        return run(params, dataclasses.replace(arrays, phase=phase), inputs)

    return divided


def varying_as(x: jax.Array, other: jax.Array) -> jax.Array:
    """An array as one that varies over the axes of `jax.shard_map` that another varies over.

    jax sums slopes on an array that is the same on every device over them; on one that varies each device has its own.
    """
    return _varying(x, jax.typeof(other).manual_axis_type.varying)


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
