"""`python -m atlas_jax.model.lm`: trains a byte-level model on a text file and writes it as GGUF."""

from __future__ import annotations

import argparse
import dataclasses
import os
from pathlib import Path

import jax

from atlas_jax.gguf import BYTE_VOCAB, byte_vocabulary
from atlas_jax.memory import PRESETS
from atlas_jax.model.lm.config import LAYER_KINDS, MEMORY_KINDS, LMConfig
from atlas_jax.model.lm.data import text_batches
from atlas_jax.model.lm.export import export_gguf
from atlas_jax.model.lm.training import TrainConfig, train


def main(argv: list[str] | None = None) -> None:
    """The command line; `--help` explains it."""
    kinds = "; ".join(f"{letter}: {text}" for letter, text in LAYER_KINDS.items())
    parser = argparse.ArgumentParser(prog="python -m atlas_jax.model.lm", description=__doc__, epilog=kinds)
    parser.add_argument("text", type=Path, help="file to learn from")
    parser.add_argument("gguf", type=Path, help="file to write")
    parser.add_argument("--pattern", default="AAAA", help="one letter per layer (default: %(default)s)")
    parser.add_argument("--rule", choices=sorted(PRESETS), default="omeganet", help="memory of M, C, G and L layers")
    parser.add_argument(
        "--chunk", type=int, default=16, help="tokens per anchor of the memory; delta rules keep their 1"
    )
    parser.add_argument("--embed", type=int, default=128)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--window", type=int, default=64, help="tokens of sliding-window attention")
    parser.add_argument("--length", type=int, default=256, help="tokens of a training sequence")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--checkpoints", type=Path, help="directory to keep checkpoints in, and to go on from")
    parser.add_argument(
        "--devices",
        choices=["local", "pmap", "sharded"],
        default="local",
        help="one device, or all of them, each with its part of a batch; a CPU counts as one device per core",
    )
    args = parser.parse_args(argv)
    if args.devices != "local":
        # XLA runs a memory's loop over chunks on one core of a device
        jax.config.update("jax_num_cpu_devices", len(os.sched_getaffinity(0)))

    dim = args.embed // args.heads
    rule = PRESETS[args.rule](dim, dim) if set(args.pattern) & MEMORY_KINDS else None
    if rule is not None and not rule.sequential:
        rule = dataclasses.replace(rule, chunk=args.chunk)
    model = LMConfig(
        vocab=BYTE_VOCAB,
        embed=args.embed,
        ff=3 * args.embed,
        heads=args.heads,
        pattern=args.pattern,
        window=args.window,
        rule=rule,
        memory_heads=args.heads,
    )
    source = text_batches(args.text.read_bytes(), batch=args.batch, length=args.length, seed=args.seed)
    run = TrainConfig(steps=args.steps, seed=args.seed, devices=args.devices)
    trained = train(model, run, source, directory=args.checkpoints, show=True)
    export_gguf(args.gguf, model, trained.params, byte_vocabulary(), name=args.gguf.stem)
    if trained.losses:
        last = trained.losses[-20:]
        print(f"{args.gguf.name}: {sum(last) / len(last):.3f} nats per byte over the last {len(last)} steps")


if __name__ == "__main__":
    main()
