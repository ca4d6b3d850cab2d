"""Does every client work? Runs the ordinary flows of client libraries against a server, each in an environment of its own.

    python -m benchmarks.clients [MODEL.gguf] [--only NAME …] [--flow NAME …] [--home data/clients]
        [--output docs/benchmarks/clients.md]

Without a model all flows have the server whose model is made up, which says what a flow wants or what follows the request's
grammar; with one those flows have it that the model is good enough for.

A Python client is a script in `python/` whose header (PEP 723) names its packages; they are installed into a virtual
environment under `--home` when they are not there. Clients for node are scripts in `node/`, with one `package.json`.
Everything a client has a default for is left at it. Ends with 1 if a flow failed.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from benchmarks.clients.flows import KINDS
from benchmarks.clients.scripted import Scripted
from benchmarks.server_process import Server

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
_SECONDS = 900
_HEADER = re.compile(r"^# /// script\n((?:#.*\n)+?)# ///$", re.MULTILINE)


def packages(script: Path) -> list[str]:
    """What the header of a script says it needs."""
    found = _HEADER.search(script.read_text("utf-8"))
    assert found is not None, f"{script} names no packages"
    needed: list[str] = tomllib.loads(re.sub(r"^# ?", "", found[1], flags=re.MULTILINE))["dependencies"]
    return needed


def install_python(script: Path, home: Path) -> Path:
    """The interpreter of the script's environment, which is made anew where its packages have changed."""
    needed = packages(script)
    place = home / script.stem
    stamp = place / f"installed-{hashlib.sha256(json.dumps(needed).encode()).hexdigest()[:16]}"
    python = place / "bin" / "python"
    if not stamp.exists():
        shutil.rmtree(place, ignore_errors=True)
        subprocess.run([sys.executable, "-m", "venv", str(place)], check=True)
        subprocess.run([str(python), "-m", "pip", "install", "--quiet", *needed], check=True)
        stamp.touch()
    return python


def install_node(home: Path) -> Path:
    """The folder that has node's packages."""
    place = home / "node"
    place.mkdir(parents=True, exist_ok=True)
    wanted = (HERE / "node" / "package.json").read_bytes()
    stamp = place / f"installed-{hashlib.sha256(wanted).hexdigest()[:16]}"
    if not stamp.exists():
        (place / "package.json").write_bytes(wanted)
        subprocess.run(["npm", "install", "--silent", "--no-audit", "--no-fund"], cwd=place, check=True)
        stamp.touch()
    for script in (HERE / "node").glob("*.mjs"):  # node looks for packages beside the script
        shutil.copy(script, place)
    return place


class Model:
    """A server that has a model, and keeps its address when it is started again."""

    def __init__(self, model: Path, folder: Path) -> None:
        self._model, self._folder = model, folder
        self._server = Server(model, folder)
        self.url = self._server.url

    def restart(self) -> None:
        """Stops it as a supervisor would, and starts it again."""
        self._server.end()
        self._server = Server(self._model, self._folder, ["--port", self.url.rpartition(":")[2]])

    def end(self) -> None:
        """Stops it."""
        self._server.kill()


def run(command: list[str], place: Path, environ: dict[str, str], log: Path) -> Iterator[dict[str, Any]]:
    """The rows that a client's script prints."""
    with log.open("w") as errors:
        process = subprocess.Popen(command, cwd=place, env=environ, stdout=subprocess.PIPE, stderr=errors, text=True)
        assert process.stdout is not None
        with ThreadPoolExecutor(1) as watch:
            code = watch.submit(process.wait, _SECONDS)
            code.add_done_callback(lambda _: process.kill())
            for line in process.stdout:
                if line.startswith('{"'):
                    yield json.loads(line)
    if process.returncode:
        yield {"version": "", "flow": "the script", "ok": False, "why": f"ended with {process.returncode}: see {log}"}


def environment(servers: dict[str, str], home: Path) -> dict[str, str]:
    """What a client finds in its environment: no key, no proxy and no configuration of whoever runs it."""
    kept = {name: value for name, value in os.environ.items() if name in ("PATH", "LANG", "TZ", "TMPDIR")}
    kept |= {f"CLIENTS_{name}": value for name, value in servers.items()}
    return kept | {"HOME": str(home), "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1", "NO_COLOR": "1"}


def table(rows: dict[str, list[dict[str, Any]]]) -> str:
    """The page's table, and what failed."""
    lines = ["| client | version | " + " | ".join(KINDS) + " |", "|---" * (2 + len(KINDS)) + "|"]
    failed = []
    for client, flows in rows.items():
        marks = []
        for kind in KINDS:
            found = [row["ok"] for row in flows if row["flow"].partition(":")[0] == kind]
            marks.append(("✓" if all(found) else "✗") if found else "")
        version = next((row["version"] for row in flows if row["version"]), "")
        lines.append(f"| {client} | {version} | " + " | ".join(marks) + " |")
        failed += [f"- {client}, {row['flow']}: {row['why']}" for row in flows if not row["ok"]]
    return "\n".join(lines) + "\n" + ("\n## What failed\n\n" + "\n".join(failed) + "\n" if failed else "")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, nargs="?")
    parser.add_argument("--only", nargs="*", default=[], metavar="CLIENT", help="clients to run")
    parser.add_argument("--flow", nargs="*", default=[], metavar="FLOW", help="flows to run")
    parser.add_argument("--home", type=Path, default=Path("data/clients"))
    parser.add_argument("--output", type=Path, help="page whose table is written")
    parser.add_argument("--install", action="store_true", help="install and run nothing")
    args = parser.parse_args()
    home: Path = args.home.resolve()
    scripts = sorted([*(HERE / "python").glob("*.py"), *(HERE / "node").glob("*.mjs")], key=lambda path: path.stem)
    scripts = [one for one in scripts if one.stem != "flows" and (not args.only or one.stem in args.only)]
    commands = {}
    for script in scripts:
        if script.suffix == ".py":  # -P: a script may have the name of its package
            commands[script.stem] = [str(install_python(script, home)), "-P", str(script)]
        else:
            commands[script.stem] = ["node", str(install_node(home) / script.name)]
    if args.install:
        return
    rows: dict[str, list[dict[str, Any]]] = {}
    with tempfile.TemporaryDirectory() as folder:
        model = None if args.model is None else Model(args.model.resolve(), Path(folder))
        scripted = Scripted((lambda: None) if model is None else model.restart)
        url = scripted.url if model is None else model.url
        servers = {"URL": url, "SCRIPTED": scripted.url, "CONTROL": scripted.control}
        try:
            for name, command in commands.items():
                rows[name] = []
                log = home / f"{name}.log"
                for row in run([*command, *args.flow], home, environment(servers, home), log):
                    rows[name].append(row)
                    seconds = f"{row.get('seconds', 0):6.1f} s"
                    print(
                        f"{'ok  ' if row['ok'] else 'FAIL'} {seconds} {name}: {row['flow']} {row['why'] or ''}",
                        flush=True,
                    )
                if args.output is not None:
                    before = args.output.read_text("utf-8") if args.output.exists() else ""
                    head = before.partition("| client |")[0]
                    args.output.write_text(head + table(rows), "utf-8")
        finally:
            scripted.stop()
            if model is not None:
                model.end()
    if args.output is None:
        print(table(rows))
    sys.exit(not all(row["ok"] for flows in rows.values() for row in flows))


if __name__ == "__main__":
    main()
