"""Muon: momentum whose matrices are orthogonalised before they become steps (Jordan et al., 2024)."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from atlas_jax.kernels.newton_schulz import CoefficientTable, orthogonalize
from atlas_jax.optim.axes import AxesSource, resolve_axes
from atlas_jax.optim.bank import BankLayout, Banks
from atlas_jax.optim.sharding import LOCAL, GradientSharding, average_gradients
from atlas_jax.typing import Array, Int32


class MuonState(NamedTuple):
    """Momentum of all matrices.

    Attributes:
      step: steps taken.
      momentum: stacks of equally shaped matrices; under a `GradientSharding` with shards, this device's share.
    """

    step: Int32[Array, ""]
    momentum: Banks


def scale_by_muon(
    axes: AxesSource = None,
    *,
    beta: float = 0.95,
    nesterov: bool = True,
    steps: int = 5,
    table: CoefficientTable = "jordan",
    sharding: GradientSharding = LOCAL,
) -> optax.GradientTransformation:
    """Replaces each matrix's gradient by its orthogonalised momentum, S ← βS + (1−β)G, U = NS(S).

    Every leaf of the updates must be a matrix or a batch of them; `muon` and `optax.partition` keep others away.

    Args:
      axes: which axes of each leaf are a matrix (`MatrixAxes.parse`): a pytree like the parameters, or a function that
        makes one from them; by default every leaf has two axes.
      beta: decay of the momentum, in [0, 1).
      nesterov: orthogonalises the momentum one step ahead.
      steps, table: see `orthogonalize`.
      sharding: how the matrices are shared out; the updates come back whole on every device.

    Raises:
      ValueError: on use, if a leaf has no axes or axes of another number.
    """

    def layout_of(tree: Any) -> BankLayout:
        return BankLayout.of(tree, resolve_axes(axes, tree), sharding.shards)

    def init(params: optax.Params) -> MuonState:
        layout = layout_of(params)
        shapes = jax.eval_shape(layout.pack, params)
        zeros = {name: jnp.zeros(bank.shape, bank.dtype) for name, bank in shapes.items()}
        # scatter decides where a share lives; of zeros, every share is the same
        return MuonState(jnp.zeros((), jnp.int32), {name: sharding.scatter(bank) for name, bank in zeros.items()})

    def update(
        updates: optax.Updates, state: optax.OptState, params: optax.Params | None = None
    ) -> tuple[optax.Updates, optax.OptState]:
        del params
        assert isinstance(state, MuonState)
        layout = layout_of(updates)
        gradient = {name: sharding.scatter(bank) for name, bank in layout.pack(updates).items()}
        momentum = jax.tree.map(lambda s, g: beta * s + (1 - beta) * g, state.momentum, gradient)
        taken = state.step + 1
        ahead = momentum
        if nesterov:
            # bias corrections of both terms, up to a common factor, which orthogonalisation drops
            ratio = (1 - beta**taken) / (1 - beta ** (taken + 1))
            ahead = jax.tree.map(lambda s, g: beta * ratio * s + (1 - beta) * g, momentum, gradient)
        orthogonal = {
            name: sharding.gather(orthogonalize(bank, steps=steps, table=table)) for name, bank in ahead.items()
        }
        return layout.unpack(orthogonal, updates), MuonState(taken, momentum)

    return optax.GradientTransformation(init, update)


def scale_by_shape(axes: AxesSource = None, *, rms: float | None = None) -> optax.GradientTransformation:
    """Makes the size of orthogonalised updates independent of their shape.

    Args:
      axes: as for `scale_by_muon`.
      rms: None multiplies by √max(1, outputs / inputs); a number by rms·√max(inputs, outputs), with which updates of
        full rank have that root mean square (0.2 is like AdamW's; Liu et al., arXiv 2502.16982).
    """

    def scale(updates: optax.Updates) -> optax.Updates:
        specs = resolve_axes(axes, updates)

        def one(path: Any, leaf: jax.Array) -> jax.Array:
            inputs, outputs = specs[jax.tree_util.keystr(path)].fans(leaf.shape)
            factor = max(1.0, outputs / inputs) ** 0.5 if rms is None else rms * max(inputs, outputs) ** 0.5
            return factor * leaf

        return jax.tree_util.tree_map_with_path(one, updates)

    return optax.stateless(lambda updates, params: scale(updates))


def muon(
    learning_rate: optax.ScalarOrSchedule,
    axes: AxesSource = None,
    *,
    beta: float = 0.95,
    nesterov: bool = True,
    steps: int = 5,
    table: CoefficientTable = "jordan",
    rms: float | None = None,
    weight_decay: float = 0.0,
    adam_learning_rate: optax.ScalarOrSchedule | None = None,
    adam_b1: float = 0.9,
    adam_b2: float = 0.999,
    sharding: GradientSharding = LOCAL,
) -> optax.GradientTransformation:
    """Muon for the matrices and Adam for everything else.

    Args:
      learning_rate: of the matrices.
      axes: as for `scale_by_muon`; leaves whose entry is None get Adam.
      rms: as for `scale_by_shape`.
      weight_decay: of the matrices, multiplied by the learning rate.
      adam_learning_rate: of the rest; the same if None.
      sharding: with shards, each device keeps the momentum of its share of the matrices and orthogonalises only that;
        Adam's leaves are few and small, and every device does them all.
    """

    def matrices(params: optax.Params) -> Any:
        paths = resolve_axes(axes, params)
        return jax.tree_util.tree_map_with_path(
            lambda path, _: "matrix" if jax.tree_util.keystr(path) in paths else "other", params
        )

    return optax.partition(
        {
            "matrix": optax.chain(
                scale_by_muon(axes, beta=beta, nesterov=nesterov, steps=steps, table=table, sharding=sharding),
                scale_by_shape(axes, rms=rms),
                optax.add_decayed_weights(weight_decay),
                optax.sgd(learning_rate),
            ),
            "other": optax.chain(
                average_gradients(sharding),
                optax.adam(learning_rate if adam_learning_rate is None else adam_learning_rate, b1=adam_b1, b2=adam_b2),
            ),
        },
        matrices,
    )
