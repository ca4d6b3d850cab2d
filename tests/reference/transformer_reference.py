"""A decoder-only transformer by definition: whole text at once, float64, straight from the tensors of a GGUF file."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from gguf import GGUFReader, quants

from atlas_jax.config import ModelConfig


def tensors(path: Path) -> dict[str, np.ndarray]:
    """The tensors of a file as floats."""
    found = GGUFReader(path).tensors
    return {tensor.name: quants.dequantize(tensor.data, tensor.tensor_type).astype(np.float64) for tensor in found}


def logits(config: ModelConfig, weights: dict[str, np.ndarray], tokens: list[int]) -> np.ndarray:
    """Scores of every next token at every position; rows of the head past the last token score nothing."""
    factors = weights.get("rope_freqs.weight")
    x = weights["token_embd.weight"][tokens] * config.embed_scale
    for index, layer in enumerate(config.layers):
        part = {
            name.removeprefix(f"blk.{index}.").removesuffix(".weight"): value
            for name, value in weights.items()
            if name.startswith(f"blk.{index}.")
        }
        mixed = _attention(config, index, part, _norm(config, x, part["attn_norm"]), factors)
        x = x + (_norm(config, mixed, part["post_attention_norm"]) if config.post_norms else mixed)
        h = _norm(config, x, part["ffn_norm"])
        gate = h @ part["ffn_gate"].T
        if config.activation == "silu":
            gate = gate / (1 + np.exp(-gate))
        else:
            gate = 0.5 * gate * (1 + np.tanh(np.sqrt(2 / np.pi) * (gate + 0.044715 * gate**3)))
        out = (gate * (h @ part["ffn_up"].T)) @ part["ffn_down"].T
        x = x + (_norm(config, out, part["post_ffw_norm"]) if config.post_norms else out)
        del layer
    head = weights.get("output.weight", weights["token_embd.weight"])
    scores = _norm(config, x, weights["output_norm.weight"]) @ head[: config.vocab].T
    cap = config.final_softcap
    return scores if cap is None else cap * np.tanh(scores / cap)


def _attention(
    config: ModelConfig, index: int, part: dict[str, np.ndarray], h: np.ndarray, factors: np.ndarray | None
) -> np.ndarray:
    layer = config.layers[index]
    rope = config.ropes[layer.rope]
    count = len(h)
    q = (h @ part["attn_q"].T).reshape(count, config.heads, config.head_dim)
    k = (h @ part["attn_k"].T).reshape(count, config.kv_heads, config.head_dim)
    v = (h @ part["attn_v"].T).reshape(count, config.kv_heads, config.head_dim)
    if config.qk_norm:
        q, k = _norm(config, q, part["attn_q_norm"]), _norm(config, k, part["attn_k_norm"])
    frequency = rope.position_scale * rope.base ** -(np.arange(0, rope.dims, 2) / rope.dims)
    if factors is not None:
        frequency = frequency / factors
    angle = np.arange(count)[:, None] * frequency
    q, k = (_rotate(x, angle, rope.dims, rope.interleaved) for x in (q, k))
    distance = np.arange(count)[:, None] - np.arange(count)[None]
    seen = distance >= 0
    if layer.sliding_window is not None:
        seen &= distance < layer.sliding_window
    out = np.empty((count, config.heads, config.head_dim))
    for head in range(config.heads):
        own = head // config.groups
        score = np.where(seen, q[:, head] @ k[:, own].T * config.scale, -np.inf)
        weight = np.exp(score - score.max(axis=1, keepdims=True))
        out[:, head] = weight / weight.sum(axis=1, keepdims=True) @ v[:, own]
    return out.reshape(count, -1) @ part["attn_output"].T


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
