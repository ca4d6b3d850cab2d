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

import jax
import jax.numpy as jnp
from flax import nnx

from atlas_jax.model.lm.attention import rotate
from atlas_jax.model.lm.config import LMConfig
from atlas_jax.model.lm.layers import RMSNorm, weight
from atlas_jax.typing import Array, Float


def window_weights(gamma: Float[Array, "B H T c"]) -> Float[Array, "B H T T"]:
    """c_{t,i} = Σ_{n=i..min(t, i+c−1)} γ_{n−i}^{(n)}: how often, and how much, token i was written by time t.

    Args:
      gamma: gates emitted with each token, the j-th for the token j places back.
    """
    tokens, window = gamma.shape[-2:]
    distance = jnp.arange(tokens)[:, None] - jnp.arange(tokens)
    inside = (distance >= 0) & (distance < window)
    age = jnp.broadcast_to(jnp.clip(distance, 0, window - 1), (*gamma.shape[:-1], tokens))
    emitted = jnp.where(inside, jnp.take_along_axis(gamma, age, axis=-1), 0.0)
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
        self._base, self._omega = config.rope_base, config.dot_window > 1

    def __call__(self, x: Float[Array, "B T E"]) -> Float[Array, "B T E"]:
        q = rotate(jnp.einsum("bte,ehd->bthd", x, self.q[...]), self._base)
        k = rotate(jnp.einsum("bte,ehd->bthd", x, self.k[...]), self._base)
        v = jnp.einsum("bte,ehd->bthd", x, self.v[...])
        gamma = jax.nn.sigmoid(jnp.einsum("bte,ehc->bthc", x, self.gamma[...]) + self.gamma_bias[...])
        y = deep_memory(q, k, v, self.w1[...], self.w2[...], jnp.swapaxes(gamma, 1, 2), l2=self._omega)
        return jnp.einsum("bthd,hde->bte", self.norm(y), self.out[...])


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
    scale = q.shape[-1] ** -0.5
    before = jnp.einsum("bthd,hdf->bthf", k, w2)
    hidden, slope = jax.jvp(jax.nn.gelu, (before,), (jnp.ones_like(before),))
    error = v - jnp.einsum("bthf,hfd->bthd", hidden, w1) if l2 else v
    back = jnp.einsum("bthd,hfd->bthf", error, w1) * slope

    count = window_weights(gamma)
    score = jnp.einsum("bthd,bihd->bhti", q, k) * scale
    causal = jnp.tril(jnp.ones(score.shape[-2:], bool))
    attention = jax.nn.softmax(jnp.where(causal, score, -1e30), axis=-1) * count
    active = jax.nn.gelu(jnp.einsum("bthd,hdf->bthf", q, w2) + jnp.einsum("bhti,bihf->bthf", attention, back))
    # hidden units grow with F and tokens with T: means, not sums, keep the output's size
    place = jnp.arange(1, q.shape[1] + 1, dtype=q.dtype)[:, None]
    linear = jnp.einsum("bthf,bihf->bhti", active, hidden) * count / (w1.shape[1] ** 0.5 * place)
    return jnp.einsum("bthf,hfd->bthd", active, w1) + jnp.einsum("bhti,bihd->bthd", linear, error)
