"""The tables and plots of what has been run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from atlas_jax.experiments._report import Estimate, plot
from atlas_jax.experiments.reproduction import arms, runs
from atlas_jax.experiments.reproduction.arms import Size
from atlas_jax.experiments.reproduction.runs import Job

Found = Mapping[Job, Mapping[str, Any]]


def write(size: Size, found: Found, path: Path, command: str) -> None:
    """Writes the page, and a plot beside it for each part."""
    parts: dict[str, dict[str, list[Any]]] = {part: {} for part in ("text", "ablation", "needle", "mqar")}
    for job, measured in found.items():
        parts[job.part].setdefault(job.arm, []).append(measured)
    lines = ["# Reproduction", "", f"`{command}`", "", *_setting(size, found), ""]
    if parts["text"]:
        lines += ["## Language models", "", *_losses(parts["text"]), "", *_cost(size, parts["text"]), ""]
        lines += _drawn(path, "text", _curves(parts["text"]), "place in the window", "held-out nats per byte")
    if parts["ablation"]:
        both = {"ATLAS": parts["text"].get("ATLAS", []), **parts["ablation"]}
        lines += ["## What each part is worth", "", "One part of ATLAS changed, all else alike.", ""]
        lines += [*_losses({name: runs_ for name, runs_ in both.items() if runs_}), ""]
    if parts["mqar"]:
        lines += ["## Recall of pairs (MQAR)", "", *_mqar(size, parts["mqar"]), ""]
    if parts["needle"]:
        lines += ["## A needle past the trained length", "", *_needles(size, parts["needle"]), ""]
        curves = {
            arm: {float(n): Estimate.of([r["accuracy"][n] for r in held]) for n in held[0]["accuracy"]}
            for arm, held in parts["needle"].items()
        }
        lines += _drawn(path, "needle", curves, "trained lengths", "accuracy", log_x=True)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(lines).rstrip() + "\n")


def _setting(size: Size, found: Found) -> list[str]:
    seeds = len({job.seed for job in found if job.seed is not None})
    counts = [held["parameters"] for job, held in found.items() if job.part in ("text", "ablation", "needle")]
    lines = [
        f"Size `{size.name}`: {size.layers} layers, width {size.embed}, {size.heads} heads; bytes as tokens. Models have "
        f"{min(counts, default=0)} to {max(counts, default=0)} parameters, made equal by the width of their MLPs and "
        f"asserted to be within {arms.TOLERANCE:.0%}. Each reads {size.steps * size.batch * size.length} bytes of text in "
        f"{size.steps} steps of {size.batch} × {size.length}; AdamW, learning rate {runs.RATE:g} for all. The last tenth of "
        f"every text is held out. {seeds} seeds; mean ± 95 % interval (Student's t) over seeds.",
    ]
    if not size.per_token:
        lines += [
            "",
            'At this size Muon orthogonalises once per chunk (`ns_per="chunk"`), in the paper for each token.',
        ]
    return lines


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    return ["| " + " | ".join(row) + " |" for row in (head, ["---"] * len(head), *rows)]


def _losses(held: Mapping[str, list[Any]]) -> list[str]:
    places = list(next(iter(held.values()))[0]["loss_by_position"])
    rows = [
        [arm, *(str(Estimate.of([r["loss_by_position"][p] for r in each])) for p in places)]
        for arm, each in held.items()
    ]
    return ["Held-out loss, nats per byte, by place in the window:", "", *_table(["model", *places], rows)]


def _curves(held: Mapping[str, list[Any]]) -> dict[str, dict[float, Estimate]]:
    return {
        arm: {
            float(place.split("–")[1]): Estimate.of([r["loss_by_position"][place] for r in each])
            for place in each[0]["loss_by_position"]
        }
        for arm, each in held.items()
    }


def _cost(size: Size, held: Mapping[str, list[Any]]) -> list[str]:
    near, far = str(size.length), str(16 * size.length)
    rows = []
    for arm, each in held.items():
        speeds = [r["tokens_per_second"] for r in each if r["tokens_per_second"]]
        bytes_ = each[0]["state_bytes"]
        rows.append(
            [
                arm,
                str(each[0]["parameters"]),
                str(each[0]["ff"]),
                f"{bytes_[near]}",
                f"{bytes_[far]}",
                f"{max(speeds):.0f}" if speeds else "",
            ]
        )
    head = ["model", "parameters", "MLP", f"state at {near} tokens, bytes", f"at {far}", "training, tokens per second"]
    return [
        *_table(head, rows),
        "",
        "Speed is the fastest seed's, median over steps, on a machine that had other work.",
    ]


def _mqar(size: Size, held: Mapping[str, list[Any]]) -> list[str]:
    rows = [[arm, str(each[0]["parameters"]), str(Estimate.of(each[0]["accuracy"]))] for arm, each in held.items()]
    return [
        f"One layer, {size.pairs} pairs, {size.mqar_steps} steps of 16 rows, {runs.MQAR_SEEDS} seeds; chance is 1/8.",
        "",
        *_table(["memory", "parameters", "accuracy"], rows),
    ]


def _needles(size: Size, held: Mapping[str, list[Any]]) -> list[str]:
    factors = list(next(iter(held.values()))[0]["accuracy"])
    rows = [[arm, *(str(Estimate.of([r["accuracy"][n] for r in each])) for n in factors)] for arm, each in held.items()]
    return [
        f"Four pairs among {size.needle_length} bytes of filler in training, one of them asked for at the end; "
        "chance is 1/16.",
        "",
        *_table(["model", *(f"{n}×" for n in factors)], rows),
    ]


def _drawn(
    page: Path, name: str, curves: Mapping[str, Mapping[float, Estimate]], x: str, y: str, *, log_x: bool = False
) -> list[str]:
    picture = page.with_name(f"{page.stem}-{name}.png")
    page.parent.mkdir(parents=True, exist_ok=True)
    return [f"![{y}]({picture.name})", ""] if plot(picture, curves, "", x, y, log_x=log_x) else []
