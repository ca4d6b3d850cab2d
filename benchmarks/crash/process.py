"""Server processes that can be killed, stopped, and put on a slow disk."""

from __future__ import annotations

import asyncio
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import httpx

ROOT = Path(__file__).parents[2]
_PATIENCE = 300.0
_LISTENS = re.compile(r"Listening on (http://127\.0\.0\.1:\d+)")
_TROUBLE = re.compile(r"^\S+ \S+ (?:ERROR|CRITICAL) .*|(?<=^Traceback )[\s\S]*?\n(?=\w).*", re.MULTILINE)
_PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")


@dataclass(frozen=True)
class Launcher:
    """How servers of one run are started.

    Attributes:
      flags: those of every server.
      cache: where compiled programs are kept, so that a kill cannot hurt a user's own.
      logs: folder of the servers' logs.
    """

    model: Path
    flags: tuple[str, ...]
    cache: Path
    logs: Path
    started: list[Process] = field(default_factory=list)

    @cached_property
    def known(self) -> str:
        """The server's own list of flags: what a build does not have is not asked of it."""
        command = [sys.executable, "-m", "server", "--help"]
        return subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout

    def start(self, memory: Path, *flags: str, environ: Mapping[str, str] | None = None) -> Process:
        """Starts a server with its sessions in `memory`; it is not waited for."""
        command = [sys.executable, "-m", "server", "serve", "--model", str(self.model), "--port", "0"]
        # clients take processor time from the server here, so it would say that it was slow
        command += ["--atlas-latency-budget-ms", "60000", "--queue-timeout", str(_PATIENCE)]
        command += ["--atlas-memory-path", str(memory), *self.flags, *flags]
        kept = {name: value for name, value in os.environ.items() if not name.startswith("ATLAS_")}
        log = self.logs / f"{len(self.started):04d}.log"
        process = Process(command, {**kept, "XDG_CACHE_HOME": str(self.cache), **(environ or {})}, log)
        self.started.append(process)
        return process

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for process in self.started:
            process.kill()


class Process:
    """One server process.

    Attributes:
      began: when it was started, in seconds of the wall clock, as files have it.
    """

    def __init__(self, command: list[str], environ: dict[str, str], log: Path) -> None:
        self.log_file = log
        self.began = time.time()
        self._started = time.monotonic()
        with log.open("w") as file:
            self._process = subprocess.Popen(
                command, stdout=file, stderr=file, stdin=subprocess.DEVNULL, cwd=ROOT, env=environ
            )
        self._http: httpx.AsyncClient | None = None

    @property
    def http(self) -> httpx.AsyncClient:
        """A client of it; there is one from `ready` on."""
        assert self._http is not None, "the server has not been waited for"
        return self._http

    @property
    def log(self) -> str:
        """What it has written."""
        return self.log_file.read_text(errors="replace")

    @property
    def trouble(self) -> list[str]:
        """Log lines that tell of something wrong."""
        return [match[0].splitlines()[-1] for match in _TROUBLE.finditer(self.log)]

    @property
    def alive(self) -> bool:
        """Whether it runs."""
        return self._process.poll() is None

    @property
    def resident(self) -> float:
        """Its memory in MiB."""
        return int(Path(f"/proc/{self._process.pid}/statm").read_text().split()[1]) * _PAGE_BYTES / 2**20

    @property
    def processor_seconds(self) -> float:
        """Seconds of a processor that it has used, all its threads together."""
        fields = Path(f"/proc/{self._process.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    async def ready(self, *, warm: bool = False) -> float:
        """Waits until it answers, or until every program is compiled; seconds since its start."""
        while (found := _LISTENS.search(self.log)) is None:
            await self._pause()
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=64)
        self._http = httpx.AsyncClient(base_url=found[1], timeout=_PATIENCE, limits=limits)
        while not await self._answers():
            await self._pause()
        seconds = time.monotonic() - self._started
        while warm and "Every program is compiled" not in self.log:
            await self._pause()
        return seconds

    async def _answers(self) -> bool:
        try:
            return (await self.http.get("/ready")).status_code == 200
        except httpx.TransportError:
            return False

    async def _pause(self) -> None:
        if not self.alive:
            raise RuntimeError(f"the server ended with code {self._process.returncode}:\n{self.log[-4000:]}")
        if time.monotonic() - self._started > _PATIENCE:
            raise TimeoutError(f"the server is not ready after {_PATIENCE:.0f} s:\n{self.log[-4000:]}")
        await asyncio.sleep(0.02)

    def kill(self) -> None:
        """Ends it as `kill -9` does."""
        if self.alive:
            self._process.kill()
        self._process.wait()

    async def stop(self, number: int, limit: float) -> float | None:
        """Ends it with a signal, and after `limit` seconds as a supervisor would; seconds, None if it had to be killed."""
        started = time.monotonic()
        self._process.send_signal(number)
        while self.alive:
            if time.monotonic() - started > limit:
                self.kill()
                return None
            await asyncio.sleep(0.01)
        return time.monotonic() - started

    async def hang_up(self) -> None:
        """Closes the client."""
        if self._http is not None:
            await self._http.aclose()

    # --- requests ----------------------------------------------------------------------------------------------------
    async def post(self, path: str, body: dict[str, Any], **options: Any) -> dict[str, Any]:
        """The answer to a request; raises Refused, or httpx.TransportError where the connection broke."""
        response = await self.http.post(path, json=body, **options)
        if response.status_code != 200:
            raise Refused(response.status_code, response.text)
        answer: dict[str, Any] = response.json()
        return answer

    async def sessions(self) -> dict[str, dict[str, Any]]:
        """All sessions by name, read page by page."""
        out: dict[str, dict[str, Any]] = {}
        after: str | None = None
        while True:
            page = await self.post("/v1/atlas/memory/list", {"limit": 1000, "after": after})
            out |= {row["context_id"]: row for row in page["contexts"]}
            after = page["next"]
            if after is None:
                return out


class Refused(Exception):
    """The server answered with an error."""

    def __init__(self, status: int, text: str) -> None:
        super().__init__(f"HTTP {status}: {text[:500]}")
        self.status = status


SIGNALS = (signal.SIGTERM, signal.SIGTERM, signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
"""What a stop sends, in turns."""
