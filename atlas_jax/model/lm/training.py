"""Training a language model: optimiser, loop, checkpoints, progress. Interrupted runs go on as if nothing had been."""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import Mesh

from atlas_jax.config import ConfigError
from atlas_jax.model.lm.checkpoints import Checkpoints
from atlas_jax.model.lm.config import LMConfig
from atlas_jax.model.lm.data import IGNORE, Batch, Source, batches_from
from atlas_jax.model.lm.metrics import MetricsCallback
from atlas_jax.model.lm.model import LanguageModel, LMParams, create, cross_entropy, init_params, matrix_axes, split
from atlas_jax.optim import (
    GradientSharding,
    Training,
    average_gradients,
    local_training,
    muon,
    pmap_training,
    sharded_training,
)

Model = LMConfig | nnx.Module
"""A configuration; or a module that makes logits [B, T, V] of tokens [B, T], whose parameters are where training begins."""

Evaluate = Callable[[LMParams, int], Mapping[str, float]]
"""(parameters, steps taken) → what was found, by name."""


class NonFiniteLoss(ArithmeticError):
    """The loss of a step, or a parameter after it, is not a finite number; the newest checkpoint is of a step before it."""


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
      precision: what matrices and activations are in while gradients are taken: parameters, optimiser, norms, softmax,
        memories and losses are float32 in both.
      accumulate: parts that a batch is taken in, one after the other, before one step: the gradient is that of the whole
        batch, each target counts alike. Rows of a batch must be a multiple of it.
      checkpoint_every: steps between checkpoints.
      evaluate_every: steps between evaluations; 0 evaluates after the last step alone.
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
    precision: Literal["float32", "bfloat16"] = "float32"
    accumulate: int = 1
    checkpoint_every: int = 500
    evaluate_every: int = 0
    devices: Literal["local", "pmap", "sharded"] = "local"

    def __post_init__(self) -> None:
        for name in ("steps", "learning_rate", "adam_learning_rate", "clip", "checkpoint_every", "accumulate"):
            if not getattr(self, name) > 0:
                raise ConfigError(f"{name} must be positive, got {getattr(self, name)}")
        for name in ("warmup", "weight_decay", "evaluate_every"):
            if getattr(self, name) < 0:
                raise ConfigError(f"{name} must not be negative, got {getattr(self, name)}")
        for name, choices in _CHOICES.items():
            if getattr(self, name) not in choices:
                raise ConfigError(f"{name} must be one of {', '.join(choices)}, got {getattr(self, name)!r}")


_CHOICES = {
    "optimizer": ("muon", "adamw"),
    "devices": ("local", "pmap", "sharded"),
    "precision": ("float32", "bfloat16"),
}
_FREE = ("checkpoint_every", "evaluate_every")
"""Settings with which a run may go on that began with others."""
_FULL = frozenset({"start", "gates", "features", "scale", "taps", "gamma", "gamma_bias"})
"""Parameters that stay float32: what memories start from, and what is added or multiplied number by number."""


@dataclass(frozen=True)
class Trained:
    """The result of a run.

    Attributes:
      params: as `split` gives them; `nnx.update(module, trained.params)` puts them into a module.
      losses: of the steps this call has made, mean nats per token.
      first_step: the step the first of them belongs to.
    """

    params: LMParams
    losses: tuple[float, ...]
    first_step: int


