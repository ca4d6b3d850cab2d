"""Two servers on one object store: kills in the midst of turns, and what it costs to go on with a session on the other.

python -m benchmarks.replicas kills --kills 100
python -m benchmarks.replicas resume --lengths 1024 4096 16384 65536 131072
python -m benchmarks.replicas ray
"""

from __future__ import annotations

import argparse
import asyncio
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.crash.process import Launcher, Process
from benchmarks.replicas.kills import kill_servers
from benchmarks.replicas.resume import measure_resumption
from benchmarks.replicas.seaweed import S3, seaweed
from server.config.sources import add_flags


@dataclass(frozen=True)
class Replicas:
    """How servers of one store are started, and one that keeps its sessions in a folder."""

    launcher: Launcher
    store: S3
    folder: Path

    @property
    def _shared(self) -> tuple[str, ...]:
        return ("--session-store", "s3://atlas/replicas", "--session-store-endpoint", self.store.endpoint)

    def start(self, number: int) -> Process:
        """A server on the store."""
        return self.launcher.start(self.folder / f"copies{number}", *self._shared, environ=self.store.environ)

    @property
    def settings(self) -> dict[str, Any]:
        """Of a server on the store, by their dotted names: what the flags say."""
        flags = vars(parsed((*self.launcher.flags, "--model", str(self.launcher.model), *self._shared)))
        return {**flags, "server.cache_path": str(self.launcher.cache)}

    def alone(self) -> Process:
        """A server that shares nothing and is never stopped."""
        return self.launcher.start(self.folder / "alone")


def parsed(flags: Sequence[str]) -> argparse.Namespace:
    """The server's own reading of its flags."""
    parser = argparse.ArgumentParser()
    add_flags(parser)
    return parser.parse_args(flags)


@contextmanager
def replicas(args: argparse.Namespace, more: list[str]) -> Iterator[Replicas]:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        flags = ["--max-concurrent", "4", "--atlas-window", "128", "--atlas-max-window", "128"]
        model = args.model
        if model is None:
            from tests import tiny_model

            model = tiny_model.write_model(folder / "tiny.gguf")
            flags += ["--atlas-adapter", str(tiny_model.write_adapter(folder / "tiny.safetensors", model))]
        flags += ["--weight-dtype", "float32", "--kv-dtype", "float32"] if args.model is None else []
        (folder / "logs").mkdir()
        launcher = Launcher(model, (*flags, *more), args.cache or folder / "cache", folder / "logs")
        with seaweed(folder / "seaweed") as store, launcher:
            yield Replicas(launcher, store, folder)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--model", type=Path, help="GGUF file; else a tiny model")
    common.add_argument("--cache", type=Path, help="folder of compiled programs")
    commands = parser.add_subparsers(dest="command", required=True)
    one = commands.add_parser("kills", parents=[common], help="kill -9 one of two servers in the midst of turns")
    one.add_argument("--kills", type=int, default=100)
    one.add_argument("--clients", type=int, default=4)
    one.add_argument("--seed", type=int, default=0)
    two = commands.add_parser("resume", parents=[common], help="go on with a session on another server")
    two.add_argument("--lengths", type=int, nargs="+", default=[1024, 4096, 16_384, 65_536, 131_072])
    two.add_argument("--turns", type=int, default=40)
    commands.add_parser("ray", parents=[common], help="run deploy/ray on this machine")
    args, more = parser.parse_known_args()  # what is not known here is a flag of the servers
    with replicas(args, more) as found:
        if args.command == "kills":
            return asyncio.run(kill_servers(found.start, found.alone, args.kills, args.clients, args.seed))
        if args.command == "ray":
            from benchmarks.replicas.ray_cluster import run_on_ray  # Ray is an extra

            return asyncio.run(run_on_ray(found.settings, found.store.environ, found.folder / "r"))
        return asyncio.run(measure_resumption(found.start, args.lengths, args.turns))


if __name__ == "__main__":
    sys.exit(main())
