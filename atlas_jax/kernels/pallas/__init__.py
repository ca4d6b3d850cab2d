"""Mosaic kernels for TPUs: attention over int8 pages, and the products of the memory's polynomial features.

Like the C kernels of `kernels.native` they are an implementation, never a definition: on other platforms, and for shapes
they do not take, the same functions run as XLA programs.
"""

from __future__ import annotations

from typing import Any

import jax

from atlas_jax.kernels.attention import LayerKV, QuantPages

__all__ = ["attention", "read_out", "takes_attention", "takes_read", "use"]

_INT8_SUBLANES = 32
_MAX_READ = 32
"""Tokens per row whose features fit in VMEM beside the memory."""

_wanted = True


def use(wanted: bool) -> None:
    """Says whether programs traced from now on may use the kernels (they may unless this says no)."""
    global _wanted
    _wanted = wanted


def takes_attention(kv: LayerKV) -> bool:
    """Whether `attention` takes a cache of this shape here."""
    return _ready() and isinstance(kv.k, QuantPages) and kv.sink_k.shape[-1] % _INT8_SUBLANES == 0


def attention(*args: Any) -> jax.Array:
    """`window.attention`: queries [B, T, H, D] to outputs of the same shape."""
    from atlas_jax.kernels.pallas import window  # here, for importing Pallas takes 0.4 s that only TPUs need

    return window.attention(*args)


def takes_read(tokens: int) -> bool:
    """Whether `read_out` takes a step of so many tokens per row here."""
    return _ready() and tokens <= _MAX_READ


def read_out(*args: Any) -> jax.Array:
    """`memory.read_out`: keys [B, T, R] to what the memory says of them, [B, T, C]."""
    from atlas_jax.kernels.pallas import memory

    return memory.read_out(*args)


def _ready() -> bool:
    mesh = jax.sharding.get_abstract_mesh()
    # XLA cannot divide a kernel: on a mesh it runs where every device runs a program of its own (`jax.shard_map`)
    return _wanted and jax.default_backend() == "tpu" and (mesh.empty or mesh.are_all_axes_manual)
