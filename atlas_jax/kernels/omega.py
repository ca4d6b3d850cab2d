"""The Omega rule over one chunk: windowed weighted gradients, and the dual form that needs no weights per token
(ATLAS, arXiv 2505.23735).

All of a chunk's inner gradients are taken at one anchor, and for every memory here the gradient of a token on a weight
matrix is rank one, left_i·right_iᵀ. With momentum S and memory W,

    S_t = θ_t S_{t−1} + Σ_{i in window(t)} γ_i^{(t)} left_i right_iᵀ          (ATLAS, equation 33)
    W_t = α_t W_{t−1} − η_t S_t                                               (equation 32 without Newton–Schulz)

everything a chunk does is linear in those rank-one terms: W_t = ᾱ_t W₀ − m̄_t S₀ − Σ_i C[t, i] left_i right_iᵀ, where C
follows from the gates alone. So W_t·x is one matmul with W₀ and one with a masked b×m matrix of inner products.

Axes: b tokens of a chunk, m = c − 1 + b tokens its windows reach (the previous chunk's tail first), h gate channels (1:
one gate for all), o rows and i columns of a weight. Add a batch with `jax.vmap`. The file is long because every operation
stands with its choice of kernel, its gradient and its definition.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp

from atlas_jax.kernels import tpu
from atlas_jax.kernels.cholesky import solve_unit_lower
from atlas_jax.typing import Array, Float

ChannelAxis = Literal["row", "column"]
"""Which side of a weight the gates' channels lie on."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Coefficients:
    """What the gates of a chunk make of its start and of each token's gradient.

    Attributes:
      weights: ᾱ, how much of the memory at the start is left after each token.
      momentum: m̄, how much of the momentum at the start each token's memory has lost.
      tokens: C, how much of each gradient each token's memory has lost.
      momentum_left: θ̄, how much of the momentum at the start is left in each token's momentum.
      momentum_tokens: how much of each gradient is in each token's momentum.
    """

    weights: Float[Array, "b h"]
    momentum: Float[Array, "b h"]
    tokens: Float[Array, "b m h"]
    momentum_left: Float[Array, "b h"]
    momentum_tokens: Float[Array, "b m h"]


def window_band(age: Float[Array, "b c"], stored: Float[Array, " m"], valid: Float[Array, " b"]) -> Float[Array, "b m"]:
    """Γ of the chunk: the weight γ_i^{(t)} of token i in the window of token t, zero outside the window (equation 9).

    Args:
      age: gates emitted with token t; column j is for the token j places back.
      stored: gate of each token the windows reach, whatever window it is in; 0 for a token that does not exist.
      valid: 0 for padding, whose window counts for nothing.
    """
    chunk, window = age.shape
    reach = chunk + window - 1
    # row t holds its window at columns t … t + c − 1: rows one entry longer than the result shift right by themselves
    padded = jnp.concatenate([age[:, ::-1], jnp.zeros((chunk, chunk), age.dtype)], axis=1)
    skewed = padded.reshape(-1)[: chunk * reach].reshape(chunk, reach)
    return skewed * stored[None, :] * valid[:, None]


def decay_products(gate: Float[Array, "b h"]) -> Float[Array, "b b h"]:
    """L[t, n] = Π_{n < τ ≤ t} gate_τ for n ≤ t, else 0.

    Halves are joined to wholes: the products across two neighbouring blocks are an outer product of what either has.
    No ratio of running products: exact for gates of zero, and for products that underflow.
    """
    # of one token there are none: JAX 0.10 fails to batch a custom rule inside a scan whose result is constant
    return jnp.ones_like(gate)[None] if gate.shape[0] == 1 else _decay_products(gate)


@jax.custom_jvp
def _decay_products(gate: Float[Array, "b h"]) -> Float[Array, "b b h"]:
    length, channels = gate.shape
    size = 1 << (length - 1).bit_length()
    gate = jnp.concatenate([gate, jnp.ones((size - length, channels), gate.dtype)])
    products = jnp.ones((size, 1, 1, channels), gate.dtype)  # [blocks, t, n, h]
    while (half := products.shape[1]) < size:
        first, second = jnp.moveaxis(products.reshape(-1, 2, half, half, channels), 1, 0)
        entered = gate.reshape(-1, 2, half, channels)[:, 1, :1]
        across = (second[:, :, 0] * entered)[:, :, None] * first[:, -1:]
        top = jnp.concatenate([first, jnp.zeros_like(across)], axis=2)
        products = jnp.concatenate([top, jnp.concatenate([across, second], axis=2)], axis=1)
    return products[0, :length, :length]


