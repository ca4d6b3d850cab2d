"""YaRN (arXiv 2309.00071): which rotary frequencies a longer context stretches, and by how much attention grows."""

from __future__ import annotations

import math

BETA_FAST, BETA_SLOW = 32.0, 1.0
"""Turns within the original context from which on a pair keeps its frequency, and up to which it is stretched wholly."""


def divisors(
    base: float, dims: int, factor: float, original: int, beta_fast: float, beta_slow: float
) -> tuple[float, ...]:
    """What the frequency of each pair is divided by: 1 for those that turn fast, `factor` for slow ones, between in between.

    Args:
      base, dims: of the rotary embedding.
      original: context that the model was first trained with.
    """

    def pair(turns: float) -> float:
        """The pair that makes so many turns in the original context."""
        return dims * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(base))

    low, high = max(math.floor(pair(beta_fast)), 0), min(math.ceil(pair(beta_slow)), dims - 1)
    width = max(high - low, 1e-3)
    stretched = [min(max((index - low) / width, 0.0), 1.0) for index in range(dims // 2)]
    return tuple(1.0 / (1.0 - part + part / factor) for part in stretched)


def magnitude(factor: float) -> float:
    """What queries and keys grow by, so that attention stays as sharp."""
    return 1.0 + 0.1 * math.log(factor) if factor > 1.0 else 1.0
