"""The paged KV cache of one layer: a ring of pages in int8, or float32 as a reference, and a few sink tokens; kept pairs.

A row's keys and values lie in N pages of P tokens. `page[b, n]` says which page of the text ring slot n holds (−1: none),
so a ring needs no order and a window is a comparison. Keys and values are int8 with one scale per token and head
(`QuantPages`): for SmolLM2-135M that costs 0.04 % of perplexity, halves the bytes, and lets both matmuls of attention run
on the CPU's int8 units. Float pages are the reference mode.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Literal, TypeVar

import jax
import jax.numpy as jnp

from atlas_jax.config import PAGE
from atlas_jax.kernels.linear import quantize_rows
from atlas_jax.kernels.packed_pages import (
    KEY_BITS,
    VALUE_BITS,
    Bits,
    PackedPages,
    init_packed,
    unpack,
    upper_half,
    whole,
)
from atlas_jax.typing import Array, Bool, Float, Int8, Int32, UInt16

KVDtype = Literal["int8", "float32"]
T = TypeVar("T")


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
class KeptPairs:
    """Pairs of all layers that stay attended when their page has left the ring.

    Every layer has a stretch of the pages, and fills it in order; which of its pairs is where means nothing. In one array,
    for so layers may keep different numbers and still be the same program.

    Attributes:
      k, v: the pairs, in 4 and 2 bits where the ring is in 8.
      stored_score: attention that each has received, see `model.kept_pairs`; of packed ones the upper half of a float32.
    """

    k: PackedPages | jax.Array
    v: PackedPages | jax.Array
    stored_score: Float[Array, "B pool K P"] | UInt16[Array, "B pool K P"]

    @property
    def score(self) -> Float[Array, "B pool K P"]:
        """Attention that each of them has received."""
        return self.stored_score if self.stored_score.dtype == jnp.float32 else whole(self.stored_score)

    def as_stored(self, score: Float[Array, "*shape"]) -> Float[Array, "*shape"] | UInt16[Array, "*shape"]:
        """Scores as they are kept here."""
        return score if self.stored_score.dtype == jnp.float32 else upper_half(score)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class LayerPairs:
    """The kept pairs that a layer attends.

    Attributes:
      pool: those of all layers.
      stretch: the first page of the layer's, the same for all rows, and how many pairs each row has filled from there on.
      pages: that XLA's programs look at, at least the layer's own; so many there are from the first on.
    """

    pool: KeptPairs
    stretch: Int32[Array, "B 2"]
    pages: int = field(metadata={"static": True})

    @property
    def count(self) -> Int32[Array, B]:
        """Filled pairs of each row."""
        return self.stretch[:, 1]

    def own(self, pages: PackedPages | jax.Array) -> Pages:
        """The layer's keys or values as pages of the ring's kind, [B, pages, K, P, D]."""
        return unpacked(stretch_of(pages, self.stretch[0, 0], self.pages))


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class PairChoice:
    """What a layer's kept pairs are chosen by, beside their own scores.

    Attributes:
      ring_score: attention that the pairs in the ring have received.
      queries, query_scale: every `PAGE // samples`-th query of the latest page, rotated, in 8 bits.
    """

    ring_score: Float[Array, "B N K P"]
    queries: Int8[Array, "B samples H D"]
    query_scale: Float[Array, "B samples H"]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class LayerKV:
    """One layer's keys and values.

    Attributes:
      k, v: the ring, [B, N, K, P, D].
      sink_k, sink_v: the first S tokens of the text, float32 [B, K, S, D], kept for when their page has left the ring.
      choice: None in layers that keep no pairs.
    """

    k: Pages
    v: Pages
    sink_k: Float[Array, "B K S D"]
    sink_v: Float[Array, "B K S D"]
    choice: PairChoice | None = None


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
    """An empty layer, which keeps no pairs."""

    def pages_of() -> Pages:
        return init_pages(batch, pages, kv_heads, head_dim, dtype)

    def sink() -> jax.Array:  # never one array twice: the cache is donated
        return jnp.zeros((batch, kv_heads, sinks, head_dim), jnp.float32)

    return LayerKV(pages_of(), pages_of(), sink(), sink())


def init_kept_pairs(batch: int, pages: int, kv_heads: int, head_dim: int, dtype: KVDtype) -> KeptPairs:
    """Nothing kept yet, in `pages` pages of all layers."""
    rows = (batch, pages, kv_heads, PAGE)

    def pairs(bits: Bits) -> PackedPages | jax.Array:
        return jnp.zeros((*rows, head_dim), jnp.float32) if dtype == "float32" else init_packed(rows, head_dim, bits)

    score = jnp.zeros(rows, jnp.float32 if dtype == "float32" else jnp.uint16)
    return KeptPairs(k=pairs(KEY_BITS), v=pairs(VALUE_BITS), stored_score=score)


def init_pair_choice(batch: int, pages: int, heads: int, kv_heads: int, head_dim: int, samples: int) -> PairChoice:
    """Nothing to choose by yet.

    Args:
      pages: of the ring.
      samples: queries noted of every page.
    """
    return PairChoice(
        ring_score=jnp.zeros((batch, pages, kv_heads, PAGE), jnp.float32),
        queries=jnp.zeros((batch, samples, heads, head_dim), jnp.int8),
        query_scale=jnp.zeros((batch, samples, heads), jnp.float32),
    )


def stretch_of(pages: T, first: Int32[Array, ""], count: int, row: Int32[Array, ""] | None = None) -> T:
    """`count` pages of every array of a pool, from `first` on; those of one row, or of all."""

    def part(leaf: jax.Array) -> jax.Array:
        start = (0 if row is None else row, first, *(0 for _ in leaf.shape[2:]))
        return jax.lax.dynamic_slice(leaf, start, (leaf.shape[0] if row is None else 1, count, *leaf.shape[2:]))

    return jax.tree.map(part, pages)


def unpacked(pairs: PackedPages | jax.Array) -> Pages:
    """Kept pairs as pages of the ring's kind, [B, N, K, P, D]."""
    return QuantPages(unpack(pairs), pairs.scale) if isinstance(pairs, PackedPages) else pairs


def write(kv: LayerKV, k: Float[Array, "B T K D"], v: Float[Array, "B T K D"], view: RingView) -> LayerKV:
    """Stores a step's keys and values in the ring."""
    return dataclasses.replace(kv, k=_write_pages(kv.k, k, view), v=_write_pages(kv.v, v, view))


def sample_queries(kv: LayerKV, q: Float[Array, "B T H D"], view: RingView) -> LayerKV:
    """Notes a step's rotated queries, those at the end of each stretch of `PAGE // samples` tokens of a page.

    They lie by position, like the pairs: what a rejected draft token or a text that was taken back has left there is written
    again before it is used.
    """
    if kv.choice is None:
        return kv
    samples = kv.choice.queries.shape[1]
    stretch = PAGE // samples
    offset = view.positions % PAGE
    place = jnp.where(view.valid & (offset % stretch == stretch - 1), offset // stretch, samples)  # the last is none
    values, scale = quantize_rows(q)
    row = jnp.arange(q.shape[0])[:, None]
    choice = dataclasses.replace(
        kv.choice,
        queries=kv.choice.queries.at[row, place].set(values, mode="drop"),
        query_scale=kv.choice.query_scale.at[row, place].set(scale[..., 0], mode="drop"),
    )
    return dataclasses.replace(kv, choice=choice)


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
