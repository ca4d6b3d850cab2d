"""Servers that are killed and stopped under load lose nothing; and the harness that says so would notice."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from benchmarks.crash.disk import build
from benchmarks.crash.ledger import Kind, Operation, Session, judge
from tests.e2e.real_server import ROOT
from tests.patience import PATIENCE

_SMALL = ("--sessions", "12", "--clients", "4", "--operations", "24", "--max-concurrent", "2")
pytestmark = pytest.mark.timeout(600)  # a minute where nothing else runs


@dataclass(frozen=True)
class Run:
    """A run of the harness: its exit code, what it printed, its figures."""

    code: int
    output: str
    figures: dict[str, Any]


def rounds(tiny: tuple[Path, Path], cache: Path, folder: Path, *flags: str) -> Run:
    model, adapter = tiny
    figures = folder / "figures.json"
    command = [
        sys.executable,
        "-m",
        "benchmarks.crash",
        "rounds",
        "--model",
        str(model),
        "--atlas-adapter",
        str(adapter),
    ]
    command += ["--cache", str(cache), "--json", str(figures), *_SMALL, *flags]
    with subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    ) as harness:
        try:
            output, _ = harness.communicate(timeout=PATIENCE)
        except BaseException:
            os.killpg(harness.pid, signal.SIGKILL)  # its servers too
            raise
    assert figures.exists(), output
    return Run(harness.returncode, output, json.loads(figures.read_text()))


def test_kills_and_a_stop_on_a_slow_disk_lose_nothing(tiny: tuple[Path, Path], cache: Path, tmp_path: Path) -> None:
    run = rounds(tiny, cache, tmp_path, "--kills", "1", "--stops", "1", "--clean-stops", "0", "--seed", "ci")
    assert run.code == 0, run.output
    assert not any(run.figures["violations"].values()), run.output
    assert run.figures["kills"] >= 1
    assert run.figures["stops"] == 1
    assert run.figures["acknowledged"]["turn"] >= 20
    assert run.figures["answers_equal"] >= 10


@pytest.mark.slow
def test_a_server_that_forgets_is_found_out(tiny: tuple[Path, Path], cache: Path, tmp_path: Path) -> None:
    plan = ("--kills", "1", "--stops", "0", "--clean-stops", "0", "--no-atlas-memory-persist")
    run = rounds(tiny, cache, tmp_path, *plan)
    assert run.code == 1, run.output
    assert run.figures["violations"]["lost"] >= 5, run.output


@pytest.mark.parametrize(
    ("found", "counts", "verdict"),
    [
        (None, [None], ("ok", 0)),
        (80, [None, 30, 80], ("ok", 0)),
        (30, [None, 30, 80], ("lost", 1)),
        (None, [None, 30, 80], ("lost", 2)),
        (50, [None, 30, 80], ("half", 1)),
        (90, [None, 30, 80], ("half", 1)),
        (80, [None, 30, 80, None], ("resurrected", 1)),
        (80, [None, 30, 80, None, 20], ("resurrected", 1)),
        (None, [None, 30, 80, None, 20], ("lost", 1)),
        (80, [None, 30, 80, 0], ("lost", 1)),
    ],
)
def test_what_a_session_may_be_found_as(found: int | None, counts: list[int | None], verdict: tuple[str, int]) -> None:
    assert judge(found, counts) == verdict


def test_only_a_session_killed_with_unsaved_turns_may_have_other_bits() -> None:
    session = Session("s")
    session.acknowledge(Operation(Kind.STATE, "", {"state": {"a": 1}}))
    session.restarted(complete=False)
    assert (session.exists, session.state, session.loose) == (True, {"a": 1}, False)
    session.unsaved = True
    session.acknowledge(Operation(Kind.SAVE, "", {}))
    session.restarted(complete=False)
    assert not session.loose
    session.unsaved = True
    session.restarted(complete=True)
    assert not session.loose
    session.unsaved = True
    session.restarted(complete=False)
    assert session.loose
    session.acknowledge(Operation(Kind.DELETE, "", {}))
    assert (session.exists, session.loose, session.has_state) == (False, False, False)


def test_a_slow_disk_is_slow_in_its_folder_alone(tmp_path: Path) -> None:
    disk = build(tmp_path, megabytes=4, sync_ms=15)
    folder = tmp_path / "memory"
    folder.mkdir()
    rate, sync = disk.measure(folder, folder / "file", megabytes=2)
    assert rate <= 4.1
    assert sync >= 15
