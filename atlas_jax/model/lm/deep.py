"""DeepTransformer and Dot: a deep memory over φ*, whose inner products are exp(q·k), in closed form.

A memory M(z) = W₁ σ(W₂ z) on z = φ*(k), the infinite feature map with φ*(q)·φ*(k) = exp(q·k) (ATLAS equations 22, 23),
all of whose gradients are taken at the memory a sequence starts from. With token i written with weight c_{t,i} at time
t, the hidden layer at a query q is

    A_t = B q_t + Σ_i c_{t,i} exp(q_t·k_i) δ_i,      δ_i = (W₁ᵀ e_i) ⊙ σ'(B k_i),

and the output W₁ σ(A_t) + Σ_i c_{t,i} (σ(A_t)·σ(B k_i)) e_i, with B the part of W₂ on the linear features (the rest
starts at zero) and e_i = v_i − W₁ σ(B k_i) the error of the ℓ2 objective. The first sum is attention (normalised here
by Σ_i exp(q_t·k_i), as softmax), the second linear attention over hidden units. A window c = 1 with e_i = v_i, the
dot-product objective, is a DeepTransformer; a window c > 1 with the ℓ2 objective is Dot: c_{t,i} sums the gates of all
windows that have held i by time t.
"""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from flax import nnx

from atlas_jax.model.lm.attention import NEGATIVE, rotate
from atlas_jax.model.lm.config import LMConfig
from atlas_jax.model.lm.layers import RMSNorm, weight
from atlas_jax.typing import Array, Float, Int32


def window_weights(gamma: Float[Array, "B H T c"]) -> Float[Array, "B H T T"]:
    """c_{t,i} = Σ_{n=i..min(t, i+c−1)} γ_{n−i}^{(n)}: how often, and how much, token i was written by time t.

    Args:
      gamma: gates emitted with each token, the j-th for the token j places back.
    """
    return added_weights(gamma, (jnp.arange(gamma.shape[-2])[:, None] - jnp.arange(gamma.shape[-2]))[None])


def added_weights(gamma: Float[Array, "B H T c"], distance: Int32[Array, "#B T U"]) -> Float[Array, "B H T U"]:
    """What a run of tokens adds to the weights of keys, up to each of its tokens.

    Args:
      gamma: as in `window_weights`.
      distance: places from a key to a token of the run; negative for keys after it.
    """
    window = gamma.shape[-1]
    inside = (distance >= 0) & (distance < window)
    age = jnp.clip(distance, 0, window - 1)[:, None]
    age = jnp.broadcast_to(age, (*gamma.shape[:-1], age.shape[-1]))
    emitted = jnp.where(inside[:, None], jnp.take_along_axis(gamma, age, axis=-1), 0.0)
    return jnp.cumsum(emitted, axis=-2)  # over n; rows before i are zero, so the result is causal


class DeepMemory(nnx.Module):
    """Kind D: DeepTransformer for `dot_window` 1, Dot for more."""

    def __init__(self, config: LMConfig, *, gain: float = 1.0, rngs: nnx.Rngs) -> None:
        embed, heads, dim, hidden = config.embed, config.heads, config.dim, config.dot_hidden
        self.q = weight(rngs, (embed, heads, dim), "ehd: e -> hd", embed)
        self.k = weight(rngs, (embed, heads, dim), "ehd: e -> hd", embed)
        self.v = weight(rngs, (embed, heads, dim), "ehd: e -> hd", embed)
        self.w2 = weight(rngs, (heads, dim, hidden), "hdf: d -> f", dim)
        self.w1 = weight(rngs, (heads, hidden, dim), "hfd: f -> d", hidden)
        self.gamma = weight(rngs, (embed, heads, config.dot_window), "ehc: e -> hc", embed, gain=0.1)
        self.gamma_bias = nnx.Param(jnp.zeros((heads, config.dot_window), jnp.float32))
        self.norm = RMSNorm(heads, dim, eps=config.norm_eps)
        self.out = weight(rngs, (heads, dim, embed), "hde: hd -> e", heads * dim, gain=gain)
        self.l2 = config.dot_window > 1  # else the dot-product objective
        self._base = config.rope_base

    def __call__(self, x: Float[Array, "B T E"], document: None = None) -> Float[Array, "B T E"]:
        q, k, v = self.heads(x)
        q, k = rotate(q, self._base), rotate(k, self._base)
        return self.project(deep_memory(q, k, v, self.w1[...], self.w2[...], self.gates(x), l2=self.l2))

    def heads(
        self, x: Float[Array, "B T E"]
    ) -> tuple[Float[Array, "B T H D"], Float[Array, "B T H D"], Float[Array, "B T H D"]]:
        """Queries, keys and values, before rotation."""
        q = jnp.einsum("bte,ehd->bthd", x, self.q[...])
        k = jnp.einsum("bte,ehd->bthd", x, self.k[...])
        v = jnp.einsum("bte,ehd->bthd", x, self.v[...])
        return q, k, v

    def gates(self, x: Float[Array, "B T E"]) -> Float[Array, "B H T c"]:
        """Window gates γ of every token."""
        gamma = jax.nn.sigmoid(jnp.einsum("bte,ehc->bthc", x, self.gamma[...]) + self.gamma_bias[...])
        return jnp.swapaxes(gamma, 1, 2)

    def project(self, y: Float[Array, "B T H D"]) -> Float[Array, "B T E"]:
        """Norm and output projection."""
        return jnp.einsum("bthd,hde->bte", self.norm(y).astype(self.out[...].dtype), self.out[...])


