"""Tokens per second of every memory preset, forward and with backward, beside titans-pytorch at equal sizes.

    python -m benchmarks.memory_speed --titans-python PATH_TO_PYTHON --output docs/benchmarks/memory_speed.md

Every contender is a layer on [batch, T, dim]: projections to q, k, v and gates, then one memory of width dim; an MLP
memory has two layers and 4·dim hidden units. Batch, chunks, cores and float32 are the same for both sides. All are
measured in turn, round after round, so what else the machine does meets them alike; a figure is the median of the rounds,
a ratio the median of the rounds' ratios. Compiling does not count. `--clock cpu` counts processor seconds of one thread.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import math
import os
import shlex
import statistics
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from atlas_jax.memory import PRESETS, Features, MemoryRule, chunked, init_params, init_state, make_tokens

MODES = ("forward", "both")
SETTLE = 0.1
"""Seconds between the two sides: a thread pool spins for a while when its work is done."""

_NOTES = (
    "As it comes, titans-pytorch averages gates over a chunk and takes all gradients at the first memory, and its MLP and "
    "matrix end in a norm. Where presets have features of their own, or a gate, its memory is an MLP with the same matrices "
    "and no norm, on the same kind of features: the key and products of two random sums of it, 256 in all.",
    "Newton–Schulz per token is on shorter texts: a matrix of 256 × 256 takes half a Gflop a token and several megabytes of "
    "intermediates, which titans-pytorch keeps for all tokens.",
    "`mesa` solves the regression of all tokens so far, as no memory of titans-pytorch does, and is beside the MLP. It has "
    "as many weights as the matrix and as many moments again; but the matrix's step is a product, and faster on long texts. "
    "It takes longer where gates forget much within a few tokens: conjugate gradients then give way to a factor per token.",
)

Layer = Callable[[Any, jax.Array], jax.Array]
Cell = tuple[int, str]
"""Tokens, and forward or both."""


@dataclass(frozen=True)
class Group:
    """Presets, and the memory of titans-pytorch that has as many weights.

    Attributes:
      section: what the memories' steps are, the heading of a table.
      peer: what its memory is.
      options: of its NeuralMemory, and of what `titans_peer.py` gives it as a memory.
      lengths: tokens of the texts.
      rules: by name.
    """

    section: str
    peer: str
    options: dict[str, Any]
    lengths: list[int]
    rules: dict[str, MemoryRule]


@dataclass
class Contender:
    """One row: how to run it, and what was found.

    Attributes:
      prepare: makes a cell ready: returns a function of a number of calls, to seconds per call, and bytes of temporaries.
      lengths: tokens of the texts it gets.
      state: numbers in the weights of one memory.
      peer: the row it is compared with; None for that row itself, or without titans-pytorch.
      seconds: of every round, by cell.
      temporary: bytes the compiled program needs beside inputs and outputs, by cell; empty for the peer.
    """

    prepare: Callable[[Cell], tuple[Callable[[int], float], int | None]]
    lengths: list[int]
    state: int
    peer: Contender | None = None
    seconds: dict[Cell, list[float]] = field(default_factory=dict)
    temporary: dict[Cell, int] = field(default_factory=dict)


def groups(arguments: argparse.Namespace) -> list[Group]:
    """Every preset, with the chunks of titans-pytorch; those with features of their own on plain keys too."""
    dim = arguments.dim

    def preset(name: str, **overrides: Any) -> MemoryRule:
        plain = PRESETS[name](dim, dim)
        chunk = {} if plain.sequential or plain.window is None else {"chunk": arguments.chunk}
        return PRESETS[name](dim, dim, **chunk | overrides)

    plain_keys, muon = {"features": Features()}, ("atlas", "atlas_pp")
    plain = {name: preset(name) for name in PRESETS if name not in ("omeganet", *muon)}
    # titans-pytorch has nothing that solves a regression as `mesa` does: it is with the MLPs, see the notes
    matrices = {name: rule for name, rule in plain.items() if rule.memory == "matrix" and name != "mesa"}
    others = {name: rule for name, rule in plain.items() if name not in matrices}
    others["omeganet, plain keys"] = preset("omeganet", **plain_keys)
    first = "Gradient descent"
    found = [
        Group(first, "a matrix", {"depth": 1}, arguments.lengths, matrices),
        Group(first, "an MLP", {}, arguments.lengths, others),
        Group(first, "an MLP on features", {"features": True}, arguments.lengths, {"omeganet": preset("omeganet")}),
    ]
    for per, name in itertools.product(("chunk", "token"), muon):
        section, mlp = f"Newton–Schulz per {per}", "a gated MLP" if name == "atlas_pp" else "an MLP"
        lengths = arguments.lengths if per == "chunk" else arguments.token_lengths
        options = {"spectral_norm_surprises": True, "gated": name == "atlas_pp"}
        options |= {} if per == "chunk" else {"chunk_size": 1}
        on_plain, own = preset(name, ns_per=per, **plain_keys), preset(name, ns_per=per)
        found += [
            Group(section, mlp, options, lengths, {f"{name}, plain keys": on_plain}),
            Group(section, f"{mlp} on features", options | {"features": True}, lengths, {name: own}),
        ]
    return found


def make_layer(rule: MemoryRule, dim: int) -> tuple[Any, Layer]:
    """Parameters and forward function of projections and memory."""
    key, *keys = jax.random.split(jax.random.key(0), 4)
    projections = {name: jax.random.normal(k, (dim, dim)) * dim**-0.5 for name, k in zip("qkv", keys, strict=True)}
    gates = jax.random.normal(key, (dim, 4)) * 0.02
    params = {"projections": projections, "gates": gates, "memory": init_params(rule, key)}

    def layer(params: Any, x: jax.Array) -> jax.Array:
        q, k, v = (x @ params["projections"][name] for name in "qkv")
        gate = jax.nn.sigmoid(x @ params["gates"] + jnp.asarray([-4.0, 4.0, 2.0, 2.0]))
        eta, alpha, theta, gamma = (gate[..., i : i + 1] for i in range(4))
        used = {name: gate for name, gate in {"eta": eta, "alpha": alpha, "theta": theta}.items() if rule.uses(name)}
        tokens = make_tokens(rule, q, k, v, **used, gamma=gamma)
        return chunked(rule, params["memory"], init_state(rule, params["memory"], x.shape[:1]), tokens)[1]

    return params, layer


def ours(rule: MemoryRule, group: Group, peer: Contender | None, arguments: argparse.Namespace) -> Contender:
    """A preset of this library, the batch divided over devices: each has the parameters, gradients are averaged."""
    params, layer = make_layer(rule, arguments.dim)
    mesh = jax.make_mesh((arguments.devices,), ("batch",))
    whole, rows = PartitionSpec(), PartitionSpec("batch")
    clock = time.process_time if arguments.clock == "cpu" else time.perf_counter

    def gradient(params: Any, x: jax.Array) -> Any:
        return jax.lax.pmean(jax.grad(lambda params: jnp.mean(layer(params, x) ** 2))(params), "batch")

    functions = {"forward": (layer, rows), "both": (gradient, whole)}
    placed = jax.device_put(params, NamedSharding(mesh, whole))

    def prepare(cell: Cell) -> tuple[Callable[[int], float], int]:
        length, mode = cell
        function, result = functions[mode]
        x = jax.random.normal(jax.random.key(1), (arguments.batch, length, arguments.dim))
        x = jax.device_put(x, NamedSharding(mesh, rows))
        divided = jax.shard_map(function, mesh=mesh, in_specs=(whole, rows), out_specs=result, check_vma=False)
        program = jax.jit(divided).lower(placed, x).compile()

        def seconds(calls: int) -> float:
            start = clock()
            for _ in range(calls):
                jax.block_until_ready(program(placed, x))
            return (clock() - start) / calls

        return seconds, program.memory_analysis().temp_size_in_bytes * arguments.devices

    state = sum(w.size for w in params["memory"].weights.values())
    return Contender(prepare, group.lengths, state, peer)


class Peer:
    """titans-pytorch in a process of its own."""

    def __init__(self, wanted: list[Group], arguments: argparse.Namespace, threads: int) -> None:
        script = Path(__file__).with_name("titans_peer.py")
        names = ("dim", "batch", "chunk", "clock")
        options = [text for name in names for text in (f"--{name}", str(getattr(arguments, name)))]
        command = [arguments.titans_python, str(script), *options, "--threads", str(threads)]
        command += ["--variants", json.dumps({f"{g.section}: {g.peer}": g.options for g in wanted})]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self._weights = json.loads(self._answer())

    def contender(self, group: Group) -> Contender:
        """Its memory in a group."""
        name = f"{group.section}: {group.peer}"

        def prepare(cell: Cell) -> tuple[Callable[[int], float], None]:
            return lambda calls: self._seconds(name, *cell, calls), None

        return Contender(prepare, group.lengths, self._weights[name])

    def close(self) -> None:
        """Ends the process."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()

    def _seconds(self, name: str, length: int, mode: str, calls: int) -> float:
        assert self._process.stdin is not None
        time.sleep(SETTLE)
        print(json.dumps([name, length, mode, calls]), file=self._process.stdin, flush=True)
        answer = self._answer()
        time.sleep(SETTLE)
        return float(answer)

    def _answer(self) -> str:
        assert self._process.stdout is not None
        answer = self._process.stdout.readline()
        if not answer:
            raise RuntimeError("titans-pytorch's process has ended; its error is above")
        return answer


