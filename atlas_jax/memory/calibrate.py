"""Fits a memory to a model in under a minute, without training: key map, ranking of layers, and gate.

The model reads a little ordinary text through its attention window. Means and principal components of the residual
stream give the key map; how often a token's nearest key among those that have left the window is followed by the same
token ranks the layers; and the gate is the logistic mixture weight that makes the text's next tokens most likely.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from atlas_jax.config import MAX_MEMORY_LAYERS, PAGE, MemoryConfig, ModelConfig
from atlas_jax.kernels.reduce import row_max, row_sum
from atlas_jax.memory import recall
from atlas_jax.memory.adapter import GATE_FEATURES, Adapter, make_adapter
from atlas_jax.memory.recall import WriteSettings
from atlas_jax.model.context import init_context, page_turn, turn_page
from atlas_jax.model.params import ModelParams
from atlas_jax.model.stages import Trunk
from atlas_jax.model.transformer import logits
from atlas_jax.model.window import WindowPlan

WINDOW = 4
"""Pages of the window the memory is calibrated for."""
_OUTLIER = 4.0
"""Tokens whose residual is this many times the median norm are attention sinks, not text."""

Progress = Callable[[str, float], None]


@dataclass(frozen=True)
class Calibration:
    """What was found.

    Attributes:
      config: the memory with its layers ranked.
      hit_rate: of each ranked layer, how often the nearest key predicts the next token.
      loss_window, loss_memory: mean nats of the text past the window, without and with the memory.
    """

    config: MemoryConfig
    adapter: Adapter
    hit_rate: tuple[float, ...]
    loss_window: float
    loss_memory: float


def candidate_layers(layers: int) -> tuple[int, ...]:
    """Layers worth trying: the last ones, whose state says what comes next."""
    return tuple(range(max(0, layers - MAX_MEMORY_LAYERS), layers))


def calibrate(
    model: ModelConfig,
    params: ModelParams,
    texts: Sequence[Sequence[int]],
    config: MemoryConfig | None = None,
    progress: Progress = lambda stage, share: None,
) -> Calibration:
    """Fits a memory to a model.

    Args:
      texts: token sequences, each well longer than the window (4 pages); about 12 000 tokens in all are enough.
      config: sizes of the memory; its `layers` are the candidates. Default: `candidate_layers`.
      progress: called with a stage's name and the share of it that is done.

    Raises:
      ValueError: no text reaches past the window.
    """
    config = config or MemoryConfig(layers=candidate_layers(len(model.layers)))
    pages = [len(text) // PAGE for text in texts]
    usable = [text[: count * PAGE + 1] for text, count in zip(texts, pages, strict=True) if count > WINDOW]
    usable = [text if len(text) % PAGE == 1 else [*text, text[0]] for text in usable]
    if not usable:
        raise ValueError(f"calibration needs a text of more than {WINDOW * PAGE} tokens")
    readings = _read(model, params, config, usable, progress)
    mean, projection = _key_maps(readings, config.components)
    order, hit_rate = _rank(readings, mean, projection)
    config = dataclasses.replace(config, layers=tuple(config.layers[i] for i in order))
    mean, projection = mean[order], projection[order]
    readings = [dataclasses.replace(r, tapped=r.tapped[order]) for r in readings]
    adapter = make_adapter(config, model.vocab, mean, projection, np.zeros(GATE_FEATURES, np.float32))
    features, p_model, p_memory = _collect(model, params, config, adapter, readings, progress)
    gate = _fit_gate(features, p_model, p_memory)
    share = 1 / (1 + np.exp(-features @ gate))
    adapter = dataclasses.replace(adapter, gate=jnp.asarray(gate, jnp.float32))
    return Calibration(
        config=config,
        adapter=adapter,
        hit_rate=tuple(float(hit_rate[i]) for i in order),
        loss_window=float(-np.log(p_model).mean()),
        loss_memory=float(-np.log((1 - share) * p_model + share * p_memory).mean()),
    )


@dataclass(frozen=True)
class _Reading:
    """One text as the model read it: tokens [n + 1], tapped states float16 [A, n, E], last states float32 [n, E]."""

    tokens: np.ndarray
    tapped: np.ndarray
    hidden: np.ndarray


def _read(
    model: ModelConfig,
    params: ModelParams,
    config: MemoryConfig,
    texts: Sequence[Sequence[int]],
    progress: Progress,
) -> list[_Reading]:
    plan = WindowPlan(window=WINDOW)

    trunk = Trunk(model)
    count = np.full((1,), PAGE, np.int32)
    turn = jax.jit(turn_page, donate_argnums=0)
    total = sum(len(text) // PAGE for text in texts)
    done = 0
    readings = []
    for text in texts:
        tokens = np.asarray(text, np.int32)
        context = init_context(model, 1, WINDOW, "int8")
        hidden, tapped = [], []
        for page in range(len(tokens) // PAGE):
            context = turn(context, page_turn(0, plan.turn(page)))
            part = tokens[None, page * PAGE : (page + 1) * PAGE]
            context, _, states = trunk((1, WINDOW, PAGE), params, context, part, count)
            hidden.append(np.asarray(states[-1][0]))
            tapped.append(np.stack([np.asarray(states[layer][0], np.float16) for layer in config.layers]))
            done += 1
            progress("reading", done / total)
        readings.append(_Reading(tokens, np.concatenate(tapped, axis=1), np.concatenate(hidden)))
    return readings


def _key_maps(readings: list[_Reading], components: int) -> tuple[np.ndarray, np.ndarray]:
    """Per layer: the mean, and the leading components over the square root of their standard deviation.

    Between none (the largest directions drown the rest) and full whitening (the smallest are noise).
    """
    means, projections = [], []
    for layer in range(readings[0].tapped.shape[0]):
        states = np.concatenate([r.tapped[layer] for r in readings]).astype(np.float32)
        norm = np.linalg.norm(states, axis=1)
        states = states[norm < _OUTLIER * np.median(norm)]
        mean = states.mean(axis=0)
        centred = states - mean
        variance, basis = np.linalg.eigh(centred.T @ centred / len(centred))
        keep = np.argsort(variance)[::-1][:components]
        projection = np.zeros((mean.size, components), np.float32)
        projection[:, : keep.size] = basis[:, keep] / np.maximum(variance[keep], 1e-12) ** 0.25
        means.append(mean)
        projections.append(projection)
    return np.stack(means), np.stack(projections)


def _rank(readings: list[_Reading], mean: np.ndarray, projection: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Layers by how often the nearest key that has left the window is followed by the token that follows here."""

    @jax.jit
    def nearest(z: jax.Array) -> jax.Array:
        key = z * jax.lax.rsqrt(jnp.maximum(row_sum(z * z), 1e-12))[:, None]
        page = jnp.arange(z.shape[0]) // PAGE
        left = page[None, :] + WINDOW <= page[:, None]
        return jnp.argmax(jnp.where(left, key @ key.T, -2.0), axis=1)

    rates = []
    for layer in range(mean.shape[0]):
        hits = []
        for reading in readings:
            z = (reading.tapped[layer].astype(np.float32) - mean[layer]) @ projection[layer]
            found = np.asarray(nearest(jnp.asarray(z)))
            following = reading.tokens[1:]
            hits.append((following[found] == following)[WINDOW * PAGE :])
        rates.append(float(np.concatenate(hits).mean()))
    rate = np.asarray(rates)
    return np.argsort(-rate, kind="stable"), rate


