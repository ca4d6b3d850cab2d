"""Which pairs stay attended when their page leaves the window: a fixed number for each layer and KV head.

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
from atlas_jax.kernels.exchange_pairs import exchange_pairs
from atlas_jax.kernels.kv_pages import KeptPairs, LayerKV, Pages, QuantPages
from atlas_jax.kernels.linear import quantize_rows
from atlas_jax.kernels.received_attention import received_attention
from atlas_jax.kernels.rope import RopeTable, apply_rope, rotations
from atlas_jax.model.kv_cache import KVCache
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
      capacity: the most pairs that the row keeps.
    """

    row: Int32[Array, ""]
    slot: Int32[Array, ""]
    first: Bool[Array, ""]
    decay: Float[Array, ""]
    capacity: Int32[Array, ""]


def leaving(row: int, slot: int, *, first: bool, decay: float, capacity: int) -> Leaving:
    """One page, made on the host."""
    values: dict[str, Any] = {
        "row": np.int32(row),
        "slot": np.int32(slot),
        "first": np.bool_(first),
        "decay": np.float32(decay),
        "capacity": np.int32(capacity),
    }
    return Leaving(**values)


def kept_count(left: int, capacity: int) -> int:
    """How many pairs are kept once `left` pages have left the window."""
    return min(max(left * PAGE - SINKS, 0), capacity)


def keep_pairs(
    config: ModelConfig,
    ropes: Sequence[RopeTable],
    cache: KVCache,
    page: Leaving,
    protected: Bool[Array, P],
) -> KVCache:
    """Keeps what is worth it of a page that leaves a row's window; it is still in the ring, and the next has not begun.

    Args:
      protected: tokens of the page that are kept before all others.
    """
    row = page.row
    position, first_page, labels = cache.position[row], cache.first_page[row], cache.page[row]
    # past the trained context what has left the window stays as far away as when it left; so do the sinks
    beyond = jnp.maximum(position - (config.context_length - 1), 0)
    asked = position - PAGE + (jnp.arange(QUERY_SAMPLES) + 1) * (PAGE // QUERY_SAMPLES) - 1
    # a query meets kept pairs from where attention has it meet them: by its own way past the context, not by the page's
    too_far = jnp.maximum(asked - (config.context_length - 1), 0)
    turns = [_Turns(rotations(table, beyond), rotations(table, too_far)) for table in ropes]
    sinks = jnp.where(labels[page.slot] == 0, cache.kv[0].sink_k.shape[2], 0)
    event = _Event(
        labels=labels,
        first_page=first_page,
        asked=asked,
        kept=cache.kept[row],
        beyond=beyond,
        protected=protected,
        sinks=sinks,
    )
    scores = config.scale, config.attention_softcap
    kv = tuple(
        layer if layer.kept is None else _keep_in_layer(scores, layer, layer.kept, page, event, turns[spec.rope])
        for spec, layer in zip(config.layers, cache.kv, strict=True)
    )
    kept = jnp.minimum(event.kept + PAGE - sinks, page.capacity)
    return dataclasses.replace(cache, kv=kv, kept=cache.kept.at[row].set(kept))


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class _Event:
    """What all layers need to know of the row.

    Attributes:
      labels, first_page, kept: the row's, as in `KVCache`.
      asked: positions of the queries that are counted.
      beyond: how far its position is past the trained context.
      sinks: tokens of the page that are kept as sinks.
    """

    labels: Int32[Array, N]
    first_page: Int32[Array, ""]
    asked: Int32[Array, samples]
    kept: Int32[Array, ""]
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


@functools.partial(jax.jit, static_argnums=0)  # compiled into its caller; layers alike are traced once
def _keep_in_layer(
    scores: _Scores, layer: LayerKV, pairs: KeptPairs, page: Leaving, event: _Event, turns: _Turns
) -> LayerKV:
    row, slot = page.row, page.slot
    ring_score, score = jax.lax.cond(
        page.first,
        lambda: _counted(scores, layer, pairs, page, event, turns.queries),
        lambda: (pairs.ring_score[row], pairs.score[row]),
    )
    own = jnp.where(event.protected, _PROTECTED, 0.0) + ring_score[slot]
    own = jnp.where(jnp.arange(PAGE) < event.sinks, -jnp.inf, own)
    k, v = (jax.tree.map(lambda leaf: leaf[row, slot], ring) for ring in (layer.k, layer.v))
    k = jax.lax.cond(event.beyond > 0, lambda k: _turned_pages(k, turns.keys), lambda k: k, k)
    pairs = dataclasses.replace(
        pairs,
        score=pairs.score.at[row].set(score),
        ring_score=pairs.ring_score.at[row].set(ring_score.at[slot].set(0.0)),
    )
    return dataclasses.replace(layer, kept=exchange_pairs(pairs, row, own, k, v, event.kept, page.capacity))


def _counted(
    scores: _Scores, layer: LayerKV, pairs: KeptPairs, page: Leaving, event: _Event, turn: tuple[jax.Array, jax.Array]
) -> tuple[Float[Array, "N K P"], Float[Array, "kept K P"]]:
    """Scores of the ring and of the kept pairs with the attention of the latest page's queries."""
    token = event.labels[:, None] * PAGE + jnp.arange(PAGE)
    in_window = (event.labels >= event.first_page) & (event.labels >= 0)
    seen = in_window[:, None] & (token <= event.asked[:, None, None])
    q = pairs.queries[page.row] * pairs.query_scale[page.row][..., None]
    received = received_attention(q, _turned(q, turn), layer, page.row, seen, event.first_page > 0, event.kept, *scores)
    old = pairs.ring_score[page.row], pairs.score[page.row]
    return tuple(page.decay * before + new for before, new in zip(old, received, strict=True))  # type: ignore[return-value]


def _turned(x: jax.Array, turn: tuple[jax.Array, jax.Array]) -> jax.Array:
    """Queries or keys, rotated back by `turn`."""
    return apply_rope(x, turn[0], -turn[1])


def _turned_pages(page: Pages, turn: tuple[jax.Array, jax.Array]) -> Pages:
    if not isinstance(page, QuantPages):
        return _turned(page, turn)
    values, scale = quantize_rows(_turned(page.values * page.scale[..., None], turn))
    return QuantPages(values, scale[..., 0])
