"""Attacks on a server process that must hold on every change; `make attack` runs all of them on a real model."""

from __future__ import annotations

from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

from benchmarks.attack.registry import ATTACKS  # noqa: E402
from benchmarks.attack.runner import run  # noqa: E402

HOLD = (
    "own origin",
    "request bodies",
    "shapes of raw HTTP",
    "routes without a key",
    "another owner's sessions",
    "fuzzed model files",
    "hostile templates",
    "many sessions",
)
_SMALL = ("--max-concurrent", "4", "--atlas-window", "128", "--atlas-max-window", "128")


@pytest.mark.timeout(600)
@pytest.mark.slow  # minutes on a busy machine; `make attack` runs all of them
def test_attacks_that_must_hold(
    tiny: tuple[Path, Path], cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, adapter = tiny
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache))
    chosen = [ATTACKS[name] for name in HOLD]
    flags = ("--atlas-adapter", str(adapter), *_SMALL)
    rows = list(run(chosen, model, tmp_path, flags, quick=True, seed=0, seconds=5))
    assert {row.name: row.verdict for row in rows} == dict.fromkeys(HOLD, "")
    assert all(row.tried for row in rows)
