"""Runs attacks on a real server and says what each has done to it.

    python -m benchmarks.attack MODEL.gguf [--only NAME …] [--quick] [--seconds 180] [--seed 0] [--list]
                                [--output docs/benchmarks/attack.md] [flags of the server]

`--only` takes names of attacks and of families. Ends with 1 if an attack ended the server, lost a session, took more
memory than it may, slowed a neighbour to a third or found anything else that must not be.
"""

from __future__ import annotations

import argparse
import resource
import signal
import sys
import tempfile
from pathlib import Path

from benchmarks.attack.registry import ATTACKS
from benchmarks.attack.runner import Row, run


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.attack", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", type=Path, nargs="?")
    parser.add_argument("--only", nargs="+", default=(), metavar="NAME")
    parser.add_argument("--quick", action="store_true", help="a twentieth of the tries")
    parser.add_argument("--seconds", type=float, default=180.0, help="how long the crowd of clients stays")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--list", action="store_true", help="say what there is, and stop")
    parser.add_argument("--output", type=Path)
    args, flags = parser.parse_known_args()
    families = {one.family for one in ATTACKS.values()}
    unknown = [name for name in args.only if name not in ATTACKS and name not in families]
    if unknown:
        parser.error(f"no attack or family is called {unknown[0]!r}; --list shows them")
    chosen = [one for one in ATTACKS.values() if not args.only or {one.name, one.family} & set(args.only)]
    if args.list:
        for one in chosen:
            print(f"{one.family}: {one.name}: {one.does}. Must hold: {one.holds}.")
        return
    if args.model is None:
        parser.error("which model?")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the servers are ended as well
    if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN:  # nohup's, which the servers would have too
        signal.signal(signal.SIGHUP, lambda *_: None)
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    rows: list[Row] = []
    with tempfile.TemporaryDirectory(prefix="attack-") as folder:
        seconds = args.seconds / 20 if args.quick else args.seconds
        for row in run(
            chosen, args.model, Path(folder), tuple(flags), quick=args.quick, seed=args.seed, seconds=seconds
        ):
            rows.append(row)
            print(row, flush=True)
    if args.output:
        args.output.write_text(report(rows), "utf-8")
    failed = [row.name for row in rows if row.verdict]
    print(f"{len(rows)} attacks, {len(failed)} with a fault{': ' if failed else ''}{', '.join(failed)}")
    raise SystemExit(bool(failed))


def report(rows: list[Row]) -> str:
    """The rows as a Markdown page."""
    lines = [
        "# Attacks on a server",
        "",
        f"`python -m benchmarks.attack {' '.join(sys.argv[1:])}`",
        "",
        "Against a real process on loopback; each attack is described by `--list`. `lost` counts sessions of another owner",
        "that are gone or shorter, also after a restart; `MiB more` is the most memory above that before the attack; `p99`",
        "is the 99th percentile of a neighbour's pauses between tokens, as a multiple of that beside one plain stream.",
        "",
        "| family | attack | tries | deaths | lost | MiB more | p99 | s | found |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {row.family} | {row.name} | {row.tried} | {row.deaths} | {len(row.lost)} | {row.growth:.0f} "
        f"| {'' if row.ratio is None else f'{row.ratio:.1f}'} | {row.seconds:.0f} | {row.verdict or 'held'} |"
        for row in rows
    ]
    held = sum(not row.verdict for row in rows)
    return "\n".join([*lines, "", f"{held} of {len(rows)} held.", ""])


if __name__ == "__main__":
    main()
