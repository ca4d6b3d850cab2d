"""Our engine and llama.cpp in turns on the same file: reading a prompt, and greedy decoding with several streams.

    python benchmarks/speed.py MODEL.gguf [--peer-python PYTHON] [--tests prompt:512 decode:16x256 ...] [--rounds 5]
        [--output docs/speed.md]

Every round runs each test once on each engine, ours first in odd rounds, so that whatever else the machine does falls on
both. The table has medians, the spread (least and most), and the ratio of the medians. Ours is measured through the whole
engine: submit to last token, the prompts' time apart. The peer runs in its own process (`benchmarks/peer/speed.py`), with
the Python given, which needs llama-cpp-python; without one, only ours is measured.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import subprocess
from collections import defaultdict
from pathlib import Path

from atlas_jax.engine import Engine
from atlas_jax.engine.api import Finished, GenerationRequest, MemoryParams, SamplingParams
from atlas_jax.experiments.asking import ask

TESTS = ("prompt:512", "decode:1x256", "decode:4x256", "decode:16x256", "decode:32x256")
_STEPS = 64


def ours(engine: Engine, test: str, memory: MemoryParams | None, seed: int) -> float:
    """Tokens per second of one test."""
    kind, _, size = test.partition(":")
    streams, context = (int(n) for n in size.split("x")) if kind == "decode" else (1, int(size))
    rng = random.Random(seed)
    steps = _STEPS if kind == "decode" else 1
    requests = [
        GenerationRequest(
            prompt=rng.choices(range(256, engine.model.vocab_size), k=context),
            max_tokens=steps,
            sampling=SamplingParams(temperature=0.0),
            ignore_eos=True,
            memory=memory,
        )
        for _ in range(streams)
    ]
    ends = [events[-1] for events in ask(engine, requests)]
    assert all(isinstance(end, Finished) for end in ends)
    if kind == "prompt":
        return context / ends[0].prompt_seconds  # type: ignore[union-attr]
    # the last stream to start decodes while all the others do: its rate is that of the full batch
    last = min(ends, key=lambda end: end.decode_seconds)  # type: ignore[union-attr]
    return streams * (steps - 1) / last.decode_seconds  # type: ignore[union-attr]


def peer(python: str, model: Path, test: str) -> tuple[float, float]:
    """Tokens per second of llama.cpp, and how many cores it got."""
    script = Path(__file__).parent / "peer" / "speed.py"
    command = [python, str(script), str(model), "--tests", test, "--repeats", "1", "--steps", str(_STEPS)]
    result = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1])
    return float(result["tokens_per_second"]), float(result["cores"])


def _cell(values: list[float]) -> str:
    if not values:
        return "–"
    return f"{statistics.median(values):.0f} ({min(values):.0f}–{max(values):.0f})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--peer-python")
    parser.add_argument("--tests", nargs="+", default=list(TESTS))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--memory", action="store_true", help="measure a third column: with memory, window 512")
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    engine = Engine.open(model_path=args.model, memory_enabled=args.memory, max_running=32, max_context=2048)
    engine.warm_up()
    found: dict[tuple[str, str], list[float]] = defaultdict(list)
    for number in range(args.rounds + 1):
        for test in args.tests:
            results = {"ours": ours(engine, test, None, number)}
            if args.memory:
                results["memory"] = ours(engine, test, MemoryParams(window_size=512), number)
            if args.peer_python:
                results["peer"], cores = peer(args.peer_python, args.model, test)
                if cores < 1.9:
                    print(f"{test}: the peer had {cores} cores; something else ran")
            if number:  # the first round warms up
                for name, value in results.items():
                    found[test, name].append(value)
            print(json.dumps({"round": number, "test": test, **results}), flush=True)
    lines = ["| test | atlas-jax | with memory | llama.cpp | ratio |", "|---|---|---|---|---|"]
    for test in args.tests:
        mine, theirs = found[test, "ours"], found[test, "peer"]
        ratio = f"{statistics.median(mine) / statistics.median(theirs):.2f}" if theirs else "–"
        lines.append(f"| {test} | {_cell(mine)} | {_cell(found[test, 'memory'])} | {_cell(theirs)} | {ratio} |")
    table = "\n".join(lines)
    print(table)
    if args.output:
        args.output.write_text(
            f"{args.model.stem}, tokens per second, median (least–most) of {args.rounds}\n\n{table}\n"
        )
    engine.close(timeout=10)


if __name__ == "__main__":
    main()
