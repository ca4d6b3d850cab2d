"""What an evaluation leaves: all values as JSON, tables as Markdown, and plots where matplotlib is installed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from atlas_jax import __version__
from atlas_jax.evaluation import acceptance
from atlas_jax.evaluation.arms import FULL, LARGER, NEAREST, WINDOW, Arm
from atlas_jax.evaluation.measures import Result, Task
from atlas_jax.evaluation.results import Row
from atlas_jax.evaluation.tables import Table

_PARTS = {"loss": "Loss", "recall": "Recall", "harm": "Harm", "cost": "Cost"}


@dataclass(frozen=True)
class Evaluated:
    """All there is to report.

    Attributes:
      command: that gives the same again.
      planned: units there would be, had the run not been stopped.
      facts: of the model and the run.
    """

    model: str
    command: str
    arms: Sequence[Arm]
    tasks: Sequence[Task]
    rows: Sequence[Row]
    planned: int
    facts: Mapping[str, Any]


def tables_of(done: Evaluated) -> dict[str, list[Table]]:
    """The tables of each task that has results."""
    results = results_of(done)
    return {
        task.name: list(task.tables(results[task.name], _arms_of(done.arms, results[task.name])))
        for task in done.tasks
        if task.name in results
    }


def results_of(done: Evaluated) -> dict[str, list[Result]]:
    """All values by task."""
    out: dict[str, list[Result]] = {}
    for row in done.rows:
        out.setdefault(row.task, []).extend(row.results())
    return {task: results for task, results in out.items() if results}


def write(done: Evaluated, folder: Path) -> list[str]:
    """Writes `evaluation.json`, `evaluation.md` and the plots; returns what a person should be told."""
    folder.mkdir(parents=True, exist_ok=True)
    tables = tables_of(done)
    plots, said = _plots(tables, folder)
    (folder / "evaluation.json").write_bytes(msgspec.json.format(msgspec.json.encode(_plain(done, tables)), indent=1))
    (folder / "evaluation.md").write_text(markdown(done, tables, plots), "utf-8")
    return said


def markdown(done: Evaluated, tables: Mapping[str, Sequence[Table]], plots: Mapping[str, str] | None = None) -> str:
    """The report.

    Args:
      plots: file names by the title of their table.
    """
    missing = done.planned - len(done.rows)
    lines = [f"# Evaluation of {done.model}", "", f"`{done.command}`", ""]
    if missing:
        lines += [f"**Not finished: {missing} of {done.planned} units are missing.**", ""]
    lines += [
        "Figures in parentheses are 95 % intervals: Wilson's for shares, the bootstrap over documents or contexts for "
        "everything else.",
        "",
        "| arm | options |",
        "|---|---|",
        *(f"| {arm.name} | {_options(arm)} |" for arm in done.arms),
        "",
        *(f"- {name}: {value}" for name, value in done.facts.items()),
    ]
    for part, title in _PARTS.items():
        of_part = [task for task in done.tasks if task.part == part and task.name in tables]
        if of_part:
            lines += ["", f"## {title}"]
        for task in of_part:
            lines += ["", task.about]
            for table in tables[task.name]:
                lines += ["", table.markdown()]
                if plots and table.title in plots:
                    lines += ["", f"![{table.title}]({plots[table.title]})"]
    judged = [arm.name for arm in done.arms if arm.name not in (WINDOW, LARGER, FULL, NEAREST)]
    if judged:
        lines += ["", "## What is to be reached", ""]
        lines += ["\n\n".join(acceptance.markdown(results_of(done), arm) for arm in judged)]
    skipped = dict.fromkeys((row.task, row.arm, row.skipped) for row in done.rows if row.skipped)
    if skipped:
        lines += ["", "## Not measured", "", *(f"- {task}, {arm}: {why}" for task, arm, why in skipped)]
    return "\n".join(lines) + "\n"


def _plain(done: Evaluated, tables: Mapping[str, Sequence[Table]]) -> dict[str, Any]:
    return {
        "model": done.model,
        "command": done.command,
        "version": __version__,
        "facts": done.facts,
        "planned": done.planned,
        "arms": {arm.name: arm.key for arm in done.arms},
        "tables": {task: [table.plain() for table in of_task] for task, of_task in tables.items()},
        "results": [_flat(row) for row in done.rows],
    }


def _flat(row: Row) -> dict[str, Any]:
    return {name: getattr(row, name) for name in row.__struct_fields__}


def _options(arm: Arm) -> str:
    if arm.kind == "full":
        return "a window that holds all of the text"
    if arm.kind == NEAREST:
        return "the window beside every state that was read (kNN-LM)"
    default = type(arm.options)()
    changed = {
        name: getattr(arm.options, name)
        for name in arm.options.__struct_fields__
        if getattr(arm.options, name) != getattr(default, name)
    }
    return "the defaults" if not changed else "`" + msgspec.json.encode(changed).decode() + "`"


def _arms_of(arms: Sequence[Arm], results: Sequence[Result]) -> list[str]:
    there = {result.arm for result in results}
    return [arm.name for arm in arms if arm.name in there]


def _plots(tables: Mapping[str, Sequence[Table]], folder: Path) -> tuple[dict[str, str], list[str]]:
    """Plots of the tables that count along a line, by title; or why there are none."""
    wanted = [
        (task, table) for task, of_task in tables.items() for table in of_task if table.x and len(table.columns) > 1
    ]
    if not wanted:
        return {}, []
    try:
        import matplotlib
    except ImportError:
        return {}, ["no plots: matplotlib is not installed (pip install 'atlas-jax[eval]')"]
    matplotlib.use("Agg")
    from matplotlib import pyplot

    files = {}
    for task, table in wanted:
        name = f"{task}-{table.title.lower().replace(' ', '-').replace(',', '')}.png"
        figure, axes = pyplot.subplots(figsize=(7, 4.5))
        places = range(len(table.columns))
        for arm, cells in table.rows.items():
            points = [(place, cells[column]) for place, column in enumerate(table.columns) if column in cells]
            low = [max(e.value - e.low, 0) if e.low == e.low else 0 for _, e in points]
            high = [max(e.high - e.value, 0) if e.high == e.high else 0 for _, e in points]
            axes.errorbar(
                [p for p, _ in points], [e.value for _, e in points], [low, high], label=arm, marker=".", capsize=2
            )
        axes.set(xlabel=table.x, title=table.title, xticks=list(places), xticklabels=table.columns)
        axes.legend(fontsize="small")
        figure.tight_layout()
        figure.savefig(folder / name, dpi=100)
        pyplot.close(figure)
        files[table.title] = name
    return files, []
