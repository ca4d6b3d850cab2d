"""Kills and stops real servers under load, and checks that they have lost nothing that they had acknowledged.

python -m benchmarks.crash rounds --kills 200 --stops 20 --sessions 200
python -m benchmarks.crash rounds --model MODEL.gguf --kills 20 --stops 2 --sessions 24
"""

from __future__ import annotations

import argparse
import asyncio
import json
import signal
import sys
import tempfile
from pathlib import Path

from benchmarks.crash.disk import build
from benchmarks.crash.figures import Row, measure_cost, measure_many
from benchmarks.crash.process import Launcher
from benchmarks.crash.rounds import Plan, Rounds


def launcher(args: argparse.Namespace, folder: Path, flags: list[str], concurrent: int = 4) -> Launcher:
    """How servers are started: with small windows, so that little text fills a memory."""
    model, own = args.model, ["--max-concurrent", str(concurrent)]
    own += ["--atlas-window", "128", "--atlas-max-window", "128"]
    if model is None:
        from tests import tiny_model

        model = tiny_model.write_model(folder / "tiny.gguf")
        own += ["--atlas-adapter", str(tiny_model.write_adapter(folder / "tiny.safetensors", model))]
    logs = folder / "logs"
    logs.mkdir()
    return Launcher(model, (*own, *flags), args.cache or folder / "cache", logs)


async def rounds(args: argparse.Namespace, folder: Path, flags: list[str]) -> int:
    disk = build(folder, args.disk_mb, args.sync_ms)
    plan = Plan(
        kills=args.kills,
        stops=args.stops,
        clean_stops=args.clean_stops,
        sessions=args.sessions,
        clients=args.clients,
        seed=args.seed,
        operations=args.operations,
        window=args.window,
        stop_limit=args.stop_limit,
        only=args.only,
    )
    with launcher(args, folder, flags) as start:
        run = Rounds(plan, start, disk, folder, lambda line: print(line, flush=True))
        try:
            figures = await run.run()
        finally:
            shown = run.figures.found
            print("\n".join(shown[:200]), f"\n{len(shown)} violations", flush=True)
    print(figures.table())
    if args.json:
        args.json.write_text(json.dumps(figures.as_json(), indent=1) + "\n")
    return 1 if any(figures.violations.values()) else 0


async def many(args: argparse.Namespace, folder: Path, flags: list[str]) -> int:
    with launcher(args, folder, flags) as start:
        return _report(args, *await measure_many(start, folder, args.sessions, args.first))


async def cost(args: argparse.Namespace, folder: Path, flags: list[str]) -> int:
    with launcher(args, folder, flags, concurrent=args.streams) as start:
        return _report(args, *await measure_cost(start, folder, args.streams, args.tokens, args.rounds, args.bar))


def _report(args: argparse.Namespace, rows: list[Row], faults: list[str]) -> int:
    print(
        "\n".join(["| | | bar |", "|---|---|---|", *(f"| {row.name} | {row.value:.3f} | {row.bar} |" for row in rows)])
    )
    print("\n".join(faults))
    if args.json:
        args.json.write_text(json.dumps({"figures": {row.name: row.value for row in rows}, "found": faults}) + "\n")
    return 1 if faults else 0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument(
        "--model", type=Path, help="GGUF file; a tiny one with random weights is made where none is given"
    )
    common.add_argument("--seed", default="0")
    common.add_argument(
        "--cache", type=Path, help="folder of compiled programs; they are thrown away where none is given"
    )
    common.add_argument("--keep", type=Path, help="folder for memory, models and logs, which is kept")
    common.add_argument("--json", type=Path, help="file for the figures")
    one = commands.add_parser("rounds", parents=[common], help="kills and stops under load")
    one.add_argument("--kills", type=int, default=200)
    one.add_argument("--stops", type=int, default=20, help="on a slow disk")
    one.add_argument("--clean-stops", type=int, default=2, help="on the disk as it is")
    one.add_argument("--sessions", type=int, default=200)
    one.add_argument("--clients", type=int, default=8)
    one.add_argument("--operations", type=int, default=100, help="most operations acknowledged in a round")
    one.add_argument("--window", type=float, default=60.0, help="most seconds of load in a round")
    one.add_argument("--disk-mb", type=float, default=2.0, help="MB a second of the slow disk")
    one.add_argument("--sync-ms", type=float, default=20.0, help="what an fsync costs there")
    one.add_argument("--stop-limit", type=float, default=10.0, help="seconds until a supervisor kills")
    one.add_argument("--only", type=int, help="number of the one round to run")
    one.set_defaults(run=rounds)
    one = commands.add_parser("many", parents=[common], help="start and stop with many sessions")
    one.add_argument("--sessions", type=int, default=1000, help="at the start")
    one.add_argument("--first", type=int, default=200, help="at the first stop")
    one.set_defaults(run=many)
    one = commands.add_parser("cost", parents=[common], help="what persistence takes of the speed of streams")
    one.add_argument("--streams", type=int, default=16)
    one.add_argument("--tokens", type=int, default=256, help="of each answer")
    one.add_argument("--rounds", type=int, default=10, help="an even number: both kinds come first equally often")
    one.add_argument("--bar", type=float, default=0.02, help="share that persistence may take")
    one.set_defaults(run=cost)
    args, flags = parser.parse_known_args()
    # a shell's background jobs ignore Ctrl-C, and nohup's a hang-up; so would the servers, which begin with the defaults of
    # whatever has a handler here
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN:
        signal.signal(signal.SIGHUP, lambda *_: None)
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))  # the servers end with this process
    if args.keep:
        args.keep.mkdir(parents=True)
        raise SystemExit(asyncio.run(args.run(args, args.keep, flags)))
    with tempfile.TemporaryDirectory() as name:
        raise SystemExit(asyncio.run(args.run(args, Path(name), flags)))


if __name__ == "__main__":
    main()
