"""Times titans-pytorch's NeuralMemory; run by memory_speed.py with the Python of an environment that has it."""

from __future__ import annotations

import argparse
import json
import time

import torch
from titans_pytorch import MemoryMLP, NeuralMemory


def main() -> None:
    """Prints one JSON object: seconds per call by length, forward and forward with backward."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--dim", type=int, required=True)
    parser.add_argument("--batch", type=int, required=True)
    parser.add_argument("--chunk", type=int, required=True)
    parser.add_argument("--lengths", type=int, nargs="+", required=True)
    parser.add_argument("--repeats", type=int, required=True)
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--clock", choices=("wall", "cpu"), required=True)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    clock = time.process_time if arguments.clock == "cpu" else time.perf_counter
    torch.manual_seed(0)
    memory = NeuralMemory(
        dim=arguments.dim,
        chunk_size=arguments.chunk,
        heads=1,
        model=MemoryMLP(arguments.dim, depth=2, expansion_factor=4.0),
    )

    def forward(x: torch.Tensor) -> None:
        with torch.no_grad():
            memory(x)

    def both(x: torch.Tensor) -> None:
        memory.zero_grad()
        memory(x)[0].square().mean().backward()

    result: dict[str, dict[int, float]] = {"forward": {}, "both": {}}
    for length in arguments.lengths:
        x = torch.randn(arguments.batch, length, arguments.dim)
        for name, call in (("forward", forward), ("both", both)):
            call(x)
            best = float("inf")
            for _ in range(arguments.repeats):
                start = clock()
                call(x)
                best = min(best, clock() - start)
            result[name][length] = best
    print(json.dumps(result))


if __name__ == "__main__":
    main()