@_decay_products.defjvp
def _decay_products_jvp(
    primals: tuple[jax.Array], tangents: tuple[jax.Array]
) -> tuple[Float[Array, "b b h"], Float[Array, "b b h"]]:
    """∂L[t, n]/∂gate_s = L[t, s]·L[s − 1, n]: one matmul, and no gate is divided by."""
    products = _decay_products(*primals)
    before = jnp.concatenate([jnp.zeros_like(products[:1]), products[:-1]])
    return products, _chain(products * tangents[0][None], before)


def kept_from_start(gate: Float[Array, "b h"], products: Float[Array, "b b h"]) -> Float[Array, "b h"]:
    """Π_{τ ≤ t} gate_τ, from `decay_products` of the same gate."""
    return gate[:1] * products[:, 0]


def chunk_coefficients(
    alpha: Float[Array, "b ha"],
    theta: Float[Array, "b ht"] | None,
    inner: Float[Array, "b hi"],
    outer: Float[Array, "b ho"],
    band: Float[Array, "b m"],
) -> Coefficients:
    """C = L_α·diag(outer)·L_θ·diag(inner)·Γ, and the same for what the chunk starts with.

    Args:
      alpha: retention.
      theta: momentum, or None for plain gradient descent.
      inner: step size on a token's windowed gradient, before momentum (equation 57), or ones.
      outer: step size on the momentum (equation 32), or ones.
    """
    decay = decay_products(alpha)
    momentum_tokens = inner[:, None, :] * band[:, :, None]
    momentum_left = jnp.zeros_like(alpha[:, :1])
    if theta is not None:
        products = decay_products(theta)
        momentum_tokens = _chain(products, momentum_tokens)
        momentum_left = kept_from_start(theta, products)
    return Coefficients(
        weights=kept_from_start(alpha, decay),
        momentum=_chain(decay, (outer * momentum_left)[:, None, :])[:, 0],
        tokens=_chain(decay, outer[:, None, :] * momentum_tokens),
        momentum_left=momentum_left,
        momentum_tokens=momentum_tokens,
    )


def window_gradient(
    left: Float[Array, "m o"], right: Float[Array, "m i"], weight: Float[Array, "m h"], axis: ChannelAxis = "row"
) -> Float[Array, "o i"]:
    """Σ_m weight_m · left_m right_mᵀ: the weighted gradient of a window of tokens (equation 9)."""
    if axis == "row":
        return jnp.einsum("mo,mi->oi", left * weight, right)
    return jnp.einsum("mo,mi->oi", left, right * weight)


def momenta(
    momentum: Float[Array, "o i"],
    left: Float[Array, "m o"],
    right: Float[Array, "m i"],
    coefficients: Coefficients,
    axis: ChannelAxis = "row",
) -> Float[Array, "b o i"]:
    """S_t after every token of the chunk: b times the memory of the weight, for what is not linear in S_t."""
    if coefficients.momentum_tokens.shape[-1] == coefficients.momentum_left.shape[-1] == 1:
        gradients = jnp.einsum("mo,mi->moi", left, right)
        kept = _combine(coefficients.momentum_left, momentum[None])
        return kept + _combine(coefficients.momentum_tokens[..., 0], gradients)
    kept = scale(momentum, coefficients.momentum_left, axis)
    return kept + jax.vmap(window_gradient, (None, None, 0, None))(left, right, coefficients.momentum_tokens, axis)


def uses_tpu_kernel(shape: tuple[int, ...], channels: int) -> bool:
    """Whether `dual_product` and `chunk_end` of a weight of this shape, with gates of so many channels, run in Mosaic."""
    return channels == 1 and 4 * shape[-2] * shape[-1] <= tpu.MATRIX_BYTES and tpu.usable_undivided()


def dual_product(
    x: Float[Array, "b i"],
    weight: Float[Array, "o i"],
    momentum: Float[Array, "o i"] | None,
    left: Float[Array, "m o"],
    right: Float[Array, "m i"],
    coefficients: Coefficients,
    axis: ChannelAxis = "row",
) -> Float[Array, "b o"]:
    """W_t·x_t for every token t of the chunk, without forming W_t.

    Args:
      momentum: S₀, or None where the rule has none.
    """
    if uses_tpu_kernel(weight.shape, _channels(coefficients)):
        return _mosaic_dual(x, weight, momentum, left, right, coefficients)
    return _dual(x, weight, momentum, left, right, coefficients, axis)


def _dual(
    x: jax.Array,
    weight: jax.Array,
    momentum: jax.Array | None,
    left: jax.Array,
    right: jax.Array,
    coefficients: Coefficients,
    axis: ChannelAxis,
) -> jax.Array:
    from_tokens = _mix(x, left, right, coefficients.tokens, axis)
    result = _gated_product(x, weight, coefficients.weights, axis) - from_tokens
    return result if momentum is None else result - _gated_product(x, momentum, coefficients.momentum, axis)


