"""A model reads calibration texts through its window: states that keys can be made of, and what it says comes next."""

from __future__ import annotations

import dataclasses
import functools
import operator
from collections.abc import Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from atlas_jax.aot import AotProgram
from atlas_jax.config import PAGE, MemoryConfig, ModelConfig
from atlas_jax.kernels.reductions import row_max
from atlas_jax.model.kept_division import KeptDivision
from atlas_jax.model.kept_pairs import keep_pairs, leaving
from atlas_jax.model.kv_cache import init_kv_cache, page_start, start_page
from atlas_jax.model.layer_groups import Trunk
from atlas_jax.model.page_schedule import PageSchedule
from atlas_jax.model.params import ModelParams
from atlas_jax.model.transformer import logits
from atlas_jax.progress import Progress
from atlas_jax.sharding import MeshLayout

WINDOW = 4
"""Pages of the window the memory is calibrated for."""
_KEPT = 768
"""Pairs kept beside it, per layer on average: about what the default budget has room for. A gate fitted without them opens
where the model knows better by itself (SmolLM2-135M, 14 documents of 2 048 tokens: 0.74 of the gap to full attention closed,
alone 0.87)."""
_DECAY = 0.9
_BLOCK = 1 << 12
"""Tokens of the vocabulary whose scores are looked at together: of few enough, they stay in the cache."""


@dataclass(frozen=True)
class Reading:
    """One text as the model read it.

    Attributes:
      tokens: [n + 1].
      tapped, exponent: states after the tapped layers, [A, n, E] float16 times 2 to the power of [A, n, 1] int16. In
        float16 alone, Gemma 3's states overflow.
      chance: the model's probability of the token that came next, float64 [n]; 1 inside the first window.
      entropy: of the model's word on it, in nats, float64 [n]; 0 inside the first window.
    """

    tokens: np.ndarray
    tapped: np.ndarray
    exponent: np.ndarray
    chance: np.ndarray
    entropy: np.ndarray

    def states(self, layer: int) -> np.ndarray:
        """States after one of the tapped layers, float32 [n, E]."""
        return np.ldexp(self.tapped[layer].astype(np.float32), self.exponent[layer])


def whole_pages(text: Sequence[int]) -> Sequence[int]:
    """The text cut to whole pages and one token more."""
    count = (len(text) - 1) // PAGE
    return text[: count * PAGE + 1]


def read_texts(
    model: ModelConfig,
    params: ModelParams,
    config: MemoryConfig,
    texts: Sequence[Sequence[int]],
    progress: Progress,
    mesh_layout: MeshLayout,
) -> list[Reading]:
    """Reads each text, of whole pages and one token more, from its first token on."""
    plan, division = PageSchedule(window=WINDOW), KeptDivision.of(model, config.kept_weights)

    program = functools.partial(AotProgram, mesh_layout=mesh_layout)
    trunk, judge = Trunk(model, program), Judge(model, params)
    count = np.full((1,), PAGE, np.int32)
    next_page = program(start_page, donate=(0,))
    keep = program(functools.partial(keep_pairs, model), donate=(1,))
    total = sum(len(text) // PAGE for text in texts)
    done = 0
    readings = []
    for text in texts:
        tokens = np.asarray(text, np.int32)
        cache = mesh_layout.rows(init_kv_cache(model, 1, WINDOW, "int8", division.pages(_KEPT // PAGE)))
        chance, entropy = np.ones(len(tokens) - 1), np.zeros(len(tokens) - 1)
        tapped, exponent = [], []
        for page in range(len(tokens) // PAGE):
            place = plan.next_page(page)
            for slot in place.leaves:
                leaves = leaving(0, slot, first=True, decay=_DECAY, capacity=division.capacities(_KEPT))
                cache = keep((), params.pairs, cache, leaves, np.zeros(PAGE, bool))
            cache = next_page((), cache, page_start(0, place))
            part = slice(page * PAGE, (page + 1) * PAGE)
            step = (1, WINDOW, PAGE), params, cache, tokens[None, part], count
            cache, _, states = trunk(*step, between=progress.between)
            if page >= WINDOW:
                chance[part], entropy[part] = judge(states[-1][0], tokens[1:][part])
            streams = np.stack([np.asarray(states[layer][0]) for layer in config.layers])
            exponent.append(np.frexp(np.abs(streams).max(axis=2, keepdims=True))[1].astype(np.int16))
            tapped.append(np.ldexp(streams, -exponent[-1]).astype(np.float16))
            done += 1
            progress("reading", done / total)
        streams, units = (np.concatenate(parts, axis=1) for parts in (tapped, exponent))
        readings.append(Reading(tokens, streams, units, chance, entropy))
    return readings


class Judge:
    """What a model says of the next tokens, a block of its vocabulary after the other: all of a page can be 134 MB."""

    def __init__(self, model: ModelConfig, params: ModelParams) -> None:
        head = params.embed if params.head is None else params.head
        self._ends = dataclasses.replace(params, layers=())
        self._blocks = [
            jax.tree.map(operator.itemgetter(slice(first, first + _BLOCK)), head)
            for first in range(0, model.vocab, _BLOCK)
        ]

        @jax.jit
        def glance(params: ModelParams, hidden: jax.Array, place: jax.Array) -> tuple[jax.Array, ...]:
            scores = logits(model, params, hidden)
            peak = row_max(scores)
            shifted = scores - peak[:, None]
            weight = jnp.exp(shifted)
            # plain sums: those of `kernels.reductions` would keep what they add, and take three times as long
            return peak, weight.sum(axis=1), (weight * shifted).sum(axis=1), scores[jnp.arange(place.size), place]

        self._glance = glance

    def __call__(self, hidden: jax.Array, target: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Probabilities of the targets, and entropies in nats, from the last states [n, E]."""
        facts = []
        for index, block in enumerate(self._blocks):
            place = target - index * _BLOCK
            inside = (place >= 0) & (place < _BLOCK)
            found = self._glance(dataclasses.replace(self._ends, head=block), hidden, np.where(inside, place, 0))
            *rest, score = (np.asarray(x, np.float64) for x in found)
            facts.append([*rest, np.where(inside, score, -np.inf)])
        peaks, masses, moments, scores = (np.stack(parts) for parts in zip(*facts, strict=True))
        peak = peaks.max(axis=0)
        share = np.exp(peaks - peak)
        mass = (share * masses).sum(axis=0)
        moment = (share * (moments + (peaks - peak) * masses)).sum(axis=0)
        return np.exp(scores.max(axis=0) - peak) / mass, np.log(mass) - moment / mass
