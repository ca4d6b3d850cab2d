"""The server as a process of its own, for measurements through HTTP."""

from __future__ import annotations

import os
import re
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import httpx

_PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")
_LINE_SECONDS = 600.0
"""Within which a line that is waited for has to come: a log that says it in other words is no reason to wait for ever."""


class Server:
    """A server of `model` on a free port, with its sessions and its log in `folder`.

    Args:
      wait: whether to return only when the server is ready.
      environ: environment variables it has beside our own.
      open_files: how many files it may have open; None is our own limit.
      user: number of the user it runs as; None is ours.

    Attributes:
      url: where it listens.
      http: a client of it.
      process: the process.
      seconds: from its start until it was ready.
    """

    def __init__(
        self,
        model: Path,
        folder: Path,
        flags: Sequence[str] = (),
        *,
        wait: bool = True,
        environ: Mapping[str, str] | None = None,
        open_files: int | None = None,
        user: int | None = None,
    ) -> None:
        started = time.monotonic()
        command = [sys.executable, "-m", "server", "serve", "--model", str(model), "--port", "0"]
        command += ["--atlas-memory-path", str(folder / "memory"), *flags]
        self._log = folder / f"server-{time.monotonic_ns()}.log"
        with self._log.open("w") as file:
            self.process = subprocess.Popen(
                command, stdout=file, stderr=file, env={**os.environ, **(environ or {})}, user=user, group=user
            )
        if open_files is not None:
            resource.prlimit(self.process.pid, resource.RLIMIT_NOFILE, (open_files, open_files))
        try:
            self.url = self.wait_for(r"Listening on (http://[\w.:]+)")
            self.http = httpx.Client(base_url=self.url, timeout=600)
            while wait and not self._ready():
                self._check()
        except BaseException:
            self.kill()
            raise
        self.seconds = time.monotonic() - started

    @property
    def log(self) -> str:
        """What it has written."""
        return self._log.read_text()

    @property
    def alive(self) -> bool:
        """Whether the process is there."""
        return self.process.poll() is None

    @property
    def resident(self) -> float:
        """Its memory in MiB; 0 once it has ended."""
        try:
            pages = Path(f"/proc/{self.process.pid}/statm").read_text().split()[1]
        except (FileNotFoundError, ProcessLookupError):
            return 0.0
        return int(pages) * _PAGE_BYTES / 2**20

    def wait_for(self, pattern: str) -> str:
        """Waits until the log has a line that the pattern finds; its first group."""
        end = time.monotonic() + _LINE_SECONDS
        while (found := re.search(pattern, self.log)) is None:
            assert time.monotonic() < end, f"no line has {pattern!r}: {self.log}"
            self._check()
        return found[1]

    def end(self) -> float:
        """Stops it as a supervisor would; seconds."""
        started = time.monotonic()
        self.process.send_signal(signal.SIGTERM)
        code = self.process.wait(60)
        assert code in (0, -signal.SIGTERM), f"exit code {code}: {self.log}"
        return time.monotonic() - started

    def kill(self) -> None:
        """Ends it at once, if it still runs."""
        self.process.kill()
        self.process.wait()

    def _ready(self) -> bool:
        try:
            return self.http.get("/ready").status_code == 200
        except httpx.TransportError:  # it may have ended, and the log says why
            return False

    def _check(self) -> None:
        assert self.alive, self.log
        time.sleep(0.05)