def chunk_end(
    weight: Float[Array, "o i"],
    momentum: Float[Array, "o i"] | None,
    left: Float[Array, "m o"],
    right: Float[Array, "m i"],
    coefficients: Coefficients,
    axis: ChannelAxis = "row",
) -> tuple[Float[Array, "o i"], Float[Array, "o i"] | None]:
    """W and S after the chunk's last token."""
    if uses_tpu_kernel(weight.shape, _channels(coefficients)):
        return _mosaic_end(weight, momentum, left, right, coefficients)
    return _end(weight, momentum, left, right, coefficients, axis)


def _end(
    weight: jax.Array,
    momentum: jax.Array | None,
    left: jax.Array,
    right: jax.Array,
    coefficients: Coefficients,
    axis: ChannelAxis,
) -> tuple[jax.Array, jax.Array | None]:
    end = jax.tree.map(lambda c: c[-1], coefficients)
    result = scale(weight, end.weights, axis) - window_gradient(left, right, end.tokens, axis)
    if momentum is None:
        return result, None
    kept = scale(momentum, end.momentum_left, axis)
    return (
        result - scale(momentum, end.momentum, axis),
        kept + window_gradient(left, right, end.momentum_tokens, axis),
    )


def accumulate(
    weight: Float[Array, "o i"],
    updates: Float[Array, "b o i"],
    alpha: Float[Array, "b ha"],
    outer: Float[Array, "b ho"],
    axis: ChannelAxis = "row",
) -> Float[Array, "b o i"]:
    """W_t = α_t W_{t−1} − outer_t·updates_t for every token of the chunk, as one gated running sum (equation 41)."""
    products = decay_products(alpha)
    left = kept_from_start(alpha, products)
    mixing = products * outer[None, :, :]
    if mixing.shape[-1] == 1:
        return _combine(left, weight[None]) - _combine(mixing[..., 0], updates)
    kept = scale(weight, left, axis)
    return kept - jnp.einsum("tno,noi->toi" if axis == "row" else "tni,noi->toi", mixing, updates)


def sequential_errors(
    keys: Float[Array, "b i"],
    values: Float[Array, "b o"],
    weight: Float[Array, "o i"],
    momentum: Float[Array, "o i"] | None,
    coefficients: Coefficients,
    gain: Float[Array, "b 1"],
) -> Float[Array, "b o"]:
    """W_{t−1}·k_t − v_t where every token's gradient is taken at the memory it finds: the delta rule's own errors.

    Each error is linear in the errors before it (Γ = I, gradients 2·error·kᵀ), so all of them solve one unit lower
    triangular system of the chunk's size (the WY form of DeltaNet, arXiv 2406.06484), here with momentum too.

    Args:
      gain: how much the memory is scaled before the gradient is taken; α_t for Gated DeltaNet, else ones.
    """

    def before(c: jax.Array, first: float) -> jax.Array:
        return gain * jnp.concatenate([jnp.full_like(c[:1], first), c[:-1]])

    found = before(coefficients.weights, 1.0) * jnp.einsum("oi,bi->bo", weight, keys) - values
    if momentum is not None:
        found = found - before(coefficients.momentum, 0.0) * jnp.einsum("oi,bi->bo", momentum, keys)
    mixing = before(coefficients.tokens[..., 0], 0.0) * jnp.einsum("ti,ni->tn", keys, keys)
    return solve_unit_lower(2.0 * mixing, found)


def scale(weight: Float[Array, "o i"], gate: Float[Array, "*rows h"], axis: ChannelAxis) -> Float[Array, "*rows o i"]:
    """The weight with its rows or columns multiplied by a gate, once per row of gates."""
    if gate.shape[-1] == 1:
        return jnp.einsum("...,oi->...oi", gate[..., 0], weight)
    return weight * (gate[..., :, None] if axis == "row" else gate[..., None, :])


def ref_omega_chunk(
    weight: Float[Array, "o i"],
    momentum: Float[Array, "o i"],
    queries: Float[Array, "b i"],
    left: Float[Array, "m o"],
    right: Float[Array, "m i"],
    alpha: Float[Array, "b h"],
    theta: Float[Array, "b h"],
    inner: Float[Array, "b h"],
    outer: Float[Array, "b h"],
    band: Float[Array, "b m"],
    axis: ChannelAxis = "row",
) -> tuple[Float[Array, "b o"], Float[Array, "o i"], Float[Array, "o i"]]:
    """`dual_product` and `chunk_end` as the recurrence they stand for: outputs, W and S."""

    def token(
        carry: tuple[jax.Array, jax.Array], row: tuple[jax.Array, ...]
    ) -> tuple[tuple[jax.Array, jax.Array], jax.Array]:
        w, s = carry
        x, a, th, step_in, step_out, gamma = row
        gradient = window_gradient(left, right, gamma[:, None], axis)
        s = scale(s, th, axis) + scale(gradient, step_in, axis)
        w = scale(w, a, axis) - scale(s, step_out, axis)
        return (w, s), w @ x

    (weight, momentum), outputs = jax.lax.scan(token, (weight, momentum), (queries, alpha, theta, inner, outer, band))
    return outputs, weight, momentum


