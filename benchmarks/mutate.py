"""Mutation check of the memory rules: breaks the code one small way at a time and looks whether a test notices.

    python benchmarks/mutate.py --output docs/mutation.md

Mutants are made on the syntax tree: changed operators, dropped factors, gates and signs, shifted comparison edges,
offsets and constants, swapped branches. One process that has jax and the tests loaded imports each in the place of the
real module and runs the property tests of its file until one fails; the tests that have killed most go first. The
source tree is never written to. A mutant that no test kills is a survivor: a missing test, unless `EQUIVALENT` says
why it computes the same.
"""

from __future__ import annotations

import argparse
import ast
import concurrent.futures
import copy
import importlib.abc
import importlib.machinery
import importlib.util
import itertools
import multiprocessing
import os
import random
import sys
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
KERNELS, FORMS = "tests/property/test_memory_kernels.py", "tests/property/test_memory_forms.py"
SPECIAL = "tests/property/test_memory_special_cases.py"
# what reaches a file; for those that need gradients or the whole library, a test run for every mutant would take hours
TARGETS = {
    "atlas_jax/kernels/omega.py": ([KERNELS, FORMS], "window_band or decay or dual_form or coefficients or (delta and definition)"),
    "atlas_jax/kernels/newton_schulz.py": ([KERNELS], "newton or band"),
    "atlas_jax/memory/rules/_exact.py": ([FORMS, SPECIAL], "mesa and not gradients"),
    "atlas_jax/memory/rules/_step.py": ([FORMS], "not gradients and not training"),
    "atlas_jax/memory/rules/_chunked.py": ([FORMS], "not gradients and not training"),
    "atlas_jax/memory/rules/_memory.py": ([FORMS], "not gradients and not training"),
    "atlas_jax/kernels/feature_maps.py": ([KERNELS], "polynomial or monomials or features"),
}
# mutants that compute the same, or another error message: (file, before, after) and why
EQUIVALENT: dict[tuple[str, str, str], str] = {}
BINARY = {ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Add, ast.MatMult: ast.Mult, ast.Div: ast.Mult, ast.Mod: ast.Add}
COMPARE = {ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Eq: ast.NotEq, ast.NotEq: ast.Eq}
# modules to load anew for each mutant: the memories, and the tests that have imported them
FRESH = ("atlas_jax.kernels.omega", "atlas_jax.kernels.newton_schulz", "atlas_jax.kernels.feature_maps")
FRESH += ("atlas_jax.memory.rules", "memory_support", "test_memory_")


@dataclass(frozen=True)
class Mutant:
    """One change of one file."""

    path: str
    line: int
    kind: str
    before: str
    after: str
    source: str

    @property
    def reason(self) -> str | None:
        """Why the mutant computes the same, if that is known."""
        return EQUIVALENT.get((self.path.rpartition("/")[2], self.before, self.after))


def mutants(path: str) -> Iterator[Mutant]:
    """All mutants of a file, except in `ref_` twins, signatures, docstrings and messages."""
    tree = ast.parse((ROOT / path).read_text("utf-8"))
    spared = {node for part in _spared(tree) for node in ast.walk(part)}
    for number, node in enumerate(ast.walk(tree)):
        if node in spared:
            continue
        for kind, change in _changes(node):
            clone = copy.deepcopy(tree)
            twin = next(itertools.islice(ast.walk(clone), number, None))
            context = _expression(clone, twin)
            before = ast.unparse(context)
            changed = change(twin)
            if changed is not twin:
                _replace(clone, twin, changed)
                context = changed if context is twin else context
            yield Mutant(path, getattr(node, "lineno", 0), kind, before, ast.unparse(context), ast.unparse(clone))


def _spared(tree: ast.AST) -> Iterator[ast.AST]:
    for node in ast.walk(tree):
        if isinstance(node, ast.arguments):  # defaults and annotations
            yield node
        elif isinstance(node, ast.FunctionDef):
            yield from ([node.returns] if node.returns else []) + node.decorator_list
            if node.name.startswith("ref_"):
                yield node
        elif isinstance(node, ast.AnnAssign):
            yield node.annotation
        elif isinstance(node, ast.Raise | ast.JoinedStr):
            yield node


