"""Multi-query associative recall (ATLAS figure 7, Zoology's task).

One-layer models read N key–value pairs, then are asked for all of them in random order.

Keys and values are single tokens and stand side by side, so the layer's short convolution has to bring a pair together;
everything else the memory must do. All seeds of a model train together.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from atlas_jax.experiments._report import Options, Report, run_command
from atlas_jax.memory import Features, MemoryRule, presets
from atlas_jax.model.lm import IGNORE, GateStart, LMConfig, LMParams, create, cross_entropy, split
from atlas_jax.model.lm.data import Batch
from atlas_jax.typing import Array, Float

_DEGREE_1 = Features()
_DEGREE_2 = Features(kind="polynomial", degree=2)
_KEYS = 16
_VALUES = 8
_VALUE_DIM = 8
VOCAB = _KEYS + _VALUES
RATE = 1e-2


@dataclass(frozen=True)
class Contender:
    """A family of models.

    Attributes:
      widths: key components to try.
    """

    name: str
    widths: tuple[int, ...]
    features: Features = _DEGREE_1
    window: int = 1

    def rule(self, width: int) -> MemoryRule:
        """The memory of one layer."""
        return presets.deltanet(
            width,
            _VALUE_DIM,
            features=self.features,
            window=self.window,
            retention="decay",
            remat=False,
        )

    def model(self, width: int) -> LMConfig:
        """A one-layer model."""
        # a unit key has 2.5 times the square of its length in degree 2, and a window counts every token c times
        eta_max = 0.5 if self.features is _DEGREE_1 else 0.2
        return LMConfig(
            vocab=VOCAB,
            embed=48,
            ff=32,
            heads=1,
            head_dim=8,
            pattern="M",
            window=8,
            rule=self.rule(width),
            gate_rank=4,
            gate_start=GateStart(eta_max=eta_max, eta=0.5 if self.window == 1 else 0.1, alpha=0.999),
            # with one matrix for embedding and head, one of two seeds was still at chance after 600 steps
            tied_head=False,
        )

    def state(self, width: int) -> int:
        """Numbers in the memory's matrix."""
        return self.features.out_dim(width) * _VALUE_DIM


# 8 features of degree 1 hold as many keys as there are pairs; 6 and 10 are also what degree 2 makes of 2 and 3
CONTENDERS = (
    Contender("delta c=1", (3, 6, 10)),
    Contender("omega c=8", (3, 6, 10), window=8),
    Contender("delta c=1, degree 2", (2, 3), features=_DEGREE_2),
    Contender("omega c=8, degree 2", (2, 3), features=_DEGREE_2, window=8),
)


def batch_of(key: Array, rows: int, pairs: int) -> Batch:
    """Rows of the task: k v k v … then all keys in another order; the target of each is its value."""
    key_order, value_choice, query_order = jax.random.split(key, 3)
    keys = jnp.argsort(jax.random.uniform(key_order, (rows, _KEYS)), axis=1)[:, :pairs]
    values = _KEYS + jax.random.randint(value_choice, (rows, pairs), 0, _VALUES)
    order = jnp.argsort(jax.random.uniform(query_order, (rows, pairs)), axis=1)
    told = jnp.stack([keys, values], axis=2).reshape(rows, 2 * pairs)
    asked, answers = (jnp.take_along_axis(x, order, axis=1) for x in (keys, values))
    silent = jnp.full((rows, 2 * pairs), IGNORE)
    return Batch(jnp.concatenate([told, asked], axis=1), jnp.concatenate([silent, answers], axis=1))


def train_all(config: LMConfig, *, seeds: int, pairs: int, steps: int, rows: int) -> Float[Array, " seeds"]:
    """Accuracy on fresh rows of models trained from every seed."""
    apply, _ = split(create(config, 0))
    params = [split(create(config, seed))[1] for seed in range(seeds)]
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *params)
    run = functools.partial(_train_one, apply, pairs, steps, rows)
    keys = jax.vmap(jax.random.key)(jnp.arange(seeds))
    accuracy: jax.Array = jax.jit(jax.vmap(run))(stacked, keys)
    return accuracy


def _train_one(apply: object, pairs: int, steps: int, rows: int, params: LMParams, key: jax.Array) -> jax.Array:
    assert callable(apply)

    def losses(params: LMParams, batch: Batch) -> tuple[jax.Array, jax.Array]:
        return cross_entropy(apply(params, batch.tokens), batch.targets)

    def schedule(step: Any) -> jax.Array:
        warm = jnp.minimum(1.0, (step + 1) / (0.05 * steps + 1))
        return RATE * warm * (0.55 + 0.45 * jnp.cos(jnp.pi * step / steps))

    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(schedule, b2=0.99))

    def step(carry: Any, index: jax.Array) -> tuple[Any, None]:
        params, state = carry
        batch = batch_of(jax.random.fold_in(key, index), rows, pairs)
        gradient = jax.grad(lambda p: losses(p, batch)[0])(params)
        updates, state = optimizer.update(gradient, state, params)
        return (optax.apply_updates(params, updates), state), None

    (params, _), _ = jax.lax.scan(step, (params, optimizer.init(params)), jnp.arange(steps))
    return losses(params, batch_of(jax.random.fold_in(key, steps + 1), 512, pairs))[1]


def experiment(options: Options) -> Sequence[Report]:
    """Accuracy against the size of the state, for each contender."""
    pairs, steps, rows = (4, 20, 8) if options.quick else (8, 1200, 32)
    report = Report(
        "mqar", f"Recall of {pairs} pairs (MQAR)", "numbers in the state", "accuracy on fresh rows", log_x=True
    )
    for contender in CONTENDERS[:1] if options.quick else CONTENDERS:
        for width in contender.widths[:1] if options.quick else contender.widths:
            accuracy = train_all(contender.model(width), seeds=options.seeds, pairs=pairs, steps=steps, rows=rows)
            report.add(contender.name, contender.state(width), np.asarray(accuracy))
            print(f"{contender.name}, d_k = {width}: {np.asarray(accuracy).round(3)}", flush=True)
    report.notes.append(
        f"Chance is 1/{_VALUES}. One layer, width 48, values of {_VALUE_DIM} components, b = 1, {steps} steps of "
        f"{rows} rows, learning rate {RATE:g}. The state counts the memory's matrix; a "
        "window of c also keeps c − 1 keys and values."
    )
    return [report]


if __name__ == "__main__":
    run_command("mqar", experiment, seeds=3)
