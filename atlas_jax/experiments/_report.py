"""What every experiment ends in: means with intervals over seeds, a markdown table, a plot."""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import numpy.typing as npt

# two-sided 95 % points of Student's t for 1, 2, … degrees of freedom
_T95 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)


@dataclass(frozen=True)
class Estimate:
    """A mean over seeds and half the width of its 95 % interval.

    Attributes:
      half: Student's t; nan for a single seed.
    """

    mean: float
    half: float

    @classmethod
    def of(cls, values: npt.ArrayLike) -> Estimate:
        """From one value per seed."""
        x = np.asarray(values, np.float64)
        if x.size < 2:
            return cls(float(x.mean()), float("nan"))
        t = _T95[min(x.size - 1, len(_T95)) - 1]
        return cls(float(x.mean()), float(t * x.std(ddof=1) / np.sqrt(x.size)))

    def __str__(self) -> str:
        return f"{self.mean:.3g} ± {self.half:.2g}"


@dataclass
class Report:
    """Curves over one variable, as they come.

    Attributes:
      name: of the files that are written.
      x_label, y_label: of the plot; `x_label` also heads the table.
      curves: name → x → estimate.
    """

    name: str
    title: str
    x_label: str
    y_label: str
    log_x: bool = False
    log_y: bool = False
    curves: dict[str, dict[float, Estimate]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def add(self, curve: str, x: float, values: npt.ArrayLike) -> None:
        """One point of a curve, one value per seed."""
        self.curves.setdefault(curve, {})[x] = Estimate.of(values)

    def table(self) -> str:
        """Rows are the values of x, columns the curves."""
        places = sorted({x for points in self.curves.values() for x in points})
        head = f"| {self.x_label} | " + " | ".join(self.curves) + " |"
        lines = [head, "|" + "---|" * (len(self.curves) + 1)]
        for x in places:
            cells = [str(points[x]) if x in points else "" for points in self.curves.values()]
            lines.append(f"| {x:g} | " + " | ".join(cells) + " |")
        return "\n".join(lines)

    def write(self, directory: Path, command: str) -> None:
        """Writes `<name>.md` and, where matplotlib is installed (extra `train`), `<name>.png`."""
        directory.mkdir(parents=True, exist_ok=True)
        notes = "".join(f"\n- {note}" for note in self.notes)
        caption = f"{self.y_label}, mean ± 95 % interval over seeds.".capitalize()
        text = f"## {self.title}\n\n`{command}`\n\n{caption}\n\n{self.table()}\n{notes}\n"
        (directory / f"{self.name}.md").write_text(text)
        plot(
            directory / f"{self.name}.png",
            self.curves,
            self.title,
            self.x_label,
            self.y_label,
            log_x=self.log_x,
            log_y=self.log_y,
        )
        print(text)


def plot(
    path: Path,
    curves: Mapping[str, Mapping[float, Estimate]],
    title: str,
    x_label: str,
    y_label: str,
    *,
    log_x: bool = False,
    log_y: bool = False,
) -> bool:
    """Draws curves with their intervals; False where matplotlib is not installed (extra `plots`)."""
    try:
        import matplotlib
    except ImportError:
        print("no plot: matplotlib is not installed")
        return False
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4.5))
    for curve, points in curves.items():
        places = sorted(points)
        spread = [0.0 if np.isnan(points[x].half) else points[x].half for x in places]
        axes.errorbar(places, [points[x].mean for x in places], spread, label=curve, marker=".", capsize=2)
    axes.set(xlabel=x_label, ylabel=y_label, title=title)
    axes.set_xscale("log" if log_x else "linear")
    axes.set_yscale("log" if log_y else "linear")
    axes.legend(fontsize="small")
    figure.tight_layout()
    figure.savefig(path, dpi=100)
    pyplot.close(figure)
    return True


@dataclass(frozen=True)
class Options:
    """Command line of an experiment.

    Attributes:
      seeds: number of them, counted from 0.
      quick: a few seconds' version, to see that it runs.
    """

    seeds: int
    quick: bool


def run_command(
    module: str,
    experiment: Callable[[Options], Sequence[Report]],
    *,
    seeds: int,
    argv: Sequence[str] | None = None,
) -> Mapping[str, Report]:
    """Parses the command line, runs the experiment and writes its reports.

    Args:
      module: name of the experiment, as in `python -m atlas_jax.experiments.<module>`.
      seeds: how many by default.
    """
    parser = argparse.ArgumentParser(prog=f"python -m atlas_jax.experiments.{module}")
    parser.add_argument("--out", type=Path, default=Path("experiment-results"), help="directory (%(default)s)")
    parser.add_argument("--seeds", type=int, default=seeds, help="number of seeds (%(default)s)")
    parser.add_argument("--quick", action="store_true", help="a small version, to see that it runs")
    args = parser.parse_args(argv)
    started = time.process_time()
    reports = experiment(Options(seeds=args.seeds, quick=args.quick))
    took = time.process_time() - started
    command = f"python -m atlas_jax.experiments.{module}" + (" --quick" if args.quick else "")
    if args.seeds != seeds:
        command += f" --seeds {args.seeds}"
    for report in reports:
        report.notes.append(f"{args.seeds} seeds; {took:.0f} processor seconds for the command.")
        report.write(args.out, command)
    return {report.name: report for report in reports}
