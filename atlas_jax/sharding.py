"""Where arrays lie: on one device, or on a mesh of devices by the names of the fields that hold them.

A mesh has two axes. Rows of a batch are divided over `data`; heads, MLP columns, vocabulary rows and memory features over
`model`. Programs stay as they are written: placed weights and states, and constraints on what a program returns, are all
that XLA's partitioner is told. `on_each_device` is for the part it would divide badly.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from atlas_jax.config import ConfigError, ModelConfig

DATA, MODEL = "data", "model"

T = TypeVar("T")
S = TypeVar("S")

_WEIGHTS: dict[str, tuple[str | None, ...]] = {
    "qkv": (MODEL,),
    "qkv_bias": (MODEL,),
    "null_logit": (MODEL,),
    "key_balance": (MODEL,),
    "gate_up": (MODEL,),
    "gate_up_bias": (MODEL,),
    "out": (None, MODEL),
    "down": (None, MODEL),
    "embed": (MODEL,),
    "head": (MODEL,),
    "codes": (MODEL,),
    "factors": (None, MODEL),
    "feature_weight": (None, MODEL),
    # the thin matrices of LoRA, whichever weight they belong to
    **dict.fromkeys(("a", "b", "gain", "owner"), ()),
}
"""Axes of a weight by its field; every other one is whole on every device."""
_ROWS: dict[str, tuple[str | None, ...]] = {
    "k": (DATA, None, MODEL),
    "v": (DATA, None, MODEL),
    "sink_k": (DATA, MODEL),
    "sink_v": (DATA, MODEL),
    "stored_score": (DATA, None, MODEL),
    "ring_score": (DATA, None, MODEL),
    "queries": (DATA, None, MODEL),
    "query_scale": (DATA, None, MODEL),
    "capacity": (),
    "integers": (),
    "floats": (),
    "loss": (),
    "losses": (),
    "skipped": (),
    "weights": (DATA, None, MODEL),
    "null_logit": (MODEL,),
}
"""Axes of what has a leading axis of rows; every other such array is divided by rows alone. What the host reads after a step
is whole on every device: with several processes it could not be read otherwise."""


@dataclass(frozen=True)
class MeshLayout:
    """Places arrays.

    Attributes:
      mesh: axes DATA and MODEL; None leaves everything where JAX puts it.
    """

    mesh: Mesh | None = None

    def weights(self, tree: T) -> T:
        """Parameters, placed; shapes get their sharding."""
        return self._put(tree, _WEIGHTS, ())

    def rows(self, tree: T) -> T:
        """What has a leading axis of rows, placed; shapes get their sharding. An array that has one already keeps it."""
        return self._put(tree, _ROWS, (DATA,))

    def program(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function with its results, which have leading axes of rows, placed as `rows` would."""
        mesh = self.mesh
        if mesh is None:
            return function

        def placed(*args: Any) -> Any:
            out = function(*args)
            return jax.lax.with_sharding_constraint(out, _shardings(mesh, out, _ROWS, (DATA,)))

        return placed

    def whole(self) -> NamedSharding | None:
        """Where an array lies of which every device has all; None without a mesh."""
        return None if self.mesh is None else NamedSharding(self.mesh, PartitionSpec())

    def scope(self) -> contextlib.AbstractContextManager[Any]:
        """In which programs are traced, so that `on_each_device` knows the mesh."""
        return contextlib.nullcontext() if self.mesh is None else jax.set_mesh(self.mesh)

    def _put(self, tree: T, axes: dict[str, tuple[str | None, ...]], default: tuple[str | None, ...]) -> T:
        if self.mesh is None:
            return tree

        def put(leaf: Any, sharding: NamedSharding) -> Any:
            if isinstance(leaf, jax.ShapeDtypeStruct):
                return leaf if leaf.sharding is not None else leaf.update(sharding=sharding)
            if isinstance(leaf, jax.Array) and isinstance(leaf.sharding, NamedSharding):
                return leaf
            return place(leaf, sharding)

        out: T = jax.tree.map(put, tree, _shardings(self.mesh, tree, axes, default))
        return out


def place(leaf: Any, sharding: NamedSharding) -> jax.Array:
    """An array that every process of the mesh has all of, placed; each process keeps its own devices' parts."""
    if sharding.is_fully_addressable:
        return jax.device_put(leaf, sharding)
    whole = np.asarray(leaf)
    return jax.make_array_from_callback(whole.shape, sharding, whole.__getitem__)


ONE_DEVICE = MeshLayout()


