"""Data-parallel training on eight virtual CPU devices is training on one."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from tests.patience import PATIENCE


def test_pmap_and_shardings_equal_one_device() -> None:
    command = [sys.executable, "-m", "tests.optim.eight_devices"]
    done = subprocess.run(
        command, cwd=Path(__file__).parents[2], capture_output=True, text=True, timeout=PATIENCE, check=False
    )
    assert done.returncode == 0, done.stderr[-4000:]
    assert done.stdout.strip() == "equal"
