"""A decoder-only transformer by definition: whole text at once, float64, straight from the tensors of a GGUF file."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGUFReader, quants

from atlas_jax.config import ModelConfig


def tensors(path: Path) -> dict[str, np.ndarray]:
    """The tensors of a file as floats."""
    found = GGUFReader(path).tensors
    return {tensor.name: quants.dequantize(tensor.data, tensor.tensor_type).astype(np.float64) for tensor in found}


def attend_all(
    config: ModelConfig,
    index: int,
    q: np.ndarray,
    k: np.ndarray,
    v: np.ndarray,
    rotate: Callable[..., np.ndarray],
    null_logit: np.ndarray | None = None,
) -> np.ndarray:
    """Every token attends to all before it, or to those in its layer's sliding window."""
    count, window = len(q), config.layers[index].sliding_window
    q, k = rotate(q, np.arange(count)), rotate(k, np.arange(count))
    distance = np.arange(count)[:, None] - np.arange(count)[None]
    seen = distance >= 0
    if window is not None:
        seen &= distance < window
    out = np.empty_like(q)
    for head in range(config.heads):
        own = head // config.groups
        score = np.where(seen, soft_capped(q[:, head] @ k[:, own].T * config.scale, config.attention_softcap), -np.inf)
        out[:, head] = softmax(score, None if null_logit is None else null_logit[head]) @ v[:, own]
    return out


def softmax(score: np.ndarray, null_logit: np.ndarray | float | None) -> np.ndarray:
    """Along the last axis; what one more score takes of the sum is nobody's."""
    if null_logit is not None:
        score = np.concatenate([score, np.broadcast_to(null_logit, (*score.shape[:-1], 1))], axis=-1)
    weight = np.exp(score - score.max(axis=-1, keepdims=True))
    share: np.ndarray = weight / weight.sum(axis=-1, keepdims=True)
    return share if null_logit is None else share[..., :-1]


def soft_capped(score: np.ndarray, cap: float | None) -> np.ndarray:
    return score if cap is None else cap * np.tanh(score / cap)


def logits(
    config: ModelConfig, weights: dict[str, np.ndarray], tokens: list[int], attend: Callable[..., Any] = attend_all
) -> np.ndarray:
    """Scores of every next token at every position; rows of the head past the last token score nothing.

    Args:
      attend: what a layer's tokens attend to, of queries and keys that are not rotated; see `attend_all`.
    """
    x = weights["token_embd.weight"][tokens] * config.embed_scale
    for index in range(len(config.layers)):
        part = {
            name.removeprefix(f"blk.{index}.").removesuffix(".weight"): value
            for name, value in weights.items()
            if name.startswith(f"blk.{index}.")
        }
        before, ff_norm = x, "ffn_norm" if "ffn_norm" in part else "post_attention_norm"
        h = _pre_norm(config, x, part, "attn_norm")
        recurrent = config.layers[index].kind == "delta_net"
        mixed = _delta_net(config, part, h) if recurrent else _attention(config, index, part, h, attend)
        x = x + config.residual_scale * (
            _rms_norm(config, mixed, part["post_attention_norm"]) if config.post_norms else mixed
        )
        out = _mlp(
            config,
            part,
            _pre_norm(config, before, part, "attn_norm") if config.parallel else _pre_norm(config, x, part, ff_norm),
        )
        x = x + config.residual_scale * (_rms_norm(config, out, part["post_ffw_norm"]) if config.post_norms else out)
    head = weights.get("output.weight", weights["token_embd.weight"])
    x = _norm(config, x, weights["output_norm.weight"]) + weights.get("output_norm.bias", 0.0)
    return soft_capped(config.logit_scale * (x @ head[: config.vocab].T), config.final_softcap)


def _linear(part: dict[str, np.ndarray], name: str, x: np.ndarray) -> np.ndarray:
    return x @ part[name].T + part.get(f"{name}.bias", 0.0)


