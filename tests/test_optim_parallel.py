"""Data-parallel training on eight virtual CPU devices is training on one."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path


def test_pmap_and_shardings_equal_one_device() -> None:
    script = Path(__file__).parent / "optim_eight_devices.py"
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    assert done.stdout.strip() == "equal"
