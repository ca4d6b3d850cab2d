"""Times titans-pytorch's NeuralMemory; run by memory_speed.py with the Python of an environment that has it.

Reads one JSON list [variant, tokens, "forward" or "both", calls] per line and answers each with seconds per call.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from typing import Any

import torch
from titans_pytorch import MemoryMLP, NeuralMemory


def make_memory(arguments: argparse.Namespace, variant: dict[str, Any]) -> NeuralMemory:
    """A memory with the benchmark's sizes; without the norm of its input, which the other side has not got either."""
    torch.manual_seed(0)
    model = MemoryMLP(arguments.dim, depth=2, expansion_factor=4.0)
    options = {"chunk_size": arguments.chunk, "heads": 1, "pre_rmsnorm": False} | variant
    return NeuralMemory(dim=arguments.dim, model=model, **options)


def run(memory: NeuralMemory, x: torch.Tensor, mode: str) -> None:
    """One call, with or without gradients of all its parameters."""
    if mode == "forward":
        with torch.no_grad():
            memory(x)
    else:
        memory.zero_grad()
        memory(x)[0].square().mean().backward()


def main() -> None:
    """Answers until its input ends."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--dim", type=int, required=True)
    parser.add_argument("--batch", type=int, required=True)
    parser.add_argument("--chunk", type=int, required=True)
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--clock", choices=("wall", "cpu"), required=True)
    parser.add_argument("--variants", type=json.loads, required=True, help="options of NeuralMemory by name")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    clock = time.process_time if arguments.clock == "cpu" else time.perf_counter
    memories = {name: make_memory(arguments, options) for name, options in arguments.variants.items()}
    for line in sys.stdin:
        name, length, mode, calls = json.loads(line)
        x = torch.randn(arguments.batch, length, arguments.dim)
        start = clock()
        for _ in range(calls):
            run(memories[name], x, mode)
        print((clock() - start) / calls, flush=True)


if __name__ == "__main__":
    main()
