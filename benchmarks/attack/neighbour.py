"""What another client feels meanwhile: the pauses between its tokens, and how soon `/health` answers.

A process of its own, so that what the attacking clients compute does not count:

    python -m benchmarks.attack.neighbour URL MODEL KEY

It writes one line an event to standard output, with times of the monotonic clock, which all processes share: `gap` with
the times of two events of a stream that followed each other, `first` with the times of a request and of its first
event, `health` with the times of a request and its answer, `error` with a time and what was wrong.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import httpx

Interval = tuple[float, float]
_TOKENS = 800
_HEALTH_SECONDS = 0.05
_PATIENCE = 60.0
ROOT = Path(__file__).parents[2]


def percentile(values: Sequence[float], share: float) -> float:
    """The value that this share of all is not above; 0 of nothing."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))] if ordered else 0.0


@dataclass
class Pace:
    """What a neighbour felt within some spans of time, in seconds."""

    gaps: list[float] = field(default_factory=list)
    firsts: list[float] = field(default_factory=list)
    health: list[float] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)

    @property
    def p99(self) -> float:
        """The 99th percentile of the pauses between two events of a stream."""
        return percentile(self.gaps, 0.99)


class Neighbour:
    """The process of a neighbour, as the runner sees it."""

    def __init__(self, url: str, model: str, key: str) -> None:
        self._output = tempfile.NamedTemporaryFile("r", prefix="neighbour-")  # noqa: SIM115 (closed by `close`)
        with open(self._output.name, "w") as file:
            command = [sys.executable, "-m", "benchmarks.attack.neighbour", url, model, key]
            self._process = subprocess.Popen(command, cwd=ROOT, stdout=file)

    def wait_until(self, moment: float, patience: float = _PATIENCE) -> bool:
        """Waits for an event of a stream after a moment; whether one came."""
        end = time.monotonic() + patience
        while time.monotonic() < end:
            if any(kind in ("gap", "first") and after > moment for kind, _, after in self._events()):
                return True
            time.sleep(0.1)
        return False

    def felt(self, spans: Sequence[Interval]) -> Pace:
        """What fell into some spans, also in part."""
        pace = Pace()
        kinds = {"gap": pace.gaps, "first": pace.firsts, "health": pace.health}
        for kind, before, after in self._events():
            if any(before < end and after > start for start, end in spans):
                if kind in kinds:
                    kinds[kind].append(after - before)
                else:
                    pace.errors.append(kind)
        return pace

    def _events(self) -> Iterator[tuple[str, float, float]]:
        for line in Path(self._output.name).read_text().splitlines():
            kind, _, rest = line.partition(" ")
            parts = rest.split(" ", 2)
            if kind == "error" and len(parts) == 3:
                yield parts[2], float(parts[0]), float(parts[1])
            elif len(parts) == 2 and parts[1]:
                yield kind, float(parts[0]), float(parts[1])

    def close(self) -> None:
        """Ends the process."""
        self._process.kill()
        self._process.wait()
        self._output.close()


@contextmanager
def beside(url: str, model: str, key: str) -> Iterator[Neighbour]:
    """A neighbour that is there within the block; it has had its first tokens."""
    neighbour = Neighbour(url, model, key)
    try:
        if not neighbour.wait_until(0.0):
            raise TimeoutError("the neighbour was not served before the attack")
        yield neighbour
    finally:
        neighbour.close()


def main() -> None:
    url, model, key = sys.argv[1:]
    lock = threading.Lock()

    def say(kind: str, before: float, after: float, text: str = "") -> None:
        with lock:
            sys.stdout.write(f"{kind} {before:.6f} {after:.6f}{' ' * bool(text)}{' '.join(text.split())}\n")
            sys.stdout.flush()

    def ask_health() -> None:
        with httpx.Client(base_url=url, timeout=_PATIENCE) as http:
            while True:
                sent = time.monotonic()
                try:
                    http.get("/health")
                    say("health", sent, time.monotonic())
                except httpx.HTTPError as error:
                    say("error", sent, time.monotonic(), f"/health: {type(error).__name__}")
                time.sleep(max(0.0, sent + _HEALTH_SECONDS - time.monotonic()))

    threading.Thread(target=ask_health, daemon=True).start()
    headers = {"Authorization": f"Bearer {key}"}
    with httpx.Client(base_url=url, timeout=_PATIENCE, headers=headers) as http:
        context = http.get("/props").json()["default_generation_settings"]["n_ctx"]
        body = {"model": model, "prompt": "Once upon a time", "max_tokens": min(_TOKENS, context // 2)}
        body |= {"stream": True, "ignore_eos": True, "temperature": 0}
        while True:
            before, kind = time.monotonic(), "first"
            try:
                with http.stream("POST", "/v1/completions", json=body) as response:
                    for line in response.iter_lines():
                        if response.status_code == 200 and line.startswith("data: {"):
                            now = time.monotonic()
                            say(kind, before, now)
                            before, kind = now, "gap"
                if response.status_code != 200:
                    say("error", before, time.monotonic(), f"status {response.status_code}")
                    time.sleep(0.2)
            except httpx.HTTPError as error:
                say("error", before, time.monotonic(), f"stream: {type(error).__name__}")
                time.sleep(0.2)


if __name__ == "__main__":
    main()