def _channels(coefficients: Coefficients) -> int:
    return max(leaf.shape[-1] for leaf in jax.tree.leaves(coefficients))


@jax.custom_vjp
def _mosaic_dual(
    x: jax.Array,
    weight: jax.Array,
    momentum: jax.Array | None,
    left: jax.Array,
    right: jax.Array,
    coefficients: Coefficients,
) -> jax.Array:
    """`_dual` with one gate for a whole weight, by a TPU kernel; its gradient is that of `_dual`, recomputed."""
    from atlas_jax.kernels.tpu import omega as mosaic  # importing Pallas takes 0.4 s that only TPUs need

    c = coefficients
    gates = c.weights, c.momentum, c.tokens[..., 0]
    return mosaic.dual_product(x, weight, momentum, left, right, *gates, interpret=tpu.interpreted())


def _mosaic_dual_backward(args: tuple[Any, ...], slope: jax.Array) -> tuple[Any, ...]:
    return jax.vjp(functools.partial(_dual, axis="row"), *args)[1](slope)


_mosaic_dual.defvjp(lambda *args: (_mosaic_dual(*args), args), _mosaic_dual_backward)


@jax.custom_vjp
def _mosaic_end(
    weight: jax.Array, momentum: jax.Array | None, left: jax.Array, right: jax.Array, coefficients: Coefficients
) -> tuple[jax.Array, jax.Array | None]:
    """`_end` with one gate for a whole weight, by a TPU kernel; its gradient is that of `_end`, recomputed."""
    from atlas_jax.kernels.tpu import omega as mosaic

    c = jax.tree.map(lambda leaf: leaf[-1], coefficients)
    gates = c.weights[None], c.tokens, c.momentum[None], c.momentum_left[None], c.momentum_tokens
    return mosaic.chunk_end(weight, momentum, left, right, *gates, interpret=tpu.interpreted())


def _mosaic_end_backward(args: tuple[Any, ...], slopes: tuple[jax.Array, jax.Array | None]) -> tuple[Any, ...]:
    return jax.vjp(functools.partial(_end, axis="row"), *args)[1](slopes)


_mosaic_end.defvjp(lambda *args: (_mosaic_end(*args), args), _mosaic_end_backward)


def _combine(mixing: Float[Array, "b m"], terms: Float[Array, "m o i"]) -> Float[Array, "b o i"]:
    """Σ_m mixing[t, m]·terms[m].

    As a product of two matrices: then XLA turns the transposed result of the backward pass into a product in the other
    order. With three axes it transposes b whole memories on CPU.
    """
    return (mixing @ terms.reshape(terms.shape[0], -1)).reshape(mixing.shape[0], *terms.shape[1:])


def _chain(left: jax.Array, right: jax.Array) -> jax.Array:
    """[b, b, h]·[b, m, h] per channel, either side with one channel for all."""
    if left.shape[-1] == 1 and right.shape[-1] == 1:
        return jnp.einsum("tn,nm->tm", left[..., 0], right[..., 0])[..., None]
    channels = max(left.shape[-1], right.shape[-1])
    left = jnp.broadcast_to(left, (*left.shape[:2], channels))
    return jnp.einsum("tnh,nmh->tmh", left, jnp.broadcast_to(right, (*right.shape[:2], channels)))


def _gated_product(x: jax.Array, weight: jax.Array, gate: jax.Array, axis: ChannelAxis) -> jax.Array:
    if axis == "row":
        return gate * jnp.einsum("oi,bi->bo", weight, x)
    return jnp.einsum("oi,bi->bo", weight, gate * x)


def _mix(x: jax.Array, left: jax.Array, right: jax.Array, mixing: jax.Array, axis: ChannelAxis) -> jax.Array:
    """Σ_m (x_t · right_m) C[t, m] left_m, with C's channels on the rows or columns of the weight."""
    if mixing.shape[-1] == 1:
        return jnp.einsum("tm,mo->to", jnp.einsum("ti,mi->tm", x, right) * mixing[..., 0], left)
    if axis == "row":
        return jnp.einsum("tmo,tm,mo->to", mixing, jnp.einsum("ti,mi->tm", x, right), left)
    return jnp.einsum("tm,mo->to", jnp.einsum("ti,tmi,mi->tm", x, mixing, right), left)
