"""Figures with 95 % intervals: shares by Wilson's formula, everything else by the bootstrap over documents or contexts."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]

_DRAWS = 4000
_Z = 1.959963984540054
_SEED = 20260


@dataclass(frozen=True)
class Estimate:
    """A figure, its 95 % interval, and of how many documents, contexts or questions it was made.

    Attributes:
      low, high: nan where there is no interval, as for a single document.
    """

    value: float
    low: float
    high: float
    count: int

    def text(self, form: str = ".3f") -> str:
        """As it stands in a table."""
        if math.isnan(self.value):
            return "–"
        if math.isnan(self.low):
            return f"{self.value:{form}}"
        return f"{self.value:{form}} ({self.low:{form}} to {self.high:{form}})"


NOTHING = Estimate(math.nan, math.nan, math.nan, 0)


def wilson(found: float, asked: int) -> Estimate:
    """A share with Wilson's interval; `found` need not be whole where a question was asked several times."""
    if not asked:
        return NOTHING
    z2, share = _Z**2, found / asked
    middle = (share + z2 / (2 * asked)) / (1 + z2 / asked)
    half = _Z * math.sqrt(share * (1 - share) / asked + z2 / (4 * asked**2)) / (1 + z2 / asked)
    return Estimate(share, min(share, max(0.0, middle - half)), max(share, min(1.0, middle + half)), asked)


def bootstrap(
    statistic: Callable[[Floats], Floats],
    rows: Sequence[Sequence[float]],
) -> Estimate:
    """A statistic of documents with its percentile interval; the same rows always give the same interval.

    Args:
      statistic: of resampled documents [draws, n, columns], all draws at once, [draws].
      rows: what each document contributes [n, columns].
    """
    table = np.asarray(rows, np.float64)
    if not len(table):
        return NOTHING
    value = float(statistic(table[None])[0])
    if len(table) == 1:
        return Estimate(value, math.nan, math.nan, 1)
    chosen = np.random.default_rng(_SEED).integers(0, len(table), (_DRAWS, len(table)))
    found = statistic(table[chosen])
    found = found[np.isfinite(found)]
    if not len(found):
        return Estimate(value, math.nan, math.nan, len(table))
    low, high = np.percentile(found, [2.5, 97.5])
    return Estimate(value, float(low), float(high), len(table))


def mean(values: Sequence[float]) -> Estimate:
    """The mean over documents."""
    return bootstrap(lambda table: table[..., 0].mean(axis=1), [[value] for value in values])


def ratio_of_means(pairs: Sequence[tuple[float, float]]) -> Estimate:
    """The ratio of two means over the same documents: every document weighs as much as its difference is large."""

    def ratio(table: Floats) -> Floats:
        above, below = table[..., 0].mean(axis=1), table[..., 1].mean(axis=1)
        return np.divide(above, below, out=np.full_like(above, np.nan), where=below != 0)

    return bootstrap(ratio, pairs)


def median(values: Sequence[float]) -> Estimate:
    """The median, of measurements that are sometimes disturbed."""
    return bootstrap(lambda table: np.median(table[..., 0], axis=1), [[value] for value in values])
