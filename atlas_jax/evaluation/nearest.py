"""A baseline that forgets nothing: the window's model mixed with its nearest earlier states (kNN-LM, arXiv 1911.00172).

Every token that was read is kept as a pair of the state after a layer and the token that came next. The nearest k of them, by
the cosine of centred states, vote with weights exp(β·cosine); what they say is mixed into the window's probabilities with a
fixed weight. Layer, k, β and weight are those with the least loss on the calibration texts that come with the library, none
of which is measured.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from atlas_jax.config import PAGE
from atlas_jax.model.checkpoint import open_model_file
from atlas_jax.model.loading import load_params, model_config
from atlas_jax.progress import Progress
from atlas_jax.recall import adapter_store
from atlas_jax.recall.calibration import candidates
from atlas_jax.recall.collect_states import Reading, read_texts
from atlas_jax.sharding import ONE_DEVICE

Floats = npt.NDArray[np.floating]
WindowLosses = Callable[[Sequence[int]], npt.NDArray[np.float64]]
_FITTED_TOKENS = 3072
_LAYERS = 4
"""Of the ten layers a memory might tap, evenly."""
_COUNTS = (8, 64, 512)
_SHARPNESS = (5.0, 10.0, 20.0, 40.0)
_WEIGHTS = tuple(share / 20 for share in range(11))
_ROWS = 256
_NEVER = -3.0
"""Further behind than one cosine can be behind another: a state that comes later."""


@dataclass(frozen=True)
class Fit:
    """What was fitted."""

    layer: int
    count: int
    sharpness: float
    weight: float


class NearestNeighbours:
    """The baseline of one model.

    Args:
      window: losses of a text with the window alone; 0 for its first token.
      encode: the tokenizer, for the calibration texts.
      start: positions that count, in fitting as in measuring.
    """

    def __init__(self, path: Path, window: WindowLosses, encode: Callable[[str], list[int]], start: int) -> None:
        with open_model_file(path) as file:
            self._model = model_config(file)
            self._params = load_params(file, self._model, dtype="int8")
        memory = candidates(self._model)
        chosen = np.linspace(0, len(memory.layers) - 1, min(_LAYERS, len(memory.layers))).round().astype(int)
        layers = tuple(memory.layers[index] for index in sorted(set(chosen.tolist())))
        self._memory = dataclasses.replace(memory, layers=layers)
        self._window = window
        texts = [encode(text)[:_FITTED_TOKENS] for text in adapter_store.calibration_texts()]
        self.fit = self._fitted([text for text in texts if len(text) > start + PAGE], start)

    def losses(self, tokens: Sequence[int]) -> npt.NDArray[np.float64]:
        """Nats of every token; 0 for the first."""
        chance = np.exp(-self._window(tokens))
        reading = self._read([tokens])[0]
        keys = unit_states(reading.states(self._memory.layers.index(self.fit.layer))[: len(tokens)])
        (said,) = neighbours(keys, np.asarray(tokens), (self.fit.count,), (self.fit.sharpness,)).values()
        mixed = (1 - self.fit.weight) * chance[1:] + self.fit.weight * said
        return np.concatenate([[0.0], -np.log(mixed)])

    def _read(self, texts: Sequence[Sequence[int]]) -> list[Reading]:
        """Texts padded to whole pages and one token: what comes later changes nothing before."""
        padded = [[*text, *[text[0]] * (-len(text) % PAGE + 1)] for text in texts]
        return read_texts(self._model, self._params, self._memory, padded, Progress(), ONE_DEVICE)

    def _fitted(self, texts: Sequence[Sequence[int]], start: int) -> Fit:
        chances = [np.exp(-self._window(text))[start:] for text in texts]
        best, least = Fit(self._memory.layers[0], _COUNTS[0], _SHARPNESS[0], 0.0), np.inf
        readings = self._read(texts)
        for index, layer in enumerate(self._memory.layers):
            said: dict[tuple[int, float], list[Floats]] = {}
            for text, reading in zip(texts, readings, strict=True):
                keys = unit_states(reading.states(index)[: len(text)])
                for how, voted in neighbours(keys, np.asarray(text), _COUNTS, _SHARPNESS).items():
                    said.setdefault(how, []).append(voted[start - 1 :])
            chance = np.concatenate(chances)
            for (count, sharpness), parts in said.items():
                voted = np.concatenate(parts)
                for weight in _WEIGHTS:
                    loss = -np.log((1 - weight) * chance + weight * voted).mean()
                    if loss < least:
                        best, least = Fit(layer, count, sharpness, weight), loss
        return best


def unit_states(states: Floats) -> Floats:
    """States less their running mean, as unit vectors [n, E]: nothing is known of states that come later."""
    count = np.arange(1, len(states) + 1, dtype=np.float64)[:, None]
    centred = states - np.cumsum(states, axis=0, dtype=np.float64) / count
    norm = np.linalg.norm(centred, axis=1, keepdims=True)
    return (centred / np.maximum(norm, 1e-9)).astype(np.float32)


def neighbours(
    keys: Floats, tokens: npt.NDArray[np.integer], counts: Sequence[int], sharpness: Sequence[float]
) -> dict[tuple[int, float], Floats]:
    """Probabilities of tokens 1 … n−1 by the states before them [n − 1], for every number of neighbours and sharpness.

    Args:
      keys: of the tokens [n, E]; the state of token t is compared with those before it, whose next tokens are known.
      tokens: [n].
    """
    out: dict[tuple[int, float], Floats] = {
        how: np.zeros(len(tokens) - 1) for how in itertools.product(counts, sharpness)
    }
    most = max(counts)
    for first in range(1, len(tokens) - 1, _ROWS):
        last = min(first + _ROWS, len(tokens) - 1)
        cosine = keys[first:last] @ keys[:last].T
        later = np.arange(last)[None] >= np.arange(first, last)[:, None]
        cosine[later] = -np.inf
        near = min(most, last)
        place = np.argpartition(-cosine, near - 1, axis=1)[:, :near]
        found = np.take_along_axis(cosine, place, axis=1)
        order = np.argsort(-found, axis=1, kind="stable")
        place, found = np.take_along_axis(place, order, axis=1), np.take_along_axis(found, order, axis=1)
        right = tokens[place + 1] == tokens[first + 1 : last + 1, None]
        behind = np.where(np.isfinite(found), found - found[:, :1], _NEVER)
        for count, sharp in out:
            votes = np.where(behind[:, :count] > _NEVER, np.exp(sharp * behind[:, :count]), 0)
            out[count, sharp][first:last] = (votes * right[:, :count]).sum(axis=1) / votes.sum(axis=1)
    return out
