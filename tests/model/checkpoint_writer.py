"""Writes a GGUF model as the folder that Hugging Face would ship, with none of the project's own code.

Rows, norms and names are put back from what the converter of llama.cpp has made of them, one by one.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import ml_dtypes
import numpy as np

ROOT = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
LAYER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
LLAMA = LAYER | {"ffn_norm": "post_attention_layernorm"}
GEMMA = LAYER | {
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}
DTYPES: Mapping[str, Any] = {"F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16}


def read(path: Path) -> dict[str, np.ndarray]:
    """Float tensors of a GGUF file, by the package of llama.cpp."""
    return {one.name: np.array(one.data).reshape(one.shape[::-1]) for one in gguf.GGUFReader(path).tensors}


def in_halves(rows: np.ndarray, heads: int) -> np.ndarray:
    """Rows of pairs (0, 1), (2, 3) … of each head as rows of pairs (i, i + d/2)."""
    dim = len(rows) // heads
    out = np.empty_like(rows)
    for head in range(heads):
        for pair in range(dim // 2):
            out[head * dim + pair] = rows[head * dim + 2 * pair]
            out[head * dim + dim // 2 + pair] = rows[head * dim + 2 * pair + 1]
    return out


def tensors(path: Path, architecture: str, heads: int, kv_heads: int) -> dict[str, np.ndarray]:
    """The tensors of a folder's model."""
    found = {}
    for name, values in read(path).items():
        *layer, part, _ = name.split(".")
        if architecture == "llama" and part in ("attn_q", "attn_k"):
            values = in_halves(values, heads if part == "attn_q" else kv_heads)
        if architecture == "gemma3" and part.endswith("norm"):
            values = values - np.float32(1.0)
        names = GEMMA if architecture == "gemma3" else LLAMA
        target = f"model.layers.{layer[1]}.{names[part]}" if layer else ROOT[part]
        found[f"{target}.weight"] = values
    return found


def safetensors(path: Path, values: Mapping[str, np.ndarray], dtype: str = "F32") -> None:
    """Writes a file of tensors, by the format's description."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    body = b""
    for name, array in values.items():
        data = array.astype(DTYPES[dtype]).tobytes()
        header[name] = {"dtype": dtype, "shape": list(array.shape), "data_offsets": [len(body), len(body) + len(data)]}
        body += data
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + body)


def sharded(folder: Path, values: Mapping[str, np.ndarray], count: int = 3) -> None:
    """Writes the tensors to several files with an index."""
    where: dict[str, str] = {}
    for number in range(count):
        name = f"model-{number + 1:05}-of-{count:05}.safetensors"
        part = {key: array for index, (key, array) in enumerate(values.items()) if index % count == number}
        safetensors(folder / name, part)
        where |= dict.fromkeys(part, name)
    write(folder / "model.safetensors.index.json", {"metadata": {"total_size": 0}, "weight_map": where})


def write(path: Path, content: Any) -> None:
    """Writes JSON."""
    path.write_text(json.dumps(content), "utf-8")


def byte_level(
    tokens: list[str], types: list[int], merges: list[str], pre_tokenizer: Any, *, pairs: bool = False, **more: Any
) -> dict[str, Any]:
    """A tokenizer.json of a byte-level vocabulary whose control tokens have GGUF's type 3, the user's own 4."""
    added = [
        {
            "id": token,
            "content": text,
            "special": types[token] == 3,
            "normalized": False,
            "lstrip": False,
            "rstrip": False,
            "single_word": False,
        }
        for token, text in enumerate(tokens)
        if types[token] in (3, 4)
    ]
    model = {
        "type": "BPE",
        "vocab": {text: token for token, text in enumerate(tokens) if types[token] == 1},
        "merges": [rule.split(" ") for rule in merges] if pairs else merges,
        "ignore_merges": False,
    }
    return {
        "version": "1.0",
        "added_tokens": added,
        "normalizer": None,
        "pre_tokenizer": pre_tokenizer,
        "post_processor": None,
        "decoder": BYTES,
        "model": model | more,
    }


BYTES = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
SMOLLM = {"type": "Sequence", "pretokenizers": [{"type": "Digits", "individual_digits": True}, BYTES]}


def split(*regexes: str) -> dict[str, Any]:
    """A pre-tokenizer of patterns, mostly one, as Llama 3's and Qwen 2's."""
    return {
        "type": "Sequence",
        "pretokenizers": [
            *(
                {"type": "Split", "pattern": {"Regex": regex}, "behavior": "Isolated", "invert": False}
                for regex in regexes
            ),
            {**BYTES, "use_regex": False},
        ],
    }


def sentencepiece(
    tokens: list[str], types: list[int], scores: list[float], *, prefix: bool, new: bool = False
) -> dict[str, Any]:
    """A tokenizer.json of a SentencePiece vocabulary, merges made of it as its converter makes them.

    Args:
      prefix: a space goes before a text.
      new: say so with a pre-tokenizer, as newer files do.
    """
    vocab = {text: token for token, text in enumerate(tokens)}
    merges = []
    for token, text in enumerate(tokens):
        if types[token] == 1:
            for cut in range(1, len(text)):
                left, right = text[:cut], text[cut:]
                if left in vocab and right in vocab:
                    merges.append((scores[token], vocab[left], vocab[right], f"{left} {right}"))
    merges.sort(key=lambda rule: (-rule[0], rule[1], rule[2]))
    replace = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
    first = [{"type": "Prepend", "prepend": "▁"}] if prefix else []
    space = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "first" if prefix else "never", "split": False}
    return {
        "version": "1.0",
        "added_tokens": [
            {
                "id": token,
                "content": text,
                "special": types[token] in (2, 3),
                "normalized": False,
                "lstrip": False,
                "rstrip": False,
                "single_word": False,
            }
            for token, text in enumerate(tokens)
            if types[token] in (2, 3, 4)
        ],
        "normalizer": None if new else {"type": "Sequence", "normalizers": [*first, replace]},
        "pre_tokenizer": space if new else None,
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
            "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
            "special_tokens": {"<s>": {"id": "<s>", "ids": [tokens.index("<s>")], "tokens": ["<s>"]}},
        },
        "decoder": None,
        "model": {
            "type": "BPE",
            "vocab": vocab,
            "merges": [rule for *_, rule in merges],
            "byte_fallback": True,
            "fuse_unk": True,
            "unk_token": "<unk>",
        },
    }
