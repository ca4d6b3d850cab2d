"""Tables of estimates: rows are arms, columns whatever a task tells apart."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from atlas_jax.evaluation.measures import Label, Result
from atlas_jax.evaluation.statistics import NOTHING, Estimate, mean, wilson


@dataclass(frozen=True)
class Table:
    """Estimates by arm and column.

    Attributes:
      about: what a cell is.
      form: how figures are written.
      x: what the columns count along, if they are places on a line: the table then has a plot.
    """

    title: str
    about: str
    columns: tuple[str, ...]
    rows: Mapping[str, Mapping[str, Estimate]]
    form: str = ".3f"
    x: str | None = None
    notes: tuple[str, ...] = field(default=())

    def markdown(self) -> str:
        """The table with its title."""
        head = "| | " + " | ".join(self.columns) + " |"
        lines = [f"### {self.title}", "", self.about, "", head, "|---|" + "---|" * len(self.columns)]
        for name, cells in self.rows.items():
            texts = (cells.get(column, NOTHING).text(self.form) for column in self.columns)
            lines.append(f"| {name} | {' | '.join(texts)} |")
        return "\n".join(lines + [f"\n{note}" for note in self.notes])

    def plain(self) -> dict[str, Any]:
        """The table as JSON; what is not a number is null."""
        rows = {
            name: {column: [number if number == number else None for number in (e.value, e.low, e.high)] + [e.count]
                   for column, e in cells.items()}
            for name, cells in self.rows.items()
        }  # fmt: skip
        return {"title": self.title, "about": self.about, "columns": self.columns, "rows": rows, "notes": self.notes}


def cells(
    results: Iterable[Result],
    arms: Sequence[str],
    column: Callable[[Result], Sequence[str]],
    estimate: Callable[[Sequence[Result]], Estimate],
) -> tuple[tuple[str, ...], dict[str, dict[str, Estimate]]]:
    """Columns in the order in which they first come, and an estimate of the results of each arm and column.

    Args:
      column: names of the columns a result belongs to, none for one that is left out.
    """
    groups: dict[str, dict[str, list[Result]]] = {arm: {} for arm in arms}
    columns: dict[str, None] = {}
    for result in results:
        for name in column(result):
            columns.setdefault(name)
            groups[result.arm].setdefault(name, []).append(result)
    return tuple(columns), {
        arm: {name: estimate(found) for name, found in by_column.items()} for arm, by_column in groups.items()
    }


def share(results: Sequence[Result]) -> Estimate:
    """How many were right."""
    return wilson(sum(result.value.value for result in results), len(results))


def mean_of_items(results: Sequence[Result]) -> Estimate:
    """The mean over items, each the weighted mean of its own values."""
    return mean([_weighted(group) for group in by(results, lambda result: (result.item, result.seed)).values()])


def by(results: Iterable[Result], key: Callable[[Result], Hashable]) -> dict[Hashable, list[Result]]:
    """Results in groups."""
    groups: dict[Hashable, list[Result]] = {}
    for result in results:
        groups.setdefault(key(result), []).append(result)
    return groups


def only(results: Iterable[Result], measure: str, **labels: Label) -> list[Result]:
    """Results of one measure, with these labels."""
    return [
        result
        for result in results
        if result.value.measure == measure
        and all(result.value.labels.get(name) == label for name, label in labels.items())
    ]


def shares_table(
    results: Sequence[Result], arms: Sequence[str], title: str, about: str, *labels: str, together: str | None = None
) -> Table:
    """Shares of questions that were answered right, by labels.

    Args:
      together: name of a last column for all of them, if there are several.
    """
    found = only(results, "found")
    columns, rows = cells(found, arms, lambda r: [", ".join(str(r.value.labels[name]) for name in labels)], share)
    if together is not None and len(columns) > 1:
        _, whole = cells(found, arms, lambda r: [together], share)
        rows = {arm: {**row, **whole[arm]} for arm, row in rows.items()}
        columns = (*columns, together)
    return Table(title, about, columns, rows, form=".2f")


def _weighted(results: Sequence[Result]) -> float:
    weight = sum(result.value.weight for result in results)
    return sum(result.value.value * result.value.weight for result in results) / weight
