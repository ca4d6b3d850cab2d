"""What the models read: bytes of real texts, a part of each held out; and lines with a needle among them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from atlas_jax.model.lm import IGNORE, Batch

HELD_OUT = 0.1
_KEYS, _VALUES = 16, 16
"""Bytes 64 to 79 are keys of needles and 96 to 111 values; filler has 113 to 122."""
_FIRST_KEY, _FIRST_VALUE, _MARK = 64, 96, 35


def read(folder: Path, length: int) -> tuple[np.ndarray, np.ndarray]:
    """Bytes to learn from, and those held out: the last tenth of each text.

    Raises:
      FileNotFoundError: the folder has no texts.
    """
    texts = [np.frombuffer(path.read_bytes(), np.uint8).astype(np.int32) for path in sorted(folder.glob("*.txt"))]
    texts = [text for text in texts if len(text) * HELD_OUT > length + 1]
    if not texts:
        raise FileNotFoundError(f"{folder} has no texts of {round((length + 1) / HELD_OUT)} bytes: {_HINT}")
    cuts = [round(len(text) * (1 - HELD_OUT)) for text in texts]
    learned = np.concatenate([text[:cut] for text, cut in zip(texts, cuts, strict=True)])
    return learned, np.concatenate([text[cut:] for text, cut in zip(texts, cuts, strict=True)])


_HINT = "make them by `python -m atlas_jax.evaluation.corpora --out data/corpora --group documents`, or give --texts"


def windows(text: np.ndarray, length: int, count: int) -> np.ndarray:
    """So many windows of a text, [count, length + 1], evenly over it."""
    start = np.linspace(0, len(text) - length - 1, count).astype(int)
    found: np.ndarray = text[start[:, None] + np.arange(length + 1)]
    return found


def needles(seed: Sequence[int], rows: int, length: int) -> Batch:
    """Rows of random filler with four pairs `#kv` at random places; at the end a key, after which its value is due."""
    rng = np.random.default_rng(seed)
    tokens = rng.integers(97 + 16, 123, (rows, length))
    targets = np.full((rows, length), IGNORE)
    for row in range(rows):
        keys = _FIRST_KEY + rng.permutation(_KEYS)[:4]
        values = _FIRST_VALUE + rng.integers(0, _VALUES, 4)
        places = 3 * rng.permutation((length - 3) // 3)[:4]
        for place, key, value in zip(places, keys, values, strict=True):
            tokens[row, place : place + 3] = _MARK, key, value
        asked = rng.integers(4)
        tokens[row, -2:] = _MARK, keys[asked]
        targets[row, -1] = values[asked]
    return Batch(tokens.astype(np.int32), targets.astype(np.int32))
