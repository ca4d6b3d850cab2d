"""Linear layers fused with what a transformer does just before them: a residual sum and a norm, or a gated activation.

On CPU these are done while a row is quantised for the C kernel's GEMM: by all threads, and one program's output less. As
XLA programs they take one thread, and for one row the gaps around them cost more than they do. The definition of each is
the pair of functions that its docstring names.
"""

from __future__ import annotations

from typing import Literal, TypeGuard

import jax
import jax.numpy as jnp

from atlas_jax.kernels.cpu import ffi
from atlas_jax.kernels.linear import InterleavedArray, PackedArray, QuantArray, Weight, linear, uses_cpu_kernel
from atlas_jax.kernels.reductions import row_sum
from atlas_jax.typing import Array, Float

Activation = Literal["silu", "gelu_tanh", "swiglu_oai"]
SWIGLU_SLOPE, SWIGLU_LIMIT = 1.702, 7.0
"""Of `swiglu_oai`: gate · σ(slope · gate) · (up + 1), with the gate cut at the limit and up at ± the limit."""


def rms_norm(x: Float[Array, "*rows E"], gain: Float[Array, "*#rows E"], eps: float) -> Float[Array, "*rows E"]:
    """x / √(mean x² + eps) · gain."""
    mean_square = row_sum(x * x)[..., None] * (1.0 / x.shape[-1])
    return x * jax.lax.rsqrt(mean_square + eps) * gain


def layer_norm(
    x: Float[Array, "*rows E"], gain: Float[Array, "*#rows E"], bias: Float[Array, E] | None, eps: float
) -> Float[Array, "*rows E"]:
    """(x − mean x) / √(variance of x + eps) · gain + bias."""
    centred = x - row_sum(x)[..., None] * (1.0 / x.shape[-1])
    normed = rms_norm(centred, gain, eps)
    return normed if bias is None else normed + bias


def residual_sum(
    x: Float[Array, "*rows E"], added: Float[Array, "*rows E"], added_gain: Float[Array, E] | None, eps: float
) -> Float[Array, "*rows E"]:
    """x and what a layer's part gives, which has a norm of its own if there is a gain."""
    return x + (added if added_gain is None else rms_norm(added, added_gain, eps))


def gated(x: Float[Array, "*rows 2*F"], block: int, activation: Activation) -> Float[Array, "*rows F"]:
    """activation(gate) · up of columns that lie as `block` of the gate, then `block` of up, and so on; GELU by tanh.

    `swiglu_oai` is what `SWIGLU_SLOPE` says.
    """
    blocks = x.reshape(*x.shape[:-1], -1, 2, block)
    gate, up = blocks[..., 0, :], blocks[..., 1, :]
    if activation == "swiglu_oai":
        gate, up = jnp.minimum(gate, SWIGLU_LIMIT), jnp.clip(up, -SWIGLU_LIMIT, SWIGLU_LIMIT)
        made = gate * jax.nn.sigmoid(SWIGLU_SLOPE * gate) * (up + 1.0)
    else:
        made = activated(gate, activation) * up
    return made.reshape(*x.shape[:-1], -1)


def activated(x: Float[Array, "*rows F"], activation: Activation) -> Float[Array, "*rows F"]:
    """SiLU, or GELU by tanh; `swiglu_oai` is of a gate and what it is multiplied with, see `gated`."""
    return jax.nn.silu(x) if activation == "silu" else jax.nn.gelu(x, approximate=True)


def normed_linear(
    weight: Weight, x: Float[Array, "*rows inp"], gain: Float[Array, inp], eps: float
) -> Float[Array, "*rows out"]:
    """`linear(weight, rms_norm(x, gain, eps))`; the C kernel's sum of squares rounds otherwise than XLA's."""
    if isinstance(weight, InterleavedArray):
        return weight.interleaved([normed_linear(part, x, gain, eps) for part in weight.parts])
    if not _uses_cpu_kernel(weight):
        return linear(weight, rms_norm(x, gain, eps))
    rows = x.reshape(-1, x.shape[-1])
    return ffi.normed_linear(rows, gain, eps, _stored(weight), weight.scale).reshape(*x.shape[:-1], -1)


def summed_linear(
    weight: Weight,
    x: Float[Array, "*rows inp"],
    added: Float[Array, "*rows inp"],
    added_gain: Float[Array, inp] | None,
    gain: Float[Array, inp],
    eps: float,
) -> tuple[Float[Array, "*rows out"], Float[Array, "*rows inp"]]:
    """`residual_sum` and `normed_linear` of it: the output, and the sum."""
    if isinstance(weight, InterleavedArray):
        first, total = summed_linear(weight.parts[0], x, added, added_gain, gain, eps)
        rest = [normed_linear(part, total, gain, eps) for part in weight.parts[1:]]
        return weight.interleaved([first, *rest]), total
    if not _uses_cpu_kernel(weight):
        total = residual_sum(x, added, added_gain, eps)
        return linear(weight, rms_norm(total, gain, eps)), total
    rows, more = (array.reshape(-1, x.shape[-1]) for array in (x, added))
    out, total = ffi.summed_linear(rows, more, added_gain, gain, eps, _stored(weight), weight.scale)
    return out.reshape(*x.shape[:-1], -1), total.reshape(x.shape)


def gated_linear(
    weight: Weight, x: Float[Array, "*rows 2*inp"], block: int, activation: Activation
) -> Float[Array, "*rows out"]:
    """`linear(weight, gated(x, block, activation))`; the C kernel's exponential rounds otherwise than XLA's."""
    if not _uses_cpu_kernel(weight) or block % 16:
        return linear(weight, gated(x, block, activation))
    rows = x.reshape(-1, x.shape[-1])
    out = ffi.gated_linear(rows, block, activation, _stored(weight), weight.scale)
    return out.reshape(*x.shape[:-1], -1)


def _uses_cpu_kernel(weight: Weight) -> TypeGuard[QuantArray | PackedArray]:
    return isinstance(weight, QuantArray | PackedArray) and uses_cpu_kernel(weight.shape[1], weight.shape[0])


def _stored(weight: QuantArray | PackedArray) -> jax.Array:
    return weight.values if isinstance(weight, QuantArray) else weight.blocks
