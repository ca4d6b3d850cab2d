"""The runs, each with a file of its own in the end; one that is interrupted goes on from its checkpoint."""

from __future__ import annotations

import functools
import itertools
import json
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from atlas_jax.experiments import mqar
from atlas_jax.experiments.reproduction import arms, texts
from atlas_jax.experiments.reproduction.arms import Size
from atlas_jax.model.lm import IGNORE, Batch, LMConfig, LMParams, create, init_params, init_state, split
from atlas_jax.model.lm.training import TrainConfig, train

RATE = 5e-3
"""Learning rate of AdamW, one for all models."""
MQAR_SEEDS = 8
FACTORS = (1, 2, 4, 8, 16)
"""Lengths that needles are looked for in, in trained lengths."""
_ROWS = 128


class TimeUp(Exception):
    """The time that was given is used up; the rest is for the next call."""


@dataclass(frozen=True)
class Job:
    """One run.

    Attributes:
      part: "text", "ablation", "needle" or "mqar".
      seed: None where a run has all seeds.
    """

    part: str
    arm: str
    seed: int | None

    @property
    def name(self) -> str:
        """Of its file."""
        words = (self.part, self.arm.replace(" ", "-"), "all" if self.seed is None else str(self.seed))
        return "_".join(words)


def jobs(parts: list[str], seeds: int) -> Iterator[Job]:
    """All runs; what compiles alike stands together."""
    table = {"text": arms.MODELS, "ablation": arms.ABLATIONS, "needle": arms.NEEDLES}
    for part in parts:
        if part == "mqar":
            yield from (Job(part, arm, None) for arm in ("Gated DeltaNet", "Titans", "OmegaNet", "ATLAS"))
        else:
            yield from (Job(part, arm, seed) for arm in table[part] for seed in range(seeds))


def run(size: Size, job: Job, folder: Path, read_from: Path, deadline: float) -> Mapping[str, Any]:
    """Trains and measures, or takes what was measured.

    Raises:
      TimeUp: `time.monotonic()` has passed the deadline.
    """
    file = folder / f"{job.name}.json"
    if file.exists():
        found: Mapping[str, Any] = json.loads(file.read_text())
        return found
    if time.monotonic() > deadline:
        raise TimeUp
    measured = _mqar(size, job) if job.part == "mqar" else _trained(size, job, folder, read_from, deadline)
    folder.mkdir(parents=True, exist_ok=True)
    unfinished = file.with_suffix(".part")
    unfinished.write_text(json.dumps(measured, indent=1))
    unfinished.replace(file)
    return measured


def _trained(size: Size, job: Job, folder: Path, read_from: Path, deadline: float) -> Mapping[str, Any]:
    assert job.seed is not None
    needle = job.part == "needle"
    model = arms.matched(size, (arms.ABLATIONS if job.part == "ablation" else arms.MODELS)[job.arm])
    steps = size.needle_steps if needle else size.steps
    learned, held_out = (np.zeros(0), np.zeros(0)) if needle else texts.read(read_from, 4 * size.length)
    seconds: list[float] = []
    last = time.perf_counter()

    def source(step: int) -> Batch:
        assert job.seed is not None
        if needle:
            return texts.needles((job.seed, step), 2 * size.batch, size.needle_length)
        start = np.random.default_rng((job.seed, step)).integers(0, len(learned) - size.length, size.batch)
        cut = learned[start[:, None] + np.arange(size.length + 1)]
        return Batch(cut[:, :-1], cut[:, 1:])

    def watch(step: int, values: Mapping[str, float]) -> None:
        nonlocal last
        now = time.perf_counter()
        seconds.append(now - last)
        last = now
        if time.monotonic() > deadline and step < steps:
            raise TimeUp

    config = TrainConfig(
        steps=steps,
        optimizer="adamw",
        learning_rate=RATE,
        warmup=min(100, steps // 10),
        checkpoint_every=min(250, steps // 4),
    )
    trained = train(
        model,
        config,
        source,
        directory=folder / "checkpoints" / job.name,
        params=init_params(model, job.seed),
        metrics=watch,
    )
    shared = {"parameters": arms.count(model), "ff": model.ff}
    if needle:
        return shared | {"accuracy": _needle_accuracy(size, model, trained.params)}
    tokens = size.batch * size.length
    return shared | {
        "tokens": tokens * steps,
        "tokens_per_second": tokens / float(np.median(seconds)) if seconds else None,
        "state_bytes": {str(n): state_bytes(model, n) for n in (size.length, 16 * size.length)},
        "loss_by_position": _loss_by_position(size, model, trained.params, held_out),
    }


@functools.lru_cache(maxsize=2)
def _scores(model: LMConfig) -> Callable[[LMParams, Batch], tuple[jax.Array, jax.Array]]:
    apply = split(create(model, 0))[0]

    @jax.jit
    def of(params: LMParams, batch: Batch) -> tuple[jax.Array, jax.Array]:
        scores = jax.nn.log_softmax(apply(params, batch.tokens), axis=-1)
        nats = -jnp.take_along_axis(scores, jnp.maximum(batch.targets, 0)[..., None], axis=-1)[..., 0]
        return nats, scores.argmax(axis=-1) == batch.targets

    return of


def _loss_by_position(size: Size, model: LMConfig, params: LMParams, held_out: np.ndarray) -> dict[str, float]:
    """Mean nats per byte by place in a window of four trained lengths, the first ones by halves of the trained length."""
    length = 4 * size.length
    cut = texts.windows(held_out, length, 64)
    nats = np.concatenate(
        [np.asarray(_scores(model)(params, Batch(rows[:, :-1], rows[:, 1:]))[0]) for rows in np.split(cut, 8)]
    )
    borders = [0, size.length // 4, size.length // 2, size.length, 2 * size.length, 4 * size.length]
    return {f"{a}–{b}": float(nats[:, a:b].mean()) for a, b in itertools.pairwise(borders)}


def _needle_accuracy(size: Size, model: LMConfig, params: LMParams) -> dict[str, float]:
    found = {}
    for factor in FACTORS:
        batch = texts.needles((1 << 20, factor), _ROWS, factor * size.needle_length)
        right = np.asarray(_scores(model)(params, batch)[1])
        found[str(factor)] = float(right[np.asarray(batch.targets) != IGNORE].mean())
    return found


def state_bytes(model: LMConfig, context: int) -> int:
    """What one text that has so many tokens keeps while it is read on, float32."""
    state = jax.eval_shape(lambda: init_state(model, init_params(model, 0), 1, context=context))
    return sum(int(x.size) * x.dtype.itemsize for x in jax.tree.leaves(state.layers))


def _mqar(size: Size, job: Job) -> Mapping[str, Any]:
    """All seeds at once, one layer each."""
    rules = {
        "Gated DeltaNet": lambda: arms.gated_deltanet(size),
        "Titans": lambda: arms.titans(size),
        "OmegaNet": lambda: arms.omeganet(size),
        "ATLAS": lambda: arms.atlas(size),
    }
    one = arms.base(size, "M", rules[job.arm]())
    config = one.replace(vocab=mqar.VOCAB, pattern="M", tied_head=False, memory_heads=1)
    accuracy = mqar.train_all(config, seeds=MQAR_SEEDS, pairs=size.pairs, steps=size.mqar_steps, rows=16)
    return {"parameters": arms.count(config), "accuracy": [float(x) for x in np.asarray(accuracy)]}
