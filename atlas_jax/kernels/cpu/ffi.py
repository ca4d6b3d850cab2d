"""The C kernels as functions of arrays, called inside jit through XLA's foreign-function interface.

Which shapes a kernel takes is said where it is chosen, in the operation's own file beside XLA's form of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from atlas_jax.config import PAGE
from atlas_jax.kernels.cpu.library import VERSION
from atlas_jax.kernels.packed_pages import PackedPages
from atlas_jax.typing import Array, Bool, Float, Int8, Int32, UInt8, UInt16

_ACTIVATIONS = "silu", "gelu_tanh", "swiglu_oai"
"""In the order of linear.h."""
MAX_ROWS = 128
"""Rows of a GEMM that one call takes."""
_RECEIVED_QUERIES = 32
"""Queries whose probabilities one part of a call of `received_attention` adds up."""


def linear(
    x: Float[Array, "*matrices rows inp"],
    weight: Int8[Array, "*matrices out inp"] | UInt8[Array, "out records bytes"],
    weight_scale: Float[Array, "*matrices out"],
) -> Float[Array, "*matrices rows out"]:
    """x·Wᵀ of activations quantised to the two terms of `linear.split_rows`, for one matrix or a batch of them.

    The weight may be that of a `linear.PackedArray`.
    """
    (out,) = _matmuls("linear", (x,), weight, weight_scale)
    return out


def normed_linear(
    x: Float[Array, "rows inp"],
    gain: Float[Array, inp],
    eps: float,
    weight: Int8[Array, "out inp"] | UInt8[Array, "out records bytes"],
    weight_scale: Float[Array, out],
) -> Float[Array, "rows out"]:
    """`fused_linear.rms_norm` and `linear`."""
    (out,) = _matmuls("normed_linear", (x,), weight, weight_scale, gain, eps=np.float32(eps))
    return out


def summed_linear(
    x: Float[Array, "rows inp"],
    added: Float[Array, "rows inp"],
    added_gain: Float[Array, inp] | None,
    gain: Float[Array, inp],
    eps: float,
    weight: Int8[Array, "out inp"] | UInt8[Array, "out records bytes"],
    weight_scale: Float[Array, out],
) -> tuple[Float[Array, "rows out"], Float[Array, "rows inp"]]:
    """The sum of x and `added`, which is normed first if it has a gain, and `normed_linear` of it: the output, the sum."""
    rest = (gain,) if added_gain is None else (gain, added_gain)
    out, total = _matmuls("summed_linear", (x, added), weight, weight_scale, *rest, eps=np.float32(eps))
    return out, total


def gated_linear(
    x: Float[Array, "rows 2*inp"],
    block: int,
    activation: str,
    weight: Int8[Array, "out inp"] | UInt8[Array, "out records bytes"],
    weight_scale: Float[Array, out],
) -> Float[Array, "rows out"]:
    """`fused_linear.gated` and `linear`; `block` a multiple of 16."""
    settings = {"block": np.int64(block), "activation": np.int64(_ACTIVATIONS.index(activation))}
    (out,) = _matmuls("gated_linear", (x,), weight, weight_scale, **settings)
    return out


def _matmuls(
    name: str,
    rows: tuple[jax.Array, ...],
    weight: jax.Array,
    weight_scale: jax.Array,
    *rest: jax.Array,
    **settings: Any,
) -> tuple[jax.Array, ...]:
    """The GEMM of any number of rows, as calls of as many as one takes, and of two arrays of rows also their sum."""
    calls: list[Sequence[jax.Array]] = []
    for first in range(0, rows[0].shape[-2], MAX_ROWS):
        x, *added = (array[..., first : first + MAX_ROWS, :] for array in rows)
        widths = weight_scale.shape[-1], *(array.shape[-1] for array in added)
        results = tuple(jax.ShapeDtypeStruct((*x.shape[:-1], width), jnp.float32) for width in widths)
        calls.append(_call(name, results, x, weight, weight_scale, *rest[:1], *added, *rest[1:], **settings))
    return tuple(parts[0] if len(parts) == 1 else jnp.concatenate(parts, axis=-2) for parts in zip(*calls, strict=True))


def monomials(
    key: Float[Array, "B T R"],
    factors: Int32[Array, "degree M F"],
    weight: Float[Array, "degree M"],
    degree: Int32[Array, B],
    *,
    rounded: bool = False,
) -> Float[Array, "B T M"]:
    """`monomials.gather_monomials` with the tables of each row's degree; `rounded` gives bfloat16."""
    shape = jax.ShapeDtypeStruct((*key.shape[:2], factors.shape[1]), jnp.bfloat16 if rounded else jnp.float32)
    (out,) = _call("rounded_monomials" if rounded else "monomials", (shape,), key, factors, weight, degree)
    return out


