"""The server as a process of its own, for measurements through HTTP."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import httpx

_PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")


class Server:
    """A server of `model` on a free port, with its sessions and its log in `folder`.

    Attributes:
      url: where it listens.
      http: a client of it.
      seconds: from its start until it was ready.
    """

    def __init__(self, model: Path, folder: Path, flags: Sequence[str] = ()) -> None:
        started = time.monotonic()
        command = [sys.executable, "-m", "server", "serve", "--model", str(model), "--port", "0"]
        command += ["--atlas-memory-path", str(folder / "memory"), *flags]
        self._log = folder / "server.log"
        with self._log.open("w") as file:
            self._process = subprocess.Popen(command, stdout=file, stderr=file)
        self.url = self.wait_for(r"running on (http://\S+)")
        self.http = httpx.Client(base_url=self.url, timeout=600)
        while self.http.get("/ready").status_code != 200:
            self._check()
        self.seconds = time.monotonic() - started

    @property
    def log(self) -> str:
        """What it has written."""
        return self._log.read_text()

    @property
    def resident(self) -> float:
        """Its memory in MiB."""
        return int(Path(f"/proc/{self._process.pid}/statm").read_text().split()[1]) * _PAGE_BYTES / 2**20

    def wait_for(self, pattern: str) -> str:
        """Waits until the log has a line that the pattern finds; its first group."""
        while (found := re.search(pattern, self.log)) is None:
            self._check()
        return found[1]

    def end(self) -> float:
        """Stops it as a supervisor would; seconds."""
        started = time.monotonic()
        self._process.send_signal(signal.SIGTERM)
        code = self._process.wait(60)
        assert code in (0, -signal.SIGTERM), f"exit code {code}: {self.log}"
        return time.monotonic() - started

    def _check(self) -> None:
        assert self._process.poll() is None, self.log
        time.sleep(0.05)
