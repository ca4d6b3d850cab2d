"""Tiny models with seeded random weights, as GGUF files, so that a whole engine opens and compiles in seconds.

The text they write means nothing, but it depends on everything they have read: weights are scaled so that attention is
neither flat nor a copy, and greedy answers do not fall into a loop at once.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGMLQuantizationType, GGUFWriter, TokenType, quants

from atlas_jax.config import MemoryConfig
from atlas_jax.gguf import GGUFFile
from atlas_jax.model.loading import model_config
from atlas_jax.recall import adapter_store
from atlas_jax.recall.adapter import make_adapter

CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
_WORDS = ("the", "and", "ing", "that", "session", "token", "page", "memory", "window", "reads", "never", "again")


@dataclass(frozen=True)
class Shape:
    """Sizes of a tiny model."""

    architecture: str = "llama"
    template: str = CHAT_TEMPLATE
    add_bos: bool = False
    layers: int = 2
    embed: int = 64
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 16
    ff: int = 96
    context: int = 4096
    sliding_window: int | None = None
    delta_heads: tuple[int, int] | None = (
        None  # of keys and of values, in layers without attention: all but every fourth
    )
    nibbles: bool = False  # matrices in Q4_1 where their width allows


LLAMA = Shape()
NIBBLES = Shape(ff=128, nibbles=True)
GEMMA = Shape(architecture="gemma3", layers=6, embed=48, heads=4, kv_heads=1, head_dim=16, ff=64, sliding_window=96)
HYBRID = Shape(architecture="qwen35", layers=8, delta_heads=(2, 4))


def byte_level_vocabulary() -> tuple[list[str], list[int], list[str]]:
    """Tokens, their types and merges: every byte, the pieces of a few words, and three control tokens."""
    shown = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    hidden = [byte for byte in range(256) if byte not in shown]
    tokens = [chr(byte) for byte in shown] + [chr(256 + index) for index in range(len(hidden))]
    merges: list[str] = []
    for word in _WORDS:
        for start in ("", "Ġ"):
            merged = (start + word)[0]
            for character in (start + word)[1:]:
                merge = f"{merged} {character}"
                merged += character
                if merge not in merges:
                    merges.append(merge)
                if merged not in tokens:
                    tokens.append(merged)
    types = [int(TokenType.NORMAL)] * len(tokens) + [int(TokenType.CONTROL)] * 3
    return [*tokens, "<|endoftext|>", "<|im_start|>", "<|im_end|>"], types, merges


def write_model(
    path: Path,
    shape: Shape = LLAMA,
    *,
    seed: int = 0,
    metadata: Mapping[str, Any] | None = None,
    tensors: Mapping[str, np.ndarray | None] | None = None,
    padding: int = 0,
    split: int = 0,
) -> Path:
    """Writes a model; the same arguments give the same bytes.

    Args:
      metadata: further keys, or other values of those of the model; None leaves a key out.
      tensors: further ones, or other values of those of the model; None leaves one out.
      padding: rows of the embeddings (and the head) past the last token, full of large numbers; negative takes rows away.
      split: tensors in each of the files `path` then is the stem of; the first is returned.
    """
    tokens, types, merges = byte_level_vocabulary()
    random = np.random.default_rng(seed)
    gemma = shape.architecture == "gemma3"
    writer = GGUFWriter(path, shape.architecture, split_max_tensors=split)
    writer.add_name("tiny")
    writer.add_block_count(shape.layers)
    writer.add_context_length(shape.context)
    writer.add_embedding_length(shape.embed)
    writer.add_feed_forward_length(shape.ff)
    writer.add_head_count(shape.heads)
    writer.add_head_count_kv(shape.kv_heads)
    writer.add_key_length(shape.head_dim)
    writer.add_value_length(shape.head_dim)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10_000.0)
    if shape.sliding_window is not None:
        writer.add_sliding_window(shape.sliding_window)
    if shape.delta_heads is not None:
        writer.add_ssm_conv_kernel(4)
        writer.add_ssm_state_size(shape.head_dim)
        writer.add_ssm_group_count(shape.delta_heads[0])
        writer.add_ssm_time_step_rank(shape.delta_heads[1])
        writer.add_ssm_inner_size(shape.delta_heads[1] * shape.head_dim)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    writer.add_token_merges(merges)
    writer.add_bos_token_id(len(tokens) - 3)
    writer.add_eos_token_id(len(tokens) - 1)
    writer.add_add_bos_token(shape.add_bos)
    writer.add_chat_template(shape.template)
    for key, value in (metadata or {}).items():
        writer.kv_data[0].pop(key, None)
        if value is not None:
            _add(writer, key, value)

    def matrix(name: str, rows: int, columns: int, gain: float = 1.0) -> None:
        values = (random.standard_normal((rows, columns)) * (gain / np.sqrt(columns))).astype(np.float32)
        if name in ("token_embd", "output") and padding:
            values = np.concatenate([values, np.full((max(padding, 0), columns), 9.0, np.float32)])[: rows + padding]
        if shape.nibbles and columns % 32 == 0:
            kind = GGMLQuantizationType.Q4_1
            writer.add_tensor(f"{name}.weight", quants.quantize(values, kind), raw_dtype=kind)
        else:
            writer.add_tensor(f"{name}.weight", values)

    def vector(name: str, size: int) -> None:
        writer.add_tensor(f"{name}.weight", (1.0 + 0.1 * random.standard_normal(size)).astype(np.float32))

    embed, dim = shape.embed, shape.head_dim
    matrix("token_embd", len(tokens), embed, gain=1.0 if gemma else np.sqrt(embed))
    for layer in range(shape.layers):
        prefix = f"blk.{layer}."
        vector(f"{prefix}attn_norm", embed)
        if shape.delta_heads is not None and (layer + 1) % 4:
            keys, values = shape.delta_heads
            channels = (2 * keys + values) * dim
            matrix(f"{prefix}attn_qkv", channels, embed, gain=1.5)
            matrix(f"{prefix}attn_gate", values * dim, embed, gain=2.0)
            matrix(f"{prefix}ssm_conv1d", channels, 4, gain=2.0)
            matrix(f"{prefix}ssm_beta", values, embed)
            matrix(f"{prefix}ssm_alpha", values, embed)
            vector(f"{prefix}ssm_norm", dim)
            matrix(f"{prefix}ssm_out", embed, values * dim, gain=2.0)
            # tokens are forgotten after ten to two thousand
            writer.add_tensor(f"{prefix}ssm_a", -np.geomspace(0.1, 5e-4, values, dtype=np.float32))
            writer.add_tensor(f"{prefix}ssm_dt.bias", random.standard_normal(values).astype(np.float32))
        else:
            matrix(f"{prefix}attn_q", shape.heads * dim * (1 if shape.delta_heads is None else 2), embed, gain=1.5)
            matrix(f"{prefix}attn_k", shape.kv_heads * dim, embed, gain=1.5)
            matrix(f"{prefix}attn_v", shape.kv_heads * dim, embed, gain=2.0)
            matrix(f"{prefix}attn_output", embed, shape.heads * dim, gain=2.0)
            if shape.delta_heads is not None:
                vector(f"{prefix}attn_q_norm", dim)
                vector(f"{prefix}attn_k_norm", dim)
        vector(f"{prefix}{'ffn_norm' if shape.delta_heads is None else 'post_attention_norm'}", embed)
        matrix(f"{prefix}ffn_gate", shape.ff, embed)
        matrix(f"{prefix}ffn_up", shape.ff, embed)
        matrix(f"{prefix}ffn_down", embed, shape.ff, gain=2.0)
        if gemma:
            for name, size in (("attn_q_norm", dim), ("attn_k_norm", dim)):
                vector(prefix + name, size)
            for name in ("post_attention_norm", "post_ffw_norm"):
                vector(prefix + name, embed)
    vector("output_norm", embed)
    if not gemma:
        matrix("output", len(tokens), embed, gain=2.5)
    for name, values in (tensors or {}).items():
        for part in writer.tensors:
            part.pop(name, None)
        if values is not None:
            writer.add_tensor(name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path if not split else min(path.parent.glob(f"{path.name.removesuffix('.gguf')}-*-of-*.gguf"))


def _add(writer: GGUFWriter, key: str, value: Any) -> None:
    add_int = writer.add_int64 if isinstance(value, int) and value >= 1 << 31 else writer.add_int32
    kinds = ((bool, writer.add_bool), (int, add_int), (float, writer.add_float32), (str, writer.add_string))
    for kind, add in kinds:
        if isinstance(value, kind):
            add(key, value)
            return
    writer.add_array(key, value)


def write_adapter(path: Path, model: Path, *, seed: int = 0) -> Path:
    """Writes a small memory for a model, not calibrated: random key maps, a gate that opens with confidence, and layers that
    keep different numbers of pairs."""
    random = np.random.default_rng(seed)
    with GGUFFile.open(model) as file:
        config, fingerprint = model_config(file), file.fingerprint()
    taps, weights = (len(config.layers) - 1, 0), tuple(0.7 if index % 2 else 1.3 for index in range(len(config.layers)))
    memory = MemoryConfig(layers=taps, components=16, features=256, code_dim=64, kept_weights=weights)
    count = len(memory.layers)
    adapter = make_adapter(
        memory,
        config.vocab,
        np.zeros((count, config.embed), np.float32),
        random.standard_normal((count, config.embed, memory.components)).astype(np.float32),
        np.ones(config.vocab, np.float32),
        np.asarray([-2.0, 3.0, 2.0, 0.1], np.float32),
        random.standard_normal(memory.components + 1).astype(np.float32),
    )
    path.write_bytes(adapter_store.encode(fingerprint, memory, adapter))
    return path
