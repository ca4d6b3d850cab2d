"""Learnability (ATLAS figure 6): a deep memory is trained online on the outputs of different kinds of functions.

Inputs x₁ … x_T are random; each target is o_t = f(x₁ … x_t) for a random f. A two-layer MLP memory sees one pair at a
time, each once, and takes an AdamW step on ‖M(x_t) − o_t‖². What is reported is the error before each step, relative to
‖o_t‖². Only functions of x_t alone can be learned in full: a memory maps one key to one value.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from atlas_jax.experiments._report import Options, Report, run_command
from atlas_jax.model.lm import attend, window_attend
from atlas_jax.typing import Array, Float

Task = Callable[[jax.Array, jax.Array], tuple[jax.Array, jax.Array]]
"""(key, sequence [T, d]) → what the memory sees, what it should say."""


def low_rank(key: Array, x: Float[Array, "T d"]) -> tuple[jax.Array, jax.Array]:
    """o = A B x of rank d/8."""
    first, second = jax.random.split(key)
    dim = x.shape[1]
    inner = x @ jax.random.normal(first, (dim, max(1, dim // 8))) / dim**0.5
    return x, inner @ jax.random.normal(second, (max(1, dim // 8), dim))


def mlp(key: Array, x: Float[Array, "T d"]) -> tuple[jax.Array, jax.Array]:
    """o = W₁ gelu(W₂ x)."""
    return x, _random_mlp(key, x)


def attention_then_mlp(key: Array, x: Float[Array, "T d"]) -> tuple[jax.Array, jax.Array]:
    """o = MLP(attention(x)_t): depends on all x before."""
    first, second = jax.random.split(key)
    return x, _random_mlp(second, _random_attention(first, x, None))


def attention_outputs(key: Array, x: Float[Array, "T d"]) -> tuple[jax.Array, jax.Array]:
    """The memory sees attention's outputs and has to say the MLP of them."""
    first, second = jax.random.split(key)
    mixed = _random_attention(first, x, None)
    return mixed, _random_mlp(second, mixed)


def window_then_mlp(key: Array, x: Float[Array, "T d"]) -> tuple[jax.Array, jax.Array]:
    """o = MLP(attention over a window): what the memory cannot see never averages out."""
    first, second = jax.random.split(key)
    return x, _random_mlp(second, _random_attention(first, x, 32))


TASKS: dict[str, Task] = {
    "low rank": low_rank,
    "MLP": mlp,
    "attention outputs → MLP": attention_outputs,
    "attention + MLP": attention_then_mlp,
    "window attention + MLP": window_then_mlp,
}


def _random_mlp(key: jax.Array, x: jax.Array) -> jax.Array:
    first, second = jax.random.split(key)
    dim = x.shape[1]
    x = x / jnp.sqrt(jnp.mean(x * x, axis=1, keepdims=True) + 1e-6)
    hidden = jax.nn.gelu(x @ jax.random.normal(first, (dim, dim)) / dim**0.5)
    return hidden @ jax.random.normal(second, (dim, dim)) / dim**0.5


def _random_attention(key: jax.Array, x: jax.Array, window: int | None) -> jax.Array:
    dim = x.shape[1]
    q, k, v = ((x @ jax.random.normal(part, (dim, dim)) / dim**0.5)[None, :, None] for part in jax.random.split(key, 3))
    if window is not None:
        return window_attend(q, k, v, window)[0, :, 0]
    steps = jnp.arange(len(x))
    rows = [attend(q[:, i : i + 512], k, v, (steps[None, i : i + 512, None] >= steps)) for i in range(0, len(x), 512)]
    return jnp.concatenate(rows, axis=1)[0, :, 0]


@functools.partial(jax.jit, static_argnums=(0, 2, 3, 4))
def learn(task: Task, key: Array, tokens: int, dim: int, width: int) -> Float[Array, T]:
    """Relative error before each step of a memory of `width`·d hidden units."""
    x_key, task_key, first, second = jax.random.split(key, 4)
    inputs, targets = task(task_key, jax.random.normal(x_key, (tokens, dim)))
    weights = (
        jax.random.normal(first, (dim, width * dim)) / dim**0.5,
        jax.random.normal(second, (width * dim, dim)) / (width * dim) ** 0.5,
    )
    optimizer = optax.adamw(5e-4)

    def error(weights: tuple[jax.Array, jax.Array], x: jax.Array, o: jax.Array) -> jax.Array:
        w2, w1 = weights
        return jnp.sum((jax.nn.gelu(x @ w2) @ w1 - o) ** 2)

    def step(carry: Any, pair: tuple[jax.Array, jax.Array]) -> tuple[Any, jax.Array]:
        weights, state = carry
        loss, gradient = jax.value_and_grad(error)(weights, *pair)
        updates, state = optimizer.update(gradient, state, weights)
        return (optax.apply_updates(weights, updates), state), loss / jnp.sum(pair[1] ** 2)

    _, errors = jax.lax.scan(step, (weights, optimizer.init(weights)), (inputs, targets))
    return errors


def experiment(options: Options) -> Sequence[Report]:
    """Learning curves of every task."""
    dim, tokens = 32, 2000 if options.quick else 10_000
    report = Report("learnability", "Learnability", "steps", "relative error", log_y=True)
    blocks = 4 if options.quick else 10
    widths = (1,) if options.quick else (1, 4)
    tasks = ("low rank", "window attention + MLP") if options.quick else tuple(TASKS)
    for width in widths:
        for name in tasks:
            task = TASKS[name]
            curves = [np.asarray(learn(task, jax.random.key(s), tokens, dim, width)) for s in range(options.seeds)]
            means = np.stack(curves).reshape(options.seeds, blocks, -1).mean(axis=2)
            for block in range(blocks):
                report.add(f"{name}, {width}×", (block + 1) * tokens // blocks, means[:, block])
    report.notes.append(f"d = {dim}, one pair per step, AdamW 5e-4; means over the steps since the row before.")
    return [report]


if __name__ == "__main__":
    run_command("learnability", experiment, seeds=5)