def _pre_norm(config: ModelConfig, x: np.ndarray, part: dict[str, np.ndarray], name: str) -> np.ndarray:
    return _norm(config, x, part[name]) + part.get(f"{name}.bias", 0.0) if config.pre_norms else x


def _mlp(config: ModelConfig, part: dict[str, np.ndarray], h: np.ndarray) -> np.ndarray:
    if config.experts is not None:
        return _mixture(config, part, h)
    up = _linear(part, "ffn_up", h)
    gate = up
    if config.gated:  # which files have in a tensor of its own, or before up
        gate, up = (_linear(part, "ffn_gate", h), up) if "ffn_gate" in part else np.split(up, 2, axis=-1)
    return _linear(part, "ffn_down", _gated(config, gate, up) if config.gated else _activated(config, gate))


def _gated(config: ModelConfig, gate: np.ndarray, up: np.ndarray) -> np.ndarray:
    if config.activation != "swiglu_oai":
        return _activated(config, gate) * up
    gate, up = np.minimum(gate, 7.0), np.clip(up, -7.0, 7.0)
    return gate / (1 + np.exp(-1.702 * gate)) * (up + 1)


def _activated(config: ModelConfig, x: np.ndarray) -> np.ndarray:
    if config.activation == "silu":
        return x / (1 + np.exp(-x))
    return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


def _mixture(config: ModelConfig, part: dict[str, np.ndarray], h: np.ndarray) -> np.ndarray:
    """One token after the other: its most probable experts, and the one that all tokens use."""
    experts = config.experts
    assert experts is not None

    def expert(x: np.ndarray, parts: list[np.ndarray], biases: list[np.ndarray | float]) -> np.ndarray:
        gate, up = (x @ matrix.T + bias for matrix, bias in zip(parts[:2], biases[:2], strict=True))
        return _gated(config, gate, up) @ parts[2].T + biases[2]

    def parts(kind: str) -> list[np.ndarray]:
        return [part[f"ffn_{name}_{kind}"] for name in ("gate", "up", "down")]

    out = np.zeros_like(h)
    for token, x in enumerate(h):
        score = np.exp(part["ffn_gate_inp"] @ x + part.get("ffn_gate_inp.bias", 0.0))
        share = score / score.sum()
        chosen = np.argsort(-share)[: experts.used]
        whole = share[chosen].sum() if experts.normalised else 1.0
        for one in chosen:
            matrices = [matrix[one] for matrix in parts("exps")]
            biases = [part[f"ffn_{name}_exps.bias"][one] if experts.biases else 0.0 for name in ("gate", "up", "down")]
            out[token] += share[one] / whole * expert(x, matrices, biases)
        if experts.shared_ff:
            out[token] += expert(x, parts("shexp"), [0.0] * 3) / (1 + np.exp(-part["ffn_gate_inp_shexp"] @ x))
    return out


def _attention(
    config: ModelConfig,
    index: int,
    part: dict[str, np.ndarray],
    h: np.ndarray,
    attend: Callable[..., Any],
) -> np.ndarray:
    rope = config.ropes[config.layers[index].rope]
    count = len(h)
    if "attn_qkv" in part:
        sizes = config.heads * config.head_dim, config.kv_heads * config.head_dim
        q, k, v = np.split(_linear(part, "attn_qkv", h), [sizes[0], sum(sizes)], axis=-1)
    else:
        q, k, v = (_linear(part, f"attn_{name}", h) for name in "qkv")
    q, k, v = (x.reshape(count, -1, config.head_dim) for x in (q, k, v))
    gate = np.inf  # of every head of the output, behind its query
    if config.attention_gate:
        q, gate = q[:, 0::2], q[:, 1::2]
    if config.qk_norm is not None:
        q, k = (
            _norm(config, x.reshape(count, 1, -1) if config.qk_norm == "width" else x, part[name]).reshape(x.shape)
            for name, x in (("attn_q_norm", q), ("attn_k_norm", k))
        )
    frequency = rope.position_scale * rope.base ** -(np.arange(0, rope.dims, 2) / rope.dims)
    if rope.frequency_factors is not None:
        frequency = frequency / np.asarray(rope.frequency_factors)

    def rotate(x: np.ndarray, positions: np.ndarray, magnitude: float = rope.magnitude) -> np.ndarray:
        turned = _rotate(x, np.asarray(positions)[:, None] * frequency, rope.dims, rope.interleaved)
        return np.concatenate([magnitude * turned[..., : rope.dims], turned[..., rope.dims :]], axis=-1)

    rest = (part["attn_sinks"],) if config.null_logits else ()
    mixed = attend(config, index, q, k, v, rotate, *rest) / (1 + np.exp(-gate))
    return _linear(part, "attn_output", mixed.reshape(count, -1))


