"""Mutation check of the memory rules: breaks the code one small way at a time and looks whether a test notices.

    python -m benchmarks.mutate --output docs/benchmarks/mutation.md

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
import hashlib
import importlib.abc
import importlib.machinery
import importlib.util
import itertools
import json
import multiprocessing
import os
import random
import signal
import sys
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
KERNELS, FORMS = "tests/property/test_memory_kernels_property.py", "tests/property/test_memory_forms_property.py"
SPECIAL = "tests/property/test_memory_special_cases_property.py"
GRADIENTS = "tests/property/test_memory_gradients_property.py"
MOSAIC = "tests/property/test_kernels_tpu_rules_property.py"
FORM_TESTS = "not agree and not training and not scan and not second and not forward and not padding"


@dataclass(frozen=True)
class Target:
    """Which tests reach a file.

    Attributes:
      chosen: pytest's -k: gradients of each preset, but no second derivatives and nothing further away, which would make
        hours of it.
      eager: run without `jit`. For small kernels that is ten times faster once their operations are compiled; for whole
        memories, whose loops then run in Python, it is slower.
    """

    files: tuple[str, ...]
    chosen: str
    eager: bool


TARGETS = {
    "atlas_jax/kernels/omega.py": Target(
        (KERNELS, MOSAIC), "window_band or decay or dual_form or sequential or where_they_are_called", True
    ),
    "atlas_jax/kernels/newton_schulz.py": Target((KERNELS, MOSAIC), "newton or band or where_they_are_called", True),
    "atlas_jax/memory/_exact.py": Target((FORMS, SPECIAL, GRADIENTS), "mesa and not agree and not second", False),
    "atlas_jax/memory/_step.py": Target((FORMS, GRADIENTS), FORM_TESTS, False),
    "atlas_jax/memory/_chunked.py": Target((FORMS, GRADIENTS), FORM_TESTS, False),
    "atlas_jax/memory/_memory.py": Target((FORMS, GRADIENTS), FORM_TESTS, False),
    "atlas_jax/memory/parts.py": Target((FORMS,), FORM_TESTS, False),
    "atlas_jax/kernels/feature_maps.py": Target((KERNELS,), "polynomial or monomials or features", True),
}
# mutants that compute the same, or another error message: (file or file:function, before, after) and why
EQUIVALENT: dict[tuple[str, str, str], str] = {
    ("omega.py", "1 << (length - 1).bit_length()", "2 << (length - 1).bit_length()"): "pads with more gates of one",
    ("omega.py", "length - 1", "length + 1"): "pads with more gates of one",
    ("omega.py", "(0, :length, :length)", "(1, :length, :length)"): "one block is left: jax clamps the index",
    ("omega.py", "products.shape[1]", "products.shape[2]"): "the products of a block are square",
    (
        "omega.py",
        "gate.reshape(-1, 2, half, channels)[:, 1, :1]",
        "gate.reshape(-1, 2, half, channels)[:, 2, :1]",
    ): "a pair: jax clamps the index",
    ("_exact.py", "products[..., 0]", "products[..., 1]"): "one gate: jax clamps the index",
    (
        "_exact.py",
        "kept_from_start(alpha, products)[:, 0]",
        "kept_from_start(alpha, products)[:, 1]",
    ): "one gate: jax clamps the index",
    ("newton_schulz.py", "matrix.shape[-1]", "matrix.shape[-2]"): "works on the larger side: only slower",
    (
        "newton_schulz.py",
        "matrix.shape[-1]",
        "matrix.shape[1]",
    ): "works on the larger side of some batches: only slower",
    **{
        (
            "newton_schulz.py:_iterate",
            before,
            after,
        ): "the matrix or its Gram matrix is iterated: only the speed differs"
        for before, afters in {
            "2 * matrix.shape[-2] < 3 * matrix.shape[-1]": ("2 * matrix.shape[-2] <= 3 * matrix.shape[-1]",),
            "2 * matrix.shape[-2]": (
                "2 + matrix.shape[-2]",
                "2",
                "matrix.shape[-2]",
                "3 * matrix.shape[-2]",
            ),
            "3 * matrix.shape[-1]": (
                "3 + matrix.shape[-1]",
                "3",
                "matrix.shape[-1]",
                "4 * matrix.shape[-1]",
            ),
        }.items()
        for after in afters
    },
    ("newton_schulz.py", "gram.shape[-1]", "gram.shape[-2]"): "a Gram matrix is square",
    ("newton_schulz.py", "jnp.where(peak > 0, peak, 1.0)", "jnp.where(peak > 0, peak, 2.0)"): "divides a zero matrix",
    (
        "newton_schulz.py",
        "jnp.where(peak > 0, square, 1.0)",
        "jnp.where(peak > 0, square, 2.0)",
    ): "scales a zero matrix",
    ("omega.py", "mixing.shape[-1] == 1", "mixing.shape[-1] == 2"): "leaves out a short cut for one channel",
    ("omega.py", "left.shape[-1] == 1", "left.shape[-1] == 2"): "leaves out a short cut for one channel",
    ("omega.py", "right.shape[-1] == 1", "right.shape[-1] == 2"): "leaves out a short cut for one channel",
    **{
        ("omega.py:momenta", f"coefficients.{gates}.shape[-1]", f"coefficients.{gates}.shape[{axis}]"): (
            "leaves out a short cut for one channel"
        )
        for gates in ("momentum_tokens", "momentum_left")
        for axis in (1, -2)
    },
    ("omega.py", "gate[..., 0]", "gate[..., 1]"): "one channel: jax clamps the index",
    ("omega.py:momenta", "coefficients.momentum_tokens[..., 0]", "coefficients.momentum_tokens[..., 1]"): (
        "one channel: jax clamps the index"
    ),
    ("omega.py", "c.tokens[..., 0]", "c.tokens[..., 1]"): "one channel: jax clamps the index",
    ("omega.py", "mixing[..., 0]", "mixing[..., 1]"): "one channel: jax clamps the index",
    ("omega.py", "left[..., 0]", "left[..., 1]"): "one channel: jax clamps the index",
    ("omega.py", "right[..., 0]", "right[..., 1]"): "one channel: jax clamps the index",
    ("omega.py", "coefficients.tokens[..., 0]", "coefficients.tokens[..., 1]"): "one channel: jax clamps the index",
    (
        "omega.py",
        "_chain(decay, (outer * momentum_left)[:, None, :])[:, 0]",
        "_chain(decay, (outer * momentum_left)[:, None, :])[:, 1]",
    ): "an axis of one: jax clamps the index",
    ("omega.py", "left.shape[-1]", "left.shape[1]"): "differs for one token only, whose decay is 1 in every channel",
    ("omega.py", "left.shape[-1]", "left.shape[-2]"): "differs for one token only, whose decay is 1 in every channel",
    ("omega.py", "jnp.tril(mixing, -1)", "jnp.tril(mixing, 1)"): "the solver reads below the diagonal only",
    ("omega.py", "before(coefficients.tokens[..., 0], 0.0)", "before(coefficients.tokens[..., 0], 1.0)"): (
        "the first row is above the diagonal"
    ),
    ("_exact.py", "token.alpha[0]", "token.alpha[1]"): "one gate: jax clamps the index",
    ("_exact.py", "token.gamma[0]", "token.gamma[1]"): "one gate: jax clamps the index",
    ("_exact.py", "jnp.cumprod(alpha, axis=0)[:, 0]", "jnp.cumprod(alpha, axis=0)[:, 1]"): (
        "one gate: jax clamps the index"
    ),
    ("_exact.py", "decay_products(alpha)[..., 0]", "decay_products(alpha)[..., 1]"): "one gate: jax clamps the index",
    ("_exact.py", "moments.shape[-1]", "moments.shape[1]"): "the moments are square",
    ("_exact.py", "moments.shape[-1]", "moments.shape[-2]"): "the moments are square",
    ("feature_maps.py", "_BLOCK = 8", "_BLOCK = 9"): "a block size that both of its users share",
    (
        "feature_maps.py:_block_table",
        "(1.0,) * (degree + 1)",
        "(2.0,) * (degree + 1)",
    ): "of the table only the variables are read here, not the weights",
    ("_exact.py", "MAX_ITERATIONS = 24", "MAX_ITERATIONS = 25"): "a limit: factors solve what is left then",
    (
        "_exact.py",
        "jnp.max(jnp.abs(right), axis=-1, keepdims=True)",
        "jnp.max(jnp.abs(right), axis=1, keepdims=True)",
    ): "rows of a block: the last axis is the second",
    ("_exact.py", "jnp.sum(x * y, axis=-1)", "jnp.sum(x * y, axis=1)"): "rows of a block: the last axis is the second",
    ("_exact.py", "jnp.where(peak > 0, peak, 1.0)", "jnp.where(peak > 0, peak, 2.0)"): "divides a zero row",
    ("_exact.py", "system.start.shape[0]", "system.start.shape[1]"): "the moments are square",
    (
        "_exact.py",
        "carry[-1] < MAX_ITERATIONS",
        "carry[-1] <= MAX_ITERATIONS",
    ): "a limit: factors solve what is left then",
    ("_exact.py", "4 * np.finfo(x.dtype).eps", "5 * np.finfo(x.dtype).eps"): "how much is a rounding error",
    (
        "_exact.py",
        "4 * np.finfo(x.dtype).eps",
        "np.finfo(x.dtype).eps",
    ): "how much is a rounding error: factors solve what is past it",
    (
        "_exact.py",
        "size * _norm(x) + _norm(right)",
        "size * _norm(x) - _norm(right)",
    ): "how much is a rounding error: factors solve what is past it",
    ("_exact.py", "np.finfo(right.dtype).eps ** 2", "np.finfo(right.dtype).eps ** 3"): (
        "a goal below rounding errors: more iterations, up to the limit"
    ),
    (
        "_exact.py",
        "np.finfo(right.dtype).eps ** 2 * _dot(right, right)",
        "np.finfo(right.dtype).eps ** 2",
    ): "a goal at most √D lower, as the largest component is 1: an iteration more",
    (
        "_exact.py",
        "jnp.where(new > 0, new / slope, 0.0)",
        "jnp.where(new > 0, new / slope, 1.0)",
    ): "a row without a residual stands still, whatever its direction",
    (
        "_step.py",
        "forward(rule, plain(weights), queries)[0]",
        "forward(rule, plain(weights), queries)[1]",
    ): "one query: jax clamps the index",
    ("_step.py", "keys.features[0]", "keys.features[1]"): "one key: jax clamps the index",
    (
        "_step.py",
        "_exact.read(rule, params, state, queries.features)[0]",
        "_exact.read(rule, params, state, queries.features)[1]",
    ): "one query: jax clamps the index",
    ("_chunked.py", "first < offset + length", "first <= offset + length"): (
        "a chunk of padding after the last border: moves what the next chunk would have moved"
    ),
    ("_chunked.py", "rule.features.compress == 'projection'", "rule.features.compress != 'projection'"): (
        "which intermediates the backward pass keeps"
    ),
    (
        "_chunked.py",
        "jax.tree.map(lambda x: checkpoint_name(x, KEPT), both) if rule.features.compress == 'projection' else both",
        "both if rule.features.compress == 'projection' else jax.tree.map(lambda x: checkpoint_name(x, KEPT), both)",
    ): "which intermediates the backward pass keeps",
    (
        "_chunked.py",
        "chunk.stored * chunk.age[:, 0] * chunk.valid",
        "chunk.stored * chunk.age[:, 0]",
    ): "what is stored of padding is zero already",
    ("_chunked.py", "chunk.age[:, 0]", "chunk.age[:, 1]"): "`exact` has one gate: jax clamps the index",
    ("_chunked.py", "not aligned", "aligned"): "leaves out a short cut; with borders the total is longer than the text",
    ("_chunked.py", "tokens.gamma[:, 0]", "tokens.gamma[:, 1]"): "one gate, or ones of its shape",
    ("_chunked.py", "first > 0", "first > 1"): "differs for chunks of one token only, which all start at offset 0",
    ("_chunked.py", "alpha[0]", "alpha[1]"): "the decayed memory needs chunk 1: jax clamps the index",
    ("_chunked.py", "size - 1", "size + 1"): "one more chunk of padding at most",
    **{
        ("_exact.py:read", "rule.ridge * x", after): "an operator that is differentiated by the moments only"
        for after in ("rule.ridge + x", "rule.ridge", "x")
    },
    ("_chunked.py", "rule.chunk > 1", "rule.chunk >= 1"): "chunks of one have a border everywhere: the phase stays 0",
    ("_chunked.py", "size - 1 if aligned else 0", "size - 1 if aligned else 1"): "one more chunk of padding at most",
    ("_memory.py", "jnp.where(square > 0, square, 1.0)", "jnp.where(square > 0, square, 2.0)"): "divides a zero row",
    ("_memory.py", "jnp.where(square > 0, root * peak, 0.0)", "jnp.where(square > 0, root * peak, 1.0)"): (
        "the length of a zero row, whose gradient is zero however it is scaled"
    ),
    ("_memory.py", "jnp.where(peak > 0, peak, 1.0)", "jnp.where(peak > 0, peak, 2.0)"): "divides a zero row",
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
# modules to load anew for each mutant: the memories, and the tests that have imported them
FRESH = ("atlas_jax.kernels.omega", "atlas_jax.kernels.newton_schulz", "atlas_jax.kernels.feature_maps")
FRESH += ("atlas_jax.memory", "memory_support", "test_memory_", "test_kernels_tpu_rules")


@dataclass(frozen=True)
class Mutant:
    """One change of one file."""

    path: str
    line: int
    scope: str
    kind: str
    before: str
    after: str
    source: str

    @property
    def key(self) -> str:
        """The mutant's name: the digest of its source."""
        return hashlib.sha256(f"{self.path}\n{self.source}".encode()).hexdigest()[:16]

    @property
    def reason(self) -> str | None:
        """Why the mutant computes the same, if that is known."""
        file = self.path.rpartition("/")[2]
        reasons = (EQUIVALENT.get((place, self.before, self.after)) for place in (file, f"{file}:{self.scope}"))
        return next(filter(None, reasons), None)


