"""Training data: every batch is a function of the seed and the step alone, so a run can stop and go on anywhere."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import jax
import numpy as np

from atlas_jax.typing import Array, Int32


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Batch:
    """Inputs and what should follow each of them.

    Attributes:
      targets: the next token, or `IGNORE` where none is asked for.
    """

    tokens: Int32[Array, "B T"]
    targets: Int32[Array, "B T"]


BatchSource = Callable[[int], Batch]
"""step → batch."""


def text_batches(text: bytes, *, batch: int, length: int, seed: int) -> BatchSource:
    """Random windows of a text, its bytes as tokens.

    Raises:
      ValueError: the text is shorter than a window.
    """
    tokens = np.frombuffer(text, np.uint8).astype(np.int32)
    if len(tokens) <= length:
        raise ValueError(f"the text has {len(tokens)} bytes, fewer than a window of {length} and one more")

    def at(step: int) -> Batch:
        start = np.random.default_rng((seed, step)).integers(0, len(tokens) - length, batch)
        windows = tokens[start[:, None] + np.arange(length + 1)]
        return Batch(windows[:, :-1], windows[:, 1:])

    return at
