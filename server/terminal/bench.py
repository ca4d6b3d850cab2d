"""`atlas-jax bench`: how fast a model is on this machine, with its memory and without."""

from __future__ import annotations

import argparse
import contextlib
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from server.terminal.arguments import DONE, CommandError, Parser, UsageError, engine_opened, run
from server.terminal.connection import quiet

if TYPE_CHECKING:
    from atlas_jax.engine.api import ModelInfo
    from atlas_jax.engine.speed import Speed

PROG = "atlas-jax bench"
_STREAMS = (1, 4, 16)
_LONGEST = 2048
"""Tokens of the longest request; for longer ones further programs would be compiled."""


def parser() -> Parser:
    """The flags."""
    made = Parser(
        prog=PROG,
        description="Measures tokens per second: prefill of one prompt, and greedy decoding of several streams, each with "
        "the memory and without, in turns. The first time programs are compiled, which takes minutes; later some seconds. "
        "Drafts are off, for how many are right depends on the text.",
    )
    made.add_argument("model", nargs="?", metavar="MODEL", help="GGUF file, or folder of safetensors")
    made.add_argument(
        *("--hf-repo", "-hf", "-hfr"), metavar="ORG/NAME[:QUANT]", help="fetch the model from this repository instead"
    )
    made.add_argument("--offline", action="store_true", help="take a repository's model from the cache and ask nobody")
    made.add_argument("--quick", action="store_true", help="one round of short runs")
    made.add_argument("--rounds", type=int, metavar="N", help="rounds whose median counts (default: 5, with --quick 1)")
    made.add_argument(
        "--streams", type=int, nargs="+", metavar="N", default=list(_STREAMS), help="decoded at once (%(default)s)"
    )
    made.add_argument("--no-memory", action="store_true", help="only without the memory")
    made.add_argument("--threads", type=int, default=0, metavar="N", help="CPU threads; 0 takes every core")
    made.add_argument("--json", action="store_true", help="write JSON")
    return made


def main(argv: Sequence[str]) -> int:
    """Runs the command and returns its exit code."""
    return run(PROG, lambda: _run(parser().parse(argv)))


def _run(args: argparse.Namespace) -> int:
    if (args.model is None) == (args.hf_repo is None):
        raise UsageError("one model is to be named: MODEL, or --hf-repo")
    rounds = args.rounds if args.rounds is not None else 1 if args.quick else 5
    if rounds < 1 or not all(1 <= count <= 256 for count in args.streams):
        raise UsageError("--rounds must be at least 1, and --streams from 1 to 256")
    quiet()
    from atlas_jax.config import ConfigError
    from atlas_jax.engine.config import EngineConfig

    try:
        config = EngineConfig(
            model_path=None if args.model is None else Path(args.model),
            hf_repo=args.hf_repo,
            offline=args.offline,
            memory_enabled=not args.no_memory,
            threads=args.threads,
            speculate=False,
            max_concurrent=max(args.streams),
            max_context=_LONGEST,
            max_window=512,
        )
    except ConfigError as error:
        raise UsageError(str(error)) from None
    from atlas_jax.engine import Engine, speed
    from server.serve import reason_of

    tokens, steps = (640, 32) if args.quick else (1024, 64)
    with _progress() as progress:
        progress("loading")
        engine_opened()
        try:
            engine = Engine.open(config)
        except Exception as error:
            raise CommandError(reason_of(error)) from error
        progress("compiling, which the first start has to wait for")
        engine.warm_up()
        has_memory = not args.no_memory and engine.model.memory_unavailable is None
        what = speed.tests(sorted(set(args.streams)), tokens=tokens, steps=steps, memory=has_memory)
        found = speed.measure(engine, what, rounds, progress)
    _write(found, engine.model, args)
    return DONE


@contextlib.contextmanager
def _progress() -> Iterator[Callable[[str], None]]:
    if not sys.stderr.isatty():
        yield lambda text: None
        return
    from server.terminal.output import console

    with console(stderr=True).status("") as status:
        yield status.update


def _write(found: Sequence[Speed], model: ModelInfo, args: argparse.Namespace) -> None:
    if args.json:
        rows: list[dict[str, Any]] = [
            {
                "test": one.test.name,
                "streams": one.test.streams,
                "memory": one.test.memory,
                "tokens_per_second": round(one.median, 2),
                "rounds": [round(value, 2) for value in one.values],
            }
            for one in found
        ]
        print(msgspec.json.format(msgspec.json.encode({"model": model.name, "results": rows}), indent=2).decode())
        return
    from server.terminal.output import console, table

    by_name: dict[str, dict[bool, Speed]] = {}
    for one in found:
        by_name.setdefault(one.test.name, {})[one.test.memory] = one
    cells: list[tuple[str, ...]] = []
    for name, kinds in by_name.items():
        plain, memory = kinds[False], kinds.get(True)
        share = f"{memory.median / plain.median:.2f}" if memory is not None else ""
        cells.append((name, _cell(plain), _cell(memory), share))
    columns = [("tokens/s", False), ("plain", True), ("with memory", True), ("ratio", True)]
    if not any(one.test.memory for one in found):
        cells, columns = [row[:2] for row in cells], columns[:2]
    if model.memory_unavailable is not None and not args.no_memory:
        console(stderr=True).print(f"without a memory: {model.memory_unavailable}")
    out = console()
    out.print(f"{model.name}, medians of {len(found[0].values)}")
    out.print(table(columns, cells))


def _cell(speed: Speed | None) -> str:
    if speed is None:
        return ""
    spread = "" if len(speed.values) == 1 else f" ({min(speed.values):.0f}–{max(speed.values):.0f})"
    return f"{speed.median:.0f}{spread}"
