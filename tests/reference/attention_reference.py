"""Attention, rotary angles and quantised products by definition, in float64 and exact arithmetic."""

from __future__ import annotations

from decimal import Decimal, localcontext

import numpy as np

_PI = Decimal("3.14159265358979323846264338327950288419716939937510582097494459")


def attend(
    q: np.ndarray, keys: np.ndarray, values: np.ndarray, scale: float, null_logit: float | None = None
) -> np.ndarray:
    """One query [D] over a plain list of keys [n, D] and values [n, D], and perhaps one more score of a value that is 0."""
    score = keys.astype(np.float64) @ q.astype(np.float64) * scale
    if null_logit is not None:
        score, values = np.append(score, null_logit), np.append(values, np.zeros_like(values[:1]), axis=0)
    weight = np.exp(score - score.max())
    return weight @ values.astype(np.float64) / weight.sum()


def visible_positions(query: int, first_page: int, sliding_window: int | None, page: int) -> list[int]:
    """Positions a token sees in the ring: its window, itself included, and nothing later."""
    start = first_page * page
    if sliding_window is not None:
        start = max(start, query - sliding_window + 1)
    return list(range(start, query + 1))


def rotation(position: int, pair: int, base: float, dims: int, position_scale: float = 1.0) -> tuple[float, float]:
    """cos and sin of a pair's angle, the angle reduced in 60-digit arithmetic."""
    with localcontext() as context:
        context.prec = 60
        exponent = -(Decimal(2 * pair) / Decimal(dims))
        frequency = Decimal(position_scale) * (Decimal(base).ln() * exponent).exp()
        turns = Decimal(position) * frequency / (2 * _PI)
        angle = float((turns - turns.to_integral_value(rounding="ROUND_FLOOR")) * 2 * _PI)
    return float(np.cos(angle)), float(np.sin(angle))