def _delta_net(config: ModelConfig, part: dict[str, np.ndarray], h: np.ndarray) -> np.ndarray:
    """A Gated DeltaNet layer, one token and one head after the other."""
    of = config.delta_net
    assert of is not None
    count, shared, dim = len(h), of.heads // of.key_heads, of.dim
    if "ssm_in" in part:  # by key head: query, key, values, gates
        by_head = (h @ part["ssm_in"].T).reshape(count, of.key_heads, -1)
        parts = np.split(by_head, [dim, 2 * dim, (2 + shared) * dim], axis=2)
        *qkv, z = (one.reshape(count, -1) for one in parts)
        mixed = np.concatenate(qkv, axis=1)
    else:
        mixed, z = h @ part["attn_qkv"].T, h @ part["attn_gate"].T
    if "ssm_ba" in part:
        both = (h @ part["ssm_ba"].T).reshape(count, of.key_heads, 2, shared)
        share, time = (both[:, :, place].reshape(count, -1) for place in (0, 1))
    else:
        share, time = h @ part["ssm_beta"].T, h @ part["ssm_alpha"].T
    decay = np.exp(part["ssm_a"] * np.log1p(np.exp(time + part["ssm_dt.bias"])))
    share = 1 / (1 + np.exp(-share))
    padded = np.concatenate([np.zeros((of.conv - 1, mixed.shape[1])), mixed])
    mixed = sum(padded[place : place + count] * part["ssm_conv1d"][:, place] for place in range(of.conv))
    heads = (mixed / (1 + np.exp(-mixed))).reshape(count, -1, dim)
    out = np.zeros((count, of.heads, dim))
    for head in range(of.heads):
        own = head % of.key_heads if of.tiled else head // shared
        memory = np.zeros((dim, dim))
        for token in range(count):
            q, k = (x / np.linalg.norm(x) for x in (heads[token, own], heads[token, of.key_heads + own]))
            v = heads[token, 2 * of.key_heads + head]
            memory *= decay[token, head]
            memory += share[token, head] * np.outer(v - memory @ k, k)
            out[token, head] = memory @ q / np.sqrt(dim)
    out = _rms_norm(config, out, part["ssm_norm"]).reshape(count, -1)
    return out * (z / (1 + np.exp(-z))) @ part["ssm_out"].T


def _rotate(x: np.ndarray, angle: np.ndarray, dims: int, interleaved: bool) -> np.ndarray:
    """Turns pairs (0, 1), (2, 3) … or (i, i + dims/2) as complex numbers."""
    first, second = (
        (slice(0, dims, 2), slice(1, dims, 2)) if interleaved else (slice(dims // 2), slice(dims // 2, dims))
    )
    turned = (x[..., first] + 1j * x[..., second]) * np.exp(1j * angle)[:, None]
    out = x.copy()
    out[..., first], out[..., second] = turned.real, turned.imag
    return out


def _norm(config: ModelConfig, x: np.ndarray, gain: np.ndarray) -> np.ndarray:
    return _rms_norm(config, x - x.mean(axis=-1, keepdims=True) if config.norm == "layer" else x, gain)


def _rms_norm(config: ModelConfig, x: np.ndarray, gain: np.ndarray) -> np.ndarray:
    return x / np.sqrt((x**2).mean(axis=-1, keepdims=True) + config.norm_eps) * gain
