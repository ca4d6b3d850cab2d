"""The dual form of the Omega rule on TPU: what a chunk makes of queries and of memory and momentum, formed in VMEM.

XLA's programs write every matmul and its scaled copies out: for 512 chunks of 64 tokens, a window of 16 and weights of
64 × 256 the TPU compiler counts (v5e) 972 MB for `omega.dual_product` and 616 MB for `omega.chunk_end`, with these kernels
398 and 324. Gates are one for a whole weight here; gates per channel stay XLA's.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from atlas_jax.typing import Array, Float


def dual_product(
    x: Float[Array, "b i"],
    weight: Float[Array, "o i"],
    momentum: Float[Array, "o i"] | None,
    left: Float[Array, "m o"],
    right: Float[Array, "m i"],
    kept: Float[Array, "b 1"],
    lost: Float[Array, "b 1"],
    tokens: Float[Array, "b m"],
    *,
    interpret: bool = False,
) -> Float[Array, "b o"]:
    """`omega.dual_product` with the coefficients of one channel. Not differentiable; batches are a grid.

    Args:
      kept, lost, tokens: `weights`, `momentum` and `tokens` of the coefficients.
      interpret: run as an XLA program on any platform, for tests.
    """
    args = [x, weight, left, right, kept, tokens] + ([] if momentum is None else [momentum, lost])
    shape = jax.ShapeDtypeStruct((x.shape[0], weight.shape[0]), x.dtype)
    (out,) = _call(_dual_kernel, args, [shape], interpret, "omega_dual_product")
    return out


def chunk_end(
    weight: Float[Array, "o i"],
    momentum: Float[Array, "o i"] | None,
    left: Float[Array, "m o"],
    right: Float[Array, "m i"],
    kept: Float[Array, "1 1"],
    tokens: Float[Array, "m 1"],
    lost: Float[Array, "1 1"],
    momentum_kept: Float[Array, "1 1"],
    momentum_tokens: Float[Array, "m 1"],
    *,
    interpret: bool = False,
) -> tuple[Float[Array, "o i"], Float[Array, "o i"] | None]:
    """`omega.chunk_end` with the last token's coefficients of one channel. Not differentiable; batches are a grid."""
    shape = jax.ShapeDtypeStruct(weight.shape, weight.dtype)
    args = [weight, left, right, kept, tokens]
    if momentum is None:
        (out,) = _call(_end_kernel, args, [shape], interpret, "omega_chunk_end")
        return out, None
    args += [momentum, lost, momentum_kept, momentum_tokens]
    found = _call(_end_kernel, args, [shape, shape], interpret, "omega_chunk_end")
    return found[0], found[1]


def _call(
    kernel: Callable[..., None],
    args: Sequence[jax.Array],
    shapes: Sequence[jax.ShapeDtypeStruct],
    interpret: bool,
    name: str,
) -> Sequence[jax.Array]:
    found: Sequence[jax.Array] = pl.pallas_call(
        functools.partial(kernel, len(args)), out_shape=list(shapes), interpret=interpret, name=name
    )(*args)
    return found


def _dual_kernel(count: int, *refs: jax.Array) -> None:
    x, weight, left, right, kept, tokens = (ref[...] for ref in refs[:6])
    scores = _dot(x, right, 1, 1) * tokens
    y = kept * _dot(x, weight, 1, 1) - _dot(scores, left, 1, 0)
    if count > 6:
        momentum, lost = (ref[...] for ref in refs[6:8])
        y = y - lost * _dot(x, momentum, 1, 1)
    refs[count][...] = y


def _end_kernel(count: int, *refs: jax.Array) -> None:
    weight, left, right, kept, tokens = (ref[...] for ref in refs[:5])
    end = kept * weight - _dot(left * tokens, right, 0, 0)
    if count > 5:
        momentum, lost, momentum_kept, momentum_tokens = (ref[...] for ref in refs[5:9])
        end = end - lost * momentum
        refs[count + 1][...] = momentum_kept * momentum + _dot(left * momentum_tokens, right, 0, 0)
    refs[count][...] = end


def _dot(x: jax.Array, y: jax.Array, of_x: int, of_y: int) -> jax.Array:
    return jax.lax.dot_general(x, y, (((of_x,), (of_y,)), ((), ())), preferred_element_type=jnp.float32)