def on_mesh(config: ModelConfig, data: int, model: int) -> MeshLayout:
    """A mesh_layout on the first `data · model` devices; one device needs no mesh.

    Raises:
      ConfigError: there are not as many devices, or the model cannot be divided so; the message names the setting.
    """
    if data * model == 1:
        return ONE_DEVICE
    check_mesh(config, data, model)
    devices = jax.devices()
    if len(devices) < data * model:
        raise ConfigError(
            f"mesh_data ({data}) times mesh_model ({model}) must not exceed the number of devices, {len(devices)}"
        )
    return MeshLayout(make_mesh(devices[: data * model], data, model))


def make_mesh(devices: Any, data: int, model: int) -> Mesh:
    """A mesh of `data · model` devices, those of one model side by side."""
    return Mesh(np.asarray(devices).reshape(data, model), (DATA, MODEL), axis_types=(AxisType.Auto, AxisType.Auto))


def check_mesh(config: ModelConfig, data: int, model: int) -> None:
    """Raises ConfigError if the model cannot be divided so; the message names the setting.

    Rows divide by the choice of batch sizes. Vocabulary rows and memory features that do not divide stay whole; KV heads
    are never repeated, for a model with fewer of them than devices is better served by rows.
    """
    for name, value in (("mesh_data", data), ("mesh_model", model)):
        if value < 1:
            raise ConfigError(f"{name} must be at least 1, got {value}")
    if config.kv_heads % model:
        raise ConfigError(
            f"mesh_model ({model}) must divide the model's {config.kv_heads} KV heads; mesh_data has no such limit"
        )
    if model > 1 and config.recurrent:
        raise ConfigError(
            f"mesh_model ({model}) must be 1: layers that keep a state in place of attention are not divided; mesh_data has "
            "no such limit"
        )
    blocks = config.ff // config.ff_block
    if config.experts is None and blocks % model:  # every device has all experts
        raise ConfigError(
            f"mesh_model ({model}) must divide the MLP's {blocks} blocks of {config.ff_block} columns; mesh_data has no "
            "such limit"
        )


def on_each_device(
    function: Callable[[jax.Array, S, Any, Any], tuple[jax.Array, S]], heads: jax.Array, state: S, rows: Any, whole: Any
) -> tuple[jax.Array, S]:
    """`function(heads, state, rows, whole)`, run by every device of the mesh in scope on its own; without a mesh, as it is.

    XLA would gather a cache whose rows and heads are merged into one axis, and can divide no kernel of ours.

    Args:
      function: returns an array divided like `heads`, and the state.
      heads: [B, T, heads, …].
      state, rows: divided as `MeshLayout.rows` does.
      whole: what every device has all of.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if MODEL not in mesh.axis_names:
        return function(heads, state, rows, whole)
    by_head = _specs(mesh.shape, heads, {}, (DATA, None, MODEL))
    of_state, of_rows = (_specs(mesh.shape, tree, _ROWS, (DATA,)) for tree in (state, rows))
    specs = by_head, of_state, of_rows, PartitionSpec()
    run = jax.shard_map(function, in_specs=specs, out_specs=(by_head, of_state), check_vma=False)
    found: tuple[jax.Array, S] = run(heads, state, rows, whole)
    return found


def _specs(
    sizes: Mapping[str, int], tree: Any, axes: dict[str, tuple[str | None, ...]], default: tuple[str | None, ...]
) -> Any:
    """Specs of a tree's arrays; an axis that a mesh axis does not divide stays whole."""

    def spec(path: tuple[Any, ...], leaf: Any) -> PartitionSpec:
        names = [key.name for key in path if isinstance(key, jax.tree_util.GetAttrKey)]
        names += [key.key for key in path if isinstance(key, jax.tree_util.DictKey)]
        wanted = next((axes[name] for name in reversed(names) if name in axes), default)
        shape = np.shape(leaf)
        return PartitionSpec(
            *(
                name if name is not None and size % sizes[name] == 0 else None
                for size, name in zip(shape, wanted, strict=False)
            )
        )

    return jax.tree_util.tree_map_with_path(spec, tree)


def _shardings(mesh: Mesh, tree: Any, axes: dict[str, tuple[str | None, ...]], default: tuple[str | None, ...]) -> Any:
    specs = _specs(mesh.shape, tree, axes, default)
    return jax.tree.map(lambda spec: NamedSharding(mesh, spec), specs, is_leaf=lambda x: isinstance(x, PartitionSpec))
