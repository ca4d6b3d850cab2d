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
    config: ModelConfig, index: int, q: np.ndarray, k: np.ndarray, v: np.ndarray, rotate: Callable[..., np.ndarray]
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
        score = np.where(seen, q[:, head] @ k[:, own].T * config.scale, -np.inf)
        weight = np.exp(score - score.max(axis=1, keepdims=True))
        out[:, head] = weight / weight.sum(axis=1, keepdims=True) @ v[:, own]
    return out


def logits(
    config: ModelConfig, weights: dict[str, np.ndarray], tokens: list[int], attend: Callable[..., Any] = attend_all
) -> np.ndarray:
    """Scores of every next token at every position; rows of the head past the last token score nothing.

    Args:
      attend: what a layer's tokens attend to, of queries and keys that are not rotated; see `attend_all`.
    """
    factors = weights.get("rope_freqs.weight")
    x = weights["token_embd.weight"][tokens] * config.embed_scale
    for index in range(len(config.layers)):
        part = {
            name.removeprefix(f"blk.{index}.").removesuffix(".weight"): value
            for name, value in weights.items()
            if name.startswith(f"blk.{index}.")
        }
        mixed = _attention(config, index, part, _norm(config, x, part["attn_norm"]), factors, attend)
        x = x + (_norm(config, mixed, part["post_attention_norm"]) if config.post_norms else mixed)
        h = _norm(config, x, part["ffn_norm"])
        gate = h @ part["ffn_gate"].T
        if config.activation == "silu":
            gate = gate / (1 + np.exp(-gate))
        else:
            gate = 0.5 * gate * (1 + np.tanh(np.sqrt(2 / np.pi) * (gate + 0.044715 * gate**3)))
        out = (gate * (h @ part["ffn_up"].T)) @ part["ffn_down"].T
        x = x + (_norm(config, out, part["post_ffw_norm"]) if config.post_norms else out)
    head = weights.get("output.weight", weights["token_embd.weight"])
    scores = _norm(config, x, weights["output_norm.weight"]) @ head[: config.vocab].T
    cap = config.final_softcap
    return scores if cap is None else cap * np.tanh(scores / cap)


def _attention(
    config: ModelConfig,
    index: int,
    part: dict[str, np.ndarray],
    h: np.ndarray,
    factors: np.ndarray | None,
    attend: Callable[..., Any],
) -> np.ndarray:
    rope = config.ropes[config.layers[index].rope]
    count = len(h)
    q = (h @ part["attn_q"].T).reshape(count, config.heads, config.head_dim)
    k = (h @ part["attn_k"].T).reshape(count, config.kv_heads, config.head_dim)
    v = (h @ part["attn_v"].T).reshape(count, config.kv_heads, config.head_dim)
    if config.qk_norm:
        q, k = _norm(config, q, part["attn_q_norm"]), _norm(config, k, part["attn_k_norm"])
    frequency = rope.position_scale * rope.base ** -(np.arange(0, rope.dims, 2) / rope.dims)
    if factors is not None:
        frequency = frequency / factors

    def rotate(x: np.ndarray, positions: np.ndarray) -> np.ndarray:
        return _rotate(x, np.asarray(positions)[:, None] * frequency, rope.dims, rope.interleaved)

    return attend(config, index, q, k, v, rotate).reshape(count, -1) @ part["attn_output"].T


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
    return x / np.sqrt((x**2).mean(axis=-1, keepdims=True) + config.norm_eps) * gain
