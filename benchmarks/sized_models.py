"""Models of the sizes people serve, with random weights: as fast and as large as the real ones, and written in a minute.

The layout is that of llama.cpp's Q4_K_M: matrices in Q4_K, in Q6_K the values of attention, the way down out of the MLP,
and the embeddings, which are the head too. The tokenizer is another model's.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from gguf import GGMLQuantizationType, GGUFWriter

from atlas_jax.gguf import GGUFFile
from atlas_jax.gguf._writer import add_value

_POOL = 1 << 16
"""Records of a type that are drawn at random; matrices are made of them from some place on, again and again."""
_BYTES = {GGMLQuantizationType.Q4_K: 144, GGMLQuantizationType.Q6_K: 210}


@dataclass(frozen=True)
class Size:
    """Sizes of a Llama; inner sizes in multiples of 256."""

    layers: int
    embed: int
    ff: int
    heads: int
    kv_heads: int
    head_dim: int


SIZES = {"1B": Size(16, 2048, 8192, 32, 8, 64), "8B": Size(32, 4096, 14336, 32, 8, 128)}
"""Llama 3.2 1B and Llama 3 8B."""


def matrices(size: Size, vocab: int) -> Iterator[tuple[str, int, int, GGMLQuantizationType]]:
    """Name, outputs, inputs and type of every matrix."""
    four, six = GGMLQuantizationType.Q4_K, GGMLQuantizationType.Q6_K
    embed, queries, values = size.embed, size.heads * size.head_dim, size.kv_heads * size.head_dim
    yield "token_embd.weight", vocab, embed, six
    for layer in range(size.layers):
        prefix = f"blk.{layer}."
        yield f"{prefix}attn_q.weight", queries, embed, four
        yield f"{prefix}attn_k.weight", values, embed, four
        yield f"{prefix}attn_v.weight", values, embed, six
        yield f"{prefix}attn_output.weight", embed, queries, four
        yield f"{prefix}ffn_gate.weight", size.ff, embed, four
        yield f"{prefix}ffn_up.weight", size.ff, embed, four
        yield f"{prefix}ffn_down.weight", embed, size.ff, six


def write_sized_model(
    path: Path,
    size: Size,
    tokenizer: Path,
    *,
    seed: int = 0,
    kinds: Mapping[str, GGMLQuantizationType] | None = None,
) -> Path:
    """Writes a model; the same arguments give the same bytes.

    Args:
      tokenizer: a GGUF file, whose tokenizer and chat template it gets.
      kinds: types that matrices have instead, by name.
    """
    rng = np.random.default_rng(seed)
    writer = GGUFWriter(path, "llama")
    with GGUFFile.open(tokenizer) as file:
        for key, value in file.metadata.items():
            if key.startswith("tokenizer."):
                add_value(writer, key, value.tolist() if isinstance(value, np.ndarray) else value)
        vocab = len(file.metadata["tokenizer.ggml.tokens"])
    drawn = [(name, rows, inner, (kinds or {}).get(name, kind)) for name, rows, inner, kind in matrices(size, vocab)]
    writer.add_name(path.stem)
    writer.add_block_count(size.layers)
    writer.add_context_length(8192)
    writer.add_embedding_length(size.embed)
    writer.add_feed_forward_length(size.ff)
    writer.add_head_count(size.heads)
    writer.add_head_count_kv(size.kv_heads)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(500_000.0)
    writer.add_rope_dimension_count(size.head_dim)
    writer.add_vocab_size(vocab)
    gains = ["output_norm.weight"]
    gains += [f"blk.{layer}.{part}_norm.weight" for layer in range(size.layers) for part in ("attn", "ffn")]
    for name in gains:
        writer.add_tensor_info(name, (size.embed,), np.dtype(np.float32), 4 * size.embed)
    for name, outputs, inner, kind in drawn:
        width = inner // 256 * _BYTES[kind]
        writer.add_tensor_info(name, (outputs, width), np.dtype(np.uint8), outputs * width, kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for _ in gains:
        writer.write_tensor_data(np.ones(size.embed, np.float32))
    pools = {kind: _records(rng, kind) for kind in _BYTES}
    for _, outputs, inner, kind in drawn:
        writer.write_tensor_data(_matrix(rng, pools[kind], kind, outputs, inner))
    writer.close()
    return path


def _records(rng: np.random.Generator, kind: GGMLQuantizationType) -> np.ndarray:
    """Records with all their codes at random, but for the units, which are those of weights of size 1 / 16."""
    records = rng.integers(0, 256, (_POOL, _BYTES[kind]), np.uint8)
    if kind == GGMLQuantizationType.Q6_K:
        sign = rng.choice(np.asarray([-1, 1], np.int8), (_POOL, 16))
        records[:, 192:208] = (rng.integers(64, 128, (_POOL, 16)) * sign).astype(np.int8).view(np.uint8)
        records[:, 208:] = np.float16(1 / 16 / 1757).tobytes()[0], np.float16(1 / 16 / 1757).tobytes()[1]
        return records
    factor = rng.integers(32, 64, (_POOL, 8)).astype(np.uint8)  # below zero as far as above
    records[:, :4] = np.frombuffer(np.asarray([1 / 16 / 220, 7.5 / 16 / 220], np.float16).tobytes(), np.uint8)
    records[:, 4:8] = records[:, 8:12] = factor[:, :4] | factor[:, 4:] >> 4 << 6
    records[:, 12:16] = factor[:, 4:] & 15 | factor[:, 4:] << 4
    return records


def _matrix(
    rng: np.random.Generator, pool: np.ndarray, kind: GGMLQuantizationType, outputs: int, inner: int
) -> np.ndarray:
    """Rows of records, whose weights are 1 / √inner in size."""
    count = outputs * inner // 256
    start = int(rng.integers(_POOL))
    rows = np.resize(np.roll(pool, -start, axis=0), (count, pool.shape[1]))
    at = slice(208, 210) if kind == GGMLQuantizationType.Q6_K else slice(0, 4)
    units = pool[0, at].copy().view(np.float16) * np.float16(16 / np.sqrt(inner))
    rows[:, at] = units.view(np.uint8)
    return rows.reshape(outputs, -1)
