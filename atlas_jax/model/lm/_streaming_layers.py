"""Layers of a language model chunk by chunk: what each carries from one chunk of a text to the next.

A chunk is a few tokens of each row. Every leaf of a layer's state has a leading axis of rows; rows may be at different
places of their texts, and a row that is not active keeps its state bit for bit. What grows with the text is written
where it lies and never copied.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from atlas_jax import memory
from atlas_jax.kernels.rope import RopeTable, rotations
from atlas_jax.memory import MemoryState, Tokens
from atlas_jax.memory._step import measured_step
from atlas_jax.model.lm.attention import NEGATIVE, Attention, rotate_pairs
from atlas_jax.model.lm.blocks import MemoryAsContext, MemoryAsGate
from atlas_jax.model.lm.config import LMConfig
from atlas_jax.model.lm.deep import DeepKeys, DeepMemory, added_weights, deep_keys, deep_read
from atlas_jax.model.lm.memory import QKV, Memory, MemoryLayer, MixedMemory, groups
from atlas_jax.typing import Array, Bool, Float, Int32

MAX_CHUNK = 64
"""Tokens of a chunk at most: a sliding window's ring has room for a chunk beside the window."""

Tree = TypeVar("Tree")


@dataclass(frozen=True)
class Chunk:
    """Where the tokens of a chunk stand.

    Attributes:
      position: of each token in its row's text, from 0.
      active: rows that read; the others only take part in the arithmetic.
      table: of the model's rotations.
    """

    position: Int32[Array, "B T"]
    active: Bool[Array, " B"]
    table: RopeTable

    def rotate(self, x: Float[Array, "B T heads D"], place: Int32[Array, "B T"]) -> Float[Array, "B T heads D"]:
        """Queries or keys, rotated to a place each."""
        return rotate_pairs(x, *rotations(self.table, place))

    def slots(self, index: Int32[Array, "B T"], size: int) -> Int32[Array, "B T"]:
        """Where tokens are written: at the index, or outside in rows that are not active, each at another slot."""
        return jnp.where(self.active[:, None], index, size + jnp.arange(index.shape[1]))


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Cache:
    """Rotated keys, and values, of the tokens an attention may still see; heads first: a product reads them as they lie."""

    k: Float[Array, "B K slots D"]
    v: Float[Array, "B K slots D"]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class MemoryRun:
    """A memory layer between two tokens.

    Attributes:
      memory: its state; `phase` has an axis of rows, as all else.
      before: projections of the last taps − 1 tokens, by the names of `memory.QKV`, as their convolutions see them.
      loss: inner loss ℓ of the newest token when it was written, mean over heads.
      losses: sum of such losses of all tokens since the state was made or `forget_losses` was called.
    """

    memory: MemoryState
    before: dict[str, jax.Array]
    loss: Float[Array, " B"]
    losses: Float[Array, " B"]


Runs = tuple[MemoryRun, ...]
"""A layer's memories, one per rule."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Mixed:
    """A memory and a sliding-window attention, beside or after each other (kinds G and L)."""

    memory: Runs
    cache: Cache


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Segment:
    """A memory as context, in a segment. What is left of the segment before is overwritten or not seen.

    Attributes:
      start: the memories as they were when the segment began.
      memory: the memories now, and projections of attended tokens of the segment.
      before: of each, query projections of the segment's last taps − 1 tokens.
      recalled: keys and values of what the memory recalled for each token.
      own: those of the tokens.
    """

    start: tuple[MemoryState, ...]
    memory: Runs
    before: tuple[Float[Array, "B taps-1 H d_k"], ...]
    recalled: Cache
    own: Cache


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Deep:
    """Keys of a deep memory, with heads before slots (as `by_heads` makes them), and the weight each has gathered."""

    keys: DeepKeys
    count: Float[Array, "B H slots"]


def init_cache(config: LMConfig, batch: int, slots: int, dtype: jnp.dtype) -> Cache:
    """Nothing seen."""
    shape = (batch, config.n_kv, slots, config.dim)
    return Cache(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype))


def window_slots(config: LMConfig) -> int:
    """Slots of a sliding window's ring: a chunk is written before its first token looks back."""
    return config.window + MAX_CHUNK


