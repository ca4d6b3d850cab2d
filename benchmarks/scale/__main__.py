"""A million sessions on many replicas: what affinity is worth, and what the object store has to bear.

    python -m benchmarks.scale [--sessions 1000000] [--replicas 2 16 100] [--load 0.4] [--output docs/benchmarks/scale.md]

Every figure that `Costs` and `Habits` have is a flag.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path

from benchmarks.scale.simulation import Costs, Counts, Habits, Simulation

_COLUMNS = (
    *("replicas", "turns go to", "turns/s", "in memory", "on disk", "in the store", "resume p50 ms", "p99"),
    *("first token p50 ms", "p99", "GET/s", "PUT/s", "read MB/s", "written MB/s", "$ per million turns"),
)
HEAD = f"| {' | '.join(_COLUMNS)} |\n|---:|---|{'---:|' * (len(_COLUMNS) - 2)}"


def row(counts: Counts, costs: Costs, replicas: int, how: str) -> str:
    """A line of the table."""
    seconds, turns = counts.until - counts.since, max(1, counts.turns)
    share = {kind: count / sum(counts.kinds.values()) for kind, count in counts.kinds.items()}
    money = (counts.puts * costs.put_price + counts.gets * costs.get_price) / turns
    cells = [
        str(replicas),
        how,
        f"{turns / seconds:.0f}",
        *(f"{100 * share.get(kind, 0):.1f} %" for kind in ("memory", "disk", "store")),
        f"{1000 * _quantile(counts.resumed, 0.5):.0f}",
        f"{1000 * _quantile(counts.resumed, 0.99):.0f}",
        f"{1000 * _quantile(counts.first, 0.5):.0f}",
        f"{1000 * _quantile(counts.first, 0.99):.0f}",
        f"{counts.gets / seconds:.0f}",
        f"{counts.puts / seconds:.0f}",
        f"{counts.read / seconds / 1e6:.0f}",
        f"{counts.written / seconds / 1e6:.0f}",
        f"{1e6 * money:.1f}",
    ]
    return f"| {' | '.join(cells)} |"


def _quantile(values: Sequence[float], share: float) -> float:
    return sorted(values)[min(len(values) - 1, int(share * len(values)))] if values else math.nan


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sessions", type=int, default=1_000_000)
    parser.add_argument("--replicas", type=int, nargs="+", default=[2, 16, 100])
    parser.add_argument("--load", type=float, default=0.4, help="of what replicas can answer")
    parser.add_argument("--turns", type=int, default=2000, help="answered per replica")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, help="replace the table of this file")
    for one in (*fields(Costs), *fields(Habits)):
        parser.add_argument(f"--{one.name.replace('_', '-')}", type=type(one.default), default=one.default)
    args = parser.parse_args()
    chosen = vars(args)
    costs = Costs(**{one.name: chosen[one.name] for one in fields(Costs)})
    habits = Habits(**{one.name: chosen[one.name] for one in fields(Habits)})
    lines = [HEAD]
    print(HEAD, flush=True)
    for replicas in args.replicas:
        ways = [("their own", True, 0), ("any", False, 0)]
        if replicas >= 4:
            ways.append(("their own; a quarter is killed", True, replicas // 4))
        for how, affinity, lose in ways:
            simulation = Simulation(costs, habits, args.sessions, replicas, args.load, affinity, args.seed)
            lines.append(row(simulation.run(args.turns * replicas, lose), costs, replicas, how))
            print(lines[-1], flush=True)
    if args.output is not None:
        before = args.output.read_text("utf-8") if args.output.exists() else ""
        args.output.write_text(before.rpartition("| replicas |")[0] + "\n".join(lines) + "\n", "utf-8")


if __name__ == "__main__":
    main()
