"""One-pass memorisation: random pairs are written once each, in order, then every key is read.

Each rule gets the step size that is best on pairs kept for tuning; the seeds that are reported are others. `b` is the
chunk: gradients are taken at the memory as it was when the chunk began. A second pair of reports squeezes the monomials
of degree 2 to 4·d features, by a random matrix or by products of random signs, under the Omega rule.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from atlas_jax.experiments._pairs import best_step, one_pass, random_pairs
from atlas_jax.experiments._report import Options, Report, run_command
from atlas_jax.memory import Features, MemoryRule, init_params, presets
from atlas_jax.memory._params import apply_features, unit_keys

STEPS = tuple(float(x) for x in 2.0 ** np.arange(-8, 1.5))
_DEGREE_2 = Features(kind="polynomial", degree=2)


@dataclass(frozen=True)
class Contender:
    """A rule and what its keys go through.

    Attributes:
      lift: components that a fixed random matrix maps keys to first; 0 leaves them alone.
    """

    name: str
    rule: MemoryRule
    theta: float = 0.0
    lift: int = 0

    def keys(self, keys: jax.Array) -> jax.Array:
        """Keys as the rule gets them."""
        if not self.lift:
            return keys
        matrix = jax.random.normal(jax.random.key(77), (keys.shape[-1], self.lift))
        return jnp.einsum("snd,dl->snl", keys, matrix)


def contenders(dim: int) -> list[Contender]:
    """Rules of one state size each: d² numbers for degree 1, d·C(d+2, 2) for degree 2 and for lifted keys."""
    wide = _DEGREE_2.out_dim(dim)

    def linear(**fields: object) -> MemoryRule:
        return presets.deltanet(dim, dim, **fields)

    return [
        Contender("linear attention", presets.linear_attention(dim, dim)),
        Contender("delta c=1", linear()),
        Contender("momentum c=1", linear(optimizer="momentum"), theta=0.5),
        Contender("omega c=16, b=1", linear(window=16)),
        Contender("omega c=16, b=16", linear(window=16, chunk=16)),
        Contender("muon c=16, b=1", linear(window=16, optimizer="muon")),
        Contender("delta c=1, keys lifted", presets.deltanet(wide, dim), lift=wide),
        Contender("omega c=16, b=1, keys lifted", presets.deltanet(wide, dim, window=16), lift=wide),
        Contender("delta c=1, degree 2", linear(features=_DEGREE_2)),
        Contender("omega c=16, b=1, degree 2", linear(features=_DEGREE_2, window=16)),
        Contender("least squares", presets.mesa(dim, dim, ridge=1e-3)),
    ]


def experiment(options: Options) -> Sequence[Report]:
    """Error and top-1 recall against the number of pairs: of each rule, then of each way to compress monomials."""
    dim = 8 if options.quick else 16
    counts = (8,) if options.quick else (8, 16, 32, 64, 128)
    error = Report("memorise", "One-pass memorisation: error", "pairs", "relative squared error", log_x=True)
    recall = Report("memorise-recall", "One-pass memorisation: recall", "pairs", "top-1 accuracy", log_x=True)
    some = slice(0, 3) if options.quick else slice(None)
    for contender in contenders(dim)[some]:
        for count in counts:
            tuning, tested = (_pairs(range(a, b), count, dim) for a, b in ((900, 904), (0, options.seeds)))
            steps = STEPS[::3] if options.quick else STEPS
            keys, values = tuning
            eta = best_step(contender.rule, contender.keys(keys), values, steps, contender.theta)
            keys, values = tested
            wrong, right = one_pass(contender.rule, contender.keys(keys), values, eta, contender.theta)
            error.add(contender.name, count, wrong)
            recall.add(contender.name, count, right)
    wide = dim * _DEGREE_2.out_dim(dim)
    note = f"d = {dim}; state {dim * dim} numbers for degree 1, {wide} for degree 2 and for lifted keys."
    error.notes.append(note)
    recall.notes.append(note)
    return [error, recall, *_compressed(options)]


def _compressed(options: Options) -> Sequence[Report]:
    """Error and top-1 recall on degree 2, whole and squeezed; each seed has a random matrix or signs of its own."""
    dims, counts = ((8,), (8,)) if options.quick else ((16, 64), (16, 32, 64, 128, 256))
    steps = STEPS[::3] if options.quick else STEPS
    title = "Degree 2 squeezed to 4·d features"
    error = Report("memorise-compressed", f"{title}: error", "pairs", "relative squared error", log_x=True)
    recall = Report("memorise-compressed-recall", f"{title}: recall", "pairs", "top-1 accuracy", log_x=True)
    for dim in dims:
        maps = {
            "whole": _DEGREE_2,
            "projection": Features(kind="polynomial", degree=2, compress="projection", width=4 * dim),
            "sketch": Features(kind="polynomial", degree=2, compress="sketch", width=4 * dim),
        }
        for name, features in maps.items():
            rule = presets.deltanet(features.out_dim(dim), dim, window=16, normalize=False)
            for count in counts:
                tuning, tested = (
                    _featured(features, seeds, *_pairs(seeds, count, dim))
                    for seeds in (range(900, 904), range(options.seeds))
                )
                wrong, right = one_pass(rule, *tested, best_step(rule, *tuning, steps), 0.0)
                error.add(f"{name}, d = {dim}", count, wrong)
                recall.add(f"{name}, d = {dim}", count, right)
    return [error, recall]


def _featured(features: Features, seeds: range, keys: jax.Array, values: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Keys through a map that is drawn anew for every seed."""
    dim = keys.shape[-1]
    rows = []
    for seed, row in zip(seeds, keys, strict=True):
        rule = MemoryRule(d_k=dim, d_v=dim, features=dataclasses.replace(features, seed=seed))
        rows.append(apply_features(rule, init_params(rule, jax.random.key(seed)), unit_keys(rule, row)))
    return jnp.stack(rows), values


def _pairs(seeds: range, count: int, dim: int) -> tuple[jax.Array, jax.Array]:
    made = [random_pairs(jax.random.key(seed), count, dim, dim) for seed in seeds]
    keys, values = (jnp.stack(part) for part in zip(*made, strict=True))
    return keys, values


if __name__ == "__main__":
    run_command("memorise", experiment, seeds=8)
