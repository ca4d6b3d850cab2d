"""A clone of this repository as a newcomer has it, and commands that run in it as they would be typed."""

from __future__ import annotations

import os
import queue
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
_READY = re.compile(r"(?:Ready:|Uvicorn running on) (http://[^\s]+?:\d+)")
_STOP_SECONDS = 20.0


class Failed(Exception):
    """Something a newcomer would have been stopped by; the message says what was run and what came of it."""


def clone(target: Path, source: Path = ROOT) -> Path:
    """Clones the last commit of a working tree, without anything git does not keep.

    A tree that is no repository, as an archive of the sources is unpacked, is copied without what is made in it.
    """
    if (source / ".git").exists():
        # the tree may belong to another user than the one that checks it
        clone = ["git", "-c", "safe.directory=*", "clone", "--quiet", str(source), str(target)]
        subprocess.run(clone, check=True)
    else:
        shutil.copytree(
            source, target, symlinks=True, ignore=shutil.ignore_patterns(".*", "data", "build", "__pycache__")
        )
    return target


def reuse(target: Path, venv: Path, source: Path = ROOT) -> None:
    """Gives a clone what another tree has installed and downloaded already, so that its `make` finds it there.

    The clone gets a virtual environment of its own that sees the packages of `venv`; what `make` installs (the project
    itself) goes into the clone's.
    """
    python = venv.absolute() / "bin" / "python"
    own = target / ".venv"
    subprocess.run([python, "-m", "venv", own], check=True)
    where = [python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"]
    packages = subprocess.run(where, check=True, capture_output=True, text=True).stdout.strip()
    (site,) = own.glob("lib/python3*/site-packages")
    (site / "of_another_tree.pth").write_text(packages + "\n")
    models = source / "data" / "models"
    if models.is_dir():
        (target / "data").mkdir()
        (target / "data" / "models").symlink_to(models)


def environment(**more: str) -> dict[str, str]:
    """A newcomer's environment: no settings of this project, and no proxy before this machine's own servers."""
    mine = ("ATLAS_", "MAKE", "MFLAGS", "PYTHONPATH", "VIRTUAL_ENV", "VENV", "MODEL", "ARGS")
    environ = {name: value for name, value in os.environ.items() if not name.startswith(mine)}
    for name in ("NO_PROXY", "no_proxy"):
        environ[name] = ",".join(filter(None, [environ.get(name), "127.0.0.1", "localhost"]))
    return {**environ, **more}


class Command:
    """A command that runs in a folder, in a process group of its own, until it ends or a server in it is ready.

    Attributes:
      address: of the server it started, or None.
      output: what it has printed so far.
    """

    def __init__(self, argv: list[str], folder: Path, environ: Mapping[str, str]) -> None:
        self.argv, self.output, self.address = argv, "", None
        self._process = subprocess.Popen(
            argv,
            cwd=folder,
            env=dict(environ),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        self._lines: queue.Queue[str | None] = queue.Queue()
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self._lines.put(line)
        self._lines.put(None)

    @property
    def ended(self) -> bool:
        """Whether nothing of it runs any more."""
        return self._process.poll() is not None

    def wait(self, seconds: float) -> Command:
        """Waits until the command has ended well or its server is ready.

        Raises:
          Failed: it ended with an error, or is neither after so many seconds.
        """
        end = time.monotonic() + seconds
        while True:
            try:
                line = self._lines.get(timeout=max(0.0, end - time.monotonic()))
            except queue.Empty:
                self.kill()
                raise Failed(f"it did not end in {seconds:.0f} s; it printed:\n{self.output[-4000:]}") from None
            if line is None:
                status = self._process.wait()
                if status:
                    raise Failed(f"it ended with status {status} and printed:\n{self.output[-4000:]}")
                return self
            self.output += line
            if found := _READY.search(line):
                self.address = found[1]
                return self

    def stop(self) -> None:
        """Stops a server as Ctrl-C does.

        Raises:
          Failed: it does not end, or not in order.
        """
        os.killpg(self._process.pid, signal.SIGINT)
        end = time.monotonic() + _STOP_SECONDS
        while (line := self._next(end)) is not None:
            self.output += line
        if "Traceback" in self.output:
            raise Failed(f"the server did not end in order:\n{self.output[-4000:]}")

    def _next(self, end: float) -> str | None:
        try:
            return self._lines.get(timeout=max(0.0, end - time.monotonic()))
        except queue.Empty:
            self.kill()
            raise Failed(f"the server was still there {_STOP_SECONDS:.0f} s after Ctrl-C") from None

    def kill(self) -> None:
        """Ends the whole group, whatever it is doing."""
        try:
            os.killpg(self._process.pid, signal.SIGKILL)
        except ProcessLookupError:
            return
        self._process.wait()


def shell(code: str, folder: Path, environ: Mapping[str, str]) -> Command:
    """Runs lines as a shell does that stops at the first error."""
    return Command(["bash", "-eo", "pipefail", "-c", code], folder, environ)


def note(text: str) -> None:
    """Says on the terminal how far it is."""
    print(text, flush=True)


def fail(error: Failed) -> None:
    """Ends the program with what went wrong."""
    sys.exit(f"\n{error}")
