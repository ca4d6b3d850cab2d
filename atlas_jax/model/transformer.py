"""The transformer as pure functions: tokens and a KV cache in, hidden states and the updated cache out."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp

from atlas_jax.config import LayerConfig, ModelConfig
from atlas_jax.kernels import attention, kv_pages
from atlas_jax.kernels.fused_linear import gated_linear, normed_linear, residual_sum, summed_linear
from atlas_jax.kernels.kv_pages import KeptPairs, KVDtype, LayerKV, LayerPairs, RingView
from atlas_jax.kernels.linear import Weight, linear, rows_of
from atlas_jax.kernels.qkv_rope_cache import qkv_rope_cache
from atlas_jax.kernels.rope import RopeTable, rotations
from atlas_jax.model.params import LayerParams, ModelParams
from atlas_jax.sharding import on_each_device
from atlas_jax.typing import Array, Float, Int32

SINKS = 4
"""Tokens at the start of a text that stay attended for ever. Without them a window alone loses more than 1 nat."""


QUERY_SAMPLES = 32
"""Queries noted of every page to choose the kept pairs by. With 16, 32, 64 and 128 of them 512 pairs closed 0.60, 0.64, 0.67
and 0.69 of the gap between a window of 512 tokens and full attention (SmolLM2-135M, 4 608 tokens of five documents)."""


def init_kv(
    config: ModelConfig, batch: int, pages: int, dtype: KVDtype, kept_pages: Sequence[int] = ()
) -> tuple[LayerKV, ...]:
    """An empty cache of `pages` pages for each of `batch` rows.

    Args:
      kept_pages: pages of pairs that each layer keeps; empty where none does.
    """

    def layer(keeps: int) -> LayerKV:
        kv = kv_pages.init_layer_kv(batch, pages, config.kv_heads, config.head_dim, SINKS, dtype)
        if not keeps:
            return kv
        sizes = batch, pages, config.heads, config.kv_heads, config.head_dim
        return dataclasses.replace(kv, choice=kv_pages.init_pair_choice(*sizes, QUERY_SAMPLES))

    return tuple(layer(keeps) for keeps in kept_pages or (0,) * len(config.layers))


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class StepView:
    """What every layer needs to know of a step, computed once.

    Attributes:
      ring: where the tokens go.
      rotary, rotary_sink: per rotary embedding, cosines and sines at the tokens' positions, and at the positions from
        which they see the sinks.
      masks: per attention window of the model (`ModelConfig.windows`), what is visible; see `attention.visible`.
    """

    ring: RingView
    rotary: tuple[tuple[jax.Array, jax.Array], ...]
    rotary_sink: tuple[tuple[jax.Array, jax.Array], ...]
    masks: tuple[tuple[jax.Array, jax.Array], ...]


def step_view(config: ModelConfig, ropes: Sequence[RopeTable], ring: RingView) -> StepView:
    """Rotations and masks of a step."""
    # the sinks stay where the model has seen them: at most a trained context away, however long the text
    near = jnp.minimum(ring.positions, config.context_length - 1)
    return StepView(
        ring=ring,
        rotary=tuple(rotations(table, ring.positions) for table in ropes),
        rotary_sink=tuple(rotations(table, near) for table in ropes),
        masks=tuple(attention.visible(ring, window) for window in config.windows),
    )


def embed(config: ModelConfig, table: Weight, tokens: Int32[Array, "B T"]) -> Float[Array, "B T E"]:
    """Token embeddings as the first layer reads them."""
    return rows_of(table, tokens) * config.embed_scale


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Residual:
    """The residual stream, x, and what is still to be added to it: the next GEMM does so while it quantises its rows.

    Attributes:
      gain: of the norm of what is added, if it has one.
    """

    x: Float[Array, "B T E"]
    added: Float[Array, "B T E"] | None = None
    gain: Float[Array, E] | None = None


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class GroupPairs:
    """The kept pairs of consecutive layers.

    Attributes:
      pool: those of all layers.
      stretches: of each of these, as in `LayerPairs`.
      pages: likewise; 0 of a layer that keeps none.
    """

    pool: KeptPairs
    stretches: Int32[Array, "B layers 2"]
    pages: tuple[int, ...] = field(metadata={"static": True})

    def of_layer(self, index: int) -> LayerPairs | None:
        """Those of one of these layers."""
        if not self.pages[index]:
            return None
        return LayerPairs(self.pool, self.stretches[:, index], self.pages[index])


def run_layers(
    config: ModelConfig,
    specs: Sequence[LayerConfig],
    layers: Sequence[LayerParams],
    kv: Sequence[LayerKV],
    x: Float[Array, "B T E"],
    view: StepView,
    pairs: GroupPairs | None = None,
) -> tuple[tuple[Float[Array, "B T E"], ...], tuple[LayerKV, ...]]:
    """Runs consecutive layers over a step's tokens.

    Args:
      config, specs: static; `specs` are these layers' own.
      x: the output of the layer before, or the embeddings; all tokens of a row in one page.
      pairs: the kept pairs of these layers; they are only read.

    Returns:
      Each layer's output (the residual stream before the final norm), and the updated cache.
    """
    states: list[jax.Array] = []
    cache: list[LayerKV] = []
    residual = Residual(x)
    for index, (spec, layer, layer_kv) in enumerate(zip(specs, layers, kv, strict=True)):
        own = None if pairs is None else pairs.of_layer(index)
        x, residual, layer_kv = _run_layer(config, spec, layer, layer_kv, residual, view, own)
        states.append(x)
        cache.append(layer_kv)
    assert residual.added is not None
    last = residual_sum(residual.x, residual.added, residual.gain, config.norm_eps)
    return (*states[1:], last), tuple(cache)


# compiled into its caller; as a jit of its own, layers alike are traced once: a warm start is mostly tracing
@functools.partial(jax.jit, static_argnums=(0, 1), inline=False)
def _run_layer(
    config: ModelConfig,
    spec: LayerConfig,
    layer: LayerParams,
    kv: LayerKV,
    residual: Residual,
    view: StepView,
    pairs: LayerPairs | None,
) -> tuple[jax.Array, Residual, LayerKV]:
    """What the layer reads, what it leaves, and its cache."""
    qkv, x = _normed_linear(config, layer.qkv, residual, layer.attn_norm)
    by_head = qkv.reshape(*x.shape[:-1], config.kv_heads, config.groups + 2, config.head_dim)
    gains = None if layer.q_norm is None or layer.k_norm is None else (layer.q_norm, layer.k_norm)
    rotary, near = view.rotary[spec.rope], view.rotary_sink[spec.rope]
    rows = view.ring, rotary, near, view.masks[config.windows.index(spec.sliding_window)], pairs

    def attend(by_head: jax.Array, kv: LayerKV, rows: Any, gains: Any) -> tuple[jax.Array, LayerKV]:
        ring, rotary, near, masks, pairs = rows
        q, q_sink, kv = qkv_rope_cache(by_head, gains, config.norm_eps, rotary, near, kv, ring)
        return attention.attend(q, q_sink, kv, ring, spec.sliding_window, masks, config.scale, pairs), kv

    mixed, kv = on_each_device(attend, by_head, kv, rows, gains)
    attended = linear(layer.out, mixed.reshape(*x.shape[:2], -1))
    gate_up, between = _normed_linear(config, layer.gate_up, Residual(x, attended, layer.attn_post_norm), layer.ff_norm)
    made = gated_linear(layer.down, gate_up, config.ff_block, config.activation)
    return x, Residual(between, made, layer.ff_post_norm), kv


def _normed_linear(
    config: ModelConfig, weight: Weight, residual: Residual, gain: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Of the normed residual stream; and the stream, with what was to be added."""
    if residual.added is None:
        return normed_linear(weight, residual.x, gain, config.norm_eps), residual.x
    return summed_linear(weight, residual.x, residual.added, residual.gain, gain, config.norm_eps)


def logits(config: ModelConfig, params: ModelParams, hidden: Float[Array, "*rows E"]) -> Float[Array, "*rows V"]:
    """Scores of every token of the vocabulary from the last layer's output."""
    head = params.embed if params.head is None else params.head
    scores = normed_linear(head, hidden, params.final_norm, config.norm_eps)
    cap = config.final_softcap
    return scores if cap is None else cap * jnp.tanh(scores / cap)
