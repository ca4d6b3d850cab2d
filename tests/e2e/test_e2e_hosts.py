"""Two processes that share a mesh: they answer as one process with the same devices, keep sessions, and end together."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests import tiny_model
from tests.e2e.real_server import ROOT, RealServer
from tests.patience import PATIENCE

SHAPE = tiny_model.Shape(heads=8, kv_heads=4, ff=512)
SAID = "The lighthouse keeper wrote the number of every ship into his book. " * 6
MESHES = [("1", "2"), ("2", "1")]

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("hosts")
    model = tiny_model.write_model(folder / "tiny.gguf", SHAPE)
    return model, tiny_model.write_adapter(folder / "tiny.safetensors", model)


class Group:
    """A server of two processes with one device each."""

    def __init__(self, model: Path, flags: list[str], cache: Path, folder: Path) -> None:
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        shared = [*flags, "--coordinator-address", f"127.0.0.1:{port}", "--num-processes", "2"]
        command = [sys.executable, "-m", "server", "serve", "--model", str(model), *shared, "--process-id", "1"]
        self._log = folder / "follower.log"
        with self._log.open("w") as log:
            environ = {**os.environ, "XDG_CACHE_HOME": str(cache)}
            self.follower = subprocess.Popen(command, stdout=log, stderr=log, cwd=ROOT, env=environ)
        try:
            self.server = RealServer(model, *shared, "--process-id", "0", cache=cache, folder=folder)
        except BaseException:
            self.follower.kill()
            raise

    def stop(self) -> tuple[int, int]:
        """Tells both to stop; their exit codes."""
        for process in (self.follower, self.server.process):
            process.send_signal(signal.SIGTERM)
        return self.server.process.wait(PATIENCE), self.follower.wait(PATIENCE)

    def kill(self) -> None:
        for process in (self.follower, self.server.process):
            process.kill()
            process.wait()

    @property
    def logs(self) -> str:
        return self.server.log + self._log.read_text()


@contextmanager
def group(*arguments: Any) -> Iterator[Group]:
    found = Group(*arguments)
    try:
        yield found
    finally:
        found.kill()


def flags_of(adapter: Path, data: str, model: str) -> list[str]:
    return [
        *("--mesh-data", data, "--mesh-model", model, "--atlas-adapter", str(adapter), "--max-concurrent", "2"),
        *("--max-context", "512", "--atlas-max-window", "512", "--no-speculate"),
    ]


def ask(server: RealServer, prompt: str, **more: Any) -> Any:
    body = {"prompt": prompt, "max_tokens": 6, "logprobs": 2, "seed": 5, "ignore_eos": True, **more}
    answer = server.post("/v1/completions", body)
    assert answer.status_code == 200, answer.text
    return answer.json()["choices"]


def told(server: RealServer) -> list[Any]:
    session = {"session_id": "ships", "window_size": 128}
    plain = [ask(server, SAID, temperature=0), ask(server, SAID[:90], temperature=0.8), ask(server, SAID + "So", n=2)]
    return [*plain, ask(server, SAID, temperature=0, atlas=session)]


def asked(server: RealServer) -> Any:
    return ask(server, "How many ships?", temperature=0, atlas={"session_id": "ships", "window_size": 128})


@pytest.mark.parametrize(("data", "model"), MESHES)
def test_two_processes_answer_as_one(
    tiny: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, data: str, model: str
) -> None:
    file, adapter = tiny
    flags, folders = flags_of(adapter, data, model), [tmp_path / name for name in ("one", "two", "cache")]
    for folder in folders:
        folder.mkdir()
    one, two, cache = folders
    with monkeypatch.context() as patch:
        patch.setenv("XLA_FLAGS", "--xla_force_host_platform_device_count=2")
        alone = RealServer(file, *flags, cache=cache, folder=one)
        try:
            first, then = told(alone), asked(alone)
        finally:
            alone.process.kill()
            alone.process.wait()
    with group(file, flags, cache, two) as both:
        assert told(both.server) == first
        codes = both.stop()
        assert codes == (-signal.SIGTERM, 0), both.logs
        assert not both.server.trouble
    with group(file, flags, cache, two) as both:
        assert asked(both.server) == then, "the session has gone on from the disk"


def test_they_end_together(tiny: tuple[Path, Path], tmp_path: Path) -> None:
    file, adapter = tiny
    flags = flags_of(adapter, "1", "2")
    with group(file, flags, tmp_path, tmp_path) as both:
        both.follower.kill()
        assert both.server.process.wait(PATIENCE) == 1
        assert "Process 1 has gone" in both.server.log
    with group(file, flags, tmp_path, tmp_path) as both:
        both.server.process.kill()
        started = time.monotonic()
        assert both.follower.wait(PATIENCE) != 0
        assert time.monotonic() - started < 20


def test_a_mesh_must_have_all_devices(tiny: tuple[Path, Path], tmp_path: Path) -> None:
    file, adapter = tiny
    command = [
        sys.executable,
        "-m",
        "server",
        "serve",
        "--model",
        str(file),
        *flags_of(adapter, "1", "1"),
        "--port",
        "0",
    ]
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command += ["--coordinator-address", f"127.0.0.1:{port}", "--num-processes", "1", "--process-id", "0"]
    command += ["--mesh-data", "2", "--atlas-memory-path", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=PATIENCE, check=False)
    assert done.returncode != 0
    assert "mesh_data (2) times mesh_model (1) must be 1, the devices of all 1 processes" in done.stderr
