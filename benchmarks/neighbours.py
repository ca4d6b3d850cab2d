"""How a stream fares beside another client: time between its tokens, and time to the first text of a short question.

    python -m benchmarks.neighbours MODEL.gguf [--seconds 30] [--tokens 176000] [--output FILE] [server flags]

One server, measured through HTTP. A plain stream is read beside, in turns,

- one other plain stream,
- a prompt of `--tokens` tokens into a session: its arrival and the first `--seconds` of its reading,
- prompts of 16 000 tokens into sessions, read to their end and answered,
- plain prompts of 6 000 tokens, one after the other.

A gap is the time between two arrivals of text. The last column is the gap's 99th percentile over that beside one plain
stream. The second table has five-token answers to short questions, asked one after the other beside the same.
"""

from __future__ import annotations

import argparse
import multiprocessing
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import resources
from itertools import count, pairwise
from pathlib import Path
from typing import Any

import httpx

from benchmarks.server_process import Server

_ANSWER = 800
"""Tokens of a stream that is watched, which is begun again when it has ended: its steps are alike all along."""
_SESSION, _PLAIN = 16_000, 6_000
_CHARACTERS = 4.4
"""Of a token of this prose."""
_MOST = 3.0
"""What the gap's 99th percentile may become beside any single client, over that beside one plain stream."""


def prose(seed: int, tokens: int) -> str:
    """English words of about so many tokens, no two texts alike."""
    folder = resources.files("atlas_jax.recall") / "texts"
    words = [word for file in ("prose.txt", "technical.txt") for word in (folder / file).read_text("utf-8").split()]
    rng, text, length = random.Random(seed), [], 0
    while length < tokens * _CHARACTERS:
        start = rng.randrange(len(words))
        text += words[start : start + 40]
        length += sum(map(len, text[-40:])) + 40
    return " ".join(text)


def body(prompt: str, tokens: int, **more: Any) -> dict[str, Any]:
    """A greedy completion, streamed."""
    return {"prompt": prompt, "max_tokens": tokens, "temperature": 0, "ignore_eos": True, "stream": True, **more}


def arrivals(http: httpx.Client, asked: dict[str, Any]) -> Iterator[float]:
    """When each piece of an answer came."""
    with http.stream("POST", "/v1/completions", json=asked) as response:
        response.raise_for_status()
        for data in response.iter_raw():
            if b'"text":' in data:
                yield time.perf_counter()


# --- clients that keep on asking, each in a process of its own ------------------------------------------------------
def _others(url: str, kind: str, tokens: int) -> None:
    with httpx.Client(base_url=url, timeout=3600) as http:
        for number in count():
            if kind == "stream":
                asked = body("A long story about the sea.", _ANSWER)
            elif kind == "plain":
                asked = body(prose(number, tokens), 5)
            else:
                asked = body(prose(number, tokens), 5, atlas={"session_id": f"{kind}-{tokens}-{number}"})
            for _ in arrivals(http, asked):
                pass


@contextmanager
def beside(url: str, kind: str, tokens: int = 0) -> Iterator[None]:
    """Has another client ask one thing after the other meanwhile."""
    process = multiprocessing.get_context("spawn").Process(target=_others, args=(url, kind, tokens))
    process.start()
    try:
        yield
    finally:
        process.kill()
        process.join()


# --- what is measured -----------------------------------------------------------------------------------------------
def gaps(http: httpx.Client, seconds: float) -> list[float]:
    """Milliseconds between two arrivals of a stream's text, for so long."""
    found: list[float] = []
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        times = []
        for moment in arrivals(http, body("Once upon a time there was", _ANSWER)):
            times.append(moment)
            if time.monotonic() > end:
                break
        found += [1e3 * (after - before) for before, after in pairwise(times)]
    return found


def first_texts(http: httpx.Client, seconds: float) -> list[float]:
    """Milliseconds to the first text of five-token answers, for so long."""
    found: list[float] = []
    end = time.monotonic() + seconds
    for number in count():
        if time.monotonic() > end:
            return found
        started = time.perf_counter()
        times = list(arrivals(http, body(prose(10_000 + number, 20), 5)))
        found.append(1e3 * (times[0] - started))
    return found


def settle(http: httpx.Client) -> None:
    """Waits until nothing runs: what a client that left had asked for ends at the engine's next step."""
    while http.get("/metrics").text.partition("\natlas_num_requests_running ")[2][:1] != "0":
        time.sleep(0.1)


def row(name: str, values: list[float], base: float | None) -> str:
    """A line of a table."""
    share = statistics.quantiles(values, n=100)
    times = f"{statistics.median(values):.0f} | {share[98]:.0f} | {max(values):.0f}"
    return f"| {name} | {len(values)} | {times} | {'' if base is None else f'{share[98] / base:.1f}'} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--seconds", type=float, default=30)
    parser.add_argument("--tokens", type=int, default=176_000)
    parser.add_argument("--output", type=Path)
    args, flags = parser.parse_known_args()
    clients = {
        "one plain stream": ("stream", 0),
        f"a prompt of {args.tokens} tokens into a session": ("session", args.tokens),
        f"prompts of {_SESSION} tokens into sessions": ("session", _SESSION),
        f"plain prompts of {_PLAIN} tokens": ("plain", _PLAIN),
    }
    lines: list[str] = []
    slow: list[str] = []

    def table(what: str, measure: Callable[[httpx.Client, float], list[float]]) -> None:
        lines.extend(
            [f"| {what} | how many | median ms | p99 ms | most ms | p99, to one stream |", "|---|---|---|---|---|---|"]
        )
        base: float | None = None
        for name, (kind, tokens) in clients.items():
            settle(server.http)
            with beside(server.url, kind, tokens):
                values = measure(server.http, args.seconds)
            share = statistics.quantiles(values, n=100)[98]
            base = base or share
            lines.append(row(name, values, base))
            print(lines[-1], flush=True)
            if measure is gaps and share > _MOST * base:
                slow.append(f"beside {name} the 99th percentile is {share / base:.1f} times that beside one stream")

    with tempfile.TemporaryDirectory() as folder:
        server = Server(args.model, Path(folder), ["--no-atlas-auto-save-memory", *flags])
        server.wait_for(r"(Every program is compiled)")
        table("gaps of a stream beside", gaps)
        lines.append("")
        table("first text beside", first_texts)
        settle(server.http)
        server.end()
    text = "\n".join(
        ["# Neighbours", "", f"`python -m benchmarks.neighbours {' '.join(sys.argv[1:])}`", "", *lines, "", *slow]
    )
    print(text)
    if args.output:
        args.output.write_text(text.rstrip() + "\n", "utf-8")
    raise SystemExit(1 if slow else 0)


if __name__ == "__main__":
    main()
