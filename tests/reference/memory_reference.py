"""Test-time memory rules in NumPy float64, one token after another, straight from the equations of the paper.

Written to be read against arXiv 2505.23735, not to be fast: every window is recomputed from the whole history, nothing
is carried that an equation does not name.
"""

from __future__ import annotations

import itertools
import math
from collections import Counter

import numpy as np

JORDAN = [(3.4445, -4.7750, 2.0315)] * 5


def unit(x):
    norm = np.linalg.norm(x)
    return x / norm if norm > 0 else x


def monomials(x, coefficients):
    """Every distinct monomial once; one that occurs n times in the tensor power is weighted √(aᵢ·n)."""
    out = []
    for order, a in enumerate(coefficients):
        for combination in itertools.combinations_with_replacement(range(len(x)), order):
            repeats = math.prod(math.factorial(n) for n in Counter(combination).values())
            out.append(math.sqrt(a * math.factorial(order) / repeats) * math.prod(x[i] for i in combination))
    return np.array(out)


def features(rule, learned, x):
    kind = rule.features.kind
    if kind == "identity":
        return x
    if kind == "elementwise":
        return sum(a * x ** (i + 1) for i, a in enumerate(learned["scale"]))
    if kind == "polynomial":
        phi = monomials(x, np.square(learned["scale"]))
    elif kind == "exponential":
        phi = monomials(x, [1 / math.factorial(i) for i in range(rule.features.degree + 1)])
    else:
        raise NotImplementedError(kind)
    return phi @ learned["projection"] if rule.features.compress == "projection" else phi


def gelu(x):
    return 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def gelu_slope(x):
    inner = math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)
    return 0.5 * (1 + np.tanh(inner)) + 0.5 * x * (1 - np.tanh(inner) ** 2) * math.sqrt(2 / math.pi) * (
        1 + 3 * 0.044715 * x**2
    )


def relu(x):
    return np.where(np.real(x) > 0, x, 0.0)


def silu(x):
    return x / (1 + np.exp(-x))


SIGMA = {"gelu": gelu, "relu": relu, "silu": silu, "tanh": np.tanh}


def layer_norm(x):
    centred = x - np.mean(x)
    return centred / np.sqrt(np.mean(centred**2) + 1e-6)


def loss(objective, y, v):
    """ℓ(y, v), analytic in y: real on the real axis, its slope by a step along the imaginary one."""
    name, _, number = objective.rstrip(")").partition("(")
    error = y - v
    size = error * np.sign(np.real(error))
    if name == "l2":
        return np.sum(error**2)
    if name == "dot":
        return -np.sum(y * v)
    if name == "p_norm":
        return np.sum(size ** float(number or 3))
    delta, length = float(number or 1), np.sqrt(np.sum(error**2))
    return np.sum(error**2) if np.real(length) <= delta else delta * (2 * length - delta)


def retain(retention, w, step):
    """What becomes of decayed weights that take a step."""
    name, _, number = retention.rstrip(")").partition("(")
    moved = w - step
    if name == "elastic_net":
        return np.sign(moved) * np.maximum(np.abs(moved) - float(number or 1e-3), 0)
    if name == "bounded":
        return moved * min(1.0, float(number or 10) / max(np.linalg.norm(moved), 1e-30))
    return moved


def newton_schulz(matrix, steps, table=JORDAN):
    norm = np.linalg.norm(matrix)
    if norm == 0:
        return matrix
    x = matrix / norm
    if x.shape[0] > x.shape[1]:
        return newton_schulz(matrix.T, steps, table).T
    for i in range(steps):
        a, b, c = table[min(i, len(table) - 1)]
        outer = x @ x.T
        x = a * x + (b * outer + c * outer @ outer) @ x
    return x