def mutants(path: str) -> Iterator[Mutant]:
    """All mutants of a file, except in `ref_` twins, signatures, docstrings and messages."""
    tree = ast.parse((ROOT / path).read_text("utf-8"))
    spared = {node for part in _spared(tree) for node in ast.walk(part)}
    scope = {node: f.name for f in tree.body if isinstance(f, ast.FunctionDef) for node in ast.walk(f)}
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
            line, name = getattr(node, "lineno", 0), scope.get(node, "")
            yield Mutant(path, line, name, kind, before, ast.unparse(context), ast.unparse(clone))


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
    elif isinstance(node, ast.Return) and isinstance(node.value, ast.Call | ast.BinOp):
        yield "slope dropped", _without_slope
    elif isinstance(node, ast.Constant) and type(node.value) in (int, float):
        yield "constant shifted", lambda n: ast.copy_location(ast.Constant(n.value + 1), n)
    elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name | ast.Attribute):
        name = node.func.id if isinstance(node.func, ast.Name) else node.func.attr
        if name == "scale":
            yield "gate dropped", lambda n: n.args[0]


def _with_operator(node):
    node.op = BINARY[type(node.op)]()
    return node


def _without_slope(node):
    """Returns the same numbers as constants: no test of values can tell."""
    return ast.copy_location(
        ast.Return(ast.parse(f"jax.lax.stop_gradient({ast.unparse(node.value)})").body[0].value), node
    )


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