def init_runs(layer: Memory, config: LMConfig, batch: int, dtype: jnp.dtype) -> Runs:
    """The learned memories that every text starts from."""
    found = []
    for one in groups(layer):
        shapes = {"q": one.q.shape[1:], "k": one.k.shape[1:], "v": one.v.shape[1:]}
        before = {n: jnp.zeros((batch, config.conv - 1, *shapes[n]), dtype) for n in QKV}
        state = init_memory(one, batch)
        none = [jnp.zeros(batch, state.tail_gate.dtype) for _ in range(2)]  # never one array twice
        found.append(MemoryRun(state, before, *none))
    return tuple(found)


def forget_losses(state: Tree) -> Tree:
    """A state with the sums of its losses at zero, on the host: a program that takes them compiles nothing for it."""

    def forgotten(x: Any) -> Any:
        if not isinstance(x, MemoryRun):
            return x
        return dataclasses.replace(x, losses=np.zeros(x.losses.shape, x.losses.dtype))  # type: ignore[arg-type]

    return jax.tree.map(forgotten, state, is_leaf=lambda x: isinstance(x, MemoryRun))


def runs_of(state: object) -> list[MemoryRun]:
    """All memories in a state."""
    nodes = jax.tree.leaves(state, is_leaf=lambda x: isinstance(x, MemoryRun))
    return [node for node in nodes if isinstance(node, MemoryRun)]


def init_memory(layer: MemoryLayer, batch: int) -> MemoryState:
    """A memory of `init_runs`, every row with a phase of its own."""
    state = layer.initial_state(batch)
    return dataclasses.replace(state, phase=jnp.zeros(batch, jnp.int32))


def init_segment(layer: MemoryAsContext, config: LMConfig, batch: int, dtype: jnp.dtype) -> Segment:
    """Before the first segment."""
    return Segment(
        start=tuple(init_memory(one, batch) for one in groups(layer.memory)),
        memory=init_runs(layer.memory, config, batch, dtype),
        before=tuple(jnp.zeros((batch, config.conv - 1, *one.q.shape[1:]), dtype) for one in groups(layer.memory)),
        recalled=init_cache(config, batch, config.segment, dtype),
        own=init_cache(config, batch, config.segment, dtype),
    )


def init_deep(config: LMConfig, batch: int, slots: int, dtype: jnp.dtype) -> Deep:
    """Nothing learned."""
    heads = (batch, config.heads, slots)
    sizes = (config.dim, config.dot_hidden, config.dot_hidden, config.dim)
    return Deep(DeepKeys(*(jnp.zeros((*heads, size), dtype) for size in sizes)), jnp.zeros(heads, dtype))


def extend_attention(
    layer: Attention, cache: Cache, x: Float[Array, "B T E"], chunk: Chunk, window: int | None
) -> tuple[Cache, Float[Array, "B T E"]]:
    """Attention to everything, in a cache that ends (tokens past its end are lost), or to a window, in a ring.

    Args:
      window: tokens seen; None for all.
    """
    first = persistent_keys(layer, x)
    before = first.k.shape[2]
    q, k, v = layer.heads(x)
    q, k = (chunk.rotate(y, chunk.position + before) for y in (q, k))
    size = cache.k.shape[2]
    slots = chunk.slots(chunk.position if window is None else chunk.position % size, size)
    cache = write(cache, slots, by_heads(Cache(k, v)))
    slot = jnp.arange(size)
    if window is None:
        seen = slot <= chunk.position[:, :, None]
    else:
        last = chunk.position[:, -1:]
        held = last - (last - slot) % size  # the newest position that this slot can hold; before 0 it holds nothing
        distance = chunk.position[:, :, None] - held[:, None]
        seen = (held[:, None] >= 0) & (distance >= 0) & (distance < window)
    always = jnp.ones((1, x.shape[1], before), bool)
    return cache, layer.project(attend_caches(q, [first, cache], [always, seen]))


def attend_caches(
    q: Float[Array, "B T H D"], caches: Sequence[Cache], masks: Sequence[Bool[Array, "#B T slots"]]
) -> Float[Array, "B T H D"]:
    """As `attention.attend`, over keys and values of several caches: scores are put together, keys are not."""
    grouped = q.reshape(*q.shape[:2], caches[0].k.shape[1], -1, q.shape[3])
    scores = []
    for cache, mask in zip(caches, masks, strict=True):
        score = jnp.einsum("btkgd,bkud->bkgtu", grouped, cache.k) * q.shape[-1] ** -0.5
        scores.append(jnp.where(mask[:, None, None], score, NEGATIVE))
    borders = np.cumsum([score.shape[-1] for score in scores])[:-1]
    shares = jnp.split(jax.nn.softmax(jnp.concatenate(scores, axis=-1), axis=-1), borders, axis=-1)
    parts = [jnp.einsum("bkgtu,bkud->btkgd", share, c.v) for share, c in zip(shares, caches, strict=True)]
    return sum(parts[1:], start=parts[0]).reshape(q.shape)


