"""Mosaic kernels for TPUs: attention over int8 pages, the recall memory's features, Newton–Schulz and the Omega rule.

Like the C kernels of `kernels.native` they are an implementation, never a definition: on other platforms, and for shapes
they do not take, the same functions run as XLA programs.
"""

from __future__ import annotations

from typing import Any

import jax

from atlas_jax.kernels.attention import LayerKV, QuantPages

__all__ = [
    "attention",
    "chunk_end",
    "dual_product",
    "orthogonalize",
    "read_out",
    "takes_attention",
    "takes_omega",
    "takes_orthogonalize",
    "takes_read",
    "use",
]

_INT8_SUBLANES = 32
_MAX_READ = 32
"""Tokens per row whose features fit in VMEM beside the memory."""

_MATRIX = 1 << 20
"""Bytes of a matrix up to which what is made of it fits in VMEM beside it."""

_wanted = True


def use(wanted: bool) -> None:
    """Says whether programs traced from now on may use the kernels (they may unless this says no)."""
    global _wanted
    _wanted = wanted


def takes_attention(kv: LayerKV) -> bool:
    """Whether `attention` takes a cache of this shape here."""
    return _ready() and isinstance(kv.k, QuantPages) and kv.sink_k.shape[-1] % _INT8_SUBLANES == 0


def attention(*args: Any) -> jax.Array:
    """`window_attention.attention`: queries [B, T, H, D] to outputs of the same shape."""
    from atlas_jax.kernels.tpu import window_attention  # here, for importing Pallas takes 0.4 s that only TPUs need

    return window_attention.attention(*args)


def takes_read(tokens: int) -> bool:
    """Whether `read_out` takes a step of so many tokens per row here."""
    return _ready() and tokens <= _MAX_READ


def read_out(*args: Any) -> jax.Array:
    """`recall_features.read_out`: keys [B, T, R] to what the memory says of them, [B, T, C]."""
    from atlas_jax.kernels.tpu import recall_features

    return recall_features.read_out(*args)


def takes_orthogonalize(shape: tuple[int, ...]) -> bool:
    """Whether `orthogonalize` takes matrices of this shape here."""
    return _undivided() and 4 * shape[-2] * shape[-1] <= _MATRIX


def orthogonalize(*args: Any) -> jax.Array:
    """`newton_schulz.orthogonalize`: matrices [..., m, n] to matrices of the same shape."""
    from atlas_jax.kernels.tpu import newton_schulz

    return newton_schulz.orthogonalize(*args)


def takes_omega(shape: tuple[int, ...], channels: int) -> bool:
    """Whether `dual_product` and `chunk_end` take a weight of this shape, with gates of so many channels, here."""
    return _undivided() and channels == 1 and 4 * shape[-2] * shape[-1] <= _MATRIX


def dual_product(*args: Any) -> jax.Array:
    """`omega.dual_product`: queries [b, i] to outputs [b, o]."""
    from atlas_jax.kernels.tpu import omega

    return omega.dual_product(*args)


def chunk_end(*args: Any) -> tuple[jax.Array, jax.Array | None]:
    """`omega.chunk_end`: the weight [o, i] and its momentum after a chunk."""
    from atlas_jax.kernels.tpu import omega

    return omega.chunk_end(*args)


def _undivided() -> bool:
    """Whether a program of arrays that anybody may have divided over devices surely runs on one."""
    return _ready() and (jax.device_count() == 1 or not jax.sharding.get_abstract_mesh().empty)


def _ready() -> bool:
    mesh = jax.sharding.get_abstract_mesh()
    # XLA cannot divide a kernel: on a mesh it runs where every device runs a program of its own (`jax.shard_map`)
    return _wanted and jax.default_backend() == "tpu" and (mesh.empty or mesh.are_all_axes_manual)
