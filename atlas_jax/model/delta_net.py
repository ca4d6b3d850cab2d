"""A Gated DeltaNet layer: what takes attention's place in three of four layers of Qwen 3 Next and Qwen 3.5.

A short convolution over the latest inputs, then the gated delta rule in every head (`kernels.gated_delta`), then a norm of
each head that a further projection gates. Its state has one size, and cannot be set back to an earlier token.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from atlas_jax.config import DeltaNetConfig
from atlas_jax.kernels.fused_linear import rms_norm
from atlas_jax.kernels.gated_delta import DeltaState, gated_delta, init_delta_state, short_convolution
from atlas_jax.kernels.reductions import row_sum
from atlas_jax.model.params import DeltaParams
from atlas_jax.typing import Array, Bool, Float


def init_state(config: DeltaNetConfig, batch: int) -> DeltaState:
    """Rows of a layer that have read nothing."""
    return init_delta_state(batch, config.conv - 1, config.channels, config.heads, config.dim)


def mix_tokens(
    config: DeltaNetConfig,
    eps: float,
    params: DeltaParams,
    state: DeltaState,
    projected: Float[Array, "B T outputs"],
    gates: Float[Array, "B T gates"],
    valid: Bool[Array, "B T"],
) -> tuple[Float[Array, "B T inner"], DeltaState]:
    """What the output projection reads, and the state after the step.

    Args:
      eps: of the norms.
      projected, gates: of the normed residual stream, by `DeltaParams.project` and `DeltaParams.gates`.
      valid: which tokens are real: the first of each row, as many as there are. Others leave the state as it is.
    """
    batch, tokens = valid.shape
    qkv, z = projected[..., : config.channels], projected[..., config.channels :]
    mixed, inputs = short_convolution(state.inputs, qkv, params.conv, valid)
    heads = jax.nn.silu(mixed).reshape(batch, tokens, -1, config.dim)
    q, k, v = jnp.split(heads, [config.key_heads, 2 * config.key_heads], axis=2)
    q, k = (_for_each_value(config, _unit(x, eps)) for x in (q, k))
    share, time = jnp.split(gates, 2, axis=-1)
    real = valid[..., None]
    decay = jnp.where(real, params.decay * jax.nn.softplus(time + params.decay_bias), 0.0)
    share = jnp.where(real, jax.nn.sigmoid(share), 0.0)
    read, memory = gated_delta(state.memory, q * config.dim**-0.5, k, v, decay, share)
    out = rms_norm(read, params.norm, eps) * jax.nn.silu(z.reshape(read.shape))
    return out.reshape(batch, tokens, -1), DeltaState(inputs, memory)


def _for_each_value(config: DeltaNetConfig, x: Float[Array, "B T heads D"]) -> Float[Array, "B T V D"]:
    """A key or query head for every value head."""
    each = config.heads // config.key_heads
    return jnp.tile(x, (1, 1, each, 1)) if config.tiled else jnp.repeat(x, each, axis=2)


def _unit(x: Float[Array, "*rows D"], eps: float) -> Float[Array, "*rows D"]:
    """x at length 1, or shorter if it is shorter than `eps`."""
    return x / jnp.maximum(jnp.sqrt(row_sum(x * x)), eps)[..., None]
