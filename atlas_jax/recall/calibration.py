"""Fits a memory to a model in minutes, without training: key map, ranking of layers, and gate.

The model reads a little ordinary text through its attention window. Means and principal components of the residual
stream give the key map. How often a token's nearest key among those that have left the window is followed by the same
token ranks the layers, on that text and on a probe full of facts. The gate is the logistic mixture weight that makes the
text's next tokens most likely.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from atlas_jax.config import MAX_MEMORY_LAYERS, PAGE, ConfigError, MemoryConfig, ModelConfig
from atlas_jax.model.page_schedule import PageSchedule
from atlas_jax.model.params import ModelParams
from atlas_jax.progress import Progress
from atlas_jax.recall import recall_memory, recall_state
from atlas_jax.recall.adapter import CONTEXT_LENGTH, GATE_FEATURES, Adapter, make_adapter, token_weights, value_codes
from atlas_jax.recall.collect_states import WINDOW, Reading, read_texts, whole_pages
from atlas_jax.recall.conversation import Conversation
from atlas_jax.recall.kept_weights import LEAST_PAGES, FullReader, kept_weights, pages_read
from atlas_jax.recall.probe import Probe
from atlas_jax.recall.recall_state import WriteSettings
from atlas_jax.sharding import ONE_DEVICE, MeshLayout

DEFAULT_DIM: int = MemoryConfig.components
"""Dimension of keys where none is asked for; a model with smaller states has the rest zero."""
_FIRST_CANDIDATE = 0.4
"""Depth from which a layer's state is tried as a key."""
_LEAST = 1e-30
"""Least probability: both of a model whose weights are noise and of its memory may be 0, and a slope has no such quotient."""
_FACT = 5
"""Tokens of a fact. Where nearly all tokens are found, middle layers lead late ones by little, and by much in whole facts."""
_ANSWER_SHARE = 0.1
"""What all answers count for in the gate's fit, where all running text counts one. With 0.02, 0.1, 0.3 and 1 a gate of
SmolLM2-135M gained 10.6, 8.9, 6.4 and 1.9 mnat a token of 45 568 tokens of text, and 1.01, 1.15, 1.20 and 1.26 nats a token
of a fact in a conversation it was not fitted to."""
_SHRINK = 1e-4
"""Weight of the squares of the gate's weights."""
_OUTLIER = 4.0
"""Tokens whose residual is this many times the median norm are attention sinks, not text."""


_LARGE = 1024
"""Size of states from which only the components that are kept are computed: all 4096 would take half a minute a layer."""


@dataclass(frozen=True)
class Effort:
    """How much a model reads to have a memory fitted to it.

    Attributes:
      pages: of each text.
      divided: texts that say how the layers share kept pairs; of none, they share them equally.
      conversations: that the gate is fitted to.
    """

    pages: int
    divided: int
    conversations: int

    def pages_read(self, texts: Sequence[int], probe: int, conversations: Sequence[int]) -> int:
        """Pages that are read in all, where the parts have so many."""
        texts = [min(pages, self.pages) for pages in texts]
        return (
            sum(map(pages_read, texts[: self.divided])) + sum(texts) + probe + sum(conversations[: self.conversations])
        )


EFFORTS = (Effort(32, 2, 2), Effort(LEAST_PAGES, 2, 2), Effort(LEAST_PAGES, 1, 1), Effort(10, 0, 1), Effort(6, 0, 1))
"""From what is worth reading to the least that a memory can be fitted to. Texts of 10 pages have 768 tokens each past the
window; the probe, which ranks the layers, is always read whole."""


@dataclass(frozen=True)
class Calibration:
    """What was found.

    Attributes:
      config: the memory with its layers ranked.
      hit_rate: of each ranked layer, how often the nearest key predicts the next token of ordinary text.
      found_rate: how often a memory of that layer alone names the probe's next token.
      loss_window, loss_memory: mean nats of the text past the window, without and with the memory.
    """

    config: MemoryConfig
    adapter: Adapter
    hit_rate: tuple[float, ...]
    found_rate: tuple[float, ...]
    loss_window: float
    loss_memory: float


