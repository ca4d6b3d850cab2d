"""The transformer as pure functions: tokens and a KV cache in, hidden states and the updated cache out."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from atlas_jax.config import ModelConfig
from atlas_jax.kernels import attention
from atlas_jax.kernels.attention import KVDtype, LayerKV, RingView
from atlas_jax.kernels.linear import linear, rows_of
from atlas_jax.kernels.reduce import row_sum
from atlas_jax.kernels.rope import apply_rope, rotations
from atlas_jax.model.params import LayerParams, ModelParams
from atlas_jax.typing import Array, Float, Int32

SINKS = 4
"""Tokens at the start of a text that stay attended for ever. Without them a window alone loses more than 1 nat."""


def init_kv(config: ModelConfig, batch: int, pages: int, dtype: KVDtype) -> tuple[LayerKV, ...]:
    """An empty cache of `pages` pages for each of `batch` rows."""
    return tuple(
        attention.init_layer_kv(batch, pages, config.kv_heads, config.head_dim, SINKS, dtype) for _ in config.layers
    )


def rms_norm(x: Float[Array, "*rows E"], gain: Float[Array, E], eps: float) -> Float[Array, "*rows E"]:
    """x / √(mean x² + eps) · gain."""
    mean_square = row_sum(x * x)[..., None] * (1.0 / x.shape[-1])
    return x * jax.lax.rsqrt(mean_square + eps) * gain


def trunk(
    config: ModelConfig,
    params: ModelParams,
    kv: tuple[LayerKV, ...],
    tokens: Int32[Array, "B T"],
    view: RingView,
    taps: Sequence[int] = (),
) -> tuple[Float[Array, "B T E"], tuple[LayerKV, ...], tuple[Float[Array, "B T E"], ...]]:
    """Runs every layer over a step's tokens.

    Args:
      config: static.
      tokens: the step's tokens, all of one page per row; where `view.valid` is False they are ignored.
      view: where they go and what they see.
      taps: layers whose output (the residual stream) is also returned, in this order.

    Returns:
      The last layer's output before the final norm, the updated cache, and the tapped residual streams.
    """
    rotary = [rotations(table, view.positions) for table in params.ropes]
    # the sinks stay where the model has seen them: at most a trained context away, however long the text
    near = jnp.minimum(view.positions, config.context_length - 1)
    rotary_sink = [rotations(table, near) for table in params.ropes]
    windows = {layer.sliding_window for layer in config.layers}
    masks = {window: attention.visible(view, window) for window in windows}

    x = rows_of(params.embed, tokens) * config.embed_scale
    cache: list[LayerKV] = []
    tapped: dict[int, jax.Array] = {}
    for index, (spec, layer, layer_kv) in enumerate(zip(config.layers, params.layers, kv, strict=True)):
        with jax.named_scope(f"layer_{index}"):
            q, k, v = _project(config, layer, rms_norm(x, layer.attn_norm, config.norm_eps))
            cos, sin = rotary[spec.rope]
            layer_kv = attention.write(layer_kv, apply_rope(k, cos, sin), v, view)
            mixed = attention.window_attention(
                apply_rope(q, cos, sin),
                apply_rope(q, *rotary_sink[spec.rope]),
                layer_kv,
                *masks[spec.sliding_window],
                config.scale,
            )
            cache.append(layer_kv)
            x = x + _post(
                config, linear(layer.out, mixed.reshape(*tokens.shape, -1), precise=False), layer.attn_post_norm
            )
            x = x + _post(config, _mlp(config, layer, rms_norm(x, layer.ff_norm, config.norm_eps)), layer.ff_post_norm)
            if index in taps:
                tapped[index] = x
    return x, tuple(cache), tuple(tapped[index] for index in taps)


def logits(config: ModelConfig, params: ModelParams, hidden: Float[Array, "*rows E"]) -> Float[Array, "*rows V"]:
    """Scores of every token of the vocabulary from the last layer's output."""
    head = params.embed if params.head is None else params.head
    scores = linear(head, rms_norm(hidden, params.final_norm, config.norm_eps))
    cap = config.final_softcap
    return scores if cap is None else cap * jnp.tanh(scores / cap)


def _project(config: ModelConfig, layer: LayerParams, h: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    qkv = linear(layer.qkv, h)
    split = jnp.split(
        qkv, [config.heads * config.head_dim, (config.heads + config.kv_heads) * config.head_dim], axis=-1
    )
    q, k, v = (part.reshape(*part.shape[:-1], -1, config.head_dim) for part in split)
    if layer.q_norm is not None and layer.k_norm is not None:
        q, k = rms_norm(q, layer.q_norm, config.norm_eps), rms_norm(k, layer.k_norm, config.norm_eps)
    return q, k, v


def _mlp(config: ModelConfig, layer: LayerParams, h: jax.Array) -> jax.Array:
    gate, up = jnp.split(linear(layer.gate_up, h), 2, axis=-1)
    activated = jax.nn.silu(gate) if config.activation == "silu" else jax.nn.gelu(gate, approximate=True)
    return linear(layer.down, activated * up)


def _post(config: ModelConfig, x: jax.Array, gain: jax.Array | None) -> jax.Array:
    return x if gain is None else rms_norm(x, gain, config.norm_eps)
