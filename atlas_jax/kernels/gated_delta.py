"""The gated delta rule (Gated DeltaNet, arXiv 2412.06464), as layers of pretrained models have it.

Each head has a memory W. A token multiplies it by its decay α, then corrects what it says of the token's key by a share β:

    W_t = α_t W_{t−1} + β_t (v_t − α_t W_{t−1} k_t) k_tᵀ,   y_t = W_t q_t

which is `memory.presets.gated_deltanet` with β = 2η. One token is a step; several are a chunk, in GEMMs that never form W_t
(the WY form). Both leave W bit for bit where a token is not real: its ln α and its β are 0.
"""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp

from atlas_jax.kernels.cholesky import solve_lower
from atlas_jax.kernels.reductions import row_sum
from atlas_jax.typing import Array, Bool, Float


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class DeltaState:
    """What a layer keeps of a row's text, however long that is.

    Attributes:
      inputs: the latest inputs of the convolution, oldest first.
      memory: W of every head.
    """

    inputs: Float[Array, "B before C"]
    memory: Float[Array, "B V O I"]


def init_delta_state(batch: int, before: int, channels: int, heads: int, dim: int) -> DeltaState:
    """Rows that have read nothing."""
    return DeltaState(
        inputs=jnp.zeros((batch, before, channels), jnp.float32),
        memory=jnp.zeros((batch, heads, dim, dim), jnp.float32),
    )


def short_convolution(
    inputs: Float[Array, "B before C"],
    x: Float[Array, "B T C"],
    weight: Float[Array, "C width"],
    valid: Bool[Array, "B T"],
) -> tuple[Float[Array, "B T C"], Float[Array, "B before C"]]:
    """Each channel's weighted sum of a token's input and those before it, and the inputs that the next tokens see.

    Args:
      inputs: those before the first token.
      valid: which tokens are real: the first of each row, as many as there are.
    """
    before, tokens = inputs.shape[1], x.shape[1]
    whole = jnp.concatenate([inputs, x], axis=1)
    mixed = sum(whole[:, place : place + tokens] * weight[:, place] for place in range(before + 1))
    place = valid.sum(axis=1, dtype=jnp.int32)[:, None] + jnp.arange(before)
    return jnp.asarray(mixed), jnp.take_along_axis(whole, place[..., None], axis=1)


def gated_delta(
    memory: Float[Array, "B V O I"],
    q: Float[Array, "B T V I"],
    k: Float[Array, "B T V I"],
    v: Float[Array, "B T V O"],
    decay: Float[Array, "B T V"],
    share: Float[Array, "B T V"],
) -> tuple[Float[Array, "B T V O"], Float[Array, "B V O I"]]:
    """What every token reads after it has written, and the memory after the last.

    Args:
      decay: ln α, 0 of a token that is not real.
      share: β, 0 of a token that is not real.
    """
    if q.shape[1] == 1:
        read, memory = _step(memory, *(x[:, 0] for x in (q, k, v, decay, share)))
        return read[:, None], memory
    return _chunk(memory, q, k, v, decay, share)


def _step(
    memory: jax.Array, q: jax.Array, k: jax.Array, v: jax.Array, decay: jax.Array, share: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """One token of every row; the memory is read once for both of its products, and once to be written."""
    both, decay = jnp.stack([k, q], axis=-2), jnp.exp(decay)
    found = jnp.einsum("bvti,bvoi->bvto", both, memory, precision=jax.lax.Precision.HIGHEST) * decay[..., None, None]
    change = (v - found[..., 0, :]) * share[..., None]
    memory = memory * decay[..., None, None] + change[..., None] * k[..., None, :]
    return found[..., 1, :] + change * row_sum(k * q)[..., None], memory


def _chunk(
    memory: jax.Array, q: jax.Array, k: jax.Array, v: jax.Array, decay: jax.Array, share: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Several tokens: what each changes is linear in what those before it change, one triangular system for each head."""
    q, k, v, decay, share = (jnp.moveaxis(x, 1, 2) for x in (q, k, v, decay, share))
    place = jnp.arange(q.shape[2])
    upto, after = (place[:, None] >= place).astype(q.dtype), (place[:, None] > place).astype(q.dtype)
    # sums of logarithms from every token on, not differences of sums from the first: those lose what they have in common
    since = jnp.exp(jnp.einsum("ts,bvs,sn->bvtn", upto, decay, after)) * upto
    left = jnp.exp(jnp.einsum("ts,bvs->bvt", upto, decay))[..., None]
    found = left * jnp.einsum("bvti,bvoi->bvto", k, memory)
    alike = share[..., None] * since * jnp.einsum("bvti,bvni->bvtn", k, k)
    system = alike * after + jnp.eye(place.size, dtype=q.dtype)
    change = solve_lower(system, share[..., None] * (v - found))
    asked = since * jnp.einsum("bvti,bvni->bvtn", q, k)
    read = left * jnp.einsum("bvti,bvoi->bvto", q, memory) + jnp.einsum("bvtn,bvno->bvto", asked, change)
    ended = since[:, :, -1, :, None] * change
    memory = left[:, :, -1:] * memory + jnp.einsum("bvno,bvni->bvoi", ended, k)
    return jnp.moveaxis(read, 2, 1), memory


def ref_gated_delta(
    memory: Float[Array, "B V O I"],
    q: Float[Array, "B T V I"],
    k: Float[Array, "B T V I"],
    v: Float[Array, "B T V O"],
    decay: Float[Array, "B T V"],
    share: Float[Array, "B T V"],
) -> tuple[Float[Array, "B T V O"], Float[Array, "B V O I"]]:
    """`gated_delta` as the recurrence that it stands for."""

    def token(memory: jax.Array, now: tuple[jax.Array, ...]) -> tuple[jax.Array, jax.Array]:
        q, k, v, decay, share = now
        memory = memory * jnp.exp(decay)[..., None, None]
        change = (v - jnp.einsum("bvoi,bvi->bvo", memory, k)) * share[..., None]
        memory = memory + jnp.einsum("bvo,bvi->bvoi", change, k)
        return memory, jnp.einsum("bvoi,bvi->bvo", memory, q)

    memory, read = jax.lax.scan(token, memory, tuple(jnp.moveaxis(x, 1, 0) for x in (q, k, v, decay, share)))
    return jnp.moveaxis(read, 0, 1), memory
