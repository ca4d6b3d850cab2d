"""The recall memory by definition, in float64: features, the Omega objective and its minimum, scores, the mixture."""

from __future__ import annotations

import itertools
import math

import numpy as np


def features(keys: np.ndarray, degree: int) -> np.ndarray:
    """All distinct monomials of one degree, weighted so that products of features are powers of products: [n, M]."""
    columns = []
    for variables in itertools.combinations_with_replacement(range(keys.shape[1]), degree):
        repeats = math.prod(math.factorial(variables.count(v)) for v in set(variables))
        columns.append(math.sqrt(math.factorial(degree) / repeats) * np.prod(keys[:, variables], axis=1))
    return np.stack(columns, axis=1)


def omega_loss(memory: np.ndarray, phi: np.ndarray, values: np.ndarray) -> float:
    """Σ ‖M φ(k) − v‖² per pair."""
    return float(((phi @ memory - values) ** 2).sum() / len(phi))


def ridge_loss(memory: np.ndarray, before: np.ndarray, phi: np.ndarray, values: np.ndarray, ridge: float) -> float:
    """The objective of an exact write: what is left of the pairs, and ρ times the change."""
    return float(((phi @ memory - values) ** 2).sum() + ridge * ((memory - before) ** 2).sum())


def exact_write(memory: np.ndarray, phi: np.ndarray, values: np.ndarray, ridge: float) -> np.ndarray:
    """The minimum of Σ ‖M φ − v‖² + ρ ‖M − M₀‖², by the normal equations in feature space."""
    system = phi.T @ phi + ridge * np.eye(phi.shape[1])
    return memory + np.linalg.solve(system, phi.T @ (values - phi @ memory))


def mixture(logits: np.ndarray, scores: np.ndarray, gate: float) -> np.ndarray:
    """(1 − g)·softmax(logits) + g·max(s, 0)⁶ normalised."""
    weight = np.exp(logits - logits.max())
    power = np.maximum(scores, 0.0) ** 6
    return (1 - gate) * weight / weight.sum() + gate * power / power.sum()