def measure(
    contenders: list[Contender], arguments: argparse.Namespace, threads: int, done: Callable[[int], None]
) -> None:
    """Fills in the seconds of all cells, in turn.

    Args:
      done: called after every round with how many there have been.
    """
    cells = [(contender, (n, mode)) for contender in contenders for n in contender.lengths for mode in MODES]
    with ThreadPoolExecutor(threads) as pool:  # the compiler uses one thread per program
        prepared = list(pool.map(lambda pair: pair[0].prepare(pair[1]), cells))
    counts = []
    for (contender, cell), (call, temporary) in zip(cells, prepared, strict=True):
        if temporary is not None:
            contender.temporary[cell] = temporary
        counts.append(math.ceil(arguments.least / min(call(1), call(1))))
    order = sorted(
        range(len(cells)), key=lambda index: cells[index][1]
    )  # a row directly after the one it is compared with
    for number in range(arguments.rounds):
        for index in order:
            (contender, cell), (call, _), calls = cells[index], prepared[index], counts[index]
            if calls > 1:
                call(1)  # brings its data back into the caches
            contender.seconds.setdefault(cell, []).append(call(calls))
        done(number + 1)


def _head(rows: dict[str, Contender], *more: str) -> tuple[list[Cell], list[str]]:
    cells = [(n, mode) for mode in MODES for n in next(iter(rows.values())).lengths]
    names = [f"{'forward' if mode == 'forward' else 'with backward'}, {n}" for n, mode in cells]
    return cells, [
        "| memory | " + " | ".join([*more, *names]) + " |",
        "|---" + "|---:" * (len(names) + len(more)) + "|",
    ]


