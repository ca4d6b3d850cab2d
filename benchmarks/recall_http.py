"""Facts asked for through the HTTP API after they left the window and the server was restarted.

    python benchmarks/recall_http.py MODEL.gguf --filler TEXT ... [--contexts 10] [--blend 1]

The contexts and questions of `atlas_jax.experiments.fact_recall`: a server reads every context into a session of its own,
is ended with SIGTERM, started again, and asked. Prints the same table, and how long the stop and the start took.
"""

from __future__ import annotations

import argparse
import re
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import httpx

from atlas_jax.experiments.fact_recall import DIGITS, QUESTIONS, Score, cases, table_head, table_row
from atlas_jax.gguf import GGUFFile, Tokenizer


class Server:
    """A server process on a free port, with its sessions in `folder`."""

    def __init__(self, model: Path, folder: Path) -> None:
        started = time.monotonic()
        command = [sys.executable, "-m", "server", "serve", "--model", str(model), "--port", "0"]
        command += ["--atlas-memory-path", str(folder / "memory")]
        self._log = log = folder / "server.log"
        with log.open("w") as file:
            self._process = subprocess.Popen(command, stdout=file, stderr=file)
        while (found := re.search(r"running on (http://\S+)", log.read_text())) is None:
            assert self._process.poll() is None, log.read_text()
            time.sleep(0.05)
        self.http = httpx.Client(base_url=found[1], timeout=600)
        while self.http.get("/ready").status_code != 200:
            assert self._process.poll() is None, log.read_text()
            time.sleep(0.05)
        self.seconds = time.monotonic() - started

    def complete(self, prompt: str, session: str, max_tokens: int, **atlas: object) -> str:
        """A greedy completion of a session."""
        body = {
            "prompt": prompt,
            "max_tokens": max_tokens,
            "temperature": 0,
            "ignore_eos": True,
            "atlas": {"session_id": session, **atlas},
        }
        answer = self.http.post("/v1/completions", json=body)
        assert answer.status_code == 200, answer.text
        text: str = answer.json()["choices"][0]["text"]
        return text

    def end(self) -> float:
        """Stops it as a supervisor would; seconds."""
        started = time.monotonic()
        self._process.send_signal(signal.SIGTERM)
        code = self._process.wait(60)
        assert code in (0, -signal.SIGTERM), f"exit code {code}: {self._log.read_text()}"
        return time.monotonic() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--filler", type=Path, nargs="+", required=True)
    parser.add_argument("--contexts", type=int, default=10, help="contexts of five facts each")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--blend", type=float, default=1.0)
    args = parser.parse_args()
    with GGUFFile.open(args.model) as file:
        tokenizer = Tokenizer.from_metadata(file.metadata)

    def count(text: str) -> int:
        return len(tokenizer.encode(text, add_special=False, parse_special=False))

    fillers = [path.read_text("utf-8") for path in args.filler]
    contexts = [cases(fillers[i % len(fillers)], 1, args.seed + i, count)[0] for i in range(args.contexts)]
    scores = {wording: Score() for wording in QUESTIONS}
    with tempfile.TemporaryDirectory() as name:
        server = Server(args.model, Path(name))
        for index, case in enumerate(contexts):
            server.complete(case.text, f"context-{index}", 1)
        stopped = server.end()
        server = Server(args.model, Path(name))
        for index, case in enumerate(contexts):
            for wording, template in QUESTIONS.items():
                for place, code in case.facts:
                    question = template.format(place=place)
                    answer = server.complete(
                        question, f"context-{index}", DIGITS + 5, write=False, blend_ratio=args.blend
                    )
                    scores[wording].add(code, answer)
        print(f"stopped in {stopped:.1f} s, started again in {server.seconds:.1f} s")
        server.end()
    print(table_head())
    print(table_row("memory, over HTTP, after a restart", scores))


if __name__ == "__main__":
    main()