def persistent_keys(layer: Attention, x: Float[Array, "B T E"]) -> Cache:
    """Keys and values of the persistent tokens, which stand before the text from place 0 on, for the rows of x."""
    first, _ = layer.with_persistent(x[:1, :0])
    _, k, v = layer.qkv(first)
    return by_heads(Cache(*(jnp.broadcast_to(y, (x.shape[0], *y.shape[1:])) for y in (k, v))))


def extend_memory(layer: Memory, runs: Runs, x: Float[Array, "B T E"], active: Bool[Array, " B"]) -> tuple[Runs, Any]:
    """Writes tokens; outputs, as the layer takes them, are read after each token's own write, before the norm."""
    found, reads = [], []
    for one, run in zip(groups(layer), runs, strict=True):
        projected = {name: one.projected(name, x) for name in QKV}
        convolved = {name: one.convolved(name, y, run.before[name]) for name, y in projected.items()}
        state, read, loss = _write_rows(one, run.memory, Tokens(**convolved, **one.gates(x)))
        before = {name: last_tokens(run.before[name], y) for name, y in projected.items()}
        new = MemoryRun(state, before, loss[:, -1], run.losses + loss.sum(axis=1))
        found.append(where_rows(active, new, run))
        reads.append(read)
    return tuple(found), _as_layer(layer, reads)


def _as_layer(layer: Memory, values: Sequence[jax.Array]) -> Any:
    """What the memories of a layer have made, as its own methods take it."""
    return tuple(values) if isinstance(layer, MixedMemory) else values[0]


def _write_rows(
    layer: MemoryLayer, state: MemoryState, tokens: Tokens
) -> tuple[MemoryState, Float[Array, "B H T d_v"], Float[Array, "B T"]]:
    """`memory.measure`, or a measured step for one token, in every row at its own phase; and losses, means over heads."""
    if tokens.k.shape[2] > 1:
        state, read, found = jax.vmap(partial(memory.measure, layer.rule, layer.params()))(state, tokens)
        return state, read, found.loss.mean(axis=1)
    token = jax.tree.map(lambda x: x[:, :, 0], tokens)
    state, (read, found) = jax.vmap(partial(measured_step, layer.rule, layer.params()))(state, token)
    return state, read[:, :, None], found.loss.mean(axis=1)[:, None]


def extend_gate(
    layer: MemoryAsGate, state: Mixed, x: Float[Array, "B T E"], chunk: Chunk, window: int
) -> tuple[Mixed, Float[Array, "B T E"]]:
    """Kind G."""
    cache, near = extend_attention(layer.attention, state.cache, x, chunk, window)
    mixer: Any = layer.memory
    runs, read = extend_memory(mixer, state.memory, x, chunk.active)
    return Mixed(runs, cache), layer.combine(near, mixer.project(mixer.gated(read, x)))


def extend_segments(
    layer: MemoryAsContext, state: Segment, x: Float[Array, "B T E"], chunk: Chunk
) -> tuple[Segment, Float[Array, "B T E"]]:
    """Kind C, token by token: where in a chunk segments end differs from row to row."""
    first = persistent_keys(layer.attention, x)

    def one(state: Segment, token: tuple[jax.Array, jax.Array]) -> tuple[Segment, jax.Array]:
        x, position = token
        state, y = _segment_token(layer, first, state, x[:, None], Chunk(position[:, None], chunk.active, chunk.table))
        return state, y[:, 0]

    state, out = jax.lax.scan(one, state, (jnp.swapaxes(x, 0, 1), chunk.position.T))
    return state, jnp.swapaxes(out, 0, 1)


