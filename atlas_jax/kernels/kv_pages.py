"""The paged KV cache of one layer: a ring of pages in int8, or float32 as a reference, and a few sink tokens.

A row's keys and values lie in N pages of P tokens. `page[b, n]` says which page of the text ring slot n holds (−1: none),
so a ring needs no order and a window is a comparison. Keys and values are int8 with one scale per token and head
(`QuantPages`): for SmolLM2-135M that costs 0.04 % of perplexity, halves the bytes, and lets both matmuls of attention run
on the CPU's int8 units. Float pages are the reference mode.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import jax
import jax.numpy as jnp

from atlas_jax.config import PAGE
from atlas_jax.kernels.linear import quantize_rows
from atlas_jax.typing import Array, Bool, Float, Int8, Int32

KVDtype = Literal["int8", "float32"]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class QuantPages:
    """Keys or values in 8 bits.

    Attributes:
      values: int8 [B, N, K, P, D].
      scale: float32 [B, N, K, P].
    """

    values: Int8[Array, "B N K P D"]
    scale: Float[Array, "B N K P"]


Pages = QuantPages | jax.Array


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class LayerKV:
    """One layer's keys and values.

    Attributes:
      k, v: the ring, [B, N, K, P, D].
      sink_k, sink_v: the first S tokens of the text, float32 [B, K, S, D], kept for when their page has left the ring.
    """

    k: Pages
    v: Pages
    sink_k: Float[Array, "B K S D"]
    sink_v: Float[Array, "B K S D"]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class RingView:
    """Where a step's tokens go and what they may see; the same for every layer.

    Attributes:
      page: page of the text in each ring slot after this step's write, −1 where there is none.
      slot: ring slot the step's tokens are written to.
      positions: absolute position of every token of the step (all in one page).
      valid: which tokens of the step are real.
      first_page: pages before it have left the window.
    """

    page: Int32[Array, "B N"]
    slot: Int32[Array, B]
    positions: Int32[Array, "B T"]
    valid: Bool[Array, "B T"]
    first_page: Int32[Array, B]


def init_pages(batch: int, pages: int, kv_heads: int, head_dim: int, dtype: KVDtype) -> Pages:
    """An empty ring."""
    shape = (batch, pages, kv_heads, PAGE, head_dim)
    if dtype == "float32":
        return jnp.zeros(shape, jnp.float32)
    return QuantPages(jnp.zeros(shape, jnp.int8), jnp.zeros(shape[:-1], jnp.float32))


def init_layer_kv(batch: int, pages: int, kv_heads: int, head_dim: int, sinks: int, dtype: KVDtype) -> LayerKV:
    """An empty layer."""

    def pages_of() -> Pages:
        return init_pages(batch, pages, kv_heads, head_dim, dtype)

    def sink() -> jax.Array:  # never one array twice: the cache is donated
        return jnp.zeros((batch, kv_heads, sinks, head_dim), jnp.float32)

    return LayerKV(pages_of(), pages_of(), sink(), sink())


def write(kv: LayerKV, k: Float[Array, "B T K D"], v: Float[Array, "B T K D"], view: RingView) -> LayerKV:
    """Stores a step's keys and values in the ring."""
    return LayerKV(_write_pages(kv.k, k, view), _write_pages(kv.v, v, view), kv.sink_k, kv.sink_v)


@jax.jit  # compiled into its caller; layers alike are traced once
def first_tokens(
    kv: LayerKV, slot: Int32[Array, B], keep: Bool[Array, B]
) -> tuple[Float[Array, "B K S D"], Float[Array, "B K S D"]]:
    """The sinks of a layer, with the first S tokens of ring slot `slot` copied in for rows whose first page is leaving.

    They become the numbers the ring gave while it held them, so nothing changes at the moment of the hand-over.
    """
    sinks = kv.sink_k.shape[2]

    def first(pages: Pages, old: jax.Array) -> jax.Array:
        row = jnp.arange(old.shape[0])
        if isinstance(pages, QuantPages):
            values = pages.values[row, slot, :, :sinks].astype(jnp.float32)
            new = values * pages.scale[row, slot, :, :sinks, None]
        else:
            new = pages[row, slot, :, :sinks]
        return jnp.where(keep[:, None, None, None], new, old)

    return first(kv.k, kv.sink_k), first(kv.v, kv.sink_v)


def _write_pages(pages: Pages, new: jax.Array, view: RingView) -> Pages:
    if not isinstance(pages, QuantPages):
        return _put_tokens(pages, new, view)
    values, scale = quantize_rows(new)
    return QuantPages(_put_tokens(pages.values, values, view), _put_tokens(pages.scale, scale[..., 0], view))


def _put_tokens(ring: jax.Array, new: jax.Array, view: RingView) -> jax.Array:
    """Writes [B, T, K, …] at each token's place in [B, N, K, P, …].

    In a step of one token a row whose token is not valid writes back what was there: at the end of a page, its next
    page not begun, that place holds the first token of the page before.
    """
    batch, tokens = new.shape[:2]
    offset = view.positions % PAGE
    row, slot = jnp.arange(batch)[:, None], view.slot[:, None]
    if tokens == 1:
        valid = view.valid.reshape(view.valid.shape + (1,) * (new.ndim - 2))
        new = jnp.where(valid, new, ring[row, slot, :, offset])
        return ring.at[row, slot, :, offset].set(new, mode="promise_in_bounds", unique_indices=True)
    offset = jnp.where(view.valid, offset, PAGE)  # offset P is out of range: dropped
    return ring.at[row, slot, :, offset].set(new, mode="drop")
