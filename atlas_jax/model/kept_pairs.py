"""Which pairs stay attended when their page leaves the window: a number for each layer that is fixed, and of each KV head.

When a page begins for which another leaves, every pair of the row has received the attention of the latest page's queries (a
sample of them, which lies by position in the cache). That is added to its score, which decays from page to page, and the
leaving page's pairs compete with those that are kept: the highest scores stay (the rule of accumulated attention: H2O,
arXiv 2306.14048; its decay: as the recency of `cache_strategy` asks). Nothing else moves, so a write is at most a page.

All of it follows from positions and from what has been read, so a text that is read in other chunks, or taken back as far as
the page and read again, keeps the same pairs up to rounding.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from atlas_jax.config import PAGE, ModelConfig
from atlas_jax.kernels.attention import kept_index
from atlas_jax.kernels.exchange_pairs import exchange_pairs
from atlas_jax.kernels.kv_pages import KeptPairs, LayerKV, Pages, PairChoice, QuantPages
from atlas_jax.kernels.linear import quantize_rows
from atlas_jax.kernels.received_attention import received_attention
from atlas_jax.kernels.rope import apply_rope, rotations
from atlas_jax.model.kv_cache import KVCache, first_pages
from atlas_jax.model.params import PairParams
from atlas_jax.model.transformer import QUERY_SAMPLES, SINKS
from atlas_jax.typing import Array, Bool, Float, Int32

_PROTECTED = 1e6
"""Score of the first tokens of a turn, above all attention: with every page it decays like the rest."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Leaving:
    """A page that leaves a row's window.

    Attributes:
      slot: its place in the ring.
      first: whether it is the first that leaves at this moment: then the latest page's queries are counted.
      decay: of scores, from one such moment to the next.
      capacity: the most pairs that each layer keeps of the row.
    """

    row: Int32[Array, ""]
    slot: Int32[Array, ""]
    first: Bool[Array, ""]
    decay: Float[Array, ""]
    capacity: Int32[Array, layers]


def leaving(row: int, slot: int, *, first: bool, decay: float, capacity: Sequence[int]) -> Leaving:
    """One page, made on the host."""
    values: dict[str, Any] = {
        "row": np.int32(row),
        "slot": np.int32(slot),
        "first": np.bool_(first),
        "decay": np.float32(decay),
        "capacity": np.asarray(capacity, np.int32),
    }
    return Leaving(**values)


def kept_count(left: int, capacity: int) -> int:
    """How many pairs a layer keeps once `left` pages have left the window."""
    return min(max(left * PAGE - SINKS, 0), capacity)


