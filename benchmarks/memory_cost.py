"""What the memory costs: speed with it beside the same window without it, in turns, in one engine.

    python -m benchmarks.memory_cost MODEL.gguf [--tests prompt:4096 decode:16x1024 ...] [--rounds 5]
        [--output docs/benchmarks/memory_cost.md]

Tests are those of `speed.py`; texts are longer than the window of 512 tokens, so the memory has been written and is read.
"Without" is the same request with `read` and `write` off. The table has medians, least and most, and what the memory takes
of the speed. Drafts are off, as for the plain columns of `speed.py`.
"""

from __future__ import annotations

import argparse
import statistics
from collections import defaultdict
from pathlib import Path

import speed

from atlas_jax.engine import Engine
from atlas_jax.engine.api import Finished, MemoryParams
from atlas_jax.engine.offline import ask
from atlas_jax.engine.speed import greedy

TESTS = ("prompt:1024", "prompt:4096", "decode:1x1024", "decode:4x1024", "decode:16x1024", "decode:32x1024")
WINDOW = 512
_STEPS = 64
COLUMNS = {
    "without": MemoryParams(window_size=WINDOW, read=False, write=False),
    "with": MemoryParams(window_size=WINDOW),
}


def measure(engine: Engine, test: str, column: str, seed: int) -> float:
    """Tokens per second of one test."""
    asked = speed.prompts(engine, test, seed)
    reading = test.startswith("prompt:")
    steps = 1 if reading else _STEPS
    events = ask(engine, [greedy(prompt, steps, COLUMNS[column]) for prompt in asked])
    ends = [one[-1] for one in events]
    done = [end for end in ends if isinstance(end, Finished)]
    if any((end.memory is None or not end.memory.tokens_absorbed) for end in done) and column == "with":
        raise SystemExit(f"{test}: the text fits the window, so there is nothing in the memory")
    if reading:
        return len(asked[0]) / done[0].prompt_seconds
    return len(done) * (steps - 1) / min(end.decode_seconds for end in done)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--tests", nargs="+", default=list(TESTS))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    engine = Engine.open(model_path=args.model, max_concurrent=32, max_context=8192, speculate=False)
    engine.warm_up()
    found: dict[tuple[str, str], list[float]] = defaultdict(list)
    for number in range(args.rounds + 1):
        for test in args.tests:
            for column in list(COLUMNS)[:: 1 if number % 2 else -1]:
                rate = measure(engine, test, column, number)
                if number:  # the first round warms up
                    found[test, column].append(rate)
                print(f"round {number}, {test}, {column}: {rate:.0f}", flush=True)
    engine.close(timeout=10)
    lines = [f"{args.model.stem}, window {WINDOW}, tokens per second: median (least–most) of {args.rounds}", ""]
    lines += ["| test | without memory | with memory | it takes |", "|---|---|---|---|"]
    for test in args.tests:
        without, with_it = (found[test, column] for column in COLUMNS)
        cells = [f"{statistics.median(v):.0f} ({min(v):.0f}–{max(v):.0f})" for v in (without, with_it)]
        cost = 1 - statistics.median(with_it) / statistics.median(without)
        lines.append(f"| {test} | {cells[0]} | {cells[1]} | {cost:.0%} |")
    table = "\n".join(lines) + "\n"
    print(table)
    if args.output:
        args.output.write_text(table)


if __name__ == "__main__":
    main()
