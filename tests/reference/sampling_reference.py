"""The distribution a token is drawn from, by definition, in float64."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np


@dataclass(frozen=True)
class Settings:
    """How one row draws; the defaults change nothing."""

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    typical_p: float = 1.0
    repeat_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    bias: Mapping[int, float] = field(default_factory=dict)
    prompt: Sequence[int] = ()
    generated: Sequence[int] = ()


def adjusted(logits: np.ndarray, settings: Settings) -> np.ndarray:
    """Logits after penalties and bias."""
    x = logits.astype(np.float64).copy()
    for token in {*settings.prompt, *settings.generated}:
        x[token] = x[token] / settings.repeat_penalty if x[token] > 0 else x[token] * settings.repeat_penalty
    for token in settings.generated:
        x[token] -= settings.frequency_penalty
    for token in set(settings.generated):
        x[token] -= settings.presence_penalty
    for token, value in settings.bias.items():
        x[token] += value if abs(value) < 100 else np.sign(value) * 1e5  # the ends decide at any temperature
    return x


def distribution(logits: np.ndarray, settings: Settings, slack: float = 0.0) -> np.ndarray:
    """Probabilities after temperature, top-k, typical-p, top-p and min-p, in this order.

    Args:
      slack: widens every threshold, to see whether a token stands so near one that rounding decides about it.
    """
    x = adjusted(logits, settings) / settings.temperature
    p = _normal(np.exp(x - x.max()))
    if settings.top_k:
        limit = np.sort(p)[::-1][min(settings.top_k, p.size) - 1]
        p = _normal(np.where(p >= limit, p, 0.0))
    if settings.typical_p < 1:
        surprise = np.where(p > 0, -np.log(np.maximum(p, 1e-300)), np.inf)
        distance = np.abs(surprise - np.sum(p[p > 0] * surprise[p > 0]))
        p = _normal(np.where(_cheapest(distance, p, settings.typical_p + slack), p, 0.0))
    if settings.top_p < 1:
        p = _normal(np.where(_cheapest(-p, p, settings.top_p + slack), p, 0.0))
    return _normal(np.where(p >= settings.min_p * p.max() * (1 - slack), p, 0.0))


def _normal(weight: np.ndarray) -> np.ndarray:
    return weight / weight.sum()


def _cheapest(cost: np.ndarray, mass: np.ndarray, target: float) -> np.ndarray:
    """The smallest set of tokens, cheapest first, that weighs at least `target`; equals stay together."""
    order = np.argsort(cost, kind="stable")
    running = np.cumsum(mass[order])
    last = order[min(int(np.searchsorted(running, target - 1e-12)), len(order) - 1)]
    return cost <= cost[last]
