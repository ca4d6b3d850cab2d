"""`python -m atlas_jax.experiments.reproduction`: runs what has not been run, and writes the report."""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

import jax

from atlas_jax.experiments.reproduction import arms, report, runs

UNFINISHED = 3
"""Exit status where time was up: the same command goes on."""


def main(argv: list[str] | None = None) -> int:
    """The command line; `--help` explains it."""
    parser = argparse.ArgumentParser(prog="python -m atlas_jax.experiments.reproduction", description=__doc__)
    parser.add_argument("--size", choices=sorted(arms.SIZES), default="tiny")
    parser.add_argument("--seeds", type=int, default=3, help="of each model (%(default)s)")
    parser.add_argument("--parts", nargs="+", default=["text", "ablation", "mqar", "needle"], help="(all)")
    parser.add_argument(
        "--texts", type=Path, default=Path("data/corpora/documents"), help="folder of .txt (%(default)s)"
    )
    parser.add_argument("--out", type=Path, default=Path("build/reproduction"), help="runs are kept here (%(default)s)")
    parser.add_argument("--report", type=Path, help="page to write (in --out if not given)")
    parser.add_argument(
        "--minutes", type=float, help=f"leave after so long, with status {UNFINISHED}, to be called again"
    )
    args = parser.parse_args(argv)
    unknown = sorted(set(args.parts) - {"text", "ablation", "mqar", "needle"})
    if unknown or args.seeds < 1:
        parser.error(f"no part {unknown[0]!r}" if unknown else "--seeds must be positive")
    size, folder = arms.SIZES[args.size], args.out / args.size
    deadline = float("inf") if args.minutes is None else time.monotonic() + 60 * args.minutes
    folder.mkdir(parents=True, exist_ok=True)
    jax.config.update("jax_compilation_cache_dir", str((folder / "compiled").absolute()))  # kept from call to call
    wanted, found, left = list(runs.jobs(args.parts, args.seeds)), {}, False
    for job in wanted:
        try:
            found[job] = runs.run(size, job, folder, args.texts, deadline)
            print(f"{len(found)} of {len(wanted)}: {job.name}", flush=True)
        except runs.TimeUp:
            left = True
            break
    command = f"python -m atlas_jax.experiments.reproduction --size {args.size} --seeds {args.seeds}"
    if found:
        report.write(size, found, args.report or folder / "reproduction.md", command)
    return UNFINISHED if left else 0


if __name__ == "__main__":
    sys.exit(main())
