"""The sizes people serve: models of 1B and 8B in Q4_K_M with random weights, beside llama.cpp on the same file.

    python -m benchmarks.sizes --tokenizer MODEL.gguf [--peer-python PYTHON] [--sizes 1B 8B] [--rounds 3]
        [--folder data/sizes] [--keep] [--output docs/benchmarks/sizes.md]

Of every size: prompts, one stream without and with drafts, and 16 streams, in turns with llama.cpp (as `benchmarks.speed`,
medians; drafts of random weights are all wrong, so their column is what guessing costs at most); then servers in processes of
their own: seconds until the first one is ready, with nothing compiled yet, and the second one, its peak memory until then
and what it has afterwards, and the tokens per second of one stream in the first two minutes of the first server, while the
rest is being compiled, and when all is. The models are written into the folder, and deleted afterwards.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections import defaultdict
from functools import partial
from pathlib import Path
from unittest import mock

from atlas_jax.engine import Engine
from atlas_jax.engine.scheduler.speculation import StepWidths
from benchmarks.server_process import Server
from benchmarks.sized_models import SIZES, write_sized_model
from benchmarks.speed import TITLES, ours, peer

TESTS = ("prompt:512", "decode:1x256", "decode:16x256")
_FIRST_MINUTES = 120.0
_TOKENS = 128


def speeds(model: Path, python: str | None, rounds: int) -> dict[tuple[str, str], list[float]]:
    """Tokens per second by test and column, of every round but the first."""
    engine = Engine.open(model_path=model, memory_enabled=False, max_concurrent=16, max_context=2048)
    engine.warm_up()
    found: dict[tuple[str, str], list[float]] = defaultdict(list)
    for number in range(rounds + 1):
        for test in TESTS:
            columns = {"plain": partial(undrafted, engine, test, number)}
            if test.startswith("decode:1x"):
                columns["drafts"] = partial(ours, engine, test, number)
            if python:
                columns["peer"] = partial(peer, python, model, test)
            # every column comes first in turn: what ran just before can matter
            names = list(columns)[number % len(columns) :] + list(columns)[: number % len(columns)]
            results = {name: columns[name]() for name in names}
            if number:  # the first round warms up
                for name, value in results.items():
                    found[test, name].append(value)
            print(json.dumps({"model": model.stem, "round": number, "test": test, **results}), flush=True)
    engine.close(timeout=10)
    return found


def undrafted(engine: Engine, test: str, seed: int) -> float:
    """`ours` of steps without drafts."""
    with mock.patch.object(StepWidths, "choose", lambda _, shape, widths, rates: widths[0]):
        return ours(engine, test, seed)


def starts(model: Path) -> dict[str, float]:
    """Figures of a first and of a second server."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        flags = ("--no-atlas", "--cache-path", str(folder / "cache"), "--max-concurrent", "16")
        first = Server(model, folder, flags)
        found = {"first": first.seconds, "early": _stream(first, _FIRST_MINUTES)}
        first.wait_for("(Every program is compiled)")
        found["late"] = _stream(first, _FIRST_MINUTES / 4)
        first.end()
        second = Server(model, folder, flags)
        found["second"], found["peak"] = second.seconds, _peak(second)
        second.wait_for("(Every program is compiled)")
        found["resting"] = second.resident
        second.end()
    return found


def _stream(server: Server, seconds: float) -> float:
    """Tokens per second of one stream, answer after answer."""
    body = {"prompt": "The cat sat on the mat.", "max_tokens": _TOKENS, "ignore_eos": True, "temperature": 0}
    tokens, started = 0, time.monotonic()
    while time.monotonic() - started < seconds:
        server.http.post("/v1/completions", json=body).raise_for_status()
        tokens += _TOKENS
    return tokens / (time.monotonic() - started)


def _peak(server: Server) -> float:
    """The most memory that it has had, in MiB."""
    lines = Path(f"/proc/{server.process.pid}/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("VmHWM")).split()[1]) / 1024


def markdown(size: str, found: dict[tuple[str, str], list[float]], figures: dict[str, float], mib: float) -> str:
    """The tables of a size."""
    columns = [column for column in TITLES if any(name == column for _, name in found)]
    lines = [f"## {size}", "", "| tokens per second | " + " | ".join(TITLES[one] for one in columns) + " |"]
    lines.append("|---" * (len(columns) + 1) + "|")
    for test in TESTS:
        cells = []
        for column in columns:
            values, other = found.get((test, column)), found.get((test, "peer"))
            if not values:
                cells.append("")
                continue
            middle = statistics.median(values)
            ratio = f" [{middle / statistics.median(other):.2f}]" if other and column != "peer" else ""
            cells.append(f"{middle:.1f} ({min(values):.1f}–{max(values):.1f}){ratio}")
        lines.append(f"| `{test}` | " + " | ".join(cells) + " |")
    early = f"{figures['early']:.1f} tokens per second while programs are compiled, {figures['late']:.1f} afterwards"
    lines += [
        "",
        f"- until ready: {figures['first']:.1f} s the first time, {figures['second']:.1f} s the second",
        f"- memory of a file of {mib:.0f} MiB: {figures['peak']:.0f} MiB at most until ready, {figures['resting']:.0f} later",
        f"- one stream: {early}",
        "",
    ]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokenizer", type=Path, required=True)
    parser.add_argument("--peer-python")
    parser.add_argument("--sizes", nargs="+", choices=list(SIZES), default=list(SIZES))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--folder", type=Path, default=Path("data/sizes"))
    parser.add_argument("--keep", action="store_true", help="leave the models in the folder")
    parser.add_argument("--output", type=Path, help="tables as Markdown")
    args = parser.parse_args()
    args.folder.mkdir(parents=True, exist_ok=True)
    parts = [f"Random weights in Q4_K_M, medians (least–most) of {args.rounds} [ratio to llama.cpp]", ""]
    for size in args.sizes:
        model: Path = args.folder / f"random-{size}-q4_k_m.gguf"
        if not model.exists():
            write_sized_model(model, SIZES[size], args.tokenizer)
        found, figures = speeds(model, args.peer_python, args.rounds), starts(model)
        parts.append(markdown(size, found, figures, model.stat().st_size / 2**20))
        print(parts[-1], flush=True)
        if not args.keep:
            model.unlink()
    if args.output:
        args.output.write_text("\n".join(parts))


if __name__ == "__main__":
    main()
