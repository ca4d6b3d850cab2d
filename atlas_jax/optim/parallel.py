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


Weigh = Callable[[Any], Float[Array, ""]]
"""How much a part of a batch counts in the mean of the whole, such as its number of targets."""


def _alike(batch: Any) -> jax.Array:
    return jnp.ones(())


def _accumulated(loss: Loss, accumulate: int, weigh: Weigh) -> Callable[[Any, Any], tuple[jax.Array, Any]]:
    """Value and gradient of the loss over a batch, taken in so many parts: the intermediates of one are held at a time."""
    both = jax.value_and_grad(loss)
    if accumulate == 1:
        return both

    def split(x: jax.Array) -> jax.Array:
        # every `accumulate`-th row is one part: where devices divide the rows, each keeps its own
        return jnp.swapaxes(x.reshape(x.shape[0] // accumulate, accumulate, *x.shape[1:]), 0, 1)

    def total(params: Any, batch: Any) -> tuple[jax.Array, Any]:
        parts = jax.tree.map(split, batch)
        counts = jax.vmap(weigh)(parts)
        shares = counts / jnp.maximum(counts.sum(), 1e-30)

        def add(carry: Any, part: Any) -> tuple[Any, None]:
            share, rows = part
            found = both(params, rows)
            return jax.tree.map(lambda a, b: a + (share * b).astype(a.dtype), carry, found), None

        empty = (jnp.zeros(()), jax.tree.map(jnp.zeros_like, params))
        return jax.lax.scan(add, empty, (shares, parts))[0]

    return total


def _step(
    both: Callable[[Any, Any], tuple[jax.Array, Any]],
    optimizer: optax.GradientTransformation,
    state: TrainState,
    batch: Any,
) -> tuple[TrainState, jax.Array]:
    value, gradient = both(state.params, batch)
    updates, inner = optimizer.update(gradient, state.optimizer, state.params)
    return TrainState(optax.apply_updates(state.params, updates), inner, state.step + 1), value


def local_training(loss: Loss, optimizer: OptimizerFor, *, accumulate: int = 1, weigh: Weigh = _alike) -> Training:
    """Training on the default device.

    Args:
      accumulate: parts a batch is taken in, one after the other, before one step.
      weigh: how much each part counts.
    """
    chosen, both = optimizer(LOCAL), _accumulated(loss, accumulate, weigh)
    return Training(
        # copied: a step gives its state away, and the caller's parameters are not ours to give
        init=lambda params: _init(chosen, jax.tree.map(jnp.array, params)),
        step=jax.jit(lambda state, batch: _step(both, chosen, state, batch), donate_argnums=0),
        params=lambda state: state.params,
    )


def pmap_training(
    loss: Loss,
    optimizer: OptimizerFor,
    devices: Sequence[jax.Device] | None = None,
    *,
    accumulate: int = 1,
    weigh: Weigh = _alike,
) -> Training:
    """Data-parallel training, one program per device with explicit communication (`jax.pmap`).

    Args:
      optimizer: must average gradients through its `GradientSharding`, as `muon` and `average_gradients` do.
      devices: all of them by default. A batch's leading axis must be a multiple of their number.
      accumulate, weigh: as for `local_training`; the rows of a device must be a multiple of `accumulate`.
    """
    own = _accumulated(loss, accumulate, weigh)

    def both(params: Any, batch: Any) -> tuple[jax.Array, Any]:
        count = weigh(batch)  # what a device's rows count for in the mean of all
        share = count / jnp.maximum(jax.lax.pmean(count, _AXIS), 1e-30)
        return jax.tree.map(lambda x: (share * x).astype(x.dtype), own(params, batch))

    devices = list(jax.devices() if devices is None else devices)
    count = len(devices)
    chosen = optimizer(mapped(_AXIS, count))

    def local(state: TrainState, batch: Any) -> tuple[TrainState, jax.Array]:
        state, value = _step(both, chosen, state, batch)
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


def sharded_training(
    loss: Loss, optimizer: OptimizerFor, mesh: Mesh, *, accumulate: int = 1, weigh: Weigh = _alike
) -> Training:
    """Data-parallel training as one program over a mesh with an axis "data"; XLA inserts the communication.

    A batch's leading axis must be a multiple of that axis; parameters are whole on every device.
    """
    chosen, both = optimizer(sharded(mesh, _AXIS)), _accumulated(loss, accumulate, weigh)
    whole, parts = NamedSharding(mesh, PartitionSpec()), NamedSharding(mesh, PartitionSpec(_AXIS))
    jitted = jax.jit(lambda state, batch: _step(both, chosen, state, batch), donate_argnums=0)
    init = jax.jit(lambda params: _init(chosen, params))
    return Training(
        init=lambda params: init(jax.device_put(params, whole)),
        step=lambda state, batch: jitted(state, jax.device_put(batch, parts)),
        params=lambda state: state.params,
    )
