"""Mutation check of the memory rules: breaks the code one small way at a time and looks whether a test notices.

    python benchmarks/mutate.py --sample 40 --output docs/mutation.md

Mutants are made on the syntax tree: flipped signs, swapped products and sums, shifted comparison edges and constants,
swapped branches, dropped gates. Each is imported in the place of the real module in one
fork that runs the fast property tests; the source tree is never written to. A mutant that no test kills is a
survivor, and a survivor is either equivalent code or a missing test.
"""

from __future__ import annotations

import argparse
import ast
import copy
import importlib.abc
import importlib.machinery
import importlib.util
import os
import random
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

import pytest

ROOT = Path(__file__).resolve().parents[1]
TARGETS = {
    "atlas_jax/kernels/omega.py": ["omega", "forms"],
    "atlas_jax/kernels/newton_schulz.py": ["newton_schulz"],
    "atlas_jax/kernels/feature_maps.py": ["features"],
    "atlas_jax/memory/rules/_step.py": ["forms"],
    "atlas_jax/memory/rules/_memory.py": ["forms"],
    "atlas_jax/memory/rules/_chunked.py": ["forms"],
    "atlas_jax/memory/rules/_exact.py": ["exact"],
}
KERNELS, FORMS = "tests/property/test_memory_kernels.py", "tests/property/test_memory_forms.py"
TESTS = {
    "omega": [KERNELS, "-k", "dual or band or decay"],
    "newton_schulz": [KERNELS, "-k", "newton"],
    "features": [KERNELS, "-k", "polynomial or monomials or features"],
    "forms": [FORMS, "-k", "not gradients and not training and not atlas"],
    "exact": [FORMS, "-k", "mesa and not gradients"],
}
BINARY = {
    ast.Add: ast.Sub,
    ast.Sub: ast.Add,
    ast.Mult: ast.Add,
    ast.MatMult: ast.Mult,
    ast.Div: ast.Mult,
    ast.Mod: ast.Add,
}
COMPARE = {ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Eq: ast.NotEq, ast.NotEq: ast.Eq}


@dataclass(frozen=True)
class Mutant:
    """One change of one file."""

    path: str
    line: int
    kind: str
    before: str
    after: str
    source: str


def mutants(path: str) -> Iterator[Mutant]:
    """All mutants of a file, except in `ref_` twins, docstrings and messages."""
    tree = ast.parse((ROOT / path).read_text("utf-8"))
    spared = _inside(tree)
    sites = [node for function in _functions(tree) for node in ast.walk(function)]
    for number, node in enumerate(sites):
        if node in spared:
            continue
        for kind, change in _changes(node):
            clone = copy.deepcopy(tree)
            twin = [n for function in _functions(clone) for n in ast.walk(function)][number]
            before = ast.unparse(twin)
            changed = change(twin)
            if changed is not twin:
                _replace(clone, twin, changed)
            after = ast.unparse(changed)
            yield Mutant(path, getattr(node, "lineno", 0), kind, before, after, ast.unparse(clone))


def _inside(tree: ast.AST) -> set[ast.AST]:
    """Constants to leave alone: indices, which jax clamps to the array, and default values."""
    parts = [node.slice for node in ast.walk(tree) if isinstance(node, ast.Subscript)]
    signatures = [node for node in ast.walk(tree) if isinstance(node, ast.arguments)]
    parts += [default for s in signatures for default in (*s.defaults, *s.kw_defaults) if default]
    return {node for part in parts for node in ast.walk(part) if isinstance(node, ast.Constant)}


def _functions(tree: ast.AST) -> list[ast.FunctionDef]:
    return [n for n in ast.iter_child_nodes(tree) if isinstance(n, ast.FunctionDef) and not n.name.startswith("ref_")]


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
    elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "scale":
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


def _replace(tree: ast.AST, old: ast.AST, new: ast.AST) -> None:
    for parent in ast.walk(tree):
        for field, value in ast.iter_fields(parent):
            if value is old:
                setattr(parent, field, new)
            elif isinstance(value, list) and any(item is old for item in value):
                setattr(parent, field, [new if item is old else item for item in value])


class Finder(importlib.abc.MetaPathFinder):
    """Imports one module from another file."""

    def __init__(self, module: str, file: Path) -> None:
        self.module, self.file = module, str(file)

    def find_spec(self, name, path=None, target=None):
        if name != self.module:
            return None
        loader = importlib.machinery.SourceFileLoader(name, self.file)
        return importlib.util.spec_from_loader(name, loader, origin=self.file)


