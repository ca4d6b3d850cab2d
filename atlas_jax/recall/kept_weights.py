"""Measures which layers ask for how many kept pairs: from what a model attends of a text when it sees all of it."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from atlas_jax.aot import AotProgram
from atlas_jax.config import PAGE, ModelConfig
from atlas_jax.kernels.kv_pages import LayerKV
from atlas_jax.kernels.received_attention import received_attention
from atlas_jax.model.kept_division import KeptDivision
from atlas_jax.model.kv_cache import KVCache, init_kv_cache, page_start, start_page
from atlas_jax.model.layer_groups import Trunk
from atlas_jax.model.page_schedule import PageSchedule
from atlas_jax.model.params import ModelParams, PairParams
from atlas_jax.model.transformer import QUERY_SAMPLES, SINKS
from atlas_jax.progress import Progress
from atlas_jax.sharding import MeshLayout

_WINDOW = 4
"""Pages of the window that the text has left."""
_PAGES = 32
"""Of a text that are read."""
_MEAN, _LEAST, _MOST = 6, 2, 14
"""Pages that are divided, on average, and those that a layer gets at least and at most. Weights that sum up so far divide
any other number alike."""
_DECAY = 0.9
_TIMED = 2
"""Pages that are timed, after one that compiles."""

LEAST_PAGES = _MOST + _WINDOW + 1
"""Pages of a text that tells how pairs are to be divided."""


def pages_read(pages: int) -> int:
    """How many pages of a text of so many `kept_weights` reads."""
    return min(pages, _PAGES) if pages >= LEAST_PAGES else 0


def kept_weights(reader: FullReader, texts: Sequence[Sequence[int]], progress: Progress) -> tuple[float, ...]:
    """Weights of the layers for `KeptDivision`; none where no text is long enough to tell.

    Layers get a page each in turn: the one with the largest quotient of the attention that its next page would receive and
    the root of all its attention outside the window. Without the root, and with the power of 3/4, divisions were worse.
    """
    texts = [text for text in texts if len(text) >= LEAST_PAGES * PAGE]
    if not texts:
        return ()
    gains, totals = [], []
    total, done = sum(pages_read(len(text) // PAGE) for text in texts), 0
    for text in texts:
        score: np.ndarray = np.zeros(1)
        for page, received in enumerate(reader.read(text, progress)):
            outside = (page - _WINDOW + 1) * PAGE
            flat = received.swapaxes(1, 2).reshape(received.shape[0], received.shape[2], -1)
            if page >= _MOST + _WINDOW:
                now, before = flat[..., SINKS:outside], score[..., SINKS:outside]
                ranked = np.take_along_axis(now, np.argsort(-before, axis=-1), axis=-1)[..., : _MOST * PAGE]
                gains.append(ranked.reshape(*ranked.shape[:2], _MOST, PAGE).sum(axis=(1, 3)))
                totals.append(now.sum(axis=(1, 2)))
            score = _DECAY * score + flat
            done += 1
            progress("dividing kept pairs", done / total)
    gain = np.minimum.accumulate(np.mean(gains, axis=0), axis=1)
    pages = _divided(gain / np.sqrt(np.maximum(np.mean(totals, axis=0), 1e-9))[:, None])
    weights = np.ones(reader.depth)
    weights[reader.layers] = pages
    return tuple(weights.tolist())


def _divided(gain: np.ndarray) -> np.ndarray:
    """Pages of each layer; `gain`: what each further one is worth to it, [layers, _MOST]."""
    pages = np.full(len(gain), _LEAST)
    worth = np.concatenate([gain, np.full((len(gain), 1), -np.inf)], axis=1)
    for _ in range((_MEAN - _LEAST) * len(gain)):
        pages[np.argmax(worth[np.arange(len(gain)), pages])] += 1
    return pages


class FullReader:
    """Reads texts with full attention."""

    def __init__(self, model: ModelConfig, params: ModelParams, mesh_layout: MeshLayout) -> None:
        program = functools.partial(AotProgram, mesh_layout=mesh_layout)
        self._model, self._params, self._mesh_layout = model, params, mesh_layout
        self._kept_pages = KeptDivision.of(model).pages(1)  # none of which is filled
        self.layers = [index for index, pages in enumerate(self._kept_pages) if pages]
        self._trunk, self._next_page = Trunk(model, program), program(start_page, donate=(0,))
        self._received = jax.jit(self._received_of)

    def _received_of(self, params: PairParams, cache: KVCache) -> jax.Array:
        """What the latest page's queries attend: [layers, pages, K, P]."""
        assert cache.pairs is not None
        asked = cache.position[0] - PAGE + (jnp.arange(QUERY_SAMPLES) + 1) * (PAGE // QUERY_SAMPLES) - 1
        token = cache.page[0][:, None] * PAGE + jnp.arange(PAGE)
        seen = (cache.page[0] >= 0)[:, None] & (token <= asked[:, None, None])
        none = jnp.zeros((), jnp.int32)
        found = []
        for index in self.layers:
            layer = cache.kv[index]
            assert isinstance(layer, LayerKV)
            assert layer.choice is not None
            q = layer.choice.queries[0] * layer.choice.query_scale[0][..., None]
            where = none, seen, jnp.zeros((), bool), none, none, 1
            scores = self._model.scale, self._model.attention_softcap, params.null_logits[index]
            found.append(received_attention(q, q, layer, cache.pairs, *where, *scores)[0])
        return jnp.stack(found)

    @property
    def depth(self) -> int:
        """Layers of the model."""
        return len(self._model.layers)

    def page_seconds(self, text: Sequence[int]) -> float:
        """How long the model takes to read a page, measured on the beginning of a text; compiles what `read` needs."""
        times = []
        cache = self._new_cache()
        for page in range(_TIMED + 1):
            started = time.perf_counter()
            cache = self._page(cache, text, page, jax.block_until_ready)
            times.append(time.perf_counter() - started)
        return min(times[1:])

    def read(self, text: Sequence[int], progress: Progress) -> Iterator[np.ndarray]:
        """What each page's queries attend, as `_received_of`."""
        cache = self._new_cache()
        for page in range(min(len(text) // PAGE, _PAGES)):
            cache = self._page(cache, text, page, progress.between)
            yield np.asarray(self._received(self._params.pairs, cache))

    def _new_cache(self) -> KVCache:
        return self._mesh_layout.rows(init_kv_cache(self._model, 1, _PAGES, "int8", self._kept_pages))

    def _page(self, cache: KVCache, text: Sequence[int], page: int, between: Callable[[jax.Array], object]) -> KVCache:
        """Reads a page."""
        cache = self._next_page((), cache, page_start(0, PageSchedule(None).next_page(page)))
        part = np.asarray(text[page * PAGE : (page + 1) * PAGE], np.int32)[None]
        step = (1, _PAGES, PAGE), self._params, cache, part, np.full((1,), PAGE, np.int32)
        return self._trunk(*step, between=between)[0]