def keep_pairs(
    config: ModelConfig,
    params: PairParams,
    cache: KVCache,
    page: Leaving,
    protected: Bool[Array, P],
) -> KVCache:
    """Keeps what is worth it of a page that leaves a row's window; it is still in the ring, and the next has not begun.

    Args:
      protected: tokens of the page that are kept before all others.
    """
    row, pool = page.row, cache.pairs
    assert pool is not None
    position, first_page, labels = cache.position[row], cache.first_page[row], cache.page[row]
    # past the trained context what has left the window stays as far away as when it left; so do the sinks
    beyond = jnp.maximum(position - (config.context_length - 1), 0)
    asked = position - PAGE + (jnp.arange(QUERY_SAMPLES) + 1) * (PAGE // QUERY_SAMPLES) - 1
    # a query meets kept pairs from where attention has it meet them: by its own way past the context, not by the page's
    too_far = jnp.maximum(asked - (config.context_length - 1), 0)
    turns = [_Turns(rotations(table, beyond), rotations(table, too_far)) for table in params.ropes]
    sinks = jnp.where(labels[page.slot] == 0, SINKS, 0)
    event = _Event(
        labels=labels,
        first_page=first_page,
        asked=asked,
        beyond=beyond,
        protected=protected,
        sinks=sinks,
    )
    scores = config.scale, config.attention_softcap
    kv, kept, most = list(cache.kv), cache.kept[row], max(cache.kept_pages)
    layers = [
        (index, layer, layer.choice, turns[spec.rope], _Stretch(np.int32(first), kept[index], page.capacity[index]))  # type: ignore[arg-type]
        for index, (spec, layer, first) in enumerate(
            zip(config.layers, cache.kv, first_pages(cache.kept_pages), strict=True)
        )
        if isinstance(layer, LayerKV) and layer.choice is not None
    ]

    def counted() -> tuple[list[jax.Array], jax.Array]:
        ring_scores, score = [], pool.score[row]
        for index, layer, choice, turn, stretch in layers:
            of_layer = layer, choice, pool, stretch, page, event, turn.queries, params.null_logits[index]
            ring_score, score = _count_in_layer(scores, most, score, *of_layer)
            ring_scores.append(ring_score)
        return ring_scores, score

    # one conditional for all layers: with one for each, this program takes twice as long to compile
    ring_scores, score = jax.lax.cond(
        page.first, counted, lambda: ([choice.ring_score[row] for _, _, choice, *_ in layers], pool.score[row])
    )
    stored = jax.lax.dynamic_update_index_in_dim(pool.stored_score, pool.as_stored(score), row, 0)
    pairs = dataclasses.replace(pool, stored_score=stored)
    gone = []
    for (index, layer, choice, turn, _), ring_score in zip(layers, ring_scores, strict=True):
        left, choice = _leave_layer(layer, choice, ring_score, page, event, turn.keys)
        gone.append(left)
        kv[index] = dataclasses.replace(layer, choice=choice)
    own, k, v = jax.tree.map(lambda *parts: jnp.stack(parts), *gone)
    where = jax.tree.map(lambda *parts: jnp.stack(parts), *(stretch for *_, stretch in layers))
    pairs = exchange_pairs(pairs, row, where.first, own, k, v, where.kept, where.capacity, most)
    kept = jnp.minimum(kept + PAGE - sinks, page.capacity)
    return dataclasses.replace(cache, kv=tuple(kv), pairs=pairs, kept=cache.kept.at[row].set(kept))


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class _Event:
    """What all layers need to know of the row.

    Attributes:
      labels, first_page: the row's, as in `KVCache`.
      asked: positions of the queries that are counted.
      beyond: how far its position is past the trained context.
      sinks: tokens of the page that are kept as sinks.
    """

    labels: Int32[Array, N]
    first_page: Int32[Array, ""]
    asked: Int32[Array, samples]
    beyond: Int32[Array, ""]
    protected: Bool[Array, P]
    sinks: Int32[Array, ""]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class _Turns:
    """Cosines and sines of what lies past the trained context: for the page's keys, and for each of the queries."""

    keys: tuple[Float[Array, half], Float[Array, half]]
    queries: tuple[Float[Array, "samples half"], Float[Array, "samples half"]]


_Scores = tuple[float, float | None]
"""Factor on q·k, and what caps the product."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class _Stretch:
    """A layer's places among the kept pairs of all: the first page, how many pairs the row has, and how many it may."""

    first: Int32[Array, ""]
    kept: Int32[Array, ""]
    capacity: Int32[Array, ""]


@functools.partial(jax.jit, static_argnums=(0, 1))  # compiled into its caller; layers alike are traced once
def _count_in_layer(
    scores: _Scores,
    pages: int,
    score: Float[Array, "pool K P"],
    layer: LayerKV,
    choice: PairChoice,
    pairs: KeptPairs,
    stretch: _Stretch,
    page: Leaving,
    event: _Event,
    turn: tuple[jax.Array, jax.Array],
    null_logit: Float[Array, H] | None,
) -> tuple[Float[Array, "N K P"], Float[Array, "pool K P"]]:
    """Scores of the ring and of all kept pairs, the layer's with the attention of the latest page's queries.

    Args:
      pages: that the layer's pairs lie in, or more.
    """
    token = event.labels[:, None] * PAGE + jnp.arange(PAGE)
    in_window = (event.labels >= event.first_page) & (event.labels >= 0)
    seen = in_window[:, None] & (token <= event.asked[:, None, None])
    q = choice.queries[page.row] * choice.query_scale[page.row][..., None]
    where = seen, event.first_page > 0, stretch.first, stretch.kept, pages
    ring, kept = received_attention(q, _turned(q, turn), layer, pairs, page.row, *where, *scores, null_logit)
    old = jax.lax.dynamic_slice_in_dim(score, stretch.first, pages)
    # behind the layer's pairs are other layers'
    own = jnp.where(kept_index(pages)[:, None] < stretch.kept, page.decay * old + kept, old)
    score = jax.lax.dynamic_update_slice_in_dim(score, own, stretch.first, 0)
    return page.decay * choice.ring_score[page.row] + ring, score


@jax.jit
def _leave_layer(
    layer: LayerKV,
    choice: PairChoice,
    ring_score: Float[Array, "N K P"],
    page: Leaving,
    event: _Event,
    turn: tuple[jax.Array, jax.Array],
) -> tuple[tuple[Float[Array, "K P"], Pages, Pages], PairChoice]:
    """The scores, keys and values of the page that leaves a layer, and what is left there to choose by."""
    row, slot = page.row, page.slot
    own = jnp.where(event.protected, _PROTECTED, 0.0) + ring_score[slot]
    own = jnp.where(jnp.arange(PAGE) < event.sinks, -jnp.inf, own)
    k, v = (jax.tree.map(lambda leaf: leaf[row, slot], ring) for ring in (layer.k, layer.v))
    k = jax.lax.cond(event.beyond > 0, lambda k: _turned_pages(k, turn), lambda k: k, k)
    ring_score = choice.ring_score.at[row].set(ring_score.at[slot].set(0.0))
    return (own, k, v), dataclasses.replace(choice, ring_score=ring_score)


def _turned(x: jax.Array, turn: tuple[jax.Array, jax.Array]) -> jax.Array:
    """Queries or keys, rotated back by `turn`."""
    return apply_rope(x, turn[0], -turn[1])


def _turned_pages(page: Pages, turn: tuple[jax.Array, jax.Array]) -> Pages:
    if not isinstance(page, QuantPages):
        return _turned(page, turn)
    values, scale = quantize_rows(_turned(page.values * page.scale[..., None], turn))
    return QuantPages(values, scale[..., 0])
