"""Tokens per second of every memory preset, forward and with backward, beside titans-pytorch at equal sizes.

    python benchmarks/memory_speed.py --titans-python PATH_TO_PYTHON --output docs/memory_speed.md

Every contender is a layer on [batch, T, dim]: projections to q, k, v and gates, then one memory of width dim; an MLP
memory has two layers and 4·dim hidden units. Batch, chunks, threads and float32 are the same for both sides. All are
measured in turn, round after round, so what else the machine does meets them alike; a figure is the median of the rounds,
a ratio the median of the rounds' ratios. Compiling does not count. `--clock cpu` counts processor seconds of one thread.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import subprocess
import textwrap
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from atlas_jax.memory.rules import PRESETS, Features, MemoryRule, chunked, init_params, init_state, make_tokens

MODES = ("forward", "both")
_REASONS = (
    "`omeganet` is behind for what it computes: it projects 2 145 monomials of every key and query to 256 features, about",
    "2.2 Mflop a token and three times that with backward, and has 2.5 times the weights. The `atlas` presets with",
    "monomials of their own orthogonalise a 256 × 256 matrix per token and are not here. `mesa` takes longer where gates",
    "forget much within a few tokens: conjugate gradients then give way to a factor per token.",
)
SETTLE = 0.1
"""Seconds between the two sides: a thread pool spins for a while when its work is done."""

PEERS: dict[str, dict[str, Any]] = {
    "titans-pytorch": {},
    "titans-pytorch, Newton–Schulz per chunk": {"spectral_norm_surprises": True},
    "titans-pytorch, Newton–Schulz per token": {"spectral_norm_surprises": True, "chunk_size": 1},
}
"""Options of its NeuralMemory. As it comes it averages gates over a chunk and takes all gradients at the first memory."""

Cell = tuple[int, str]
"""Tokens, and forward or both."""


@dataclass
class Contender:
    """One row: how to run it, and what was found.

    Attributes:
      prepare: makes a cell ready: returns a function of a number of calls, to seconds per call, and bytes of temporaries.
      seconds: of every round, by cell.
      temporary: bytes the compiled program needs beside inputs and outputs, by cell; empty for the peer.
      state: numbers in the weights of one memory.
    """

    prepare: Callable[[Cell], tuple[Callable[[int], float], int | None]]
    seconds: dict[Cell, list[float]] = field(default_factory=dict)
    temporary: dict[Cell, int] = field(default_factory=dict)
    state: int = 0


def rules(dim: int, chunk: int) -> dict[str, dict[str, MemoryRule]]:
    """By peer: the presets with its chunks, on plain keys where their own features would make them larger than it.

    `omeganet` is there with its features too; with Newton–Schulz they would take minutes.
    """

    def preset(name: str, **overrides: Any) -> MemoryRule:
        plain = PRESETS[name](dim, dim)
        return PRESETS[name](dim, dim, **({} if plain.chunk == 1 else {"chunk": chunk}) | overrides)

    small, muon = {"features": Features()}, ("atlas", "atlas_pp")
    descent = {name: preset(name) for name in PRESETS if name not in muon}

    def orthogonal(per: str) -> dict[str, MemoryRule]:
        return {f"{name}, per {per}, plain keys": preset(name, ns_per=per, **small) for name in muon}

    return {
        "titans-pytorch": descent | {"omeganet, plain keys": preset("omeganet", **small)},
        "titans-pytorch, Newton–Schulz per chunk": orthogonal("chunk"),
        "titans-pytorch, Newton–Schulz per token": orthogonal("token"),
    }


def make_layer(rule: MemoryRule, dim: int, batch: int) -> tuple[Any, Callable[[Any, jax.Array], jax.Array]]:
    """Parameters and forward function of projections and memory."""
    key, *keys = jax.random.split(jax.random.key(0), 4)
    projections = {name: jax.random.normal(k, (dim, dim)) * dim**-0.5 for name, k in zip("qkv", keys, strict=True)}
    gates = jax.random.normal(key, (dim, 4)) * 0.02
    params = {"projections": projections, "gates": gates, "memory": init_params(rule, key)}

    def layer(params: Any, x: jax.Array) -> jax.Array:
        q, k, v = (x @ params["projections"][name] for name in "qkv")
        gate = jax.nn.sigmoid(x @ params["gates"] + jnp.asarray([-4.0, 4.0, 2.0, 2.0]))
        eta, alpha, theta, gamma = (gate[..., i : i + 1] for i in range(4))
        tokens = make_tokens(rule, q, k, v, eta=eta, alpha=alpha, theta=theta, gamma=gamma)
        return chunked(rule, params["memory"], init_state(rule, params["memory"], (batch,)), tokens)[1]

    return params, layer


def ours(rule: MemoryRule, arguments: argparse.Namespace) -> Contender:
    """A preset of this library."""
    params, layer = make_layer(rule, arguments.dim, arguments.batch)
    clock = time.process_time if arguments.clock == "cpu" else time.perf_counter
    functions = {"forward": layer, "both": jax.grad(lambda params, x: jnp.mean(layer(params, x) ** 2))}

    def prepare(cell: Cell) -> tuple[Callable[[int], float], int]:
        length, mode = cell
        x = jax.random.normal(jax.random.key(1), (arguments.batch, length, arguments.dim))
        program = jax.jit(functions[mode]).lower(params, x).compile()

        def seconds(calls: int) -> float:
            start = clock()
            for _ in range(calls):
                jax.block_until_ready(program(params, x))
            return (clock() - start) / calls

        return seconds, program.memory_analysis().temp_size_in_bytes

    return Contender(prepare, state=sum(w.size for w in params["memory"].weights.values()))


class Peer:
    """titans-pytorch in a process of its own."""

    def __init__(self, arguments: argparse.Namespace, threads: int) -> None:
        script = Path(__file__).with_name("titans_peer.py")
        names = ("dim", "batch", "chunk", "clock")
        options = [text for name in names for text in (f"--{name}", str(getattr(arguments, name)))]
        command = [arguments.titans_python, str(script), *options, "--threads", str(threads)]
        command += ["--variants", json.dumps(PEERS)]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def contender(self, name: str, dim: int) -> Contender:
        """One of its variants."""

        def prepare(cell: Cell) -> tuple[Callable[[int], float], None]:
            return lambda calls: self._seconds(name, *cell, calls), None

        return Contender(prepare, state=2 * 4 * dim * dim)

    def close(self) -> None:
        """Ends the process."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()

    def _seconds(self, name: str, length: int, mode: str, calls: int) -> float:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        time.sleep(SETTLE)
        print(json.dumps([name, length, mode, calls]), file=self._process.stdin, flush=True)
        answer = self._process.stdout.readline()
        if not answer:
            raise RuntimeError("titans-pytorch's process has ended; its error is above")
        time.sleep(SETTLE)
        return float(answer)


