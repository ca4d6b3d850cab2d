"""Causal attention in training form: whole sequences, over everything or over a sliding window."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from atlas_jax.config import RopeConfig
from atlas_jax.kernels.rope import frequencies
from atlas_jax.model.lm.config import LMConfig
from atlas_jax.model.lm.layers import weight
from atlas_jax.typing import Array, Bool, Float, Int32

NEGATIVE = -1e30
"""A score that no softmax sees."""


def rotate(
    x: Float[Array, "B T heads D"], base: float, place: Int32[Array, "B T"] | None = None
) -> Float[Array, "B T heads D"]:
    """Rotary embedding of pairs (0, 1), (2, 3), … as GGUF's `llama` stores them.

    Args:
      place: of each token, less than T; 0, 1, … if not given.
    """
    angle = np.arange(x.shape[1])[:, None] * frequencies(RopeConfig(base=base, dims=x.shape[-1]))
    wide = jnp.promote_types(x.dtype, jnp.float32)
    cos, sin = jnp.asarray(np.cos(angle), wide), jnp.asarray(np.sin(angle), wide)
    return rotate_pairs(x, *((cos, sin) if place is None else (cos[place], sin[place])))


def places(document: Int32[Array, "B T"], prefix: int) -> Int32[Array, "B prefix+T"]:
    """Where each token stands in its own document, which the same `prefix` tokens precede."""
    index = jnp.arange(document.shape[1], dtype=jnp.int32)
    begins = jnp.diff(document, axis=1, prepend=document[:, :1]) != 0
    own = index - jax.lax.cummax(jnp.where(begins, index, 0), axis=1)
    first = jnp.broadcast_to(jnp.arange(prefix, dtype=jnp.int32), (document.shape[0], prefix))
    return jnp.concatenate([first, prefix + own], axis=1)


def rotate_pairs(
    x: Float[Array, "*rows heads D"], cos: Float[Array, "*#rows half"], sin: Float[Array, "*#rows half"]
) -> Float[Array, "*rows heads D"]:
    """Rotates pairs (0, 1), (2, 3), … by the angles with these cosines and sines."""
    cos, sin = cos[..., None, :], sin[..., None, :]
    even, odd = x[..., 0::2], x[..., 1::2]
    return jnp.stack([even * cos - odd * sin, even * sin + odd * cos], axis=-1).reshape(x.shape).astype(x.dtype)


def attend(
    q: Float[Array, "B T H D"], k: Float[Array, "B U K D"], v: Float[Array, "B U K D"], mask: Bool[Array, "#B T U"]
) -> Float[Array, "B T H D"]:
    """softmax(q·k / √D) v over the keys the mask allows, each KV head serving H / K query heads."""
    grouped = q.reshape(*q.shape[:2], k.shape[2], -1, q.shape[3])
    score = jnp.einsum("btkgd,bukd->bkgtu", grouped, k) * q.shape[-1] ** -0.5
    score = jnp.where(mask[:, None, None], score.astype(jnp.promote_types(score.dtype, jnp.float32)), NEGATIVE)
    out = jnp.einsum("bkgtu,bukd->btkgd", jax.nn.softmax(score, axis=-1).astype(v.dtype), v)
    return out.reshape(q.shape)


def window_mask(tokens: int, window: int | None) -> Bool[Array, "T T"]:
    """Which keys a query may see: those not after it, at most `window` of them."""
    distance = jnp.arange(tokens)[:, None] - jnp.arange(tokens)
    causal = distance >= 0
    return causal if window is None else causal & (distance < window)


def within(mask: Bool[Array, "#B T T"], document: Int32[Array, "B T"] | None) -> Bool[Array, "#B T T"]:
    """A mask that also keeps documents of a row from each other."""
    return mask if document is None else mask & (document[:, :, None] == document[:, None])


def window_attend(
    q: Float[Array, "B T H D"],
    k: Float[Array, "B T K D"],
    v: Float[Array, "B T K D"],
    window: int,
    prefix: int = 0,
    document: Int32[Array, "B T-prefix"] | None = None,
) -> Float[Array, "B T-prefix H D"]:
    """Attention of each token to the last `window` tokens, itself included, in time and memory T · window.

    Blocks of `window` queries look at their own block and the one before it, which hold all they may see.

    Args:
      prefix: leading keys that every query sees beside its window; the first queries are dropped with them.
      document: number of the document of each token, which sees no other; all are of one if not given.
    """
    (q, _), (k, first_k), (v, first_v) = ((x[:, prefix:], x[:, :prefix]) for x in (q, k, v))
    batch, tokens = q.shape[:2]
    if tokens <= window:
        mask = within(window_mask(tokens, window)[None], document)
        mask = jnp.pad(mask, ((0, 0), (0, 0), (prefix, 0)), constant_values=True)
        return attend(q, jnp.concatenate([first_k, k], 1), jnp.concatenate([first_v, v], 1), mask)
    blocks = -(-tokens // window)
    after = blocks * window - tokens

    def queries(x: jax.Array) -> jax.Array:
        x = jnp.pad(x, ((0, 0), (0, after), *((0, 0) for _ in x.shape[2:])))
        return x.reshape(batch * blocks, window, *x.shape[2:])

    def keys(x: jax.Array, first: jax.Array) -> jax.Array:
        x = jnp.pad(x, ((0, 0), (window, after), *((0, 0) for _ in x.shape[2:])))
        x = x.reshape(batch, blocks + 1, window, *x.shape[2:])
        pairs = jnp.concatenate([x[:, :-1], x[:, 1:]], axis=2)
        first = jnp.broadcast_to(first[:, None], (batch, blocks, *first.shape[1:]))
        return jnp.concatenate([first, pairs], axis=2).reshape(batch * blocks, -1, *x.shape[3:])

    distance = (jnp.arange(window) + window)[:, None] - jnp.arange(2 * window)
    seen = (distance >= 0) & (distance < window)
    real = jnp.arange(2 * window) >= window  # before the first block there is nothing
    mask = jnp.stack([seen & real, *[seen] * (blocks - 1)])
    mask = jnp.tile(mask, (batch, 1, 1))
    if document is not None:
        own = queries(document)
        around = keys(document, document[:, :0])[:, : 2 * window]
        mask &= own[:, :, None] == around[:, None]
    mask = jnp.pad(mask, ((0, 0), (0, 0), (prefix, 0)), constant_values=True)
    out = attend(queries(q), keys(k, first_k), keys(v, first_v), mask)
    return out.reshape(batch, blocks * window, *out.shape[2:])[:, :tokens]


class Attention(nnx.Module):
    """Rotary grouped-query attention with its four projections.

    Args:
      window: tokens seen, or None for all.
      persistent: learned tokens that stand before the sequence and are always seen.
    """

    def __init__(
        self, config: LMConfig, *, window: int | None, persistent: int = 0, gain: float = 1.0, rngs: nnx.Rngs
    ) -> None:
        embed, heads, kv, dim = config.embed, config.heads, config.n_kv, config.dim
        self.q = weight(rngs, (embed, heads, dim), "ehd: e -> hd", embed)
        self.k = weight(rngs, (embed, kv, dim), "ekd: e -> kd", embed)
        self.v = weight(rngs, (embed, kv, dim), "ekd: e -> kd", embed)
        self.out = weight(rngs, (heads, dim, embed), "hde: hd -> e", heads * dim, gain=gain)
        first = jax.random.normal(rngs.params(), (persistent, embed), jnp.float32)
        self.persistent = nnx.Param(first) if persistent else None
        self._base, self._window = config.rope_base, window

    def __call__(self, x: Float[Array, "B T E"], document: Int32[Array, "B T"] | None = None) -> Float[Array, "B T E"]:
        return self.project(self.mix(x, document))

    def mix(self, x: Float[Array, "B T E"], document: Int32[Array, "B T"] | None = None) -> Float[Array, "B T H D"]:
        """Attention before the output projection; persistent tokens are seen by every document of a row."""
        if self._window is None:
            return self.mix_masked(x, within(window_mask(x.shape[1], None)[None], document))
        x, prefix = self.with_persistent(x)
        q, k, v = self.qkv(x, None if document is None else places(document, prefix))
        return window_attend(q, k, v, self._window, prefix, document)

    def mix_masked(self, x: Float[Array, "B T E"], mask: Bool[Array, "#B T T"]) -> Float[Array, "B T H D"]:
        """As `mix`, with a mask instead of the window; persistent tokens are seen by all."""
        x, prefix = self.with_persistent(x)
        q, k, v = self.qkv(x)
        mask = jnp.pad(mask, ((0, 0), (0, 0), (prefix, 0)), constant_values=True)
        return attend(q[:, prefix:], k, v, mask)

    def project(self, mixed: Float[Array, "B T H D"]) -> Float[Array, "B T E"]:
        """The output projection."""
        return jnp.einsum("bthd,hde->bte", mixed, self.out[...])

    def qkv(
        self, x: Float[Array, "B T E"], place: Int32[Array, "B T"] | None = None
    ) -> tuple[Float[Array, "B T H D"], Float[Array, "B T K D"], Float[Array, "B T K D"]]:
        """Rotated queries, rotated keys, values; `place` as for `rotate`."""
        q, k, v = self.heads(x)
        return rotate(q, self._base, place), rotate(k, self._base, place), v

    def heads(
        self, x: Float[Array, "B T E"]
    ) -> tuple[Float[Array, "B T H D"], Float[Array, "B T K D"], Float[Array, "B T K D"]]:
        """Queries, keys and values, before rotation."""
        q = jnp.einsum("bte,ehd->bthd", x, self.q[...])
        k = jnp.einsum("bte,ekd->btkd", x, self.k[...])
        v = jnp.einsum("bte,ekd->btkd", x, self.v[...])
        return q, k, v

    def with_persistent(self, x: Float[Array, "B T E"]) -> tuple[Float[Array, "B persistent+T E"], int]:
        """The persistent tokens and x after them, and how many of them there are."""
        if self.persistent is None:
            return x, 0
        first = jnp.broadcast_to(self.persistent[...].astype(x.dtype), (x.shape[0], *self.persistent[...].shape))
        return jnp.concatenate([first, x], axis=1), first.shape[1]