def _changes(node: ast.AST):
    """The ways to break a node, as functions of its copy."""
    if isinstance(node, ast.BinOp) and type(node.op) in BINARY:
        yield f"{type(node.op).__name__} to {BINARY[type(node.op)].__name__}", _with_operator
        if isinstance(node.op, ast.Mult):
            yield "factor dropped", lambda n: n.left
            yield "factor dropped", lambda n: n.right
    elif isinstance(node, ast.Compare) and len(node.ops) == 1 and type(node.ops[0]) in COMPARE:
        yield "comparison edge", _with_edge
    elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub | ast.Not):
        yield "sign or negation dropped", lambda n: n.operand
    elif isinstance(node, ast.IfExp):
        yield "branches swapped", _with_branches
    elif isinstance(node, ast.Constant) and type(node.value) in (int, float):
        yield "constant shifted", lambda n: ast.copy_location(ast.Constant(n.value + 1), n)
    elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name | ast.Attribute):
        name = node.func.id if isinstance(node.func, ast.Name) else node.func.attr
        if name == "scale":
            yield "gate dropped", lambda n: n.args[0]


def _with_operator(node):
    node.op = BINARY[type(node.op)]()
    return node


def _with_edge(node):
    node.ops = [COMPARE[type(node.ops[0])]()]
    return node


def _with_branches(node):
    node.body, node.orelse = node.orelse, node.body
    return node


def _expression(tree: ast.AST, node: ast.AST) -> ast.AST:
    """What a report shows of a change: the smallest expression around it that has a name in it."""
    parents = {child: parent for parent in ast.walk(tree) for child in ast.iter_child_nodes(parent)}
    while not isinstance(node, ast.stmt) and not any(isinstance(n, ast.Name) for n in ast.walk(node)):
        node = parents[node]
    return node


def _replace(tree: ast.AST, old: ast.AST, new: ast.AST) -> None:
    for parent in ast.walk(tree):
        for field, value in ast.iter_fields(parent):
            if value is old:
                setattr(parent, field, new)
            elif isinstance(value, list) and any(item is old for item in value):
                setattr(parent, field, [new if item is old else item for item in value])


class Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Imports one module from a text."""

    def __init__(self, module: str, source: str) -> None:
        self.module, self.source = module, source

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> importlib.machinery.ModuleSpec | None:
        return importlib.util.spec_from_loader(name, self) if name == self.module else None

    def exec_module(self, module: ModuleType) -> None:
        exec(compile(self.source, f"<mutant of {self.module}>", "exec"), module.__dict__)


class Watch:
    """A pytest plugin: puts the likely killers first and keeps the name of the test that failed."""

    def __init__(self, killers: Counter[str]) -> None:
        self.killers, self.failed, self.timeout, self.passed = killers, "", False, 0

    def pytest_collection_modifyitems(self, items: list[Any]) -> None:
        items.sort(key=lambda item: -self.killers[item.nodeid])

    def pytest_runtest_logreport(self, report: Any) -> None:
        self.passed += report.when == "call" and report.passed
        if report.failed and not self.failed:
            self.failed, self.timeout = report.nodeid, "Timeout" in str(report.longrepr)


def trial(path: str, source: str, killers: Counter[str], limit: float) -> tuple[str, str]:
    """Runs the tests of a file with its module made of `source`, in this process.

    Returns:
      How it ended (killed, timeout, survived, or error where no test ran), and the test that failed.
    """
    import pytest
    from hypothesis import Phase, settings

    settings.register_profile("mutation", phases=[Phase.explicit, Phase.generate])  # a failure need not be shrunk
    settings.load_profile("mutation")
    for name in [name for name in sys.modules if name.startswith(FRESH)]:
        parent, _, child = name.rpartition(".")
        sys.modules[parent].__dict__.pop(child, None) if parent else None
        del sys.modules[name]
    finder = Finder(path.removesuffix(".py").replace("/", "."), source)
    sys.meta_path.insert(0, finder)
    watch, (files, chosen) = Watch(killers), TARGETS[path]
    options = ["-x", "-q", "--no-header", "--no-summary", "-n0", f"--timeout={limit}"]
    options += ["-p", "no:cacheprovider", "-p", "no:randomly", "-k", chosen]
    try:
        status = pytest.main([*options, *files], plugins=[watch])
    except BaseException as error:  # a mutant may do anything, exit included
        return "killed", type(error).__name__
    finally:
        sys.meta_path.remove(finder)
    if watch.timeout:
        return "timeout", watch.failed
    if status == pytest.ExitCode.OK and watch.passed:
        return "survived", ""
    if status in (pytest.ExitCode.TESTS_FAILED, pytest.ExitCode.INTERRUPTED):
        return "killed", watch.failed
    return "error", str(status)


def _prepare() -> None:
    """In the worker: imports from the source tree, and no output but failures of this tool."""
    os.chdir(ROOT)
    sys.path.insert(0, str(ROOT))
    quiet = os.open(os.devnull, os.O_WRONLY)
    os.dup2(quiet, 1)
    os.dup2(quiet, 2)


class Worker:
    """A process that runs trials, replaced when one has crashed or hung it and, for memory's sake, now and then."""

    def __init__(self, limit: float) -> None:
        self.limit, self.killers = limit, Counter[str]()
        self._pool = self._start()

    def _start(self) -> concurrent.futures.ProcessPoolExecutor:
        context = multiprocessing.get_context("spawn")
        return concurrent.futures.ProcessPoolExecutor(1, context, _prepare, max_tasks_per_child=40)

    def run(self, path: str, source: str) -> tuple[str, str]:
        """One trial."""
        future = self._pool.submit(trial, path, source, self.killers, self.limit)
        try:
            how, test = future.result(timeout=10 * self.limit)
        except (BrokenProcessPool, TimeoutError) as error:
            for process in list((self._pool._processes or {}).values()):
                process.kill()
            self._pool.shutdown(cancel_futures=True)
            self._pool = self._start()
            return ("crash" if isinstance(error, BrokenProcessPool) else "timeout"), ""
        if how == "killed":
            self.killers[test] += 1
        return how, test


