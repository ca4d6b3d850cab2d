"""The threads that write turns: what a disk or a network refuses is tried again, and said once."""

from __future__ import annotations

import threading

import pytest

from atlas_jax.engine.sessions import journal_writer
from atlas_jax.engine.sessions.journal_writer import JournalWriter
from tests.patience import PATIENCE


class Failing:
    """A journal that cannot be brought to the disk for a while."""

    def __init__(self, times: int) -> None:
        self.times, self.tried, self.synced = times, 0, threading.Event()

    def sync(self) -> None:
        self.tried += 1
        if self.tried <= self.times:
            raise OSError(5, "Input/output error")
        self.synced.set()


@pytest.mark.parametrize(("seconds", "width"), [(0.01, 1), (0.0, 4)])
def test_a_sync_that_fails_is_tried_again_and_said_once(
    seconds: float, width: int, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(journal_writer, "_RETRY_SECONDS", 0.01)
    one, writer = Failing(times=5), JournalWriter(seconds, width)
    failures: list[Exception | None] = []
    writer.submit(lambda: one, failures.append)
    assert one.synced.wait(PATIENCE)
    assert writer.close(PATIENCE)
    assert one.tried == 6
    assert len([record for record in caplog.records if "could not be brought" in record.getMessage()]) == 1
    assert [failure is None for failure in failures] == [seconds > 0], "who waits for the disk is told"
