"""Times titans-pytorch's NeuralMemory; run by memory_speed.py with the Python of an environment that has it.

First prints how many weights each variant's memory has, a JSON object. Then reads one JSON list [variant, tokens,
"forward" or "both", calls] per line and answers each with seconds per call.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from typing import Any

import torch
from titans_pytorch import MemoryMLP, NeuralMemory
from torch.nn import Module, Parameter
from torch.nn.functional import gelu


class EqualMLP(Module):
    """An MLP with the other side's matrices: x + W1·σ(W2·φ(x)), or with ⊙ W3·φ(x) where it is gated.

    φ is the key, or the constant, the key and products of two random sums of it, 4·dim features in all.
    """

    def __init__(self, dim: int, gated: bool, features: bool) -> None:
        super().__init__()
        hidden, width = 4 * dim, 4 * dim if features else dim
        self.w1 = Parameter(torch.randn(hidden, dim) * hidden**-0.5)
        self.w2 = Parameter(torch.randn(width, hidden) * width**-0.5)
        if gated:
            self.w3 = Parameter(torch.randn(width, hidden) * width**-0.5)
        self._gated = gated
        # no buffer: NeuralMemory refuses models that have any
        self._signs = torch.randint(0, 2, (2, dim, width - 1 - dim)) * 2.0 - 1.0 if features else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., dim] to [..., dim]."""
        phi = x
        if self._signs is not None:
            one, other = self._signs
            products = (x @ one) * (x @ other) * (2 * one.shape[-1]) ** -0.5
            phi = torch.cat([torch.ones_like(x[..., :1]), x, products], dim=-1)
        hidden = gelu(phi @ self.w2)
        if self._gated:
            hidden = hidden * (phi @ self.w3)
        return x + hidden @ self.w1


def make_memory(arguments: argparse.Namespace, variant: dict[str, Any]) -> NeuralMemory:
    """A memory with the benchmark's sizes; without the norm of its input, which the other side has not got either."""
    torch.manual_seed(0)
    options = {"chunk_size": arguments.chunk, "heads": 1, "pre_rmsnorm": False} | variant
    gated, features = options.pop("gated", False), options.pop("features", False)
    if gated or features:
        model = EqualMLP(arguments.dim, gated, features)
        options["mem_model_norm_add_residual"] = False
    else:
        model = MemoryMLP(arguments.dim, depth=options.pop("depth", 2), expansion_factor=4.0)
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
    parser.add_argument("--variants", type=json.loads, required=True, help="options by name")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    clock = time.process_time if arguments.clock == "cpu" else time.perf_counter
    memories = {name: make_memory(arguments, options) for name, options in arguments.variants.items()}
    weights = {name: sum(w.numel() for w in memory.memory_model_parameters) for name, memory in memories.items()}
    print(json.dumps(weights), flush=True)
    for line in sys.stdin:
        name, length, mode, calls = json.loads(line)
        x = torch.randn(arguments.batch, length, arguments.dim)
        start = clock()
        for _ in range(calls):
            run(memories[name], x, mode)
        print((clock() - start) / calls, flush=True)


if __name__ == "__main__":
    main()
