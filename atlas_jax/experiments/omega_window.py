"""The Omega window c: what looking back at the last c tokens with each write is worth, at one state size.

Same task as `memorise`. With b = 1 every gradient is taken at the newest memory; with b = c at the memory as it was up
to c tokens ago, as the parallel form does.
"""

from __future__ import annotations

from collections.abc import Sequence

from atlas_jax.experiments._pairs import best_step, one_pass
from atlas_jax.experiments._report import Options, Report, run_command
from atlas_jax.experiments.memorise import STEPS, _pairs
from atlas_jax.memory import presets


def experiment(options: Options) -> Sequence[Report]:
    """Error against c, for newest and for stale gradients, below and at capacity."""
    dim = 8 if options.quick else 16
    report = Report("window", "Omega window", "c", "relative squared error", log_x=True)
    windows = (1, 4) if options.quick else (1, 2, 4, 8, 16, 32)
    for count in (dim,) if options.quick else (dim // 2, dim, 2 * dim):
        for stale in (False, True):
            for window in windows:
                rule = presets.deltanet(dim, dim, window=window, chunk=window if stale else 1)
                steps = STEPS[::3] if options.quick else STEPS
                # as many seeds for tuning as are reported: equal shapes, so each point compiles once
                eta = best_step(rule, *_pairs(range(900, 900 + options.seeds), count, dim), steps)
                error, _ = one_pass(rule, *_pairs(range(options.seeds), count, dim), eta, 0.0)
                report.add(f"{count} pairs, b = {'c' if stale else 1}", window, error)
    report.notes.append(f"d = {dim}, matrix memory of {dim * dim} numbers, best constant step for each point.")
    return [report]


if __name__ == "__main__":
    run_command("window", experiment, seeds=8)
