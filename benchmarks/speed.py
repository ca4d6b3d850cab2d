"""Our engine and llama.cpp in turns on the same file: prefill, and greedy decoding with several streams.

    python -m benchmarks.speed MODEL.gguf [--peer-python PYTHON] [--tests prompt:512 decode:16x256 chat ...] [--rounds 5]
        [--output docs/benchmarks/speed.md]

Tests are `prompt:TOKENS`, `decode:STREAMSxCONTEXT` (prose, a place of its own for every stream), and three of a single
stream that show what drafts bring: `chat` (ordinary questions), `prose` (text to be continued) and `repetitive` (a text to
be copied with changes). Columns: without drafts, with drafts, llama.cpp. What a memory costs, `memory_cost.py` measures.

Every round runs each test once on each engine, just after once unmeasured, so that whatever else the machine does falls on
all. The table has medians, the spread (least and most), and the ratio of the medians. Ours is measured through the whole
engine: submit to last token, the prompts' time apart. The peer runs in its own process (`benchmarks/peer/speed.py`), with
the Python given, which needs llama-cpp-python; without one, only ours is measured. Beside the table a plot of the ratios is
written.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
from collections import defaultdict
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from atlas_jax.engine import Engine
from atlas_jax.engine.api import Finished
from atlas_jax.engine.offline import ask
from atlas_jax.engine.speed import greedy, prose

TESTS = (
    *("prompt:512", "prompt:4096", "decode:1x256", "decode:4x256", "decode:16x256", "decode:32x256", "decode:1x8000"),
    *("chat", "prose", "repetitive"),
)
STORY = (
    "The cat sat on the mat. The cat saw a mouse near the door. The cat ran after the mouse and the mouse ran away from the "
    "cat. Then the cat came back to the mat and sat on the mat again."
)
QUESTIONS = (
    "Name ten rivers of Europe and say one sentence about each.",
    "Write a short story about a lighthouse keeper who finds a letter.",
    "Write a Python class for a bank account with deposit, withdraw and transfer methods, with docstrings.",
    "Explain how vaccines work to a ten year old.",
    "What should I consider when I buy a used bicycle?",
)
COPIES = (f"Repeat this text with 'dog' instead of 'cat': {STORY}",)
_STEPS = 64
_ANSWER = 160
COLUMNS = ("plain", "drafts", "peer")
TITLES = {"plain": "atlas-jax", "drafts": "with drafts", "peer": "llama.cpp"}


def prompts(engine: Engine, test: str, seed: int) -> list[list[int]]:
    """The prompts of one test."""
    kind, _, size = test.partition(":")
    if kind in ("chat", "repetitive"):
        asked = QUESTIONS if kind == "chat" else COPIES
        return [engine.render_chat([{"role": "user", "content": text}]) for text in asked]
    if kind == "prose":
        size = f"{len(QUESTIONS)}x256"
    streams, length = (int(n) for n in size.split("x")) if "x" in size else (1, int(size))
    return list(prose(engine, streams, length, seed))


def ours(engine: Engine, test: str, seed: int) -> float:
    """Tokens per second of one test."""
    kind = test.partition(":")[0]
    asked = prompts(engine, test, seed)
    steps = 1 if kind == "prompt" else _STEPS if kind == "decode" else _ANSWER
    together = [[greedy(prompt, steps) for prompt in asked]]
    if kind not in ("prompt", "decode"):
        together = [[one] for one in together[0]]  # one after the other: a single stream
    # the peer's process warms up like this too
    ask(engine, together[0])
    ends = [[events[-1] for events in ask(engine, requests)] for requests in together]
    done = [[end for end in group if isinstance(end, Finished)] for group in ends]
    if kind == "prompt":
        return len(asked[0]) / done[0][0].prompt_seconds
    # the last stream to start decodes while all the others do: its rate is that of the full batch
    seconds = [min(end.decode_seconds for end in group) for group in done]
    return sum(len(group) * (steps - 1) for group in done) / sum(seconds)


def peer(python: str, model: Path, test: str) -> float:
    """Tokens per second of llama.cpp; says so if it did not get its cores. What it writes does not change its speed."""
    script = Path(__file__).parent / "peer" / "speed.py"
    same = test if ":" in test else "decode:1x256"
    command = [python, str(script), str(model), "--tests", same, "--repeats", "1", "--steps", str(_STEPS)]
    result = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1])
    if result["cores"] < 1.9:
        print(f"{test}: the peer had {result['cores']} cores; something else ran")
    return float(result["tokens_per_second"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--peer-python")
    parser.add_argument("--tests", nargs="+", default=list(TESTS))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--output", type=Path, help="table as Markdown; the plot goes beside it")
    args = parser.parse_args()

    def opened(*, speculate: bool) -> Engine:
        return Engine.open(
            model_path=args.model, memory_enabled=False, max_concurrent=32, max_context=8192, speculate=speculate
        )

    engines = {"plain": opened(speculate=False), "drafts": opened(speculate=True)}
    for engine in engines.values():
        engine.warm_up()
    found: dict[tuple[str, str], list[float]] = defaultdict(list)
    for number in range(args.rounds + 1):
        for test in args.tests:
            columns: dict[str, Callable[[], float]] = {"plain": partial(ours, engines["plain"], test, number)}
            if ":" not in test or test.startswith("decode:1x"):
                columns["drafts"] = partial(ours, engines["drafts"], test, number)
            if args.peer_python:
                columns["peer"] = partial(peer, args.peer_python, args.model, test)
            # every column comes first in turn: what ran just before can matter
            names = list(columns)[number % len(columns) :] + list(columns)[: number % len(columns)]
            results = {name: columns[name]() for name in names}
            if number:  # the first round warms up
                for name, value in results.items():
                    found[test, name].append(value)
            print(json.dumps({"round": number, "test": test, **results}), flush=True)
    for engine in engines.values():
        engine.close(timeout=10)
    table = markdown(args.tests, found)
    print(table)
    if args.output:
        title = f"{args.model.stem}, tokens per second: median (least–most) of {args.rounds} [ratio to llama.cpp]"
        args.output.write_text(f"{title}\n\n{table}\n")
        plot(args.tests, found, args.output.with_suffix(".png"), args.model.stem)


def _ratio(found: dict[tuple[str, str], list[float]], test: str, name: str) -> float | None:
    mine, theirs = found[test, name], found[test, "peer"]
    return statistics.median(mine) / statistics.median(theirs) if mine and theirs else None


def markdown(tests: Sequence[str], found: dict[tuple[str, str], list[float]]) -> str:
    """A row per test, a column per engine."""
    lines = ["| test | " + " | ".join(TITLES[name] for name in COLUMNS) + " |", "|---|" + "---|" * len(COLUMNS)]
    for test in tests:
        cells = []
        for name in COLUMNS:
            values = found[test, name]
            cell = f"{statistics.median(values):.0f} ({min(values):.0f}–{max(values):.0f})" if values else "–"
            ratio = _ratio(found, test, name)
            cells.append(cell if ratio is None or name == "peer" else f"{cell} [{ratio:.2f}]")
        lines.append(f"| {test} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def plot(tests: Sequence[str], found: dict[tuple[str, str], list[float]], path: Path, title: str) -> None:
    """Bars of the ratios to llama.cpp, if there are any."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(9, 4))
    for offset, name in enumerate(COLUMNS[:-1]):
        ratios = [(index, _ratio(found, test, name)) for index, test in enumerate(tests)]
        shown = [(index, ratio) for index, ratio in ratios if ratio is not None]
        axes.bar([i + 0.4 * (offset - 0.5) for i, _ in shown], [r for _, r in shown], 0.38, label=TITLES[name])
    axes.axhline(1.0, color="black", linewidth=0.8)
    axes.set_xticks(range(len(tests)), tests, rotation=30, ha="right")
    axes.set_ylabel("speed / llama.cpp's")
    axes.set_title(title)
    axes.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    main()
