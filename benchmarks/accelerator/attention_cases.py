"""Attention and what lies around it: rotation, the cache's pages, kept pairs, and what they are chosen by."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from atlas_jax.config import PAGE, RopeConfig
from atlas_jax.kernels import packed_pages
from atlas_jax.kernels.attention import attend, ref_window_attention, visible
from atlas_jax.kernels.exchange_pairs import exchange_pairs
from atlas_jax.kernels.kv_pages import KeptPairs, LayerKV, LayerPairs, QuantPages, RingView, init_layer_kv
from atlas_jax.kernels.qkv_rope_cache import qkv_rope_cache
from atlas_jax.kernels.received_attention import received_attention, ref_received_attention
from atlas_jax.kernels.rope import frequencies, rope_table, rotations
from benchmarks.accelerator.kernel_case import KernelCase, Pair, drawn, on_cpu

_KV_HEADS, _GROUPS, _DIM, _SINKS = 3, 3, 64, 4
_SCALE = _DIM**-0.5
_FIRST = 1
"""Where the layer's pages begin among those of all kept pairs."""


def _quantised(rows: int, pages: int, seed: int) -> QuantPages:
    random = np.random.default_rng(seed)
    size = rows, pages, _KV_HEADS, PAGE
    values = random.integers(-127, 128, (*size, _DIM)).astype(np.int8)
    return QuantPages(jnp.asarray(values), jnp.asarray(random.uniform(1e-3, 0.02, size).astype(np.float32)))


def _pool(rows: int, pages: int) -> KeptPairs:
    """Kept pairs, `pages` pages of this layer and two of others; no score occurs twice in a head."""
    k, v = (_quantised(rows, pages + 2, seed) for seed in (25, 26))
    return KeptPairs(
        packed_pages.pack(k.values, k.scale, packed_pages.KEY_BITS),
        packed_pages.pack(v.values, v.scale, packed_pages.VALUE_BITS),
        jnp.asarray(_scores(rows, pages + 2)),
    )


def _scores(rows: int, pages: int) -> np.ndarray:
    """Upper halves of numbers from 10⁻¹⁰ to 1, uint16 [rows, pages, K, P]."""
    halves = np.tile(np.arange(0x3000, 0x3F80, dtype=np.uint16), (rows, _KV_HEADS, 1))
    halves = np.random.default_rng(27).permuted(halves, axis=-1)[..., : pages * PAGE]
    return halves.reshape(rows, _KV_HEADS, pages, PAGE).swapaxes(1, 2)


def _floats(pages: Any) -> np.ndarray:
    """What pages stand for, float32."""
    if isinstance(pages, packed_pages.PackedPages):
        pages = QuantPages(on_cpu(packed_pages.unpack, pages), on_cpu(lambda pages: pages.scale, pages))
    return np.asarray(pages.values, np.float32) * np.asarray(pages.scale)[..., None]


def _layer(rows: int, pages: int) -> LayerKV:
    near = (jnp.asarray(drawn(rows, _KV_HEADS, _SINKS, _DIM, seed=seed)) for seed in (4, 5))
    return LayerKV(_quantised(rows, pages, 6), _quantised(rows, pages, 7), *near)


def _attention(rows: int, tokens: int, pages: int, kept_pages: int = 0) -> Pair:
    kv = _layer(rows, pages)
    page = np.tile(np.arange(pages), (rows, 1)).astype(np.int32)
    positions = np.tile((pages - 1) * PAGE + 9 + np.arange(tokens), (rows, 1)).astype(np.int32)
    last, first = np.full(rows, pages - 1, np.int32), np.ones(rows, np.int32)
    view = RingView(*map(jnp.asarray, (page, last, positions, np.ones(positions.shape, bool), first)))
    queries = [jnp.asarray(drawn(rows, tokens, _KV_HEADS * _GROUPS, _DIM, seed=seed)) for seed in (8, 9)]
    pairs = kept = None
    if kept_pages:
        count = np.maximum(kept_pages * PAGE - 37 * np.arange(rows), 1).astype(np.int32)
        pool, stretch = _pool(rows, kept_pages), np.stack([np.full(rows, _FIRST, np.int32), count], axis=1)
        pairs = LayerPairs(pool, jnp.asarray(stretch), kept_pages)
        kept = *(_floats(part)[:, _FIRST : _FIRST + kept_pages] for part in (pool.k, pool.v)), count

    def run(q: Any, q_sink: Any, kv: LayerKV, view: RingView, pairs: LayerPairs | None) -> jax.Array:
        return attend(q, q_sink, kv, view, None, visible(view, None), _SCALE, pairs)

    masks = visible(view, None)
    plain = *queries, _floats(kv.k), _floats(kv.v), kv.sink_k, kv.sink_v, *masks
    exact = on_cpu(lambda kept, *args: ref_window_attention(*args, _SCALE, kept), kept, *plain)
    return jax.jit(run)(*queries, kv, view, pairs), exact


