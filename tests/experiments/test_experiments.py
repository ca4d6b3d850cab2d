"""Every experiment's small version runs and finds what its text says; its report is written."""

from __future__ import annotations

from pathlib import Path

import jax
import numpy as np
import pytest

from atlas_jax.experiments import capacity, learnability, memorise, mqar, omega_window
from atlas_jax.experiments._report import Estimate, Options, run_command
from atlas_jax.model.lm import IGNORE

QUICK = Options(seeds=4, quick=True)


@pytest.mark.slow
def test_capacity_is_the_rank() -> None:
    [report] = capacity.experiment(QUICK)
    for degree in (1, 2):
        rank = capacity.expected_rank(4, degree)
        curve = report.curves[f"degree {degree} (rank {rank})"]
        assert curve[rank].mean < 1e-4
        assert curve[2 * rank].mean > 0.3


def test_a_window_beats_the_newest_token_alone_and_stale_gradients_undo_it() -> None:
    [report] = omega_window.experiment(QUICK)
    new, stale = report.curves["8 pairs, b = 1"], report.curves["8 pairs, b = c"]
    assert new[1] == stale[1]
    assert new[4].mean < new[1].mean < stale[4].mean


def test_memorise_reports_error_and_recall_of_each_rule() -> None:
    error, recall, squeezed, squeezed_recall = memorise.experiment(QUICK)
    assert error.curves.keys() == recall.curves.keys() == {"linear attention", "delta c=1", "momentum c=1"}
    assert all(0 < curve[8].mean < 1 for curve in error.curves.values())
    assert all(0.3 < curve[8].mean <= 1 for curve in recall.curves.values())
    assert squeezed.curves.keys() == squeezed_recall.curves.keys()
    whole, projection, sketch = (
        squeezed.curves[f"{name}, d = 8"][8].mean for name in ("whole", "projection", "sketch")
    )
    assert 0 < whole < projection < 1
    assert 0 < sketch < projection


def test_what_a_memory_cannot_see_it_does_not_learn() -> None:
    [report] = learnability.experiment(Options(seeds=2, quick=True))
    seen, unseen = report.curves["low rank, 1×"], report.curves["window attention + MLP, 1×"]
    assert seen[2000].mean < 0.7 * seen[500].mean
    assert unseen[2000].mean > 1.3 * seen[2000].mean


def test_mqar_asks_for_every_pair_it_has_told() -> None:
    batch = mqar.batch_of(jax.random.key(0), rows=3, pairs=4)
    tokens, targets = np.asarray(batch.tokens), np.asarray(batch.targets)
    assert (targets[:, :8] == IGNORE).all()
    for row, wanted in zip(tokens, targets, strict=True):
        told = dict(zip(row[0:8:2], row[1:8:2], strict=True))
        assert len(told) == 4
        assert sorted(told) == sorted(row[8:])
        assert [told[key] for key in row[8:]] == list(wanted[8:])


@pytest.mark.slow  # half a minute of compiling
def test_mqar_trains_and_its_report_is_written(tmp_path: Path) -> None:
    arguments = ["--quick", "--seeds", "2", "--out", str(tmp_path)]
    report = run_command("mqar", mqar.experiment, seeds=3, argv=arguments)["mqar"]
    assert 0 <= report.curves["delta c=1"][24].mean <= 1
    text = (tmp_path / "mqar.md").read_text()
    assert "`python -m atlas_jax.experiments.mqar --quick --seeds 2`" in text
    assert report.table() in text


def test_intervals_are_students() -> None:
    found = Estimate.of([1.0, 2.0, 3.0])
    assert found.mean == 2.0
    assert abs(found.half - 4.303 / 3**0.5) < 1e-3
    assert str(Estimate.of([1.0])) == "1 ± nan"
