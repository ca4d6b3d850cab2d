"""A memory that is fitted while the model is served: what requests get meanwhile, and how it comes to be used."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from atlas_jax.engine import adapter_finder
from atlas_jax.engine.adapter_finder import FittingStopped
from atlas_jax.engine.api import MemoryUnavailable
from atlas_jax.engine.fitting import BackgroundFit
from atlas_jax.gguf import GGUFFile
from atlas_jax.model.loading import model_config
from atlas_jax.progress import Progress
from atlas_jax.recall import adapter_store
from atlas_jax.recall.calibration import Calibration
from tests.engine.offline import ask, memory, request
from tests.patience import PATIENCE

PROMPT = list(range(40, 80))


class Gate:
    """A calibration that waits in the middle until it is let go on, or fails."""

    def __init__(self, found: Calibration) -> None:
        self.found, self.go, self.begun = found, threading.Event(), threading.Event()
        self.failure: Exception | None = None

    def __call__(self, *args: Any, **_: Any) -> Calibration:
        progress = next(one for one in args if isinstance(one, Progress))
        progress("reading", 0.25)
        self.begun.set()
        while not self.go.wait(0.005):
            progress.between()
        if self.failure is not None:
            raise self.failure
        return self.found


@pytest.fixture
def gate(models: dict[str, tuple[Path, Path]], monkeypatch: pytest.MonkeyPatch) -> Iterator[Gate]:
    model, adapter = models["llama"]
    with GGUFFile.open(model) as file:
        config, found = adapter_store.decode(
            adapter.read_bytes(), file.fingerprint(), model_config(file), max_window=256
        )
    gate = Gate(Calibration(config, found, (0.5, 0.5), (0.5, 0.5), 3.0, 2.0))
    monkeypatch.setattr(adapter_finder, "calibrate_with", gate)
    yield gate
    gate.go.set()


@pytest.fixture
def own(cache: Path, tmp_path: Path) -> Path:
    """A cache folder with nothing in it but the compiled programs."""
    (cache / "compiled").mkdir(parents=True, exist_ok=True)
    (tmp_path / "compiled").symlink_to(cache / "compiled")
    return tmp_path


def until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def test_a_model_is_served_without_its_memory_until_that_is_fitted(
    opened: Callable[..., Any], gate: Gate, own: Path, tmp_path: Path
) -> None:
    seen: list[str] = []
    kept = {"memory_path": tmp_path / "sessions", "cache_path": own, "adapter_path": None}
    with opened(**kept, calibrate_in_background=True) as engine:
        assert gate.begun.wait(PATIENCE)
        engine.before_memory(lambda sessions: seen.append(engine.model.memory_unavailable))
        engine.documents.write("owner", "note", b"said before")
        far = engine.fitting()
        assert (far.stage, far.share) == ("reading", 0.25)
        plain = ask(engine, request(PROMPT, 4)).tokens
        with pytest.raises(MemoryUnavailable, match="still being fitted"):
            ask(engine, request(PROMPT, 4, memory=memory("s")))
        with pytest.raises(MemoryUnavailable, match="still being fitted"):
            _ = engine.sessions
        gate.go.set()
        until(lambda: engine.fitting() is None)
        assert (engine.model.memory_unavailable, engine.model.adapter) == (None, "calibrated")
        assert seen == ["The memory is still being fitted to this model"]
        assert ask(engine, request(PROMPT, 4)).tokens == plain
        assert ask(engine, request(PROMPT, 4, memory=memory("s"))).tokens == plain  # it fits into the window
        assert [one.session_id for one in engine.sessions.list("owner", after=None, limit=9)[0]] == ["s"]
        assert engine.documents.read("owner", "note") == b"said before"
        assert engine.stats().requests_completed == 3
    gate.begun.clear()
    with opened(**kept, calibrate_in_background=True) as engine:  # it was kept
        assert (engine.fitting(), engine.model.adapter, gate.begun.is_set()) == (None, "calibrated", False)
        assert engine.documents.read("owner", "note") == b"said before"


@pytest.mark.slow
def test_one_that_fails_leaves_the_model_served(opened: Callable[..., Any], gate: Gate, own: Path) -> None:
    gate.failure = MemoryError("12345678 bytes")
    with opened(adapter_path=None, cache_path=own, calibrate_in_background=True) as engine:
        gate.go.set()
        until(lambda: engine.fitting() is None)
        assert engine.model.memory_unavailable == "No memory could be fitted to this model"
        assert len(ask(engine, request(PROMPT, 4)).tokens) == 4


def test_closing_ends_it_and_keeps_nothing(opened: Callable[..., Any], gate: Gate, own: Path) -> None:
    with opened(adapter_path=None, cache_path=own, calibrate_in_background=True) as engine:
        assert gate.begun.wait(PATIENCE)
    assert not any(thread.name == "atlas-fitting" for thread in threading.enumerate())
    assert not list((own / "adapters").glob("*")) if (own / "adapters").exists() else True
    assert engine.model.memory_unavailable == "The memory is still being fitted to this model"


@pytest.mark.parametrize(("busy", "parts"), [(True, 8), (False, 90)])
def test_parts_take_a_twelfth_of_the_time_of_requests(busy: bool, parts: int) -> None:
    now, done, ended = [0.0], [0], threading.Event()

    def work(fit: BackgroundFit) -> None:
        while now[0] < 100.0:
            now[0] += 1.0  # what a part takes
            fit.between()
            done[0] += 1
        ended.set()

    def asked() -> bool:
        now[0] += 0.5  # what passes until it is asked again
        return busy

    fit = BackgroundFit(work, asked, clock=lambda: now[0])
    fit.start()
    assert ended.wait(PATIENCE)
    fit.stop(PATIENCE)
    assert (done[0] <= parts + 1) if busy else (done[0] >= 60)
    assert done[0] >= parts - 1 if busy else True


def test_a_stop_is_heard_between_two_parts() -> None:
    stopped = threading.Event()

    def work(fit: BackgroundFit) -> None:
        try:
            while True:
                fit.between()
        except FittingStopped:
            stopped.set()
            raise

    fit = BackgroundFit(work, lambda: True)
    fit.start()
    assert fit.state() is not None
    fit.stop(PATIENCE)
    assert stopped.is_set()
    assert fit.state() is None
