"""The server as a process of its own, with the real engine in it."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import httpx
import openai

from tests.patience import PATIENCE

ROOT = Path(__file__).parents[2]
STOP_SECONDS = 10.0
"""What supervisors give a process between SIGTERM and SIGKILL."""
_LISTENS = re.compile(r"Listening on (http://127\.0\.0\.1:\d+)")
_TROUBLE = re.compile(r"^\S+ \S+ (WARNING|ERROR|CRITICAL) .*|^Traceback.*", re.MULTILINE)


class RealServer:
    """`python -m server serve` with a model, on a free port.

    Attributes:
      memory: folder of the stored sessions.
    """

    def __init__(self, model: Path, *flags: str, cache: Path, folder: Path, wait: bool = True) -> None:
        self.memory = folder / "memory"
        self._log = folder / f"{time.monotonic_ns()}.log"
        self.name = model.name.removesuffix(".gguf")
        environ = {name: value for name, value in os.environ.items() if not name.startswith("ATLAS_")}
        command = [sys.executable, "-m", "server", "serve", "--model", str(model), "--port", "0"]
        command += ["--atlas-memory-path", str(self.memory), "--queue-timeout", str(PATIENCE), *flags]
        with self._log.open("w") as log:
            self.process = subprocess.Popen(
                command, stdout=log, stderr=log, cwd=ROOT, env={**environ, "XDG_CACHE_HOME": str(cache)}
            )
        try:
            self._wait(lambda: _LISTENS.search(self.log))
            match = _LISTENS.search(self.log)
            assert match is not None
            self.http = httpx.Client(base_url=match[1], timeout=PATIENCE)
            self.openai = openai.OpenAI(base_url=f"{match[1]}/v1", api_key="unused", max_retries=0, timeout=PATIENCE)
            if wait:
                self._wait(lambda: self.http.get("/ready").status_code == 200)
        except BaseException:
            self.process.kill()
            raise

    @property
    def log(self) -> str:
        """What the process has written."""
        return self._log.read_text()

    @property
    def trouble(self) -> list[str]:
        """Log lines that tell of something wrong."""
        found = [match[0] for match in _TROUBLE.finditer(self.log)]
        return [line for line in found if "still being compiled" not in line]  # the machine is busy

    def wait_warm(self) -> None:
        """Waits until every program is compiled."""
        self._wait(lambda: "Every program is compiled" in self.log)

    def _wait(self, condition: Any) -> None:
        end = time.monotonic() + PATIENCE
        while not condition():
            assert self.process.poll() is None, self.log
            assert time.monotonic() < end, self.log
            time.sleep(0.05)

    def post(self, path: str, body: Any = None) -> httpx.Response:
        return self.http.post(path, json={} if body is None else body)

    def chat(self, *turns: str, session: str | None = None, **options: Any) -> Any:
        """A greedy answer of fixed length to a conversation whose turns alternate, the user's first."""
        atlas = {} if session is None else {"atlas": remember(session)}
        return self.openai.chat.completions.create(
            model=self.name,
            messages=conversation(*turns),
            extra_body={"ignore_eos": True, **atlas},
            **{"max_tokens": 12, "temperature": 0, **options},
        )

    def contexts(self) -> dict[str, Any]:
        """The sessions by name."""
        return {row["context_id"]: row for row in self.post("/v1/atlas/memory/list").json()["contexts"]}

    def end(self, number: int = signal.SIGTERM) -> tuple[int, float]:
        """Sends a signal; the exit code and how many seconds the end took."""
        started = time.monotonic()
        self.process.send_signal(number)
        return self.process.wait(3 * STOP_SECONDS), time.monotonic() - started

    def kill(self) -> None:
        """Makes sure that nothing is left."""
        self.http.close()
        self.openai.close()
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()


def conversation(*turns: str) -> Any:
    """Messages of turns that alternate, the user's first."""
    return [{"role": ("user", "assistant")[i % 2], "content": turn} for i, turn in enumerate(turns)]


def remember(session: str) -> dict[str, Any]:
    """A memory behind a window of one page, so that little text overflows it."""
    sizes = {"window_size": 128, "update_frequency": 128, "omega_window": 128}
    return {"session_id": session, **sizes}


def text(subject: str, words: int) -> str:
    """Words that depend on the subject, about three tokens each."""
    return " ".join(f"{subject}{number * 7 % 31}" for number in range(words))


def content(answer: Any) -> str:
    """The text of the first choice of a chat."""
    out: str = answer.choices[0].message.content
    return out
