"""Memory rules on two devices are those on one, whichever way JAX divides a program."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.patience import PATIENCE


@pytest.mark.slow  # all rules on two devices, compiled anew
def test_rules_divided_over_devices_are_those_on_one() -> None:
    """`shard_map` as it is by default, explicit axes of a mesh, `pmap`, and `jit` with heads on different devices."""
    command = [sys.executable, "-m", "tests.property.memory_devices"]
    done = subprocess.run(
        command, cwd=Path(__file__).parents[2], capture_output=True, text=True, timeout=PATIENCE, check=False
    )
    assert done.returncode == 0, done.stderr[-4000:]
    assert done.stdout.strip() == "equal"
