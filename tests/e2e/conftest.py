"""Server processes over a tiny model; all of a run share one folder of compiled programs."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests import tiny_model
from tests.e2e.real_server import STOP_SECONDS, RealServer

Launch = Callable[..., RealServer]
_SMALL = (
    "--max-concurrent",
    "4",
    "--atlas-window",
    "128",
    "--atlas-max-window",
    "128",
    "--atlas-latency-budget-ms",
    "60000",
)


@pytest.fixture(scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Model and adapter files."""
    folder = tmp_path_factory.mktemp("tiny")
    model = tiny_model.write_model(folder / "tiny.gguf", dataclasses.replace(tiny_model.LLAMA, context=1024))
    return model, tiny_model.write_adapter(folder / "tiny.safetensors", model)


@pytest.fixture(scope="module")
def launch(tiny: tuple[Path, Path], cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Launch]:
    """Starts servers of the tiny model, or of `files`; `folder` names the place of their memory, if it is to be kept."""
    running: list[RealServer] = []
    numbers = itertools.count()
    root = tmp_path_factory.mktemp("servers")

    def start(*flags: str, folder: str | None = None, files: tuple[Path, Path] = tiny, wait: bool = True) -> RealServer:
        model, adapter = files
        place = root / (folder or f"server-{next(numbers)}")
        place.mkdir(exist_ok=True)
        flags = (*_SMALL, "--atlas-adapter", str(adapter), *flags)
        running.append(RealServer(model, *flags, cache=cache, folder=place, wait=wait))
        return running[-1]

    yield start
    for server in running:
        server.kill()


@pytest.fixture(scope="module")
def server(launch: Launch) -> Iterator[RealServer]:
    """A server for all tests of a module; nothing they do may make it complain."""
    running = launch()
    yield running
    trouble = running.trouble
    code, seconds = running.end()
    assert (code, trouble) == (-15, [])
    assert seconds < STOP_SECONDS