def _segment_token(
    layer: MemoryAsContext, first: Cache, state: Segment, x: Float[Array, "B 1 E"], chunk: Chunk
) -> tuple[Segment, Float[Array, "B 1 E"]]:
    size, before = state.own.k.shape[2], first.k.shape[2]
    place = chunk.position % size
    begins = chunk.active & (place[:, 0] == 0)
    start = where_rows(begins, tuple(run.memory for run in state.memory), state.start)
    tails = (state.before, tuple(run.before for run in state.memory))
    query_tails, tails = where_rows(begins, jax.tree.map(jnp.zeros_like, tails), tails)  # convolutions begin anew

    attention, each = layer.attention, groups(layer.memory)
    projected = [one.projected("q", x) for one in each]
    reads = [
        _read_rows(one, held, one.convolved("q", y, tail))
        for one, held, y, tail in zip(each, start, projected, query_tails, strict=True)
    ]
    _, k, v = attention.heads(layer.recalled(_as_layer(layer.memory, reads), x))
    slots = chunk.slots(place, size)
    recalled = write(state.recalled, slots, by_heads(Cache(chunk.rotate(k, before + place), v)))
    q, k, v = attention.heads(x)
    q, k = (chunk.rotate(y, before + size + place) for y in (q, k))
    own = write(state.own, slots, by_heads(Cache(k, v)))

    seen = jnp.arange(size) <= place[:, :, None]
    always = jnp.ones((1, 1, before), bool)
    attended = attention.project(attend_caches(q, [first, recalled, own], [always, seen, seen]))
    runs = tuple(dataclasses.replace(run, before=tail) for run, tail in zip(state.memory, tails, strict=True))
    runs, written = extend_memory(layer.memory, runs, attended, chunk.active)
    moved = tuple(last_tokens(tail, y) for tail, y in zip(query_tails, projected, strict=True))
    queries = where_rows(chunk.active, moved, query_tails)
    return Segment(start, runs, queries, recalled, own), layer.combine(attended, written)


def _read_rows(layer: MemoryLayer, state: MemoryState, q: Float[Array, "B H T d_k"]) -> Float[Array, "B H T d_v"]:
    return jax.vmap(partial(memory.read, layer.rule, layer.params()))(state, q)


def extend_deep(
    layer: DeepMemory, state: Deep, x: Float[Array, "B T E"], chunk: Chunk
) -> tuple[Deep, Float[Array, "B T E"]]:
    """Kind D, in a cache that ends: tokens past its end are lost."""
    w1, w2, gamma = layer.w1[...], layer.w2[...], layer.gates(x)
    q, k, v = layer.heads(x)
    q, k = (chunk.rotate(y, chunk.position) for y in (q, k))
    size = state.count.shape[2]
    learned = by_heads(deep_keys(k, v, w1, w2, l2=layer.l2))
    keys = write(state.keys, chunk.slots(chunk.position, size), learned)
    distance = chunk.position[:, :, None] - jnp.arange(size)
    count = state.count[:, :, None] + added_weights(gamma, distance)
    y = deep_read(q, by_heads(keys), count, distance, chunk.position, w1, w2)
    return Deep(keys, _add_weights(state.count, gamma, chunk)), layer.project(y)


def _add_weights(count: Float[Array, "B H slots"], gamma: Float[Array, "B H T c"], chunk: Chunk) -> jax.Array:
    """Weights after the chunk: each token adds γ to the keys of its window, itself first."""
    size, window = count.shape[2], gamma.shape[-1]
    index = (chunk.position[:, :, None] - jnp.arange(window)).reshape(count.shape[0], -1)
    index = jnp.where(chunk.active[:, None] & (index >= 0), index, size)  # a negative index would count from the end
    added = jnp.moveaxis(gamma, 1, -1).reshape(*index.shape, -1)
    return count.at[jnp.arange(count.shape[0])[:, None], :, index].add(added, mode="drop")


def by_heads(tokens: Tree) -> Tree:
    """Arrays [B, T, heads, ·] as caches have them, [B, heads, T, ·], and back."""
    return jax.tree.map(lambda x: jnp.swapaxes(x, 1, 2), tokens)


def write(cache: Tree, slots: Int32[Array, "B T"], new: Tree) -> Tree:
    """Puts the tokens of a chunk where they belong; slots past the end are dropped."""
    rows = jnp.arange(slots.shape[0])[:, None]

    def one(old: Float[Array, "B heads slots d"], x: Float[Array, "B heads T d"]) -> Float[Array, "B heads slots d"]:
        return old.at[rows, :, slots].set(jnp.swapaxes(x, 1, 2), mode="drop", unique_indices=True)

    return jax.tree.map(one, cache, new)


def last_tokens(before: Float[Array, "B t H d"], y: Float[Array, "B T H d"]) -> Float[Array, "B t H d"]:
    """The last t of `before` and the chunk together."""
    return jnp.concatenate([before, y], axis=1)[:, y.shape[1] :]


def where_rows(rows: Bool[Array, " B"], new: Tree, old: Tree) -> Tree:
    """New where the row is chosen, else old."""
    return jax.tree.map(lambda a, b: jnp.where(rows.reshape(-1, *(1,) * (b.ndim - 1)), a, b), new, old)
