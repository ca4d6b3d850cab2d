"""Times the first and the second start of a bare clone, from `make serve` to the first answer, as a newcomer waits for them.

    python -m tools.first_start [--rounds 3] [--port 8099] [--seconds 90 9]

Each round clones the repository anew and starts with nothing: no virtual environment, no model, and empty folders in the
place of the home, of every cache and of pip's. The second start finds what the first has left. A question is asked in chat
from the beginning, until it is answered. Other work on the machine makes all of it slower, so its load is told beside.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Mapping
from pathlib import Path

from tools.bare_clone import Failed, clone, environment, fail, note, shell

_PATIENCE = 900.0
_BODY = {"messages": [{"role": "user", "content": "Name three rivers."}], "max_tokens": 16}


def start(folder: Path, environ: Mapping[str, str], port: int) -> float:
    """Seconds from `make serve` to the first answer.

    Raises:
      Failed: it ended before, or there is none.
    """
    began = time.monotonic()
    server = shell(f'make serve ARGS="--port {port}"', folder, environ)
    try:
        while not _answered(f"http://127.0.0.1:{port}/v1/chat/completions"):
            if server.ended or time.monotonic() - began > _PATIENCE:
                server.wait(5)  # says what it has printed
                raise Failed("make serve ended before it answered")
            time.sleep(0.05)
        took = time.monotonic() - began
        server.stop()
    finally:
        server.kill()
    return took


def _answered(url: str) -> bool:
    request = urllib.request.Request(url, json.dumps(_BODY).encode(), {"Content-Type": "application/json"})
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(request, timeout=_PATIENCE) as answer:
            return bool(json.load(answer)["choices"][0]["message"]["content"])
    except (urllib.error.URLError, ConnectionError):  # nobody listens yet, or the model is still being loaded
        return False


def one_round(port: int) -> tuple[float, float]:
    """Seconds of a first and of a second start."""
    with tempfile.TemporaryDirectory(prefix="first-start-") as work:
        home = Path(work) / "home"
        home.mkdir()
        folder = clone(Path(work) / "atlas-jax")
        environ = environment(HOME=str(home), XDG_CACHE_HOME=str(home / ".cache"), PIP_NO_CACHE_DIR="1")
        return start(folder, environ, port), start(folder, environ, port)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3, help="clones to start")
    parser.add_argument("--port", type=int, default=8099, help="where the servers listen")
    parser.add_argument(
        "--seconds", type=float, nargs=2, default=(90.0, 9.0), help="most a first and a second start may take"
    )
    args = parser.parse_args()
    try:
        rounds = []
        for number in range(1, args.rounds + 1):
            load = os.getloadavg()[0]
            rounds.append(one_round(args.port))
            first, second = rounds[-1]
            note(f"round {number}: first {first:.1f} s, second {second:.1f} s (load before it {load:.1f})")
        for name, times, most in zip(("first", "second"), zip(*rounds, strict=True), args.seconds, strict=True):
            median = statistics.median(times)
            note(
                f"{name} start: median {median:.1f} s, {min(times):.1f} to {max(times):.1f}; at most {most:.0f} s wanted"
            )
            if median > most:
                raise Failed(f"the {name} start took longer than {most:.0f} s")
    except Failed as error:
        fail(error)


if __name__ == "__main__":
    main()