def speed_table(rows: dict[str, Contender], batch: int) -> list[str]:
    """Markdown: tokens per second by length and how many times the peer's, the row before."""
    cells, lines = _head(rows, "weights")
    for name, row in rows.items():
        texts = [f"{row.state:,}"]
        for cell in cells:
            text = f"{batch * cell[0] / statistics.median(row.seconds[cell]):,.0f}"
            if row.peer is not None:
                pairs = zip(row.peer.seconds[cell], row.seconds[cell], strict=True)
                text += f" ({statistics.median(theirs / own for theirs, own in pairs):.2f}×)"
            texts.append(text)
        lines.append(f"| {name} | " + " | ".join(texts) + " |")
    return lines


def growth_table(rows: dict[str, Contender]) -> list[str]:
    """Markdown: megabytes of temporaries by length, and how the seconds of a call with backward grow."""
    cells, lines = _head(rows)
    lengths = next(iter(rows.values())).lengths
    if len(lengths) > 1:
        lines = [f"{lines[0]} growth of seconds |", f"{lines[1]}---:|"]
    for name, row in rows.items():
        texts = [f"{row.temporary[cell] / 1e6:.1f}" for cell in cells]
        if len(lengths) > 1:
            first, last = (statistics.median(row.seconds[n, "both"]) for n in (lengths[0], lengths[-1]))
            texts.append(f"{last / first:.1f}× for {lengths[-1] / lengths[0]:.0f}×")
        lines.append(f"| {name} | " + " | ".join(texts) + " |")
    return lines


