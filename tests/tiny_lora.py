"""LoRA adapters with seeded random weights for the tiny models of `tests/tiny_families.py` and `tests/tiny_model.py`."""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGUFWriter

from atlas_jax.gguf import GGUFFile
from tests import tiny_families
from tests.tiny_families import SAMPLES

ADAPTED = {"llama": r".*", "qwen2": r"blk\.1\.(attn_[qkv]|attn_output|ffn_down)\.", "qwen35": r"blk\..*"}
"""Samples whose logits with an adapter are compared with llama.cpp's, and the weights it changes."""
SCALE = 0.75
_MATRICES = re.compile(
    r"(blk\.\d+\.(attn_(q|k|v|qkv|output|gate)|ffn_(gate|up|down)|ssm_out)|token_embd|output)\.weight"
)

Pairs = dict[str, tuple[np.ndarray, np.ndarray]]


def pairs_of(model: Path, *, chosen: str = r"blk\..*", rank: int = 4, seed: int = 5, size: float = 0.5) -> Pairs:
    """By weight: A and B as they lie in a file, whose product is `size` times as large as the weight of a tiny model."""
    random = np.random.default_rng(seed)
    found: Pairs = {}
    with GGUFFile.open(model) as file:
        for name, info in file.tensors.items():
            if not (_MATRICES.fullmatch(name) and re.match(chosen, name)):
                continue
            outputs, inner = info.shape if name != "token_embd.weight" else info.shape[::-1]
            a = random.standard_normal((rank, inner)) * (size / np.sqrt(inner * rank))
            b = random.standard_normal((outputs, rank)) * np.exp(random.standard_normal(rank))
            found[name] = (a.T if name == "token_embd.weight" else a).astype(np.float32), b.astype(np.float32)
    return found


def write_lora(
    path: Path,
    model: Path,
    pairs: Pairs | None = None,
    *,
    alpha: float | None = 6.0,
    metadata: Mapping[str, Any] | None = None,
    change: Callable[[dict[str, np.ndarray]], None] = lambda tensors: None,
) -> Path:
    """Writes an adapter for a model.

    Args:
      metadata: other values of its keys; None leaves one out.
      change: is given the tensors before they are written.
    """
    with GGUFFile.open(model) as file:
        architecture = file.require("general.architecture", str)
    keys: dict[str, Any] = {"general.architecture": architecture, "general.type": "adapter", "adapter.type": "lora"}
    keys |= {"adapter.lora.alpha": alpha, **(metadata or {})}
    writer = GGUFWriter(path, "none")
    writer.kv_data[0].clear()
    for key, value in keys.items():
        if value is not None:
            (writer.add_string if isinstance(value, str) else writer.add_float32)(key, value)
    tensors = dict[str, np.ndarray]()
    for name, (a, b) in (pairs_of(model) if pairs is None else pairs).items():
        tensors |= {f"{name}.lora_a": a, f"{name}.lora_b": b}
    change(tensors)
    for name, values in tensors.items():
        writer.add_tensor(name, np.ascontiguousarray(values))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def merged(weights: Mapping[str, np.ndarray], pairs: Pairs, factor: float) -> dict[str, np.ndarray]:
    """The weights with `factor` times an adapter's products added: what it means, by definition."""
    out = dict(weights)
    for name, (a, b) in pairs.items():
        product = b.astype(np.float64) @ (a.T if name == "token_embd.weight" else a)
        out[name] = out[name] + factor * (product.T if name == "token_embd.weight" else product)
    return out


def main() -> None:
    """Writes the adapters that llama.cpp is to score beside their models, NAME.lora beside NAME.gguf."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args().folder
    folder.mkdir(parents=True, exist_ok=True)
    for name, chosen in ADAPTED.items():
        model = tiny_families.write_sample(folder / f"{name}.gguf", SAMPLES[name])
        write_lora(folder / f"{name}.lora", model, pairs_of(model, chosen=chosen))


if __name__ == "__main__":
    main()