def train(
    model: Model,
    config: TrainConfig,
    source: Source,
    *,
    directory: str | os.PathLike[str] | None = None,
    stop_after: int | None = None,
    show: bool = False,
    params: LMParams | None = None,
    metrics: MetricsCallback | None = None,
    evaluate: Evaluate | None = None,
) -> Trained:
    """Trains a model, going on from the newest checkpoint in `directory` if there is one.

    A run that is interrupted and goes on gives the parameters of one that is not, bit for bit, where batches depend on the
    step only, or come from an iterator that begins anew with the same ones: a checkpoint holds the whole state.

    Args:
      source: step → batch, or anything to be iterated over; see `data.Source`.
      directory: where checkpoints go; None keeps none.
      stop_after: leave after this many steps of the run, with a checkpoint.
      show: a progress bar (needs the `train` extra).
      params: where to start from instead of random weights.
      metrics: called after each step and each evaluation, such as a `metrics.CSVMetrics`.
      evaluate: called with the parameters every `evaluate_every` steps and after the last, such as `held_out(…)`.

    Raises:
      CheckpointError: `directory` holds a run of another model, or with other settings; the message names them.
      NonFiniteLoss: a loss is not finite, or a parameter where a checkpoint is due. Neither is kept.
    """
    if isinstance(model, LMConfig):
        training, start = _prepare(model, config), init_params(model, config.seed) if params is None else params
        described: Mapping[str, Any] = json.loads(model.to_json())
    else:
        training, start = _made(model, config), split(model)[1] if params is None else params
        described = _described(model)
    state = training.init(start)
    run = {name: value for name, value in dataclasses.asdict(config).items() if name not in _FREE}
    checkpoints = None if directory is None else Checkpoints(directory, described, run)
    if checkpoints is not None:
        state = checkpoints.latest(state) or state
    first = int(np.max(jax.device_get(state.step)))
    last = config.steps if stop_after is None else min(config.steps, stop_after)
    losses: list[float] = []
    batches = batches_from(source, first)
    with _progress(show, first, config.steps) as report:
        for step in range(first, last):
            began, batch = time.perf_counter(), batches(step)
            state, loss = training.step(state, batch)
            losses.append(float(loss))
            if not math.isfinite(losses[-1]):
                raise NonFiniteLoss(
                    f"the loss of step {step} is {losses[-1]}; lower the learning rate, or go on from before"
                )
            report(step + 1, losses[-1])
            done = step + 1
            if metrics is not None:
                speed = np.size(batch.tokens) / (time.perf_counter() - began)
                metrics(done, {"loss": losses[-1], "tokens_per_second": speed})
            often = config.evaluate_every > 0 and done % config.evaluate_every == 0
            if evaluate is not None and (often or done == config.steps):
                found = evaluate(training.params(state), done)
                if metrics is not None:
                    metrics(done, found)
            if checkpoints is not None and (done % config.checkpoint_every == 0 or done == last):
                if not _finite(training.params(state)):
                    raise NonFiniteLoss(f"parameters after step {step} are not finite; lower the learning rate")
                checkpoints.save(state, done)
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
    return _made(nnx.eval_shape(lambda: create(model, config.seed)), config)


def _made(model: nnx.Module, config: TrainConfig) -> Training:
    apply, _ = split(model)

    def loss(params: LMParams, batch: Batch) -> jax.Array:
        if config.precision == "bfloat16":
            params = in_bfloat16(params)
        inputs = (batch.tokens,) if batch.starts is None else (batch.tokens, batch.starts)
        return cross_entropy(apply(params, *inputs), batch.targets)[0]

    optimizer = make_optimizer(config, matrix_axes(model))
    shares: dict[str, Any] = {"accumulate": config.accumulate, "weigh": _targets}
    if config.devices == "pmap":
        return pmap_training(loss, optimizer, **shares)
    if config.devices == "sharded":
        return sharded_training(loss, optimizer, Mesh(np.array(jax.devices()), ("data",)), **shares)
    return local_training(loss, optimizer, **shares)


@jax.jit
def _finite(params: LMParams) -> jax.Array:
    return jnp.all(jnp.stack([jnp.isfinite(x).all() for x in jax.tree.leaves(params)]))


def _targets(batch: Batch) -> jax.Array:
    """How much a part of a batch counts."""
    return jnp.sum(batch.targets != IGNORE).astype(jnp.float32)


def in_bfloat16(params: LMParams) -> LMParams:
    """Parameters with their matrices in bfloat16; what memories start from, gates, norms and convolutions stay."""

    def cast(path: Any, x: jax.Array) -> jax.Array:
        names = {str(getattr(key, "key", getattr(key, "name", key))) for key in path}
        return x if names & _FULL else x.astype(jnp.bfloat16)

    return jax.tree_util.tree_map_with_path(cast, params)


def held_out(model: Model, batches: Iterable[Batch], *, name: str = "held_out_loss") -> Evaluate:
    """An evaluation: mean loss, in nats per token, of batches that the model does not learn from."""
    kept = list(batches)
    made = nnx.eval_shape(lambda: create(model, 0)) if isinstance(model, LMConfig) else model
    apply = split(made)[0]

    @jax.jit
    def of(params: LMParams, batch: Batch) -> tuple[jax.Array, jax.Array]:
        inputs = (batch.tokens,) if batch.starts is None else (batch.tokens, batch.starts)
        return cross_entropy(apply(params, *inputs), batch.targets)[0], _targets(batch)

    def evaluate(params: LMParams, step: int) -> Mapping[str, float]:
        found = [tuple(float(x) for x in of(params, batch)) for batch in kept]
        return {name: sum(loss * count for loss, count in found) / sum(count for _, count in found)}

    return evaluate


def _described(model: nnx.Module) -> Mapping[str, Any]:
    """What a module is, for its checkpoints: a language model's configuration, else its class and its parameters' shapes."""
    if isinstance(model, LanguageModel):
        described: Mapping[str, Any] = json.loads(model.config.to_json())
        return described
    leaves = jax.tree_util.tree_leaves_with_path(split(model)[1])
    shapes = {jax.tree_util.keystr(path): list(leaf.shape) for path, leaf in leaves}
    return {"module": f"{type(model).__module__}.{type(model).__qualname__}", "parameters": shapes}


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
