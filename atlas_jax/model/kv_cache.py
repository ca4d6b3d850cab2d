"""The KV cache of a batch of rows: rings of pages, and how a row moves from page to page."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field

import jax
import jax.numpy as jnp
import numpy as np

from atlas_jax.config import ModelConfig
from atlas_jax.kernels import kv_pages
from atlas_jax.kernels.kv_pages import KeptPairs, KVDtype, LayerKV, RingView
from atlas_jax.model.page_schedule import NextPage
from atlas_jax.model.transformer import LayerState, init_kv
from atlas_jax.typing import Array, Float, Int32


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class KVCache:
    """Keys and values of a batch of rows, and what they have read.

    Attributes:
      kv: what each layer keeps; of a layer without attention a state, which no page, window or position divides.
      page: page of the text in each ring slot, −1 where there is none.
      slot: ring slot of the page being filled.
      first_page: pages before it have left the window.
      position: position of the next token.
      kept: how many pairs of each row each layer keeps of what has left the window.
      pairs: the kept pairs of all layers; None where none are.
      lora: the scales of the LoRA adapters that what is here was made with; None where no adapter is loaded.
      kept_pages: pages of each layer among them.
    """

    kv: tuple[LayerState, ...]
    page: Int32[Array, "B N"]
    slot: Int32[Array, B]
    first_page: Int32[Array, B]
    position: Int32[Array, B]
    kept: Int32[Array, "B layers"]
    pairs: KeptPairs | None = None
    lora: Float[Array, "B adapters"] | None = None
    kept_pages: tuple[int, ...] = field(default=(), metadata={"static": True})


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class PageStart:
    """A row's move to its next page, as the compiled step reads it; see `page_schedule.NextPage`."""

    row: Int32[Array, ""]
    slot: Int32[Array, ""]
    page: Int32[Array, ""]
    first_page: Int32[Array, ""]
    sink_slot: Int32[Array, ""]


def init_kv_cache(
    model: ModelConfig, batch: int, pages: int, dtype: KVDtype, kept_pages: tuple[int, ...] = (), adapters: int = 0
) -> KVCache:
    """Rows that have read nothing.

    Args:
      kept_pages: pages of pairs that each layer keeps of a row; empty where none does.
      adapters: LoRA adapters that rows may use; they use none yet.
    """
    room = sum(kept_pages)

    def zeros() -> jax.Array:  # never one array twice: the state is donated
        return jnp.zeros((batch,), jnp.int32)

    return KVCache(
        kv=init_kv(model, batch, pages, dtype, kept_pages),
        page=jnp.full((batch, pages), -1, jnp.int32),
        slot=zeros(),
        first_page=zeros(),
        position=zeros(),
        kept=jnp.zeros((batch, len(model.layers)), jnp.int32),
        pairs=kv_pages.init_kept_pairs(batch, room, model.kv_heads, model.head_dim, dtype) if room else None,
        lora=jnp.zeros((batch, adapters), jnp.float32) if adapters else None,
        kept_pages=kept_pages if room else (),
    )


def first_pages(kept_pages: Sequence[int]) -> tuple[int, ...]:
    """Where each layer's pages begin among those of all: the fewest first, so that the most pages of any lie behind each."""
    order = sorted(range(len(kept_pages)), key=lambda layer: kept_pages[layer])
    first = dict(zip(order, itertools.accumulate((kept_pages[layer] for layer in order), initial=0), strict=False))
    return tuple(first[layer] for layer in range(len(kept_pages)))


def page_start(row: int, page: NextPage) -> PageStart:
    """One row's move to its next page, made on the host."""
    numbers = (row, page.slot, page.page, page.first_page, page.sink_slot)
    return PageStart(*(np.asarray(number, np.int32) for number in numbers))  # type: ignore[arg-type]


def ring_view(cache: KVCache, tokens: int, count: Int32[Array, B]) -> RingView:
    """Where the next `count` of up to `tokens` tokens of each row go; all of them lie in the row's current page."""
    offset = jnp.arange(tokens)[None]
    return RingView(
        page=cache.page,
        slot=cache.slot,
        positions=cache.position[:, None] + offset,
        valid=offset < count[:, None],
        first_page=cache.first_page,
    )


def start_page(cache: KVCache, start: PageStart) -> KVCache:
    """Enters the next page in a row's ring; a page that was in that slot is gone."""
    rows = cache.position.shape[0]
    here = jnp.arange(rows) == start.row
    keep = here & (start.sink_slot >= 0)
    slot = jnp.full((rows,), jnp.maximum(start.sink_slot, 0), jnp.int32)
    attending = {index: layer for index, layer in enumerate(cache.kv) if isinstance(layer, LayerKV)}
    sinks = jax.lax.cond(
        start.sink_slot >= 0,
        lambda sinks: [kv_pages.first_tokens(layer, slot, keep) for layer in attending.values()],
        lambda sinks: sinks,
        [(layer.sink_k, layer.sink_v) for layer in attending.values()],
    )
    kv = list(cache.kv)
    for (index, layer), (k, v) in zip(attending.items(), sinks, strict=True):
        kv[index] = dataclasses.replace(layer, sink_k=k, sink_v=v)
    return dataclasses.replace(
        cache,
        kv=tuple(kv),
        page=cache.page.at[start.row, start.slot].set(start.page),
        slot=cache.slot.at[start.row].set(start.slot),
        first_page=cache.first_page.at[start.row].set(start.first_page),
    )
