"""The transformer as pure functions: tokens and a KV cache in, hidden states and the updated cache out."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp

from atlas_jax.config import LayerConfig, ModelConfig, RopeConfig
from atlas_jax.kernels import attention, kv_pages
from atlas_jax.kernels.fused_linear import (
    activated,
    gated_linear,
    layer_norm,
    normed_linear,
    residual_sum,
    rms_norm,
    summed_linear,
)
from atlas_jax.kernels.gated_delta import DeltaState
from atlas_jax.kernels.kv_pages import KeptPairs, KVDtype, LayerKV, LayerPairs, RingView
from atlas_jax.kernels.linear import Weight, linear, rows_of
from atlas_jax.kernels.low_rank import LowRank, RowScales, add_low_rank
from atlas_jax.kernels.qkv_rope_cache import qkv_rope_cache
from atlas_jax.kernels.rope import RopeTable, rotations
from atlas_jax.model import delta_net
from atlas_jax.model.experts import mixture
from atlas_jax.model.params import LayerLora, LayerParams, ModelParams
from atlas_jax.sharding import on_each_device
from atlas_jax.typing import Array, Float, Int32

SINKS = 4
"""Tokens at the start of a text that stay attended for ever. Without them a window alone loses more than 1 nat."""


QUERY_SAMPLES = 32
"""Queries noted of every page to choose the kept pairs by. With 16, 32, 64 and 128 of them 512 pairs closed 0.60, 0.64, 0.67
and 0.69 of the gap between a window of 512 tokens and full attention (SmolLM2-135M, 4 608 tokens of five documents)."""


LayerState = LayerKV | DeltaState
"""What a layer keeps of the text: keys and values of its pages, or a state of one size."""


def init_kv(
    config: ModelConfig, batch: int, pages: int, dtype: KVDtype, kept_pages: Sequence[int] = ()
) -> tuple[LayerState, ...]:
    """An empty cache of `pages` pages for each of `batch` rows.

    Args:
      kept_pages: pages of pairs that each layer keeps; empty where none does.
    """

    def layer(spec: LayerConfig, keeps: int) -> LayerState:
        if spec.kind == "delta_net":
            assert config.delta_net is not None
            return delta_net.init_state(config.delta_net, batch)
        kv = kv_pages.init_layer_kv(batch, pages, config.kv_heads, config.head_dim, SINKS, dtype)
        if not keeps:
            return kv
        sizes = batch, pages, config.heads, config.kv_heads, config.head_dim
        return dataclasses.replace(kv, choice=kv_pages.init_pair_choice(*sizes, QUERY_SAMPLES))

    kept_pages = kept_pages or (0,) * len(config.layers)
    return tuple(layer(spec, keeps) for spec, keeps in zip(config.layers, kept_pages, strict=True))


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class StepView:
    """What every layer needs to know of a step, computed once.

    Attributes:
      ring: where the tokens go.
      rotary, rotary_sink: per rotary embedding, cosines and sines at the tokens' positions, and at the positions from
        which they see the sinks.
      masks: per attention window of the model (`ModelConfig.windows`), what is visible; see `attention.visible`.
      lora: how far rows use LoRA adapters; None where none is loaded.
    """

    ring: RingView
    rotary: tuple[tuple[jax.Array, jax.Array], ...]
    rotary_sink: tuple[tuple[jax.Array, jax.Array], ...]
    masks: tuple[tuple[jax.Array, jax.Array], ...]
    lora: RowScales | None = None


def step_view(config: ModelConfig, ropes: Sequence[RopeTable], ring: RingView) -> StepView:
    """Rotations and masks of a step."""
    # the sinks stay where the model has seen them: at most a trained context away, however long the text
    near = jnp.minimum(ring.positions, config.context_length - 1)

    def rotary(positions: jax.Array) -> tuple[tuple[jax.Array, jax.Array], ...]:
        return tuple(_rotary(rope, table, positions) for rope, table in zip(config.ropes, ropes, strict=True))

    return StepView(
        ring=ring,
        rotary=rotary(ring.positions),
        rotary_sink=rotary(near),
        masks=tuple(attention.visible(ring, window) for window in config.windows),
    )


def _rotary(rope: RopeConfig, table: RopeTable, positions: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Cosines and sines that queries and keys are rotated by, in the rope's magnitude."""
    cos, sin = rotations(table, positions)
    return (cos, sin) if rope.magnitude == 1.0 else (cos * rope.magnitude, sin * rope.magnitude)


def embed(config: ModelConfig, table: Weight, tokens: Int32[Array, "B T"]) -> Float[Array, "B T E"]:
    """Token embeddings as the first layer reads them."""
    return rows_of(table, tokens) * config.embed_scale