def deep_memory(
    q: Float[Array, "B T H D"],
    k: Float[Array, "B T H D"],
    v: Float[Array, "B T H D"],
    w1: Float[Array, "H F D"],
    w2: Float[Array, "H D F"],
    gamma: Float[Array, "B H T c"],
    *,
    l2: bool,
) -> Float[Array, "B T H D"]:
    """Outputs of a deep memory over exponential features, all tokens at once (see the module's text).

    Args:
      w1, w2: the memory a sequence starts from, on the keys themselves.
      l2: errors of the ℓ2 objective; otherwise values, the dot-product objective.
    """
    place = jnp.arange(q.shape[1])
    distance = (place[:, None] - place)[None]
    return deep_read(q, deep_keys(k, v, w1, w2, l2=l2), window_weights(gamma), distance, place[None], w1, w2)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class DeepKeys:
    """Keys as a deep memory has learned them.

    Attributes:
      k: keys, rotated.
      hidden: σ(B k), the hidden units of each key.
      back: δ, what a key adds to hidden units that are asked for it.
      error: e, what it adds to the output.
    """

    k: Float[Array, "B U H D"]
    hidden: Float[Array, "B U H F"]
    back: Float[Array, "B U H F"]
    error: Float[Array, "B U H D"]


def deep_keys(
    k: Float[Array, "B T H D"],
    v: Float[Array, "B T H D"],
    w1: Float[Array, "H F D"],
    w2: Float[Array, "H D F"],
    *,
    l2: bool,
) -> DeepKeys:
    """What a deep memory learns of keys and values; arguments as in `deep_memory`."""
    before = jnp.einsum("bthd,hdf->bthf", k, w2)
    hidden, slope = jax.jvp(jax.nn.gelu, (before,), (jnp.ones_like(before),))
    error = v - jnp.einsum("bthf,hfd->bthd", hidden, w1) if l2 else v
    return DeepKeys(k, hidden, jnp.einsum("bthd,hfd->bthf", error, w1) * slope, error)


def deep_read(
    q: Float[Array, "B T H D"],
    keys: DeepKeys,
    count: Float[Array, "B H T U"],
    distance: Int32[Array, "#B T U"],
    place: Int32[Array, "#B T"],
    w1: Float[Array, "H F D"],
    w2: Float[Array, "H D F"],
) -> Float[Array, "B T H D"]:
    """Outputs of a deep memory that has learned the keys (see the module's text).

    Args:
      count: weights c_{t,i}; zero for keys that are not seen.
      distance: places from a key to a query; keys with a negative one are not seen.
      place: of a query in its text, from 0.
      w1, w2: as in `deep_memory`.
    """
    score = jnp.einsum("bthd,bihd->bhti", q, keys.k) * q.shape[-1] ** -0.5
    attention = jax.nn.softmax(jnp.where(distance[:, None] >= 0, score, NEGATIVE), axis=-1) * count
    active = jax.nn.gelu(jnp.einsum("bthd,hdf->bthf", q, w2) + jnp.einsum("bhti,bihf->bthf", attention, keys.back))
    # hidden units grow with F and tokens with T: means, not sums, keep the output's size
    seen = (place + 1).astype(q.dtype)[:, None, :, None]
    linear = jnp.einsum("bthf,bihf->bhti", active, keys.hidden) * count / (w1.shape[1] ** 0.5 * seen)
    return jnp.einsum("bthf,hfd->bthd", active, w1) + jnp.einsum("bhti,bihd->bthd", linear, keys.error)