class OutOfTime(BaseException):
    """A mutant has had its processor seconds."""


def _out_of_time(signal_number: int, frame: object) -> None:
    raise OutOfTime


class Watch:
    """A pytest plugin: puts the likely killers first and keeps the name of the test that failed."""

    def __init__(self, killers: Counter[str]) -> None:
        self.killers, self.failed, self.timeout, self.passed = killers, "", False, 0

    def pytest_collection_modifyitems(self, items: list[Any]) -> None:
        items.sort(key=lambda item: -self.killers[item.nodeid])

    def pytest_runtest_logreport(self, report: Any) -> None:
        self.passed += report.when == "call" and report.passed
        if report.failed and not self.failed:
            self.failed, self.timeout = report.nodeid, "OutOfTime" in str(report.longrepr)


def trial(path: str, source: str, killers: Counter[str], limit: float) -> tuple[str, str, float]:
    """Runs the tests of a file with its module made of `source`, in this process.

    Returns:
      How it ended (killed, timeout, survived, or error where no test ran), the test that failed, and processor seconds.
    """
    start = time.process_time()
    return *_trial(path, source, killers, limit), time.process_time() - start


def _trial(path: str, source: str, killers: Counter[str], limit: float) -> tuple[str, str]:
    import jax
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
    watch, target = Watch(killers), TARGETS[path]
    options = ["-x", "-q", "--no-header", "--no-summary", "-n0", "--timeout=0", "-p", "no:cacheprovider"]
    options += ["-k", target.chosen, *target.files]
    jax.config.update("jax_disable_jit", target.eager)
    signal.signal(signal.SIGPROF, _out_of_time)
    signal.setitimer(signal.ITIMER_PROF, limit)  # processor time: the machine may do other work too
    try:
        status = pytest.main(options, plugins=[watch])
    except OutOfTime:
        return "timeout", ""
    except BaseException as error:  # a mutant may do anything, exit included
        return "killed", type(error).__name__
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
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
    """A process that runs the trials of one file, replaced when a mutant has crashed it, or ended its time outside
    Python."""

    def __init__(self, path: str, limit: float) -> None:
        self.path, self.limit, self.killers = path, limit, Counter[str]()
        self._pool = self._start()

    def _start(self) -> concurrent.futures.ProcessPoolExecutor:
        context = multiprocessing.get_context("spawn")
        # compiled programs pile up; without `jit` they are the same few for all mutants
        tasks = None if TARGETS[self.path].eager else 100
        return concurrent.futures.ProcessPoolExecutor(1, context, _prepare, max_tasks_per_child=tasks)

    def run(self, source: str, patience: float = 1.0) -> tuple[str, str, float]:
        """One trial, `patience` times the limit long."""
        future = self._pool.submit(trial, self.path, source, self.killers, patience * self.limit)
        try:
            how, test, seconds = future.result(timeout=20 * patience * self.limit)
        except (BrokenProcessPool, TimeoutError) as error:
            self.close()
            self._pool = self._start()
            return ("crash" if isinstance(error, BrokenProcessPool) else "timeout"), "", self.limit
        if how == "killed":
            self.killers[test] += 1
        return how, test, seconds

    def close(self) -> None:
        """Ends the process, whatever it is doing."""
        for process in list((self._pool._processes or {}).values()):
            process.kill()
        self._pool.shutdown(cancel_futures=True)