def report(results: list[tuple[Mutant, str]], spared: Iterable[Mutant], command: str, total: int, seconds: float) -> str:
    """The run as Markdown."""
    ends = Counter(how for _, how in results)
    killed = len(results) - ends["survived"]
    lines = [
        "# Mutation check of the memory rules",
        "",
        f"`{command}`: {killed} of {len(results)} mutants killed ({ends['timeout']} of them by a time limit), of {total} "
        f"that there are; {seconds / 60:.0f} minutes. Mutants that compute the same are listed below and not counted.",
        "",
        "| file | mutants | killed |",
        "|---|---:|---:|",
    ]
    for path in TARGETS:
        part = [how for mutant, how in results if mutant.path == path]
        if part:
            lines.append(f"| {path} | {len(part)} | {sum(how != 'survived' for how in part)} |")
    lines += ["", "## Survivors", ""]
    survivors = [mutant for mutant, how in results if how == "survived"]
    lines += ["| where | change | from | to |", "|---|---|---|---|"] if survivors else ["None.", ""]
    lines += [f"| {m.path}:{m.line} | {m.kind} | {_code(m.before)} | {_code(m.after)} |" for m in survivors]
    lines += ["", "## Mutants that compute the same", "", "| where | from | to | why |", "|---|---|---|---|"]
    lines += [f"| {m.path}:{m.line} | {_code(m.before)} | {_code(m.after)} | {m.reason} |" for m in spared]
    return "\n".join([*lines, ""])


def _code(text: str) -> str:
    return f"`{text[:90]}`".replace("|", "\\|").replace("\n", " ")


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sample", type=int, default=0, help="mutants to run, drawn at random; 0: all")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--limit", type=float, default=120.0, help="seconds one test may take")
    parser.add_argument("--files", nargs="*", default=list(TARGETS), help="paths, or ends of paths")
    parser.add_argument("--match", default="", help="only mutants whose old or new code has this in it")
    parser.add_argument("--list", action="store_true", help="print the mutants and leave")
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    command = "python benchmarks/mutate.py " + " ".join(sys.argv[1:])

    paths = [path for path in TARGETS if any(path.endswith(name) for name in arguments.files)]
    found = [m for path in paths for m in mutants(path) if arguments.match in m.before + "\n" + m.after]
    spared = [m for m in found if m.reason]
    chosen = [m for m in found if not m.reason]
    if arguments.sample and arguments.sample < len(chosen):
        chosen = random.Random(arguments.seed).sample(chosen, arguments.sample)
    if arguments.list:
        for m in chosen:
            print(f"{m.path}:{m.line} {m.kind}: {m.before!r} -> {m.after!r}")
        return
    start, results = time.monotonic(), []
    worker = Worker(arguments.limit)
    for path in {m.path: None for m in chosen}:
        how, test = worker.run(path, (ROOT / path).read_text("utf-8"))
        if how != "survived":
            raise SystemExit(f"the tests of {path} fail without any change: {how} {test}")
        worker.killers.clear()
        for mutant in (m for m in chosen if m.path == path):
            before = time.monotonic()
            how, test = worker.run(path, mutant.source)
            results.append((mutant, how))
            took = f"{time.monotonic() - before:5.1f} s"
            place = f"{mutant.path.rpartition('/')[2]}:{mutant.line}"
            print(f"{how:9}{took} {place} {mutant.before[:60]!r} -> {mutant.after[:60]!r} {test.rpartition('::')[2]}", flush=True)
            if arguments.output:
                text = report(results, spared, command, len(chosen), time.monotonic() - start)
                arguments.output.write_text(text, "utf-8")
    print(report(results, spared, command, len(chosen), time.monotonic() - start))
    worker._pool.shutdown()


if __name__ == "__main__":
    main()