def candidates(model: ModelConfig, dim: int = DEFAULT_DIM) -> MemoryConfig:
    """The memory to be fitted to a model, its layers not ranked yet.

    Raises:
      ConfigError: `dim` is out of range, or larger than the model's states.
    """
    config = MemoryConfig.of_dim(dim, candidate_layers(len(model.layers)))
    if dim != DEFAULT_DIM and dim > model.embed:
        raise ConfigError(f"memory_dim must be at most {model.embed}, the size of this model's states, got {dim}")
    return config


def candidate_layers(layers: int) -> tuple[int, ...]:
    """Layers worth trying: spread over the later part of the model, the last one left out."""
    first, last = int(_FIRST_CANDIDATE * layers), max(layers - 2, 0)
    return tuple(
        sorted({round(first + (last - first) * i / (MAX_MEMORY_LAYERS - 1)) for i in range(MAX_MEMORY_LAYERS)})
    )


def calibrate(
    model: ModelConfig,
    params: ModelParams,
    texts: Sequence[Sequence[int]],
    probe: Probe,
    config: MemoryConfig | None = None,
    progress: Progress | None = None,
    mesh_layout: MeshLayout = ONE_DEVICE,
    markup: Collection[int] = (),
    conversations: Sequence[Conversation] = (),
    gate_texts: Sequence[Sequence[int]] = (),
    seconds: float | None = None,
) -> Calibration:
    """Fits a memory to a model.

    Args:
      texts: token sequences, each well longer than the window (4 pages); about 12 000 tokens in all are enough.
      probe: facts that left the window, asked for again; ranks the layers together with the texts.
      config: sizes of the memory; its `layers` are the candidates. Default: `candidates`.
      progress: called with a stage's name and the share of it that is done, and between the parts of all of them.
      mesh_layout: where the parameters lie.
      markup: tokens that say nothing of what is being talked of, as those that begin and end a message.
      conversations: answers to questions, to which the gate is fitted as well.
      gate_texts: further texts for the gate alone, which has more to learn from them than keys have.
      seconds: that reading may take: of `EFFORTS` the first is made that the model is fast enough for, the last in any case.
        None reads everything.

    Raises:
      ValueError: no text reaches past the window.
    """
    config, progress = config or candidates(model), progress or Progress()
    usable = [whole_pages(text) for text in texts if len(text) // PAGE > WINDOW]
    if not usable:
        raise ValueError(f"calibration needs a text of more than {WINDOW * PAGE} tokens")
    further = [whole_pages(text) for text in gate_texts if len(text) // PAGE > WINDOW]
    reader, divided = FullReader(model, params, mesh_layout), len(usable)
    if seconds is not None:
        effort = _affordable(seconds, reader.page_seconds(usable[0]), usable, probe, conversations)
        usable = [text[: effort.pages * PAGE + 1] for text in usable]
        divided, conversations = effort.divided, conversations[: effort.conversations]
    weights = kept_weights(reader, usable[:divided], progress)
    del reader
    config = dataclasses.replace(config, kept_weights=weights)
    asking = [probe.tokens, *(conversation.tokens for conversation in conversations)]
    read = [*usable, *map(whole_pages, asking), *further]
    readings = read_texts(model, params, config, read, progress, mesh_layout)
    texts_read, probe_read = readings[: len(usable)], readings[len(usable)]
    mean, projection = _key_maps(texts_read, config.components, progress)
    maps = [_StateMap(*numbers) for numbers in zip(mean, projection, strict=True)]
    weight = token_weights(model.vocab, [reading.tokens for reading in texts_read], markup)
    no_gate = np.zeros(GATE_FEATURES, np.float32), np.zeros(config.components + 1, np.float32)
    *contexts, probe_context = _contexts(
        make_adapter(config, model.vocab, mean, projection, weight, *no_gate), [*texts_read, probe_read]
    )
    hit_rate = _hit_rates(texts_read, contexts, maps, progress)
    found_rate = _found_rates(config, probe_read, probe_context, maps, np.asarray(probe.asked), progress)
    facts = found_rate**_FACT  # all of a fact's tokens must be right
    order = np.argsort(-(hit_rate / max(hit_rate.max(), 1e-9) + facts / max(facts.max(), 1e-9)), kind="stable")
    config = dataclasses.replace(config, layers=tuple(config.layers[i] for i in order))
    mean, projection = mean[order], projection[order]
    readings = [dataclasses.replace(r, tapped=r.tapped[order], exponent=r.exponent[order]) for r in readings]
    adapter = make_adapter(config, model.vocab, mean, projection, weight, *no_gate)
    asking_read, last = readings[len(usable) : -len(further) or None], len(readings) - len(further)
    text = _collect(config, adapter, [*readings[: len(usable)], *readings[last:]], progress)
    answered = [probe.asked, *(conversation.answered for conversation in conversations)]
    answers = [
        _collect(config, adapter, [reading], progress).at(positions)
        for positions, reading in zip(answered, asking_read, strict=True)
    ]
    count = sum(len(answer.position) for answer in answers)
    each = _ANSWER_SHARE * len(text.position) / max(count, 1)
    gate = _fit_gate(text.joined(*(dataclasses.replace(one, weight=each * one.weight) for one in answers)))
    share = 1 / (1 + np.exp(-text.features @ gate))
    adapter = dataclasses.replace(
        adapter,
        gate=jnp.asarray(gate[:GATE_FEATURES], jnp.float32),
        cue=jnp.asarray(gate[GATE_FEATURES:], jnp.float32),
    )
    return Calibration(
        config=config,
        adapter=adapter,
        hit_rate=tuple(float(hit_rate[i]) for i in order),
        found_rate=tuple(float(found_rate[i]) for i in order),
        loss_window=float(-np.log(text.p_model).mean()),
        loss_memory=float(-np.log((1 - share) * text.p_model + share * text.p_memory).mean()),
    )


def _affordable(
    seconds: float,
    page_seconds: float,
    texts: Sequence[Sequence[int]],
    probe: Probe,
    conversations: Sequence[Conversation],
) -> Effort:
    """The most that a model which takes `page_seconds` for a page can read in this time; the least where that is too much."""
    parts = (
        [len(text) // PAGE for text in texts],
        len(probe.tokens) // PAGE,
        [len(conversation.tokens) // PAGE for conversation in conversations],
    )
    fits = (effort for effort in EFFORTS if effort.pages_read(*parts) * page_seconds <= seconds)
    return next(fits, EFFORTS[-1])


def _key_maps(readings: list[Reading], components: int, progress: Progress) -> tuple[np.ndarray, np.ndarray]:
    """Per layer: the mean, and the leading components over their standard deviation: whitened.

    Dividing by the square root of the deviation instead found 0.75 of a fact's digits where this found 0.82, and closed as
    much of the gap on documents (five contexts, teacher-forced, keys of another form: a lead, not a law).
    """
    means, projections = [], []
    for layer in range(readings[0].tapped.shape[0]):
        states = np.concatenate([r.states(layer) for r in readings])
        norm = np.linalg.norm(states, axis=1)
        states = states[norm < _OUTLIER * np.median(norm)]
        mean = states.mean(axis=0)
        centred = states - mean
        variance, basis = _leading(centred.T @ centred / len(centred), components)
        keep = np.argsort(variance)[::-1][:components]
        projection = np.zeros((mean.size, components), np.float32)
        projection[:, : keep.size] = basis[:, keep] / np.sqrt(np.maximum(variance[keep], 1e-12))
        means.append(mean)
        projections.append(projection)
        progress.between()
    return np.stack(means), np.stack(projections)


def _leading(covariance: np.ndarray, components: int) -> tuple[np.ndarray, np.ndarray]:
    """Eigenvalues and vectors, at least the `components` largest."""
    if len(covariance) <= _LARGE:
        found: tuple[np.ndarray, np.ndarray] = np.linalg.eigh(covariance)
        return found
    from scipy.sparse.linalg import eigsh  # beside jax anyway; takes a while to import

    start = np.random.default_rng(0).standard_normal(len(covariance)).astype(covariance.dtype)
    values, vectors = eigsh(covariance, components, v0=start)  # type: ignore[no-untyped-call]
    return values, vectors


@dataclass(frozen=True)
class _StateMap:
    """What makes the half of a key that is a layer's state, as `recall_memory.keys` does, in NumPy."""

    mean: np.ndarray
    projection: np.ndarray

    def __call__(self, states: np.ndarray) -> np.ndarray:
        z = (states - self.mean) @ self.projection
        return np.asarray(z / np.maximum(np.linalg.norm(z, axis=1, keepdims=True), 1e-6))


def _contexts(adapter: Adapter, readings: list[Reading]) -> list[np.ndarray]:
    """The other half of the keys, the same whatever the layer: float32 [n, Z]."""
    make = jax.jit(recall_memory.contexts)
    used = jnp.ones(adapter.select.shape[2], bool)
    none = np.full(CONTEXT_LENGTH, -1, np.int32)
    return [np.asarray(make(adapter, np.concatenate([none, reading.tokens[:-1]]), used)) for reading in readings]


def _kernel(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """`recall_memory.kernel` of degree 2."""
    size = a.shape[1] // 2
    product: np.ndarray = (a[:, :size] @ b[:, :size].T) * (a[:, size:] @ b[:, size:].T)
    return product


def _hit_rates(
    readings: list[Reading], contexts: list[np.ndarray], maps: list[_StateMap], progress: Progress
) -> np.ndarray:
    """Per layer, how often the nearest key that has left the window is followed by the token that follows here."""
    rates = []
    for layer, state_map in enumerate(maps):
        hits = []
        for reading, context in zip(readings, contexts, strict=True):
            key, following = np.concatenate([state_map(reading.states(layer)), context], axis=1), reading.tokens[1:]
            for start in range(WINDOW * PAGE, len(key), PAGE):
                now = slice(start, start + PAGE)
                nearest = _kernel(key[now], key[: start - (WINDOW - 1) * PAGE]).argmax(axis=1)
                hits.append(following[nearest] == following[now])
        rates.append(float(np.concatenate(hits).mean()))
        progress.between()
    return np.asarray(rates)


def _found_rates(
    config: MemoryConfig,
    reading: Reading,
    context: np.ndarray,
    maps: list[_StateMap],
    asked: np.ndarray,
    progress: Progress,
) -> np.ndarray:
    """Per layer, how often a memory of degree 2, written as the text is read, names the token that follows `asked`.

    In the dual: M φ(k) = Σᵢ aᵢ φ(kᵢ)·φ(k), so no features are needed. A nearest key would not do: it finds 0.65 to 0.88 of
    these tokens in every layer, because it knows nothing of interference.
    """
    asked = asked[asked < len(reading.tokens) - 1]
    following = reading.tokens[1:]
    known, index = np.unique(following, return_inverse=True)
    codes = value_codes(len(known), config.code_dim) * np.float32(config.code_dim**-0.5)
    end = (int(asked[0]) // PAGE - WINDOW + 1) * PAGE
    rates = []
    for layer, state_map in enumerate(maps):
        key = np.concatenate([state_map(reading.states(layer)), context], axis=1)
        dual = np.zeros((end, config.code_dim), np.float32)
        for now in range(PAGE, end + 1, PAGE):
            part = slice(max(0, now - config.max_omega_window), now)
            kernel = _kernel(key[part], key[:now])
            residual = codes[index[part]] - config.correction * (kernel @ dual[:now])
            system = kernel[:, part] + config.ridge * np.eye(kernel.shape[0], dtype=np.float32)
            dual[part] += np.linalg.solve(system, residual)
        score = _kernel(key[asked], key[:end]) @ dual @ codes.T
        score[:, ~np.isin(known, following[:end])] = -np.inf
        rates.append(float((known[score.argmax(axis=1)] == following[asked]).mean()))
        progress.between()
    return np.asarray(rates)


@dataclass(frozen=True)
class _Samples:
    """What the gate is fitted to, a row for every token that came.

    Attributes:
      position: of the token before.
      features: `recall_memory.gate_features` and cues.
      p_model, p_memory: the probability they gave the token that came.
      weight: what a token counts for.
    """

    position: np.ndarray
    features: np.ndarray
    p_model: np.ndarray
    p_memory: np.ndarray
    weight: np.ndarray

    def at(self, positions: Sequence[int]) -> _Samples:
        """Those after some positions of one text."""
        chosen = np.isin(self.position, positions)
        return _Samples(*(getattr(self, field.name)[chosen] for field in dataclasses.fields(self)))

    def joined(self, *others: _Samples) -> _Samples:
        """These and others."""
        whole = (self, *others)
        return _Samples(*(np.concatenate([getattr(s, f.name) for s in whole]) for f in dataclasses.fields(self)))


def _collect(
    config: MemoryConfig,
    adapter: Adapter,
    readings: list[Reading],
    progress: Progress,
) -> _Samples:
    """What there is past the window of some texts.

    The memory's vocabulary is what the texts hold: of the other tokens it has nothing to say.
    """
    known = np.unique(np.concatenate([reading.tokens for reading in readings]))
    adapter = dataclasses.replace(
        adapter,
        codes=jax.tree.map(lambda table: table[known], adapter.codes),
        token_weight=adapter.token_weight[known],
    )
    settings = recall_state.init_settings(1)

    @functools.partial(jax.jit, donate_argnums=1)
    def observe(
        adapter: Adapter,
        state: recall_state.RecallState,
        tapped: jax.Array,
        exponent: jax.Array,
        tokens: jax.Array,
        positions: jax.Array,
    ) -> tuple[recall_state.RecallState, recall_state.Answer]:
        streams = tuple(jnp.ldexp(tapped.astype(jnp.float32), exponent)[:, None])
        valid = jnp.ones(tokens.shape, bool)
        return recall_memory.observe(adapter, state, settings, streams, tokens, positions, valid)

    @jax.jit
    def judge(
        adapter: Adapter,
        state: recall_state.RecallState,
        answer: recall_state.Answer,
        entropy: jax.Array,
        place: jax.Array,
    ) -> tuple[jax.Array, jax.Array]:
        score = recall_memory.scores_of(adapter, state, answer.found)[0]
        p_memory = recall_memory.memory_distribution(score)[jnp.arange(PAGE), place]
        return jnp.concatenate([recall_memory.gate_features(score, entropy), answer.cues[0]], axis=1), p_memory

    absorb = jax.jit(functools.partial(recall_memory.write, config, "exact"), donate_argnums=1)
    plan = PageSchedule(window=WINDOW)
    total, done = sum(len(reading.tokens) // PAGE for reading in readings), 0
    samples = []
    for reading in readings:
        state = recall_state.init_state(config, 1, len(known))
        places = np.searchsorted(known, reading.tokens).astype(np.int32)
        for page in range(len(reading.tokens) // PAGE):
            part = slice(page * PAGE, (page + 1) * PAGE)
            positions = np.arange(page * PAGE, (page + 1) * PAGE, dtype=np.int32)[None]
            left = plan.next_page(page).absorb_end
            if left is not None:
                state = absorb(adapter, state, np.int32(0), _exact_write(left, config.max_omega_window))
            streams = reading.tapped[:, part], reading.exponent[:, part]
            state, answer = observe(adapter, state, *streams, places[None, part], positions)
            if left is not None:
                came = slice(part.start + 1, part.stop + 1)
                judged = judge(adapter, state, answer, reading.entropy[part].astype(np.float32), places[came])
                samples.append([positions[0], *(np.asarray(x, np.float64) for x in judged), reading.chance[part]])
            done += 1
            progress("fitting the gate", done / total)
            progress.between(state)
    position, features, p_memory, p_model = (np.concatenate(parts) for parts in zip(*samples, strict=True))
    return _Samples(position, features, np.maximum(p_model, _LEAST), p_memory, np.ones(len(position)))


def _exact_write(end: int, window: int) -> WriteSettings:
    numbers: dict[str, Any] = {
        "end": np.int32(end),
        "window": np.int32(window),
        "step": np.float32(1),
        "degree": np.int32(1),
    }
    return WriteSettings(**numbers)


def _fit_gate(samples: _Samples) -> np.ndarray:
    """Maximum-likelihood weights of g = σ(w·f) in (1 − g)·p_model + g·p_memory, a little regularised, by Adam."""
    features, p_model, p_memory = samples.features, samples.p_model, samples.p_memory
    counts = samples.weight / samples.weight.sum()
    scale = np.maximum(features.std(axis=0), 1e-6)
    scale[0] = 1.0
    inputs = features / scale
    weight = np.zeros(features.shape[1])
    weight[0] = -2.0
    first, second = np.zeros_like(weight), np.zeros_like(weight)
    for step in range(1, 601):
        g = (1 + np.tanh(inputs @ weight / 2)) / 2  # the logistic function, without an exponential that overflows
        mixture = np.maximum((1 - g) * p_model + g * p_memory, _LEAST)
        slope = -(counts * (p_memory - p_model) / mixture * g * (1 - g)) @ inputs + _SHRINK * weight
        first = 0.9 * first + 0.1 * slope
        second = 0.99 * second + 0.01 * slope**2
        rate = 0.05 * min(1.0, (601 - step) / 200)
        weight -= rate * (first / (1 - 0.9**step)) / (np.sqrt(second / (1 - 0.99**step)) + 1e-9)
    return (weight / scale).astype(np.float32)
