"""The small parts all blocks share. Every matrix parameter names its sides (`matrix`), for Muon."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx

from atlas_jax.typing import Array, Float, Int32


def weight(
    rngs: nnx.Rngs, shape: tuple[int, ...], axes: str, fan_in: int, *, gain: float = 1.0
) -> nnx.Param[jax.Array]:
    """A matrix with entries N(0, gain² / fan_in).

    Args:
      axes: as for `atlas_jax.optim.MatrixAxes.parse`.
    """
    values = jax.random.normal(rngs.params(), shape, jnp.float32) * (gain / fan_in**0.5)
    return nnx.Param(values, matrix=axes)


def rms_norm(x: Float[Array, "*rows d"], scale: Float[Array, "*#rows d"], eps: float) -> Float[Array, "*rows d"]:
    """x / √(mean x² + eps), times a learned scale; in float32 at least, and of the type of x."""
    wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    return (wide * jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + eps) * scale).astype(x.dtype)


class RMSNorm(nnx.Module):
    """`rms_norm` with its scale, over the last axis; leading axes of the scale (heads) may be given."""

    def __init__(self, *shape: int, eps: float) -> None:
        self.scale = nnx.Param(jnp.ones(shape, jnp.float32))
        self._eps = eps

    def __call__(self, x: Float[Array, "*rows d"]) -> Float[Array, "*rows d"]:
        return rms_norm(x, self.scale[...], self._eps)


class SwiGLU(nnx.Module):
    """down(silu(gate x) ⊙ up x), the MLP of Llama."""

    def __init__(self, embed: int, ff: int, *, gain: float, rngs: nnx.Rngs) -> None:
        self.gate = weight(rngs, (embed, ff), "ef: e -> f", embed)
        self.up = weight(rngs, (embed, ff), "ef: e -> f", embed)
        self.down = weight(rngs, (ff, embed), "fe: f -> e", ff, gain=gain)

    def __call__(self, x: Float[Array, "B T E"]) -> Float[Array, "B T E"]:
        hidden = jax.nn.silu(jnp.einsum("bte,ef->btf", x, self.gate[...])) * jnp.einsum("bte,ef->btf", x, self.up[...])
        return jnp.einsum("btf,fe->bte", hidden, self.down[...])


class ShortConv(nnx.Module):
    """Depthwise causal convolution: token t sees t − taps + 1 … t.

    A memory binds what stands in *one* token's key to its value; in text they are neighbours, and this is what brings
    them together.
    """

    def __init__(self, channels: tuple[int, ...], taps: int, *, rngs: nnx.Rngs) -> None:
        noise = jax.random.normal(rngs.params(), (taps, *channels), jnp.float32) * (0.5 / taps**0.5)
        self.taps = nnx.Param(noise.at[-1].add(1.0))  # starts near the identity

    def __call__(
        self,
        x: Float[Array, "B T *channels"],
        before: Float[Array, "B taps-1 *channels"] | None = None,
        document: Int32[Array, "B T"] | None = None,
    ) -> Float[Array, "B T *channels"]:
        """The convolution.

        Args:
          before: what stands before x; nothing, that is zeros, if not given.
          document: number of the document of each token, which sees no other; all are of one if not given.
        """
        taps = self.taps[...]
        if before is None:
            padded = jnp.pad(x, ((0, 0), (len(taps) - 1, 0), *((0, 0) for _ in x.shape[2:])))
        else:
            padded = jnp.concatenate([before, x], axis=1)
        total = jnp.zeros_like(x)
        for i, tap in enumerate(taps):
            seen = padded[:, i : i + x.shape[1]]
            if document is not None:
                back = len(taps) - 1 - i
                same = jnp.pad(document, ((0, 0), (back, 0)), constant_values=-1)[:, : x.shape[1]] == document
                seen = jnp.where(same.reshape(*same.shape, *(1,) * (x.ndim - 2)), seen, 0)
            total = total + seen * tap
        return total