def greedy(scores: Float[Array, "B V"]) -> tuple[Int32[Array, B], Float[Array, B]]:
    """The first of the best tokens of every row, and the logarithm of Σ exp(score)."""
    rows = scores.shape[:1]
    token, log_mass = _call(
        "greedy", (jax.ShapeDtypeStruct(rows, jnp.int32), jax.ShapeDtypeStruct(rows, jnp.float32)), scores
    )
    return token, log_mass


def draw(
    scores: Float[Array, "B V"],
    *,
    temperature: Float[Array, B],
    top_k: Int32[Array, B],
    typical_p: Float[Array, B],
    top_p: Float[Array, B],
    min_p: Float[Array, B],
    uniform: Float[Array, B],
) -> Int32[Array, B]:
    """A token for every row of a temperature above 0, as `uniform` says, from what the filters leave in this order."""
    shape = jax.ShapeDtypeStruct(top_k.shape, jnp.int32)
    (token,) = _call("draw", (shape,), scores, temperature, top_p, min_p, typical_p, uniform, top_k)
    return token


def blend(
    logits: Float[Array, "B T V"],
    found: Float[Array, "B T C"],
    codes: Int8[Array, "V C"],
    code_scale: Float[Array, V],
    seen: Int8[Array, "B V"],
    active: Bool[Array, "B T"],
    log_odds: Float[Array, "B T"],
    gate: Float[Array, features],
) -> tuple[Float[Array, "B T V"], Float[Array, "B T"]]:
    """The mixture of model and memory as logits, and the gate; see `recall_memory.blend`.

    Args:
      found: what was read out of the memory; its dot products with the codes of seen tokens are their scores.
      active: where the memory is read; elsewhere the logits come back as they are.
    """
    flat = logits.reshape(-1, logits.shape[-1])  # as `linear` made them: XLA copies what is reshaped between two calls
    whole = jax.ShapeDtypeStruct(flat.shape, jnp.float32)
    shapes = whole, jax.ShapeDtypeStruct(active.shape, jnp.float32), whole  # the last is a buffer for scores
    args = flat, found, codes, code_scale, seen, active, log_odds, gate
    mixed, passed, _ = _call("blend", shapes, *args, in_place={0: 0})
    return mixed.reshape(logits.shape), passed


def qkv_rope_cache(
    x: Float[Array, "B T K G+2 D"],
    gains: tuple[Float[Array, D], Float[Array, D]] | None,
    eps: float,
    rotary: Sequence[Float[Array, "B T half"]],
    near: Sequence[Float[Array, "B T half"]],
    slot: Int32[Array, B],
    positions: Int32[Array, "B T"],
    valid: Bool[Array, "B T"],
    ring: tuple[Int8[Array, "B N K P D"] | Float[Array, "B N K P"], ...],
    noted: tuple[Int8[Array, "B samples H D"], Float[Array, "B samples H"]] | None,
) -> tuple[
    Float[Array, "B T H D"],
    Float[Array, "B T H D"],
    tuple[Int8[Array, "B N K P D"] | Float[Array, "B N K P"], ...],
    tuple[Int8[Array, "B samples H D"], Float[Array, "B samples H"]] | None,
]:
    """Queries for the ring and for the sinks, and what is stored of them all; see `kernels.qkv_rope_cache`.

    Args:
      ring: values and scale of the keys, then of the values; changed in place.
      noted: the queries of a layer that keeps pairs, in 8 bits, and their scale; changed in place.
    """
    batch, tokens, kv_heads, parts, dim = x.shape
    queries = jax.ShapeDtypeStruct((batch, tokens, kv_heads * (parts - 2), dim), jnp.float32)
    stored = *ring, *(noted or ())
    shapes = queries, queries, *(jax.ShapeDtypeStruct(part.shape, part.dtype) for part in stored)
    args = x, *rotary, *near, slot, positions, valid, *stored
    in_place = {len(args) - len(stored) + i: 2 + i for i in range(len(stored))}
    settings = {"eps": np.float32(eps), "norms": np.int64(gains is not None), "notes": np.int64(noted is not None)}
    q, q_sink, *written = _call("qkv_rope_cache", shapes, *args, *(gains or ()), in_place=in_place, **settings)
    after = None if noted is None else (written[len(ring)], written[len(ring) + 1])
    return q, q_sink, tuple(written[: len(ring)]), after


