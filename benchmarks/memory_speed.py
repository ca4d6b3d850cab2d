"""Tokens per second of every memory preset, forward and with backward, beside titans-pytorch at equal sizes.

    python benchmarks/memory_speed.py --titans-python PATH_TO_PYTHON --output docs/memory_speed.md

Every contender is a layer on [batch, T, dim]: projections to q, k, v and gates, then one memory of width dim; an MLP
memory has two layers and 4·dim hidden units. Chunks are equal. A time is the best of a few calls, compilation excluded.
On a machine that does other work too, `--clock cpu` counts this process's processor seconds, on one thread, instead.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from atlas_jax.memory.rules import PRESETS, MemoryRule, chunked, init_params, init_state, make_tokens

PEER = "titans-pytorch"
Times = dict[str, dict[int, float]]


def contenders(dim: int, chunk: int) -> dict[str, MemoryRule]:
    """Every preset with chunks of the same size, and the variants that trade exactness for speed."""
    rules = {}
    for name, preset in reversed(PRESETS.items()):  # quick ones first
        plain = preset(dim, dim)
        rules[name] = plain if plain.chunk == 1 else preset(dim, dim, chunk=chunk)
    rules["atlas, NS per chunk"] = PRESETS["atlas"](dim, dim, chunk=chunk, ns_per="chunk")
    rules["atlas_pp, NS per chunk"] = PRESETS["atlas_pp"](dim, dim, chunk=chunk, ns_per="chunk")
    return rules


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


def best_time(call: Callable[[], Any], repeats: int, limit: float, clock: Callable[[], float]) -> float:
    """Best seconds of a few calls after one to compile; fewer where a call is slow."""
    jax.block_until_ready(call())
    best, spent = float("inf"), 0.0
    for _ in range(repeats):
        start = clock()
        jax.block_until_ready(call())
        taken = clock() - start
        best, spent = min(best, taken), spent + taken
        if spent > limit:
            break
    return best


def measure(rule: MemoryRule, arguments: argparse.Namespace) -> Times:
    """Seconds by length; longer texts are left out once one would take longer than the limit."""
    params, layer = make_layer(rule, arguments.dim, arguments.batch)
    clock = time.process_time if arguments.clock == "cpu" else time.perf_counter
    forward = jax.jit(layer)
    both = jax.jit(jax.grad(lambda params, x: jnp.mean(layer(params, x) ** 2)))
    times: Times = {"forward": {}, "both": {}}
    for name, function in (("forward", forward), ("both", both)):
        for length in arguments.lengths:
            x = jax.random.normal(jax.random.key(1), (arguments.batch, length, arguments.dim))
            taken = best_time(partial(function, params, x), arguments.repeats, arguments.limit, clock)
            times[name][length] = taken
            if taken * 4 > arguments.limit:
                break
    return times


def measure_peer(python: str, arguments: argparse.Namespace) -> Times:
    """The same of titans-pytorch, in its own environment."""
    script = Path(__file__).with_name("titans_peer.py")
    names = ("dim", "batch", "chunk", "repeats", "clock")
    options = [text for name in names for text in (f"--{name}", str(getattr(arguments, name)))]
    threads = "1" if arguments.clock == "cpu" else str(len(os.sched_getaffinity(0)))
    command = [python, str(script), *options, "--threads", threads, "--lengths", *map(str, arguments.lengths)]
    output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    found = json.loads(output.splitlines()[-1])
    return {name: {int(length): seconds for length, seconds in times.items()} for name, times in found.items()}


def table(results: dict[str, Times], arguments: argparse.Namespace) -> str:
    """Markdown: tokens per second by length, and how the cost grows from the first length to the last."""
    lengths, batch = arguments.lengths, arguments.batch
    head = [f"fwd {n}" for n in lengths] + [f"fwd+bwd {n}" for n in lengths]
    lines = ["| memory | " + " | ".join(head) + " | cost growth |", "|---" + "|---:" * (len(head) + 1) + "|"]
    for name, times in results.items():
        cells = []
        for form in ("forward", "both"):
            cells += [f"{batch * n / times[form][n]:,.0f}" if n in times[form] else "" for n in lengths]
        known = [n for n in lengths if n in times["both"]]
        first, last = known[0], known[-1]
        growth = times["both"][last] / times["both"][first]
        cells.append(f"{growth:.1f}× for {last // first}×" if last > first else "")
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def report(results: dict[str, Times], arguments: argparse.Namespace, threads: int) -> str:
    """The run as Markdown."""
    seconds = "processor second of one thread" if arguments.clock == "cpu" else f"second on {threads} threads"
    lines = [
        "# Speed of the memories",
        "",
        f"Tokens per {seconds} of a layer [batch {arguments.batch}, T, {arguments.dim}] by T, {jax.default_backend()}, "
        f"float32, chunks of {arguments.chunk} (DeltaNets: 1, in blocks of 64), best of {arguments.repeats}.",
        f"Made by `python benchmarks/memory_speed.py --clock {arguments.clock}`; empty cells were past the time limit.",
        "",
        table(results, arguments),
        "",
    ]
    return "\n".join(lines)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dim", type=int, default=64)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--chunk", type=int, default=64)
    parser.add_argument("--lengths", type=int, nargs="+", default=[256, 1024, 4096])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--limit", type=float, default=20.0, help="seconds that may go into one cell")
    parser.add_argument("--clock", choices=("wall", "cpu"), default="wall")
    parser.add_argument("--presets", nargs="*", help="only these")
    parser.add_argument("--titans-python", help="Python of an environment with titans-pytorch; left out: not compared")
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    threads = len(os.sched_getaffinity(0))
    if arguments.clock == "cpu":
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})

    results: dict[str, Times] = {}
    if arguments.titans_python:
        results[PEER] = measure_peer(arguments.titans_python, arguments)
    for name, rule in contenders(arguments.dim, arguments.chunk).items():
        if arguments.presets is None or name in arguments.presets:
            results[name] = measure(rule, arguments)
            print(table({name: results[name]}, arguments).splitlines()[-1], flush=True)
            if arguments.output:
                arguments.output.write_text(report(results, arguments, threads), "utf-8")
    print(report(results, arguments, threads))


if __name__ == "__main__":
    main()