def survives(mutant: Mutant, limit: float) -> tuple[bool, str]:
    """Runs the tests of a mutant's file against it, each group in a fork of this process, which has jax loaded already.

    Returns:
      Whether all passed, and how it ended.
    """
    module = mutant.path.removesuffix(".py").replace("/", ".")
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "mutant.py"
        file.write_text(mutant.source, "utf-8")
        for group in TARGETS[mutant.path]:
            child = os.fork()
            if not child:
                _test(module, file, group)
            status, deadline = 0, time.monotonic() + limit
            while not os.waitpid(child, os.WNOHANG)[0]:
                if time.monotonic() > deadline:
                    os.kill(child, signal.SIGKILL)
                    os.waitpid(child, 0)
                    return False, "timeout"
                time.sleep(0.2)
            status = int((Path(folder) / "status").read_text() if (Path(folder) / "status").exists() else 99)
            (Path(folder) / "status").unlink(missing_ok=True)
            if status:
                return False, "killed" if status in (1, 2) else f"exit {status}"
    return True, "survived"


def _test(module: str, file: Path, group: str) -> NoReturn:
    """In the fork: imports the mutant for the module, runs pytest, leaves its exit status in a file, and ends."""
    quiet = os.open(os.devnull, os.O_WRONLY)
    os.dup2(quiet, 1)
    os.dup2(quiet, 2)
    sys.meta_path.insert(0, Finder(module, file))
    status = 99
    try:
        status = int(pytest.main(["-x", "-q", "--no-header", "-p", "no:cacheprovider", *TESTS[group]]))
    finally:
        file.with_name("status").write_text(str(status))
        os._exit(0)


def report(results: list[tuple[Mutant, bool, str]], total: int, seed: int, seconds: float) -> str:
    """The run as Markdown."""
    killed = sum(not alive for _, alive, _ in results)
    lines = [
        "# Mutation check of the memory rules",
        "",
        f"`python benchmarks/mutate.py --sample {len(results)} --seed {seed}`: {killed} of {len(results)} mutants "
        f"killed, drawn from {total}; {seconds / 60:.0f} minutes.",
        "",
        "| file | mutants | killed |",
        "|---|---|---|",
    ]
    for path in TARGETS:
        part = [alive for mutant, alive, _ in results if mutant.path == path]
        lines.append(f"| {path} | {len(part)} | {sum(not alive for alive in part)} |")
    lines += ["", "## Survivors", ""]
    survivors = [mutant for mutant, alive, _ in results if alive]
    if not survivors:
        return "\n".join([*lines, "None.", ""])
    lines += ["| where | change | from | to |", "|---|---|---|---|"]
    for m in survivors:
        before, after = (f"`{x[:70]}`".replace("|", "\\|").replace("\n", " ") for x in (m.before, m.after))
        lines.append(f"| {m.path}:{m.line} | {m.kind} | {before} | {after} |")
    return "\n".join([*lines, ""])


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sample", type=int, default=0, help="mutants to run, drawn at random; 0: all")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--limit", type=float, default=600.0, help="seconds one test run may take")
    parser.add_argument("--files", nargs="*", default=list(TARGETS))
    parser.add_argument("--budget", type=float, default=0.0, help="stop after so many minutes; 0: never")
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()

    everything = [mutant for path in arguments.files for mutant in mutants(path)]
    chosen = everything
    if arguments.sample:
        chosen = random.Random(arguments.seed).sample(everything, min(arguments.sample, len(everything)))
    os.chdir(ROOT)
    sys.path.insert(0, str(ROOT))
    import hypothesis  # noqa: F401
    import jax.scipy.linalg  # noqa: F401

    import atlas_jax.typing  # noqa: F401  sets jax's flags; the modules under test must not be loaded here

    start, results = time.monotonic(), []
    for mutant in chosen:
        if arguments.budget and time.monotonic() - start > 60 * arguments.budget:
            break
        alive, how = survives(mutant, arguments.limit)
        results.append((mutant, alive, how))
        print(f"{how:9} {mutant.path}:{mutant.line} {mutant.kind}: {mutant.before[:60]!r}", flush=True)
        text = report(results, len(everything), arguments.seed, time.monotonic() - start)
        if arguments.output:
            arguments.output.write_text(text, "utf-8")
    print(text if results else "no mutants")


if __name__ == "__main__":
    main()
