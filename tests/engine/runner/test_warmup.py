"""Compiling in the background, beside requests."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

from atlas_jax.engine.runner.base import Buckets
from atlas_jax.engine.runner.warmup import WarmUp
from tests.patience import PATIENCE

ROOT = Path(__file__).parents[3]
_SECONDS = 0.02


class Runner:
    """Programs that take a while to compile."""

    chunks = (32,)
    buckets = Buckets(rows=(1,), pages=(4,))

    def __init__(self) -> None:
        self.begun: list[float] = []

    def __getattr__(self, name: str) -> Any:
        def compile_one(*_: int) -> None:
            self.begun.append(time.monotonic())
            time.sleep(_SECONDS)

        return compile_one


def test_programs_wait_while_requests_run_and_are_compiled_when_none_does() -> None:
    runner, quiet = Runner(), threading.Event()
    warm_up = WarmUp(runner, lambda: not quiet.is_set())  # type: ignore[arg-type]
    warm_up.start(first_pages=4)
    while len(runner.begun) < 5:  # two before the start has ended, then three in the background
        time.sleep(0.005)
    assert runner.begun[4] - runner.begun[3] > 10 * _SECONDS
    quiet.set()
    assert warm_up.wait(PATIENCE)
    assert len(runner.begun) == 9


def test_what_waits_for_requests_ends_at_once() -> None:
    runner = Runner()
    warm_up = WarmUp(runner, lambda: True)  # type: ignore[arg-type]
    warm_up.start(first_pages=4)
    warm_up.stop(PATIENCE)
    assert not warm_up.done


def test_a_process_ends_when_what_is_being_compiled_is_compiled() -> None:
    """What ends in the midst of it takes the process down."""
    program = """
import sys, time
from atlas_jax.engine.runner.warmup import WarmUp
from tests.engine.runner import test_warmup

class Slow(test_warmup.Runner):
    def __getattr__(self, name):
        def compile_one(*_):
            self.begun.append(name)
            if len(self.begun) > 2:  # in the background
                time.sleep(1.0)
                print("compiled", flush=True)
        return compile_one

warm_up = WarmUp(Slow(), lambda: False)
warm_up.start(first_pages=4)
warm_up.stop(0.0)
print("stopped", flush=True)
"""
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=PATIENCE, check=True, cwd=ROOT
    )
    assert done.stdout.split() == ["stopped", "compiled"]
