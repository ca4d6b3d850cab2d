"""The tutorial runs, and what it prints says what its text says."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.patience import PATIENCE


@pytest.mark.slow
def test_tutorial() -> None:
    script = Path(__file__).parents[3] / "docs" / "tutorial.py"
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, timeout=PATIENCE, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    out = done.stdout
    number = r"\s+([\d.]+)$"
    delta, omega, first, second = (
        float(re.search(name + number, out, re.MULTILINE)[1])  # type: ignore[index]
        for name in ("at a time:", "16 tokens:", "on degree 1:", "on degree 2:")
    )
    assert omega < delta
    assert second < 0.01 < 0.5 < first
    before, after = map(float, re.search(r"loss ([\d.]+) → ([\d.]+)", out).groups())  # type: ignore[union-attr]
    assert after < 0.8 * before
    assert "every number as it was: True" in out
