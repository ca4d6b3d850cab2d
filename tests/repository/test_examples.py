"""The programs in examples/ do what they say."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.patience import PATIENCE
from tests.server.fake_engine import FakeEngine
from tests.server.live_server import Live, make_settings

ROOT = Path(__file__).parents[2]


def run(program: str, *arguments: str, typed: str = "") -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(ROOT / "examples" / program), *arguments],
        input=typed,
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        env={**os.environ, "PYTHONPATH": str(ROOT), "NO_PROXY": "*"},
    )


@pytest.fixture
def live() -> Iterator[Live]:
    server = Live(make_settings(), FakeEngine())
    yield server
    server.stop()


def test_a_chat_goes_on_in_one_session(live: Live) -> None:
    for words in ("hello", "again"):
        done = run("chat_session.py", "notes", "--url", live.url, typed=f"{words}\n\n")
        assert done.returncode == 0, done.stderr
        assert words in done.stdout
    sessions = {request.memory.session.session_id for request in live.engine.requests}
    assert sessions == {"notes"}
    assert len(live.engine.requests) == 2


def test_a_chat_without_a_server_says_so() -> None:
    done = run("chat_session.py", "notes", "--url", "http://127.0.0.1:1", typed="hello\n")
    assert done.returncode == 1
    assert "http://127.0.0.1:1: " in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.slow
def test_a_memory_holds_what_its_rule_has_room_for() -> None:
    done = run("memory_rules.py")
    assert done.returncode == 0, done.stderr
    table = {line[:16].strip(): [float(x) for x in line[16:].split()] for line in done.stdout.splitlines()}
    for of_pairs in range(2):  # as many as there is room for in a matrix of 16 columns
        assert table["delta"][of_pairs] > table["omega"][of_pairs] > table["exact"][of_pairs] + 0.05
    assert table["exact, degree 2"][2] < 0.01 < 0.3 < table["exact"][2]
