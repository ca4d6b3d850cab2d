"""The recall memory by definition, in float64: features, the Omega objective and its minimum, scores, the mixture."""

from __future__ import annotations

import itertools
import math

import numpy as np


def features(keys: np.ndarray, degree: int) -> np.ndarray:
    """The monomials of one degree that join a key's halves, state and context: [n, M].

    Products of features are (s·s′)ᵖ⁻¹(t·t′), and at degree 1, which has no such monomials, the mean of both products.
    """
    state, context = np.split(keys, 2, axis=1)
    if degree == 1:
        return keys / math.sqrt(2)
    columns = []
    for variables in itertools.combinations_with_replacement(range(state.shape[1]), degree - 1):
        repeats = math.prod(math.factorial(variables.count(v)) for v in set(variables))
        columns.append(math.sqrt(math.factorial(degree - 1) / repeats) * np.prod(state[:, variables], axis=1))
    return np.concatenate([column[:, None] * context for column in columns], axis=1)


def unit(x: np.ndarray) -> np.ndarray:
    """Rows of length 1; a zero row stays zero."""
    return np.asarray(x / np.maximum(np.linalg.norm(x, axis=-1, keepdims=True), 1e-6))


def context(tokens: np.ndarray, codes: np.ndarray, weight: np.ndarray, size: int) -> np.ndarray:
    """A sketch of the words before each token, [n, size]; the code of a word is the first columns of its row."""
    out = np.zeros((len(tokens), size))
    for here in range(len(tokens)):
        for back in range(1, min(here, 32) + 1):
            word = tokens[here - back]
            out[here] += 0.9 ** (back - 1) * weight[word] * codes[word, :size]
    return unit(out)


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
