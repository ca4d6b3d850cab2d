"""The file of results: one JSON line for every finished unit, appended at once, so that a run can go on where it ended."""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from atlas_jax import __version__
from atlas_jax.evaluation.arms import Arm
from atlas_jax.evaluation.measures import Item, Result, Task, Value


class ResultsError(Exception):
    """A file of results that cannot be used."""


class Row(msgspec.Struct, kw_only=True, frozen=True):
    """One unit: what one arm gave for one item of a task.

    Attributes:
      key: digest of what the values depend on (`unit_key`).
      skipped: why there are no values, or None.
      version: of the project that measured it; no part of the key.
      seconds, finished: how long it took, and the Unix time.
    """

    key: str
    model: str
    task: str
    arm: str
    options: dict[str, Any]
    item: str
    seed: int
    values: tuple[Value, ...]
    skipped: str | None
    version: str
    seconds: float
    finished: float

    def results(self) -> Iterator[Result]:
        """Its values, each with whose it is."""
        return (Result(self.arm, self.item, self.seed, value) for value in self.values)


@dataclass(frozen=True)
class Unit:
    """Work that is done whole or not at all."""

    task: Task
    arm: Arm
    item: Item
    key: str


def unit_key(identity: Mapping[str, Any], task: Task, arm: Arm, item: Item) -> str:
    """A digest of everything the values of a unit depend on but the program itself.

    Args:
      identity: of the model and its memory's adapter.
    """
    facts = [identity, task.name, task.version, arm.key, item.name, item.seed, item.data]
    return hashlib.sha256(msgspec.json.encode(facts, order="sorted")).hexdigest()[:32]


def row_of(unit: Unit, model: str, values: Sequence[Value], skipped: str | None, seconds: float) -> Row:
    """The row of a finished unit."""
    return Row(
        key=unit.key,
        model=model,
        task=unit.task.name,
        arm=unit.arm.name,
        options=unit.arm.key,
        item=unit.item.name,
        seed=unit.item.seed,
        values=tuple(values),
        skipped=skipped,
        version=__version__,
        seconds=seconds,
        finished=time.time(),
    )


class ResultsFile:
    """Rows by key, in a file that only ever grows.

    Args:
      path: read if it is there. A last line without an end was cut off by a kill, and is taken away.

    Raises:
      ResultsError: a line within is no row.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._rows: dict[str, Row] = {}
        data = path.read_bytes() if path.exists() else b""
        whole = data[: data.rfind(b"\n") + 1]
        for number, line in enumerate(whole.splitlines(), 1):
            try:
                row = msgspec.json.decode(line, type=Row)
            except (msgspec.DecodeError, msgspec.ValidationError) as error:
                raise ResultsError(f"{path}, line {number}: no result ({error})") from None
            self._rows[row.key] = row
        if len(whole) < len(data):
            os.truncate(path, len(whole))

    def __contains__(self, key: str) -> bool:
        return key in self._rows

    def __getitem__(self, key: str) -> Row:
        return self._rows[key]

    def append(self, row: Row) -> None:
        """Adds a row; once this returns, a kill does not lose it."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("ab", buffering=0) as file:
            file.write(msgspec.json.encode(row) + b"\n")
        self._rows[row.key] = row