def attention(
    q: Float[Array, "B T H D"],
    q_sink: Float[Array, "B T H D"],
    k: Int8[Array, "B N K P D"],
    k_scale: Float[Array, "B N K P"],
    v: Int8[Array, "B N K P D"],
    v_scale: Float[Array, "B N K P"],
    sink_k: Float[Array, "B K S D"],
    sink_v: Float[Array, "B K S D"],
    seen: Bool[Array, "B T N P"],
    sinks_seen: Bool[Array, "B T"],
    scale: float,
    kept: tuple[PackedPages, PackedPages, Int32[Array, "B 2"]] | None = None,
    null_logit: Float[Array, H] | None = None,
) -> Float[Array, "B T H D"]:
    """Softmax attention over a ring of int8 pages, the sinks and kept pairs; see `kernels.attention.window_attention`.

    Args:
      kept: keys and values of all layers; the first page of this one's, and how many pairs each row has.
    """
    factor = jnp.asarray(scale, jnp.float32)
    shape = jax.ShapeDtypeStruct(q.shape, jnp.float32)
    args = (q, q_sink, k, k_scale, v, v_scale, sink_k, sink_v, seen, sinks_seen, factor)
    null = () if null_logit is None else (null_logit,)
    if kept is None:
        (out,) = _call("attention", (shape,), *args, *null)
    else:
        keys, values, stretch = kept
        (out,) = _call("kept_attention", (shape,), *args, *_packed(keys), *_packed(values), stretch, *null)
    return out


def exchange_pairs(
    row: Int32[Array, ""],
    first: Int32[Array, layers],
    kept: Int32[Array, layers],
    capacity: Int32[Array, layers],
    own: Float[Array, "layers K P"],
    page: tuple[Int8[Array, "layers K P D"] | Float[Array, "layers K P"], ...],
    score: UInt16[Array, "B pool K P"],
    k: PackedPages,
    v: PackedPages,
) -> tuple[UInt16[Array, "B pool K P"], PackedPages, PackedPages]:
    """`exchange_pairs.exchange_pairs` of packed pairs: score, keys and values, changed in place.

    Args:
      first: the first page of each layer's.
      page: values and scale of its keys, then of its values.
    """
    args = row, first, kept, capacity, own, *page
    old, tree = jax.tree.flatten((score, k, v))
    shapes = tuple(jax.ShapeDtypeStruct(part.shape, part.dtype) for part in old)
    in_place = {len(args) + i: i for i in range(len(old))}
    made: tuple[jax.Array, PackedPages, PackedPages] = jax.tree.unflatten(
        tree, _call("exchange_pairs", shapes, *args, *old, in_place=in_place)
    )
    return made


def received_attention(
    q: Float[Array, "samples H D"],
    q_near: Float[Array, "samples H D"],
    k: Int8[Array, "B N K P D"],
    k_scale: Float[Array, "B N K P"],
    sink_k: Float[Array, "B K S D"],
    kept_k: PackedPages,
    row: Int32[Array, ""],
    seen: Bool[Array, "samples N P"],
    sinks_seen: Bool[Array, ""],
    first: Int32[Array, ""],
    kept: Int32[Array, ""],
    kept_pages: int,
    scale: float,
    null_logit: Float[Array, H] | None = None,
) -> tuple[Float[Array, "N K P"], Float[Array, "kept_pages K P"]]:
    """Attention that the pairs of a row receive; see `kernels.received_attention.received_attention`.

    Args:
      kept_k: of all layers, this one's from page `first` on.
    """
    pages, kv_heads = k.shape[1], k.shape[2]
    blocks = -(-q.shape[0] * (q.shape[1] // kv_heads) // _RECEIVED_QUERIES)
    buffer = kv_heads, blocks, pages + kept_pages, PAGE
    shapes = (pages, kv_heads, PAGE), (kept_pages, kv_heads, PAGE), buffer
    ring, pairs, _ = _call(
        "received_attention",
        tuple(jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes),
        *(q, q_near, k, k_scale, sink_k, *_packed(kept_k)),
        *(row, seen, sinks_seen, first, kept, jnp.asarray(scale, jnp.float32)),
        *(() if null_logit is None else (null_logit,)),
    )
    return ring, pairs


def _packed(pages: PackedPages) -> tuple[jax.Array, ...]:
    return pages.numbers, pages.step, pages.offset, pages.half_scale


def _call(
    name: str,
    shapes: tuple[jax.ShapeDtypeStruct, ...],
    *args: jax.Array,
    in_place: dict[int, int] | None = None,
    **settings: Any,
) -> Sequence[jax.Array]:
    return jax.ffi.ffi_call(f"atlas_{name}_{VERSION}", shapes, input_output_aliases=in_place)(*args, **settings)