def _collect(
    model: ModelConfig,
    params: ModelParams,
    config: MemoryConfig,
    adapter: Adapter,
    readings: list[_Reading],
    progress: Progress,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Past the window: the gate's features, and the probability model and memory give the token that came."""
    settings = recall.init_settings(1)

    @functools.partial(jax.jit, donate_argnums=1)
    def observe(
        adapter: Adapter, state: recall.MemoryState, tapped: jax.Array, tokens: jax.Array, positions: jax.Array
    ) -> tuple[recall.MemoryState, jax.Array]:
        streams = tuple(t[None].astype(jnp.float32) for t in tapped)
        key = recall.keys(adapter, settings, streams)
        valid = jnp.ones(tokens.shape, bool)
        return recall.remember(state, key, tokens, positions, valid), key

    @jax.jit
    def judge(
        params: ModelParams,
        adapter: Adapter,
        state: recall.MemoryState,
        key: jax.Array,
        hidden: jax.Array,
        target: jax.Array,
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        scores = logits(model, params, hidden)
        shifted = scores - row_max(scores)[:, None]
        weight = jnp.exp(shifted)
        mass = row_sum(weight)
        entropy = jnp.log(mass) - row_sum(weight * shifted) / mass
        found = recall.scores(adapter, state, settings, key)[0]
        pick = functools.partial(jnp.take_along_axis, indices=target[:, None], axis=1)
        p_memory = pick(recall.memory_distribution(found))[:, 0]
        return recall.gate_features(found, entropy), pick(weight)[:, 0] / mass, p_memory

    absorb = jax.jit(functools.partial(recall.write, config), donate_argnums=1)
    ends = dataclasses.replace(params, layers=())
    plan = WindowPlan(window=WINDOW)
    total, done = sum(len(reading.tokens) // PAGE for reading in readings), 0
    samples = []
    for reading in readings:
        state = recall.init_state(config, 1, model.vocab)
        for page in range(len(reading.tokens) // PAGE):
            part = slice(page * PAGE, (page + 1) * PAGE)
            positions = np.arange(page * PAGE, (page + 1) * PAGE, dtype=np.int32)[None]
            left = plan.turn(page).absorb_end
            if left is not None:
                state = absorb(adapter, state, np.int32(0), _exact_write(left, config.max_omega_window))
            state, key = observe(adapter, state, reading.tapped[:, part], reading.tokens[None, part], positions)
            if left is not None:
                target = reading.tokens[page * PAGE + 1 : (page + 1) * PAGE + 1]
                judged = judge(ends, adapter, state, key, reading.hidden[part], target)
                samples.append([np.asarray(x, np.float64) for x in judged])
            done += 1
            progress("fitting the gate", done / total)
    features, p_model, p_memory = (np.concatenate(parts) for parts in zip(*samples, strict=True))
    return features, np.maximum(p_model, 1e-30), p_memory


def _exact_write(end: int, window: int) -> WriteSettings:
    numbers: dict[str, Any] = {
        "end": np.int32(end),
        "window": np.int32(window),
        "optimizer": np.int32(recall.EXACT),
        "step": np.float32(1),
        "degree": np.int32(1),
    }
    return WriteSettings(**numbers)


def _fit_gate(features: np.ndarray, p_model: np.ndarray, p_memory: np.ndarray) -> np.ndarray:
    """Maximum-likelihood weights of g = σ(w·f) in (1 − g)·p_model + g·p_memory, a little regularised, by Adam."""
    scale = np.maximum(features.std(axis=0), 1e-6)
    scale[0] = 1.0
    inputs = features / scale
    weight = np.zeros(features.shape[1])
    weight[0] = -2.0
    first, second = np.zeros_like(weight), np.zeros_like(weight)
    for step in range(1, 601):
        g = 1 / (1 + np.exp(-inputs @ weight))
        mixture = (1 - g) * p_model + g * p_memory
        slope = -((p_memory - p_model) / mixture * g * (1 - g)) @ inputs / len(inputs) + 1e-4 * weight
        first = 0.9 * first + 0.1 * slope
        second = 0.99 * second + 0.01 * slope**2
        rate = 0.05 * min(1.0, (601 - step) / 200)
        weight -= rate * (first / (1 - 0.9**step)) / (np.sqrt(second / (1 - 0.99**step)) + 1e-9)
    return (weight / scale).astype(np.float32)
