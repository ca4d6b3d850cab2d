"""A command at a terminal of its own, typed at and read as a person would."""

from __future__ import annotations

import contextlib
import fcntl
import os
import pty
import re
import select
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

from tests.patience import PATIENCE

ROOT = Path(__file__).parents[3]
_CODES = re.compile(r"\x1b(\[[0-9;?]*[A-Za-z]|\][^\x07]*\x07|[()][A-Z0-9]|[=>])")
CTRL_C, CTRL_D = "\x03", "\x04"


class Terminal:
    """A running command and its screen, without what only colours it.

    Attributes:
      text: everything it has written.
    """

    def __init__(self, arguments: list[str], environ: Mapping[str, str], columns: int) -> None:
        self._master, slave = pty.openpty()
        fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
        self._process = subprocess.Popen(
            [sys.executable, "-m", "server", *arguments],
            stdin=slave,
            stdout=slave,
            stderr=slave,
            env={**os.environ, "PYTHONPATH": str(ROOT), "TERM": "xterm", **environ},
            start_new_session=True,
            preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
        )
        os.close(slave)
        self._raw = b""
        self._read = 0

    @property
    def text(self) -> str:
        return _CODES.sub("", self._raw.decode("utf-8", "replace")).replace("\r", "")

    def type(self, keys: str) -> None:
        """Presses keys."""
        os.write(self._master, keys.encode())

    def see(self, text: str) -> str:
        """Waits until a text appears after what was seen before; returns what came up to it."""
        until = time.monotonic() + PATIENCE
        while (at := self.text.find(text, self._read)) < 0:
            assert time.monotonic() < until, f"{text!r} did not come; there was:\n{self.text[self._read :]}"
            if not self._more(0.1) and self._process.poll() is not None and not self._more(0.1):
                raise AssertionError(f"it ended before {text!r} came; there was:\n{self.text[self._read :]}")
        before, self._read = self.text[self._read : at], at + len(text)
        return before

    def interrupt(self, text: str) -> None:
        """Presses Ctrl-C until a text comes.

        While readline handles a key, CPython only notes an interrupt, and acts on it at the next key: one press can be lost.
        """
        until = time.monotonic() + PATIENCE
        while self.text.find(text, self._read) < 0:
            assert time.monotonic() < until, f"{text!r} did not come; there was:\n{self.text[self._read :]}"
            self.type(CTRL_C)
            pause = time.monotonic() + 2.0
            while self.text.find(text, self._read) < 0 and time.monotonic() < pause:
                self._more(0.1)
        self.see(text)

    def say(self, line: str, *, answer: str) -> str:
        """Types a line at the prompt and waits for a text and the next prompt; returns what came between."""
        self.type(line + "\r")
        before = self.see(answer)
        return before + answer + self.see(">>> ")

    def end(self) -> int:
        """Waits for its end; returns the exit code."""
        until = time.monotonic() + PATIENCE
        while self._process.poll() is None:
            assert time.monotonic() < until, f"it did not end; there was:\n{self.text[-500:]}"
            self._more(0.05)
        while self._more(0.0):
            pass
        return self._process.returncode

    def _more(self, seconds: float) -> bool:
        if not select.select([self._master], [], [], seconds)[0]:
            return False
        try:
            data = os.read(self._master, 65_536)
        except OSError:  # the other side is closed
            return False
        self._raw += data
        return bool(data)

    def close(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            self._process.kill()
        self._process.wait()
        os.close(self._master)


@contextlib.contextmanager
def terminal(*arguments: str, columns: int = 80, **environ: str) -> Iterator[Terminal]:
    """A command at a terminal; it is ended with the block."""
    made = Terminal([*arguments], environ, columns)
    try:
        yield made
    finally:
        made.close()
