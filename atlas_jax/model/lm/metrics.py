"""Where the numbers of a training run go: a callback, and one that writes CSV."""

from __future__ import annotations

import csv
import os
from collections.abc import Callable, Mapping
from pathlib import Path

MetricsCallback = Callable[[int, Mapping[str, float]], None]
"""(steps taken, numbers by name): `loss` and `tokens_per_second` after each step, and what an evaluation has found."""


class CSVMetrics:
    """Appends rows `step,name,value` to a file. A run that goes on writes its steps again: rows of later ones are dropped."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self._path, self._begun = Path(path), False

    def __call__(self, step: int, values: Mapping[str, float]) -> None:
        if not self._begun:
            self._begin(step)
        with self._path.open("a", newline="") as file:
            csv.writer(file).writerows((step, name, f"{value:.8g}") for name, value in values.items())

    def _begin(self, step: int) -> None:
        rows: list[list[str]] = []
        if self._path.exists():
            with self._path.open(newline="") as file:
                rows = [row for row in list(csv.reader(file))[1:] if len(row) == 3 and int(row[0]) < step]
        self._path.parent.mkdir(parents=True, exist_ok=True)
        with self._path.open("w", newline="") as file:
            csv.writer(file).writerows([["step", "name", "value"], *rows])
        self._begun = True