def _received(samples: int, pages: int, kept_pages: int) -> Pair:
    rows, row, kept = 2, 1, kept_pages * PAGE - 37
    kv, pool = _layer(rows, pages), _pool(rows, kept_pages)
    queries = [jnp.asarray(drawn(samples, _KV_HEADS * _GROUPS, _DIM, seed=seed)) for seed in (28, 29)]
    seen = np.random.default_rng(30).uniform(size=(samples, pages, PAGE)) < 0.8
    scalars = jnp.int32(_FIRST), jnp.int32(kept)

    def run(q: Any, q_near: Any, kv: LayerKV, pool: KeptPairs, seen: Any, first: Any, kept: Any) -> Any:
        where = jnp.int32(row), seen, jnp.bool_(True), first, kept, kept_pages
        return received_attention(q, q_near, kv, pool, *where, _SCALE)

    keys, near = _floats(kv.k)[row], _floats(pool.k)[row, _FIRST : _FIRST + kept_pages]
    plain = *queries, keys, kv.sink_k[row], near, seen, np.asarray(True), np.int32(kept)
    exact = on_cpu(lambda *args: ref_received_attention(*args, _SCALE), *plain)
    return jax.jit(run)(*queries, kv, pool, jnp.asarray(seen), *scalars), exact


def _exchange(kept_pages: int) -> Pair:
    """Which pairs are left, in the order of their scores; where they lie means nothing."""
    layers, rows, row = 2, 2, 1
    pool, pages = _pool(rows, layers * kept_pages), _quantised(2, layers, 31)
    held = pool.stored_score.shape[1]
    scores = _scores(rows, held + layers)
    pool = dataclasses.replace(pool, stored_score=jnp.asarray(scores[:, :held]))
    own = np.asarray(packed_pages.whole(jnp.asarray(scores[row, held:])))
    capacity = np.asarray([kept_pages * PAGE - 5, kept_pages * PAGE], np.int32)
    kept = np.asarray([capacity[0], PAGE // 2], np.int32)
    first = _FIRST + kept_pages * np.arange(layers, dtype=np.int32)
    k, v = (jax.tree.map(lambda part, i=i: part[i], pages) for i in (0, 1))  # [layers, K, P, D]

    def run(pool: KeptPairs, first: Any, own: Any, k: QuantPages, v: QuantPages, kept: Any, capacity: Any) -> KeptPairs:
        return exchange_pairs(pool, jnp.int32(row), first, own, k, v, kept, capacity, kept_pages)

    found = jax.jit(run)(pool, *map(jnp.asarray, (first, own)), k, v, *map(jnp.asarray, (kept, capacity)))

    def flat(pages: np.ndarray, layer: int, head: int, count: int) -> np.ndarray:
        return pages[row, first[layer] : first[layer] + kept_pages, head].reshape(-1, *pages.shape[4:])[:count]

    def sorted_pairs(parts: list[np.ndarray], most: int) -> list[np.ndarray]:
        order = np.argsort(-parts[0], kind="stable")[:most]
        return [part[order] for part in parts]

    before, after = ([on_cpu(lambda pool: pool.score, one), _floats(one.k), _floats(one.v)] for one in (pool, found))
    bits = packed_pages.KEY_BITS, packed_pages.VALUE_BITS
    packed = [
        _floats(on_cpu(lambda one, bits=bits: packed_pages.pack(one.values, one.scale, bits), one))
        for one, bits in zip((k, v), bits, strict=True)
    ]
    of_page = [own, *packed]
    left, wanted = [], []
    for layer, head in np.ndindex(layers, _KV_HEADS):
        held = [flat(part, layer, head, kept[layer]) for part in before]
        joined = [np.concatenate([one, part[layer, head]]) for one, part in zip(held, of_page, strict=True)]
        most = min(len(joined[0]), int(capacity[layer]))
        wanted += sorted_pairs(joined, most)
        left += sorted_pairs([flat(part, layer, head, most) for part in after], most)
    return left, wanted


def _cache_write(tokens: int) -> Pair:
    rows, pages, eps = 2, 3, 1e-5
    x = drawn(rows, tokens, _KV_HEADS, _GROUPS + 2, _DIM, seed=33)
    gains = 1 + drawn(_DIM, seed=34) / 4, 1 + drawn(_DIM, seed=35) / 4
    turns = [np.random.default_rng(seed).uniform(0, 7, (rows, tokens, _DIM // 2)) for seed in (36, 37)]
    rotary, near = ((np.cos(turn).astype(np.float32), np.sin(turn).astype(np.float32)) for turn in turns)
    slot, offset = np.asarray([2, 0], np.int32), 11
    positions = np.tile(PAGE + offset + np.arange(tokens), (rows, 1)).astype(np.int32)
    page = np.tile(np.arange(pages), (rows, 1)).astype(np.int32)
    view = RingView(*map(jnp.asarray, (page, slot, positions, np.ones((rows, tokens), bool), np.zeros(rows, np.int32))))
    empty = init_layer_kv(rows, pages, _KV_HEADS, _DIM, _SINKS, "int8")
    q, q_near, kv = jax.jit(
        lambda x, gains, rotary, near, kv, view: qkv_rope_cache(x, gains, eps, rotary, near, kv, view)
    )(*jax.tree.map(jnp.asarray, (x, gains, rotary, near)), empty, view)

    def normed(part: np.ndarray, gain: np.ndarray) -> np.ndarray:
        return part / np.sqrt((part**2).mean(axis=-1, keepdims=True) + eps) * gain

    def turned(part: np.ndarray, turn: np.ndarray) -> np.ndarray:
        half = part[..., : _DIM // 2] + 1j * part[..., _DIM // 2 :]
        half = half * np.exp(1j * turn)[:, :, None]
        return np.concatenate([half.real, half.imag], axis=-1)

    wide = x.astype(np.float64)
    queries = normed(wide[..., :-2, :].reshape(rows, tokens, -1, _DIM), gains[0])
    stored = []
    for new in (turned(normed(wide[..., -2, :], gains[1]), turns[0]), wide[..., -1, :]):
        ring = np.zeros((rows, pages, _KV_HEADS, PAGE, _DIM))
        for row in range(rows):
            ring[row, slot[row], :, offset : offset + tokens] = new[row].swapaxes(0, 1)
        stored.append(ring)
    found = q, q_near, *(_floats(part) for part in (kv.k, kv.v))
    return found, (turned(queries, turns[0]), turned(queries, turns[1]), *stored)


def _rotations() -> Pair:
    rope = RopeConfig(base=100_000.0, dims=_DIM)
    positions = np.asarray([0, 1, 1023, 1024, 131_072, 99_999_999, 2**30 - 1], np.int32)
    turns = positions[:, None].astype(np.longdouble) * frequencies(rope).astype(np.longdouble) / (2 * np.pi)
    angle = ((turns - np.floor(turns)) * (2 * np.pi)).astype(np.float64)
    return jax.jit(rotations)(rope_table(rope), jnp.asarray(positions)), (np.cos(angle), np.sin(angle))


CASES = {
    "rotation and cache write, a token": KernelCase(
        ("qkv_rope_cache", "rope", "kv_pages", "reductions"), lambda _: _cache_write(1), 1e-2
    ),
    "rotation and cache write, a chunk": KernelCase(
        ("qkv_rope_cache", "rope", "kv_pages", "reductions"), lambda _: _cache_write(32), 1e-2
    ),
    "rotary angles up to position 2³⁰": KernelCase(("rope",), lambda _: _rotations(), 1e-5),
    "window attention of one token": KernelCase(
        ("attention",), lambda quick: _attention(2, 1, 2 if quick else 8), 2e-2
    ),
    "window attention of a chunk": KernelCase(("attention",), lambda quick: _attention(1, 32, 2 if quick else 8), 2e-2),
    "window attention over kept pairs": KernelCase(
        ("attention", "packed_pages"), lambda quick: _attention(2, 1, 2 if quick else 4, 2 if quick else 9), 2e-2
    ),
    "received attention": KernelCase(
        ("received_attention", "packed_pages"), lambda quick: _received(8 if quick else 32, 2 if quick else 4, 2), 2e-2
    ),
    "exchange of kept pairs": KernelCase(
        ("exchange_pairs", "packed_pages"), lambda quick: _exchange(2 if quick else 9), 0.0
    ),
}