class Memory:
    """One memory and its history."""

    def __init__(self, rule, weights, learned):
        self.rule, self.learned = rule, learned
        self.first = {name: np.array(w, float) for name, w in weights.items()}
        self.weights = {name: w.copy() for name, w in self.first.items()}
        self.anchor = {name: w.copy() for name, w in self.first.items()}
        self.momentum = {name: np.zeros_like(w) for name, w in self.first.items()}
        self.history = []
        self.gathered = []

    def prepare(self, x):
        return unit(x) if self.rule.normalize else x

    def residual(self, x, phi):
        return {"none": 0.0, "key": x, "features": phi}[self.rule.residual]

    def read(self, q, weights=None):
        w = self.weights if weights is None else weights
        x = self.prepare(q)
        phi = features(self.rule, self.learned, x)
        if self.rule.memory == "matrix":
            return w["w"] @ phi
        sigma = SIGMA[self.rule.activation]
        if self.rule.memory == "norm_matrix":
            return self.residual(x, phi) + layer_norm(w["w"] @ phi)
        if self.rule.memory == "deep_mlp":
            return self.residual(x, phi) + w["w1"] @ sigma(w["w2"] @ sigma(w["w3"] @ phi))
        hidden = sigma(w["w2"] @ phi)
        if self.rule.memory == "norm_mlp":
            return self.residual(x, phi) + layer_norm(w["w1"] @ hidden)
        if self.rule.memory == "gated_mlp":
            hidden = hidden * (w["w3"] @ phi)
        return self.residual(x, phi) + w["w1"] @ hidden

    def gradient(self, weights, k, v):
        """∂‖M(φ(k)) − v‖² or ∂(−⟨M(φ(k)), v⟩) on every weight."""
        rule = self.rule
        by_hand = rule.memory in ("matrix", "mlp", "gated_mlp") and rule.objective in ("l2", "dot")
        if not by_hand or rule.activation != "gelu":
            return self.clip(self.slopes(weights, k, v))
        x = self.prepare(k)
        phi = features(self.rule, self.learned, x)
        out = 2 * (self.read(k, weights) - v) if self.rule.objective == "l2" else -v
        if self.rule.memory == "matrix":
            grads = {"w": np.outer(out, phi)}
        else:
            a = weights["w2"] @ phi
            u = weights["w3"] @ phi if self.rule.memory == "gated_mlp" else 1.0
            delta = weights["w1"].T @ out
            grads = {"w1": np.outer(out, gelu(a) * u), "w2": np.outer(delta * u * gelu_slope(a), phi)}
            if self.rule.memory == "gated_mlp":
                grads["w3"] = np.outer(delta * gelu(a), phi)
        return self.clip(grads)

    def slopes(self, weights, k, v, tiny=1e-40):
        """Of each number of the weights by itself, from a step along the imaginary axis: exact to rounding."""
        grads = {n: np.zeros_like(w) for n, w in weights.items()}
        for n, w in weights.items():
            for place in np.ndindex(w.shape):
                moved = {m: x.astype(complex) for m, x in weights.items()}
                moved[n][place] += tiny * 1j
                grads[n][place] = np.imag(loss(self.rule.objective, self.read(k, moved), v)) / tiny
        return grads

    def clip(self, grads):
        if self.rule.clip is None:
            return grads
        return {n: g * min(1.0, self.rule.clip / max(np.linalg.norm(g), 1e-30)) for n, g in grads.items()}

    def gated(self, name, weight, gate):
        """One gate for all, one per row, or, for the first layer of an MLP, one per column (its hidden unit)."""
        return weight * (gate[None, :] if name == "w1" else gate[:, None])

    def step(self, q, k, v, eta, alpha, theta, gamma):
        rule = self.rule
        alpha = alpha if rule.retention != "none" else np.ones_like(alpha)
        t = len(self.history)
        self.history.append((k, v, gamma, alpha))
        if rule.optimizer == "exact":
            return self.regress(q)
        if t % rule.chunk == 0:
            if rule.ns_per == "chunk":
                self.move()
            self.anchor = {n: w.copy() for n, w in self.weights.items()}
        anchor = self.anchor
        if rule.gradient_at == "decayed":
            anchor = {n: self.gated(n, w, alpha) for n, w in anchor.items()}
        total = {n: np.zeros_like(w) for n, w in self.weights.items()}
        for age in range(min(rule.window, t + 1)):
            ki, vi, gi, _ = self.history[t - age]
            weight = gi[0] if rule.gates == "token" else gamma[age]
            for n, g in self.gradient(anchor, ki, vi).items():
                total[n] += weight * g
        if rule.step == "inside":
            total = {n: self.gated(n, g, eta) for n, g in total.items()}
        keep = np.zeros_like(theta) if rule.optimizer == "gradient" else theta
        self.momentum = {n: self.gated(n, s, keep) + total[n] for n, s in self.momentum.items()}
        outside = eta if rule.step == "outside" else np.ones_like(eta)
        if rule.ns_per == "chunk":
            self.gathered.append((alpha, outside))
            return self.read(q)
        for n, s in self.momentum.items():
            u = newton_schulz(s, rule.ns_steps, self.table()) if rule.optimizer == "muon" else s
            if rule.optimizer == "sign":
                u = np.sign(s) / np.sqrt(s.size)
            kept = self.gated(n, self.weights[n], alpha)
            self.weights[n] = retain(rule.retention, kept, self.gated(n, u, outside))
        return self.read(q)

    def table(self):
        return JORDAN if self.rule.ns_table == "jordan" else self.rule.ns_table

    def move(self):
        """What the chunk's steps would have done, had each used its last direction."""
        for n, s in self.momentum.items():
            u = newton_schulz(s, self.rule.ns_steps)
            for alpha, outside in self.gathered:
                self.weights[n] = self.gated(n, self.weights[n], alpha) - self.gated(n, u, outside)
        self.gathered = []

    def regress(self, q):
        """Weighted least squares of the whole history, with a ridge towards the first weights."""
        rule, last = self.rule, len(self.history) - 1
        dim = self.first["w"].shape[1]
        h, g = rule.ridge * np.eye(dim), rule.ridge * self.first["w"]
        for i, (k, v, gamma, _) in enumerate(self.history):
            phi = features(rule, self.learned, self.prepare(k))
            weight = gamma[0] * math.prod(self.history[j][3][0] for j in range(i + 1, last + 1))
            h = h + weight * np.outer(phi, phi)
            g = g + weight * np.outer(v, phi)
        return g @ np.linalg.solve(h, features(rule, self.learned, self.prepare(q)))


def run(rule, weights, learned, tokens):
    """Outputs [T, d_v] of one sequence; `tokens` has arrays [T, …] named q, k, v, eta, alpha, theta, gamma."""
    memory = Memory(rule, weights, learned)
    names = ("q", "k", "v", "eta", "alpha", "theta", "gamma")
    return np.stack([memory.step(*row) for row in zip(*(tokens[n] for n in names), strict=True)])