def measure(
    contenders: dict[str, Contender], arguments: argparse.Namespace, threads: int, done: Callable[[int], None]
) -> None:
    """Fills in the seconds of all cells, in turn; a longer text is left out where it would be past the limit.

    Args:
      done: called after every round with how many there have been.
    """
    cells = {
        (name, (n, mode)): contender
        for name, contender in contenders.items()
        for n in (arguments.lengths[:1] if "per token" in name else arguments.lengths)
        for mode in MODES
    }
    with ThreadPoolExecutor(threads) as pool:  # the compiler uses one thread per program
        prepared = dict(zip(cells, pool.map(lambda key: cells[key].prepare(key[1]), cells), strict=True))
    ready: dict[tuple[str, Cell], tuple[Callable[[int], float], int]] = {}
    past: dict[tuple[str, str], int] = {}
    for (name, cell), contender in cells.items():
        length, mode = cell
        call, temporary = prepared[name, cell]
        if temporary is not None:
            contender.temporary[cell] = temporary
        if length > past.get((name, mode), length):
            continue
        taken = min(call(1), call(1))
        ready[name, cell] = call, math.ceil(arguments.least / taken)
        if taken * arguments.lengths[-1] / length > arguments.limit:
            past[name, mode] = length
    for number in range(arguments.rounds):
        for length in arguments.lengths:
            for mode in MODES:
                for name, contender in contenders.items():
                    if (name, (length, mode)) in ready:
                        call, calls = ready[name, (length, mode)]
                        if calls > 1:
                            call(1)  # brings its data back into the caches
                        contender.seconds.setdefault((length, mode), []).append(call(calls))
        done(number + 1)


def speed_table(rows: dict[str, Contender], peer: Contender | None, arguments: argparse.Namespace) -> list[str]:
    """Markdown: tokens per second by length and how many times the peer's, the first row's."""
    cells = [(n, mode) for mode in MODES for n in arguments.lengths]
    heads = [f"{'forward' if mode == 'forward' else 'with backward'}, {n}" for n, mode in cells]
    lines = ["| memory | weights | " + " | ".join(heads) + " |", "|---" + "|---:" * (len(heads) + 1) + "|"]
    for name, row in rows.items():
        texts = []
        for cell in cells:
            if cell not in row.seconds:
                texts.append("")
                continue
            text = f"{arguments.batch * cell[0] / statistics.median(row.seconds[cell]):,.0f}"
            if peer is not None and peer is not row and cell in peer.seconds:
                pairs = zip(peer.seconds[cell], row.seconds[cell], strict=True)
                text += f" ({statistics.median(theirs / own for theirs, own in pairs):.2f}×)"
            texts.append(text)
        lines.append(f"| {name} | {row.state:,} | " + " | ".join(texts) + " |")
    return lines


