"""Between the QKV GEMM and attention: norms and RoPE on queries and keys, and what is stored of them in the KV cache."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from atlas_jax.kernels.cpu import ffi, library
from atlas_jax.kernels.fused_linear import rms_norm
from atlas_jax.kernels.kv_pages import LayerKV, QuantPages, RingView, sample_queries, write
from atlas_jax.kernels.rope import apply_rope
from atlas_jax.typing import Array, Float


def uses_cpu_kernel(dim: int, half: int) -> bool:
    """Whether heads of this many dimensions, `half` of them first of a rotated pair, run the C kernel on int8 pages."""
    return dim % 16 == 0 and half % 16 == 0 and library.usable()


def qkv_rope_cache(
    x: Float[Array, "B T K G+2 D"],
    gains: tuple[Float[Array, D], Float[Array, D]] | None,
    eps: float,
    rotary: Sequence[Float[Array, "B T half"]],
    near: Sequence[Float[Array, "B T half"]],
    kv: LayerKV,
    view: RingView,
) -> tuple[Float[Array, "B T H D"], Float[Array, "B T H D"], LayerKV]:
    """Norms and rotates queries and keys, stores keys and values in the ring, and notes queries where pairs are kept.

    Args:
      x: for each KV head its queries, its key and its value.
      gains, eps: of the norms of queries and of keys, if the model has them.
      rotary, near: cosines and sines at the tokens' positions, and at those from which they see the sinks.

    Returns:
      Queries that meet the ring, queries that meet the sinks, and the cache.
    """
    k, v = kv.k, kv.v
    if uses_cpu_kernel(x.shape[-1], rotary[0].shape[-1]) and isinstance(k, QuantPages) and isinstance(v, QuantPages):
        ring = k.values, k.scale, v.values, v.scale
        where = view.slot, view.positions, view.valid
        choice = kv.choice
        noted = None if choice is None else (choice.queries, choice.query_scale)
        q, q_sink, (k_values, k_scale, v_values, v_scale), noted = ffi.qkv_rope_cache(
            x, gains, eps, rotary, near, *where, ring, noted
        )
        if choice is not None and noted is not None:
            choice = dataclasses.replace(choice, queries=noted[0], query_scale=noted[1])
        written = QuantPages(k_values, k_scale), QuantPages(v_values, v_scale)
        return q, q_sink, dataclasses.replace(kv, k=written[0], v=written[1], choice=choice)
    q, new_k, new_v = x[..., :-2, :].reshape(*x.shape[:2], -1, x.shape[-1]), x[..., -2, :], x[..., -1, :]
    if gains is not None:
        q, new_k = (rms_norm(part, gain, eps) for part, gain in zip((q, new_k), gains, strict=True))
    far = apply_rope(q, *rotary)
    kv = write(kv, apply_rope(new_k, *rotary), new_v, view)
    return far, apply_rope(q, *near), sample_queries(kv, far, view)