def _adapted(
    out: jax.Array, lora: LowRank | None, rows: RowScales | None, inner: Callable[[Weight], jax.Array]
) -> jax.Array:
    """What a weight gives, with what adapters add to it."""
    return out if lora is None or rows is None else add_low_rank(out, lora, rows, inner)


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
    kv: Sequence[LayerState],
    x: Float[Array, "B T E"],
    view: StepView,
    pairs: GroupPairs | None = None,
) -> tuple[tuple[Float[Array, "B T E"], ...], tuple[LayerState, ...]]:
    """Runs consecutive layers over a step's tokens.

    Args:
      config, specs: static; `specs` are these layers' own.
      x: the output of the layer before, or the embeddings; all tokens of a row in one page.
      pairs: the kept pairs of these layers; they are only read.

    Returns:
      Each layer's output (the residual stream before the final norm), and the updated cache.
    """
    states: list[jax.Array] = []
    cache: list[LayerState] = []
    residual = Residual(x)
    for index, (spec, layer, layer_kv) in enumerate(zip(specs, layers, kv, strict=True)):
        own = None if pairs is None else pairs.of_layer(index)
        x, residual, layer_kv = _run_layer(config, spec, layer, layer_kv, residual, view, own)
        states.append(x)
        cache.append(layer_kv)
    return (*states[1:], _summed(config, residual)), tuple(cache)


# compiled into its caller; as a jit of its own, layers alike are traced once: a warm start is mostly tracing
@functools.partial(jax.jit, static_argnums=(0, 1), inline=False)
def _run_layer(
    config: ModelConfig,
    spec: LayerConfig,
    layer: LayerParams,
    state: LayerState,
    residual: Residual,
    view: StepView,
    pairs: LayerPairs | None,
) -> tuple[jax.Array, Residual, LayerState]:
    """What the layer reads, what it leaves, and its state."""
    if isinstance(state, DeltaState):
        mixed, x, state = _mix_recurrently(config, layer, state, residual, view)
    else:
        mixed, x, state = _mix_by_attention(config, spec, layer, state, residual, view, pairs)
    lora, rows = layer.lora or LayerLora(), view.lora
    out = _adapted(linear(layer.out, mixed), lora.out, rows, lambda a: linear(a, mixed))
    after_attention = Residual(x, _biased(out, layer.out_bias), layer.attn_post_norm)
    ff_norm = layer.ff_norm, layer.ff_norm_bias
    if layer.experts is not None and config.experts is not None:
        between = _summed(config, after_attention)
        made = mixture(config, config.experts, layer.experts, _normed(config, between, *ff_norm))
        return x, Residual(between, made, layer.ff_post_norm), state
    assert layer.gate_up is not None
    assert layer.down is not None
    wide = layer.gate_up, layer.gate_up_bias
    if config.parallel:
        attn_norm = layer.attn_norm, layer.attn_norm_bias
        gate_up, _ = _normed_linear(config, *wide, Residual(x), attn_norm, lora.gate_up, rows)
        between = _summed(config, after_attention)
    else:
        gate_up, between = _normed_linear(config, *wide, after_attention, ff_norm, lora.gate_up, rows)

    def narrowed(weight: Weight) -> jax.Array:
        if config.gated:
            return gated_linear(weight, gate_up, config.ff_block, config.activation)
        return linear(weight, activated(gate_up, config.activation))

    made = _adapted(narrowed(layer.down), lora.down, rows, narrowed)
    return x, Residual(between, _biased(made, layer.down_bias), layer.ff_post_norm), state


def _mix_by_attention(
    config: ModelConfig,
    spec: LayerConfig,
    layer: LayerParams,
    kv: LayerKV,
    residual: Residual,
    view: StepView,
    pairs: LayerPairs | None,
) -> tuple[jax.Array, jax.Array, LayerKV]:
    """What the output projection reads, the residual stream as the layer has found it, and the cache."""
    assert layer.qkv is not None
    norm, lora = (layer.attn_norm, layer.attn_norm_bias), layer.lora or LayerLora()
    qkv, x = _normed_linear(config, layer.qkv, layer.qkv_bias, residual, norm, lora.qkv, view.lora)
    by_head = qkv.reshape(*x.shape[:-1], config.kv_heads, -1, config.head_dim)
    by_head, gate = by_head[..., : config.groups + 2, :], by_head[..., config.groups + 2 :, :]
    if layer.key_balance is not None:
        by_head = by_head * layer.key_balance
    gains = None if layer.q_norm is None or layer.k_norm is None else (layer.q_norm, layer.k_norm)
    if gains is not None and (config.qk_norm != "head" or config.norm != "rms"):
        by_head, gains = _normed_heads(config, by_head, *gains), None
    rotary, near = view.rotary[spec.rope], view.rotary_sink[spec.rope]
    mask, of_heads = view.masks[config.windows.index(spec.sliding_window)], {"null_logit": layer.null_logit}
    rows = view.ring, rotary, near, mask, pairs, of_heads

    def attend(by_head: jax.Array, kv: LayerKV, rows: Any, gains: Any) -> tuple[jax.Array, LayerKV]:
        ring, rotary, near, masks, pairs, of_heads = rows
        q, q_sink, kv = qkv_rope_cache(by_head, gains, config.norm_eps, rotary, near, kv, ring)
        rest = config.scale, pairs, config.attention_softcap, of_heads["null_logit"]
        return attention.attend(q, q_sink, kv, ring, spec.sliding_window, masks, *rest), kv

    mixed, kv = on_each_device(attend, by_head, kv, rows, gains)
    mixed = mixed.reshape(*x.shape[:2], -1)
    return (mixed * jax.nn.sigmoid(gate.reshape(mixed.shape)) if config.attention_gate else mixed), x, kv