def report(sections: dict[str, dict[str, Contender]], arguments: argparse.Namespace, threads: int, rounds: int) -> str:
    """The run as Markdown."""
    if arguments.clock == "cpu":
        seconds, cores = "processor second of one thread", "Both sides have one core."
    else:
        seconds = f"second on {threads} cores"
        cores = (
            f"titans-pytorch has torch with {threads} threads inside each operation. This library has "
            f"{arguments.devices} XLA CPU device{'s' if arguments.devices > 1 else ''}, the batch divided over them by "
            "`jax.shard_map`, parameters on each and gradients averaged, as in data-parallel training: XLA runs the loop "
            "over chunks on one core of a device."
        )
    paragraphs = [
        f"Tokens per {seconds} of a layer [batch {arguments.batch}, T, {arguments.dim}] by T, {jax.default_backend()}, "
        f"float32, chunks of {arguments.chunk} (DeltaNets: their own of 1, in blocks). In brackets, how many times the "
        "speed of titans-pytorch in the row before. "
        f"Medians of {rounds} interleaved rounds, without compiling. `weights` are the numbers in one memory's matrices. "
        f"Made by `python -m benchmarks.memory_speed {shlex.join(sys.argv[1:])}`.",
        cores,
        *_NOTES,
    ]
    lines = ["# Speed of the memories", ""]
    for paragraph in paragraphs:
        lines += [textwrap.fill(paragraph, 120, break_long_words=False, break_on_hyphens=False), ""]
    for section, rows in sections.items():
        lines += [f"## {section}", "", *speed_table(rows, arguments.batch), ""]
    lines += [
        "## Length",
        "",
        "Megabytes of temporaries of the compiled program (XLA's `memory_analysis`, all devices together), by length, and",
        "how seconds with backward grow from the shortest to the longest text.",
        "",
    ]
    for section, rows in sections.items():
        own = {name: row for name, row in rows.items() if row.temporary}
        lines += [f"### {section}", "", *growth_table(own), ""]
    return "\n".join(lines)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dim", type=int, default=64)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--chunk", type=int, default=64)
    parser.add_argument("--lengths", type=int, nargs="+", default=[256, 2048])
    parser.add_argument("--token-lengths", type=int, nargs="+", default=[64], help="with Newton–Schulz per token")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--least", type=float, default=0.05, help="seconds of calls that make one measurement")
    parser.add_argument("--clock", choices=("wall", "cpu"), default="wall")
    parser.add_argument("--devices", type=int, help="CPU devices of this library; default: one per core")
    parser.add_argument(
        "--sections", nargs="*", choices=("descent", "chunk", "token"), help="only tables of these steps"
    )
    parser.add_argument(
        "--presets", nargs="*", choices=sorted(PRESETS), help="only these, and what they are compared with"
    )
    parser.add_argument("--titans-python", help="Python of an environment with titans-pytorch; left out: not compared")
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    threads = len(os.sched_getaffinity(0))
    if arguments.clock == "cpu":
        threads = 1
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    arguments.devices = arguments.devices or threads
    if arguments.batch % arguments.devices:
        parser.error(f"--devices: {arguments.devices} do not divide a batch of {arguments.batch}")
    jax.config.update("jax_num_cpu_devices", arguments.devices)  # before anything uses a device

    wanted = []
    for group in groups(arguments):
        kept = {n: r for n, r in group.rules.items() if not arguments.presets or n.split(",")[0] in arguments.presets}
        if kept and (not arguments.sections or group.section.split()[-1] in arguments.sections):
            wanted.append(dataclasses.replace(group, rules=kept))
    peer = Peer(wanted, arguments, threads) if arguments.titans_python else None
    sections: dict[str, dict[str, Contender]] = {}
    for group in wanted:
        rows = sections.setdefault(group.section, {})
        theirs = peer.contender(group) if peer else None
        if theirs:
            rows[f"titans-pytorch, {group.peer}"] = theirs
        rows |= {name: ours(rule, group, theirs, arguments) for name, rule in group.rules.items()}

    def done(rounds: int) -> None:
        text = report(sections, arguments, threads, rounds)
        if arguments.output:
            arguments.output.write_text(text, "utf-8")
        if rounds == arguments.rounds:
            print(text)

    measure([row for rows in sections.values() for row in rows.values()], arguments, threads, done)
    if peer:
        peer.close()


if __name__ == "__main__":
    main()
