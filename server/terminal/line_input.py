"""Messages typed at a terminal: lines with history and completion, and messages of several lines."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Sequence
from pathlib import Path

import msgspec

try:
    import readline
except ImportError:  # a Python without it still has lines
    readline = None  # type: ignore[assignment]

PROMPT, MORE = ">>> ", "... "
_QUOTES = '"""'
_REMEMBERED = 1000


class LineInput:
    """Reads messages from the terminal.

    A message is a line; a line that ends in a backslash goes on, `\"\"\"` begins and ends one of any number of lines, and
    Alt-Enter, or pasting, puts line feeds into one.

    Args:
      history: file of earlier messages, a JSON string a line; None remembers none.
      complete: what a beginning of a line may go on to.
    """

    def __init__(self, history: Path | None, complete: Callable[[str], Sequence[str]]) -> None:
        self._history, self._complete = history, complete
        self._matches: list[str] = []
        if readline is None:
            return
        self._remembered = _read(history)
        for entry in self._remembered:
            readline.add_history(entry)
        readline.set_auto_history(False)
        readline.set_completer(self._completion)
        readline.set_completer_delims("")
        libedit = "libedit" in (readline.__doc__ or "")
        readline.parse_and_bind("bind ^I rl_complete" if libedit else "tab: complete")
        if not libedit:
            readline.parse_and_bind("set enable-bracketed-paste on")
            readline.parse_and_bind(r'"\e\C-m": "\C-v\C-j"')

    def read(self) -> str | None:
        """The next message, without spaces around it; None at the end of input. Raises KeyboardInterrupt."""
        text = _line(PROMPT)
        if text is None:
            return None
        if text.lstrip().startswith(_QUOTES):
            text = text.lstrip().removeprefix(_QUOTES)
            while not text.rstrip().endswith(_QUOTES):
                more = _line(MORE)
                if more is None:
                    break
                text += "\n" + more
            text = text.rstrip().removesuffix(_QUOTES)
        else:
            while text.endswith("\\"):
                more = _line(MORE)
                if more is None:
                    break
                text = f"{text[:-1]}\n{more}"
        text = text.strip()
        if text:
            self._remember(text)
        return text

    def _completion(self, text: str, state: int) -> str | None:
        if state == 0:
            self._matches = list(self._complete(text))
        return self._matches[state] if state < len(self._matches) else None

    def _remember(self, text: str) -> None:
        if readline is None or (self._remembered and self._remembered[-1] == text):
            return
        self._remembered.append(text)
        readline.add_history(text)
        if self._history is None:
            return
        with contextlib.suppress(OSError):  # a history that cannot be kept is no reason to stop
            self._history.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW | os.O_CLOEXEC
            descriptor = os.open(self._history, flags, 0o600)
            with os.fdopen(descriptor, "ab") as file:
                file.write(msgspec.json.encode(text) + b"\n")


def clean(text: str) -> str:
    """A text as Unicode, whatever bytes a terminal or a pipe gave."""
    return text.encode("utf-8", "surrogateescape").decode("utf-8", "replace")


def _line(prompt: str) -> str | None:
    try:
        return clean(input(prompt))
    except EOFError:
        return None


def _read(path: Path | None) -> list[str]:
    """The latest messages of a history; a file that has grown long is cut to those."""
    if path is None:
        return []
    try:
        lines = path.read_bytes().splitlines()
    except OSError:
        return []
    found = []
    for line in lines[-_REMEMBERED:]:
        with contextlib.suppress(msgspec.MsgspecError, UnicodeDecodeError):
            found.append(msgspec.json.decode(line, type=str))
    if len(lines) > 2 * _REMEMBERED:
        with contextlib.suppress(OSError):
            temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
            temporary.write_bytes(b"".join(msgspec.json.encode(one) + b"\n" for one in found))
            temporary.chmod(0o600)
            temporary.replace(path)
    return found
