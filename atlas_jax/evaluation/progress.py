"""How far an evaluation is, and about how long it will take."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

Step = Callable[[str], None]
"""Called with what is being measured before each unit."""


@contextmanager
def progress(total: int, *, show: bool = True) -> Iterator[Step]:
    """A progress bar with an estimate where rich is installed and there is a terminal, else a line for each unit."""
    if not show or not total:
        yield lambda what: None
        return
    try:
        from rich.progress import (
            BarColumn,
            MofNCompleteColumn,
            Progress,
            TextColumn,
            TimeElapsedColumn,
            TimeRemainingColumn,
        )
    except ImportError:
        rich = False
    else:
        rich = sys.stderr.isatty()
    if not rich:
        yield _lines(total)
        return
    from rich.console import Console

    columns = (MofNCompleteColumn(), BarColumn(), TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn())
    with Progress(*columns, TextColumn("{task.description}"), console=Console(stderr=True)) as bar:
        task = bar.add_task("", total=total)
        begun = 0

        def step(what: str) -> None:
            nonlocal begun
            bar.update(task, completed=begun, description=what)
            begun += 1

        yield step
        bar.update(task, completed=begun)


def _lines(total: int) -> Step:
    begun = 0

    def step(what: str) -> None:
        nonlocal begun
        begun += 1
        print(f"{begun} of {total}: {what}", file=sys.stderr, flush=True)

    return step
