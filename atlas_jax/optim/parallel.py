"""Training steps: on one device, data-parallel under `jax.pmap`, and data-parallel under `jax.jit` with shardings."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from atlas_jax.optim.sharding import LOCAL, GradientSharding, mapped, sharded
from atlas_jax.typing import Array, Float, Int32

Loss = Callable[[Any, Any], Float[Array, ""]]
"""(parameters, batch) → mean loss over the batch."""

OptimizerFor = Callable[[GradientSharding], optax.GradientTransformation]
"""Makes the optimiser for the way its work is shared out."""

_AXIS = "data"


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class TrainState:
    """What a training run carries from step to step.

    Attributes:
      step: steps taken.
    """

    params: Any
    optimizer: Any
    step: Int32[Array, ""]


@dataclass(frozen=True)
class Training:
    """A training step and what goes with it.

    Attributes:
      init: parameters → state, placed on the devices.
      step: (state, batch) → (state, loss); gives the old state's buffers away.
      params: state → the parameters, one copy.
    """

    init: Callable[[Any], TrainState]
    step: Callable[[TrainState, Any], tuple[TrainState, Float[Array, ""]]]
    params: Callable[[TrainState], Any]


def _init(optimizer: optax.GradientTransformation, params: Any) -> TrainState:
    return TrainState(params, optimizer.init(params), jnp.zeros((), jnp.int32))


def _step(
    loss: Loss, optimizer: optax.GradientTransformation, state: TrainState, batch: Any
) -> tuple[TrainState, jax.Array]:
    value, gradient = jax.value_and_grad(loss)(state.params, batch)
    updates, inner = optimizer.update(gradient, state.optimizer, state.params)
    return TrainState(optax.apply_updates(state.params, updates), inner, state.step + 1), value


def local_training(loss: Loss, optimizer: OptimizerFor) -> Training:
    """Training on the default device."""
    chosen = optimizer(LOCAL)
    return Training(
        # copied: a step gives its state away, and the caller's parameters are not ours to give
        init=lambda params: _init(chosen, jax.tree.map(jnp.array, params)),
        step=jax.jit(lambda state, batch: _step(loss, chosen, state, batch), donate_argnums=0),
        params=lambda state: state.params,
    )


def pmap_training(loss: Loss, optimizer: OptimizerFor, devices: Sequence[jax.Device] | None = None) -> Training:
    """Data-parallel training, one program per device with explicit communication (`jax.pmap`).

    Args:
      optimizer: must average gradients through its `GradientSharding`, as `muon` and `average_gradients` do.
      devices: all of them by default. A batch's leading axis must be a multiple of their number.
    """
    devices = list(jax.devices() if devices is None else devices)
    count = len(devices)
    chosen = optimizer(mapped(_AXIS, count))

    def local(state: TrainState, batch: Any) -> tuple[TrainState, jax.Array]:
        state, value = _step(loss, chosen, state, batch)
        return state, jax.lax.pmean(value, _AXIS)

    mapped_step = jax.pmap(local, _AXIS, devices=devices, donate_argnums=0)
    mapped_init = jax.pmap(lambda params, _: _init(chosen, params), _AXIS, in_axes=(None, 0), devices=devices)

    def step(state: TrainState, batch: Any) -> tuple[TrainState, jax.Array]:
        parts = jax.tree.map(lambda x: jnp.reshape(x, (count, -1, *jnp.shape(x)[1:])), batch)
        state, value = mapped_step(state, parts)
        return state, value[0]

    return Training(
        init=lambda params: mapped_init(params, jnp.zeros(count)),
        step=step,
        params=lambda state: jax.tree.map(lambda x: x[0], state.params),
    )


def sharded_training(loss: Loss, optimizer: OptimizerFor, mesh: Mesh) -> Training:
    """Data-parallel training as one program over a mesh with an axis "data"; XLA inserts the communication.

    A batch's leading axis must be a multiple of that axis; parameters are whole on every device.
    """
    chosen = optimizer(sharded(mesh, _AXIS))
    whole, parts = NamedSharding(mesh, PartitionSpec()), NamedSharding(mesh, PartitionSpec(_AXIS))
    jitted = jax.jit(lambda state, batch: _step(loss, chosen, state, batch), donate_argnums=0)
    init = jax.jit(lambda params: _init(chosen, params))
    return Training(
        init=lambda params: init(jax.device_put(params, whole)),
        step=lambda state, batch: jitted(state, jax.device_put(batch, parts)),
        params=lambda state: state.params,
    )
