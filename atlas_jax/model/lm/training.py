"""Training a language model: optimiser, loop, checkpoints, progress. Interrupted runs go on as if nothing had been."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

import jax
import numpy as np
import optax
from flax import nnx
from jax.sharding import Mesh

from atlas_jax.config import ConfigError
from atlas_jax.model.lm.checkpoints import Checkpoints
from atlas_jax.model.lm.config import LMConfig
from atlas_jax.model.lm.data import Batch, BatchSource
from atlas_jax.model.lm.model import LMParams, create, cross_entropy, init_params, matrix_axes, split
from atlas_jax.optim import (
    GradientSharding,
    Training,
    average_gradients,
    local_training,
    muon,
    pmap_training,
    sharded_training,
)


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """How a model is trained.

    Attributes:
      steps: of the whole run.
      optimizer: `muon` for the matrices of the blocks, with Adam for the rest; or `adamw` for all.
      learning_rate: of Muon, or of AdamW.
      adam_learning_rate: of what Muon leaves to Adam.
      warmup: steps of linear warm-up; a cosine to a tenth follows.
      clip: bound on the gradient's global norm, for `adamw` (orthogonalised steps have a size of their own).
      checkpoint_every: steps between checkpoints.
      devices: `local`, one device; `pmap` or `sharded`, all of them, each with its part of the batch.
    """

    steps: int
    optimizer: Literal["muon", "adamw"] = "muon"
    learning_rate: float = 0.02
    adam_learning_rate: float = 3e-3
    warmup: int = 20
    weight_decay: float = 0.0
    clip: float = 1.0
    seed: int = 0
    checkpoint_every: int = 500
    devices: Literal["local", "pmap", "sharded"] = "local"

    def __post_init__(self) -> None:
        for name in ("steps", "learning_rate", "adam_learning_rate", "clip", "checkpoint_every"):
            if not getattr(self, name) > 0:
                raise ConfigError(f"{name} must be positive, got {getattr(self, name)}")
        if self.warmup < 0 or self.weight_decay < 0:
            raise ConfigError("warmup and weight_decay must not be negative")
        if self.optimizer not in ("muon", "adamw") or self.devices not in ("local", "pmap", "sharded"):
            raise ConfigError(f"no optimizer {self.optimizer!r}, or no devices {self.devices!r}")


@dataclass(frozen=True)
class Trained:
    """The result of a run.

    Attributes:
      losses: of the steps this call has made, mean nats per token.
      first_step: the step the first of them belongs to.
    """

    params: LMParams
    losses: tuple[float, ...]
    first_step: int


def train(
    model: LMConfig,
    config: TrainConfig,
    source: BatchSource,
    *,
    directory: str | os.PathLike[str] | None = None,
    stop_after: int | None = None,
    show: bool = False,
    params: LMParams | None = None,
) -> Trained:
    """Trains a model, going on from the newest checkpoint in `directory` if there is one.

    A run that is interrupted and goes on gives the parameters of one that is not, bit for bit: batches depend on the
    step only, and a checkpoint holds the whole state.

    Args:
      directory: where checkpoints go; None keeps none.
      stop_after: leave after this many steps of the run, with a checkpoint.
      show: a progress bar (needs the `train` extra).
      params: where to start from instead of random weights.

    Raises:
      CheckpointError: `directory` holds a run of another model.
    """
    training = _prepare(model, config)
    state = training.init(init_params(model, config.seed) if params is None else params)
    checkpoints = None if directory is None else Checkpoints(directory, model)
    if checkpoints is not None:
        state = checkpoints.latest(state) or state
    first = int(np.max(jax.device_get(state.step)))
    last = config.steps if stop_after is None else min(config.steps, stop_after)
    losses: list[float] = []
    with _progress(show, first, config.steps) as report:
        for step in range(first, last):
            state, loss = training.step(state, source(step))
            losses.append(float(loss))
            report(step + 1, losses[-1])
            if checkpoints is not None and ((step + 1) % config.checkpoint_every == 0 or step + 1 == last):
                checkpoints.save(state, step + 1)
    if checkpoints is not None:
        checkpoints.close()
    return Trained(jax.tree.map(np.asarray, training.params(state)), tuple(losses), first)


def make_optimizer(config: TrainConfig, axes: LMParams) -> Callable[[GradientSharding], optax.GradientTransformation]:
    """The optimiser of a run, for each way of sharing out its work."""

    def schedule(peak: float) -> optax.Schedule:
        warmup = min(config.warmup, config.steps - 1)
        return optax.warmup_cosine_decay_schedule(0.0, peak, warmup, max(config.steps, warmup + 1), 0.1 * peak)

    def build(sharding: GradientSharding) -> optax.GradientTransformation:
        if config.optimizer == "muon":
            return muon(
                schedule(config.learning_rate),
                axes,
                weight_decay=config.weight_decay,
                adam_learning_rate=schedule(config.adam_learning_rate),
                adam_b2=0.99,
                sharding=sharding,
            )
        return optax.chain(
            average_gradients(sharding),
            optax.clip_by_global_norm(config.clip),
            optax.adamw(schedule(config.learning_rate), b2=0.99, weight_decay=config.weight_decay),
        )

    return build


@functools.lru_cache(maxsize=4)
def _prepare(model: LMConfig, config: TrainConfig) -> Training:
    """The compiled step of a run; kept, so that going on with it in the same process compiles nothing again."""
    made = nnx.eval_shape(lambda: create(model, config.seed))
    apply, _ = split(made)

    def loss(params: LMParams, batch: Batch) -> jax.Array:
        return cross_entropy(apply(params, batch.tokens), batch.targets)[0]

    optimizer = make_optimizer(config, matrix_axes(made))
    if config.devices == "pmap":
        return pmap_training(loss, optimizer)
    if config.devices == "sharded":
        return sharded_training(loss, optimizer, Mesh(np.array(jax.devices()), ("data",)))
    return local_training(loss, optimizer)


@contextmanager
def _progress(show: bool, done: int, total: int) -> Iterator[Callable[[int, float], None]]:
    if not show:
        yield lambda step, loss: None
        return
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("step"), MofNCompleteColumn(), BarColumn(), TextColumn("loss {task.fields[loss]:.3f}"))
    with Progress(*columns, TimeRemainingColumn()) as bar:
        task = bar.add_task("training", total=total, completed=done, loss=float("nan"))
        yield lambda step, loss: bar.update(task, completed=step, loss=loss)