def _mix_recurrently(
    config: ModelConfig, layer: LayerParams, state: DeltaState, residual: Residual, view: StepView
) -> tuple[jax.Array, jax.Array, DeltaState]:
    """The same of a layer whose state has one size."""
    own, norm = layer.delta, (layer.attn_norm, layer.attn_norm_bias)
    assert own is not None
    assert config.delta_net is not None
    lora = layer.lora or LayerLora()
    projected, x = _normed_linear(config, own.project, None, residual, norm, lora.project, view.lora)
    gates = linear(own.gates, _normed(config, x, *norm))
    mixed, state = delta_net.mix_tokens(
        config.delta_net, config.norm_eps, own, state, projected, gates, view.ring.valid
    )
    return mixed, x, state


_Norm = tuple[jax.Array | None, jax.Array | None]
"""Gain and bias of a norm; without a gain it is none."""


def _normed_linear(
    config: ModelConfig,
    weight: Weight,
    bias: jax.Array | None,
    residual: Residual,
    norm: _Norm,
    lora: LowRank | None = None,
    rows: RowScales | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Of the normed residual stream; and the stream, with what was to be added."""
    gain, norm_bias = norm
    if config.norm == "rms" and gain is not None and norm_bias is None:
        if residual.added is None:
            out, x = normed_linear(weight, residual.x, gain, config.norm_eps), residual.x
        else:
            out, x = summed_linear(weight, residual.x, residual.added, residual.gain, gain, config.norm_eps)
    else:
        x = _summed(config, residual)
        out = linear(weight, _normed(config, x, gain, norm_bias))
    out = _adapted(out, lora, rows, lambda a: _normed_linear(config, a, None, Residual(x), norm)[0])
    return _biased(out, bias), x


def _normed(config: ModelConfig, x: jax.Array, gain: jax.Array | None, bias: jax.Array | None) -> jax.Array:
    if gain is None:
        return x
    if config.norm == "layer":
        return layer_norm(x, gain, bias, config.norm_eps)
    return _biased(rms_norm(x, gain, config.norm_eps), bias)


def _biased(x: jax.Array, bias: jax.Array | None) -> jax.Array:
    return x if bias is None else x + bias


def _summed(config: ModelConfig, residual: Residual) -> jax.Array:
    if residual.added is None:
        return residual.x
    return residual_sum(residual.x, residual.added, residual.gain, config.norm_eps)


def _normed_heads(
    config: ModelConfig, by_head: Float[Array, "B T K G+2 D"], q_gain: jax.Array, k_gain: jax.Array
) -> Float[Array, "B T K G+2 D"]:
    """Queries and keys normed, as the fused kernel does not do it: by head with other norms, or over all heads at once."""
    q, k, v = by_head[..., :-2, :], by_head[..., -2:-1, :], by_head[..., -1:, :]

    def normed(x: jax.Array, gain: jax.Array) -> jax.Array:
        shape = (*x.shape[:2], -1) if config.qk_norm == "width" else x.shape
        gain = gain if config.qk_norm == "head" else gain.reshape(shape[2:] if config.qk_norm == "heads" else -1)
        return _normed(config, x.reshape(shape), gain, None).reshape(x.shape)

    return jnp.concatenate([normed(q, q_gain), normed(k, k_gain), v], axis=-2)


def logits(
    config: ModelConfig, params: ModelParams, hidden: Float[Array, "*rows E"], lora: RowScales | None = None
) -> Float[Array, "*rows V"]:
    """Scores of every token of the vocabulary from the last layer's output."""
    head = params.embed if params.head is None else params.head
    norm = params.final_norm, params.final_norm_bias
    scores, _ = _normed_linear(config, head, None, Residual(hidden), norm, params.head_lora, lora)
    cap = config.final_softcap
    return scores if cap is None else cap * jnp.tanh(scores / cap)