def growth_table(rows: dict[str, Contender], arguments: argparse.Namespace) -> list[str]:
    """Markdown: megabytes of temporaries by length, and how the seconds of a call with backward grow."""
    cells = [(n, mode) for mode in MODES for n in arguments.lengths]
    heads = [f"{'forward' if mode == 'forward' else 'with backward'}, {n}" for n, mode in cells]
    lines = ["| memory | " + " | ".join(heads) + " | growth of seconds |", "|---" + "|---:" * (len(heads) + 1) + "|"]
    for name, row in rows.items():
        texts = [f"{row.temporary[cell] / 1e6:.1f}" if cell in row.temporary else "" for cell in cells]
        known = [n for n in arguments.lengths if (n, "both") in row.seconds]
        growth = ""
        if len(known) > 1:
            times = statistics.median(row.seconds[known[-1], "both"]) / statistics.median(row.seconds[known[0], "both"])
            growth = f"{times:.1f}× for {known[-1] / known[0]:.0f}×"
        lines.append(f"| {name} | " + " | ".join(texts) + f" | {growth} |")
    return lines


def report(groups: dict[str, dict[str, Contender]], arguments: argparse.Namespace, threads: int, rounds: int) -> str:
    """The run as Markdown."""
    seconds = "processor second of one thread" if arguments.clock == "cpu" else f"second on {threads} threads"
    lines = [
        "# Speed of the memories",
        "",
        f"Tokens per {seconds} of a layer [batch {arguments.batch}, T, {arguments.dim}] by T, {jax.default_backend()}, "
        f"float32, chunks of {arguments.chunk}",
        "(DeltaNets: their own of 1, in blocks). In brackets, how many times the speed of titans-pytorch in the first row.",
        f"Medians of {rounds} interleaved rounds, without compiling. `weights` are the numbers in one memory's",
        "matrices. Empty cells were past the time limit. Made by",
        textwrap.fill(
            "`python benchmarks/memory_speed.py --titans-python data/titans/bin/python"
            f"{' --clock cpu' if arguments.clock == 'cpu' else ''} --output docs/memory_speed.md"
            f"{' --presets ' + ' '.join(map(repr, arguments.presets)) if arguments.presets else ''}`.",
            120,
        ),
        "",
        *_REASONS,
        "",
    ]
    for peer, rows in groups.items():
        lines += [f"## Beside {peer}", "", *speed_table(rows, rows.get(peer), arguments), ""]
    own = {name: row for peer, rows in groups.items() for name, row in rows.items() if name != peer}
    lines += [
        "## Length",
        "",
        "Megabytes of temporaries of the compiled program (XLA's `memory_analysis`), by length, and how seconds with",
        "backward grow from the shortest to the longest text.",
        "",
        *growth_table(own, arguments),
        "",
    ]
    return "\n".join(lines)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dim", type=int, default=64)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--chunk", type=int, default=64)
    parser.add_argument("--lengths", type=int, nargs="+", default=[256, 2048])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--least", type=float, default=0.05, help="seconds of calls that make one measurement")
    parser.add_argument(
        "--limit", type=float, default=8.0, help="seconds that one call may take, but for the shortest text"
    )
    parser.add_argument("--clock", choices=("wall", "cpu"), default="wall")
    parser.add_argument("--presets", nargs="*", help="only these rows, and the peers they are compared with")
    parser.add_argument("--titans-python", help="Python of an environment with titans-pytorch; left out: not compared")
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    threads = len(os.sched_getaffinity(0))
    if arguments.clock == "cpu":
        threads = 1
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})

    peer = Peer(arguments, threads) if arguments.titans_python else None
    groups: dict[str, dict[str, Contender]] = {}
    for name, candidates in rules(arguments.dim, arguments.chunk).items():
        wanted = {n: r for n, r in candidates.items() if arguments.presets is None or n in arguments.presets}
        first = {name: peer.contender(name, arguments.dim)} if peer and wanted else {}
        if wanted:
            groups[name] = first | {n: ours(rule, arguments) for n, rule in wanted.items()}

    def done(rounds: int) -> None:
        text = report(groups, arguments, threads, rounds)
        if arguments.output:
            arguments.output.write_text(text, "utf-8")
        if rounds == arguments.rounds:
            print(text)

    measure({name: row for rows in groups.values() for name, row in rows.items()}, arguments, threads, done)
    if peer:
        peer.close()


if __name__ == "__main__":
    main()