def report(results: dict[str, list[Any]], chosen: list[Mutant], spared: list[Mutant], command: str) -> str:
    """The run as Markdown."""
    run = [(m, *results[m.key][:2]) for m in chosen if m.key in results]
    ends = Counter(how for _, how, _ in run)
    seconds = sum(results[m.key][2] for m, _, _ in run)
    lines = [
        "# Mutation check of the memory rules",
        "",
        f"`{command}`: {len(run) - ends['survived']} of {len(run)} mutants killed, {ends['timeout']} of them by a time "
        f"limit and {ends['crash']} by a crash; {len(chosen) - len(run)} not run; {seconds / 60:.0f} processor minutes.",
        f"{len(spared)} mutants that compute the same are listed below and not counted.",
        "",
        "| file | mutants | run | killed |",
        "|---|---:|---:|---:|",
    ]
    for path in TARGETS:
        part = [how for mutant, how, _ in run if mutant.path == path]
        total = sum(mutant.path == path for mutant in chosen)
        if part:
            lines.append(f"| {path} | {total} | {len(part)} | {sum(how != 'survived' for how in part)} |")
    lines += ["", "## Survivors", ""]
    survivors = [mutant for mutant, how, _ in run if how == "survived"]
    lines += ["| where | change | from | to |", "|---|---|---|---|"] if survivors else ["None."]
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
    parser.add_argument(
        "--limit",
        type=float,
        default=60.0,
        help="processor seconds that a mutant's tests may take, or twice what they take without any change, if more",
    )
    parser.add_argument("--files", nargs="*", default=list(TARGETS), help="paths, or ends of paths")
    parser.add_argument("--match", default="", help="only mutants whose old or new code has this in it")
    parser.add_argument("--list", action="store_true", help="print the mutants and leave")
    parser.add_argument("--results", type=Path, help="JSON lines; survivors in it and crashes are run again, no others")
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    command = "python -m benchmarks.mutate " + " ".join(sys.argv[1:])

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
    results: dict[str, list[Any]] = {}
    if arguments.results and arguments.results.exists():
        results = dict(json.loads(line) for line in arguments.results.read_text("utf-8").splitlines())
    for path in TARGETS:
        left = [m for m in chosen if m.path == path and results.get(m.key, ["survived"])[0] in ("survived", "crash")]
        if not left:
            continue
        worker = Worker(path, arguments.limit)
        how, test, seconds = worker.run((ROOT / path).read_text("utf-8"), patience=10.0)
        if how != "survived":
            raise SystemExit(f"the tests of {path} fail without any change: {how} {test}")
        # a survivor runs every test: a limit below what they all take would report it as one that came to no end
        worker.limit = max(worker.limit, 2 * seconds)
        for m in left:
            how, test, seconds = worker.run(m.source)
            if how == "error":
                raise SystemExit(f"pytest failed with status {test} on {m.path}:{m.line} {m.after!r}")
            results[m.key] = [how, test, seconds]
            print(f"{how:9}{seconds:5.1f} s {m.path}:{m.line} {m.before[:60]!r} -> {m.after[:60]!r} {test}", flush=True)
            if arguments.results:
                with arguments.results.open("a", encoding="utf-8") as file:
                    file.write(json.dumps([m.key, results[m.key]]) + "\n")
        worker.close()
    text = report(results, chosen, spared, command)
    if arguments.output:
        arguments.output.write_text(text, "utf-8")
    print(text)


if __name__ == "__main__":
    main()
