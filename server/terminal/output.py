"""What is written to a terminal: tables and lines that fit it, and nothing that a stranger's text could do to it."""

from __future__ import annotations

import sys
import time
import unicodedata
from collections.abc import Iterable, Sequence

from rich.console import Console
from rich.table import Table
from rich.text import Text

# Characters that turn the direction of what follows, by which one text can be made to look like another.
_TURNING = frozenset("\u061c\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")
_PIPE_WIDTH = 200
_UNITS = ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB"))
_AGES = ((86_400, "d"), (3600, "h"), (60, "min"))


def console(*, stderr: bool = False) -> Console:
    """A console of stdout or stderr: colours where it is a terminal (`NO_COLOR` has none), wide lines where it is none."""
    stream = sys.stderr if stderr else sys.stdout
    width = None if stream.isatty() else _PIPE_WIDTH
    return Console(
        stderr=stderr, highlight=False, markup=False, emoji=False, width=width, force_terminal=stream.isatty()
    )


def safe(text: str, *, lines: bool = True) -> str:
    """A text without the control characters a terminal would obey, shown as `\\x1b`.

    Args:
      lines: whether line feeds and tabs stay.
    """
    if text.isprintable():
        return text if not _TURNING & set(text) else "".join(map(_shown, text))
    kept = "\n\t" if lines else ""
    return "".join(character if character in kept else _shown(character) for character in text)


def _shown(character: str) -> str:
    if character in _TURNING or unicodedata.category(character) in ("Cc", "Cs", "Zl", "Zp"):
        code = ord(character)
        return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}"
    return character


def size(count: float) -> str:
    """Bytes as people read them, in powers of 1000."""
    for unit, name in _UNITS:
        if count >= unit:
            return f"{count / unit:.1f} {name}"
    return f"{count:.0f} B"


def age(then: float, now: float | None = None) -> str:
    """How long ago something was, in its largest unit."""
    seconds = max(0.0, (time.time() if now is None else now) - then)
    for unit, name in _AGES:
        if seconds >= unit:
            return f"{seconds / unit:.0f} {name}"
    return f"{seconds:.0f} s"


def number(value: float) -> str:
    """A whole number with its thousands apart."""
    return f"{value:,.0f}".replace(",", " ")


def moment(then: float) -> str:
    """A point in time, in this machine's zone."""
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(then))


def table(columns: Sequence[tuple[str, bool]], rows: Iterable[Sequence[str]], *, header: bool = True) -> Table:
    """A table without lines.

    Args:
      columns: titles, and whether the column holds numbers.
    """
    made = Table(box=None, show_header=header, pad_edge=False, header_style="bold", padding=(0, 2, 0, 0))
    for title, right in columns:
        made.add_column(title, justify="right" if right else "left", overflow="fold", no_wrap=right)
    for row in rows:
        made.add_row(*(Text(safe(cell, lines=False)) for cell in row))
    return made


def facts(rows: Iterable[tuple[str, str]]) -> Table:
    """Names and what they are, one a line."""
    made = Table(box=None, show_header=False, pad_edge=False, padding=(0, 2, 0, 0))
    made.add_column(style="bold", no_wrap=True)
    made.add_column(overflow="fold")
    for name, value in rows:
        made.add_row(name, Text(safe(value)))
    return made
