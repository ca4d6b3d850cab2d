"""Whole evaluations of a tiny model: every task, stopped and gone on with, repeated."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from atlas_jax.evaluation import evaluate as evaluation
from atlas_jax.evaluation.results import Unit
from atlas_jax.evaluation.tasks import TASKS

_OWN = ("--arm", 'wide={"window_size": 2560, "read": false, "write": false}')
_ARMS = ("--arms", "window", "memory", "full")
_TWO = ("--arms", "window", "memory")
_FEW = ("--tasks", "lists", "overwritten", "--arms", "window", "full")
_QUICK = {"loss", "lists"}
"""Two tasks, with two arms: what takes long is to compile the engines of an evaluation. All of them are a slow test."""


def rows(out: Path) -> list[dict[str, Any]]:
    """The rows of the results file."""
    return [json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()]


def figures(out: Path) -> list[tuple[Any, ...]]:
    """What was measured, without when and how fast."""
    return sorted(
        (row["task"], row["arm"], row["item"], row["key"], json.dumps(row["values"]), row["skipped"] or "")
        for row in rows(out)
        if row["task"] != "cost"
    )


@pytest.fixture(scope="module")
def whole(evaluate: Callable[..., int], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An evaluation of few tasks and arms."""
    out = tmp_path_factory.mktemp("whole")
    assert evaluate(out, "--tasks", *sorted(_QUICK), *_TWO) == 0
    return out


def assert_complete(out: Path, tasks: set[str], arms: set[str]) -> None:
    """Every task has values of every arm, or a reason."""
    found = rows(out)
    assert {row["task"] for row in found} == tasks
    for row in found:
        assert bool(row["values"]) != bool(row["skipped"]), row
    for task in {row["task"] for row in found}:
        assert {row["arm"] for row in found if row["task"] == task} == arms


def test_quick_tasks_have_values_of_every_arm_or_a_reason(whole: Path) -> None:
    assert_complete(whole, _QUICK, set(_TWO[1:]))


@pytest.mark.slow  # minutes: texts of thousands of tokens, five arms
def test_every_task_has_values_of_every_arm_or_a_reason(evaluate: Callable[..., int], tmp_path: Path) -> None:
    assert evaluate(tmp_path, *_ARMS) == 0
    assert_complete(tmp_path, {task.name for task in TASKS if "quick" in task.scales}, set(_ARMS[1:]))
    assert "\n- cost, full: its bytes and time grow with the text\n" in (tmp_path / "evaluation.md").read_text()


def test_the_report_has_every_result_and_a_table_of_every_task(whole: Path) -> None:
    told = json.loads((whole / "evaluation.json").read_text())
    assert told["planned"] == len(told["results"]) == len(rows(whole))
    assert told["tables"].keys() == _QUICK
    text = (whole / "evaluation.md").read_text()
    for tables in told["tables"].values():
        for table in tables:
            assert f"### {table['title']}\n" in text
    for part in ("Loss", "Recall", "What is to be reached"):
        assert f"\n## {part}\n" in text
    assert "Not finished" not in text


@pytest.mark.slow
def test_a_window_that_holds_the_text_is_full_attention(evaluate: Callable[..., int], tmp_path: Path) -> None:
    assert evaluate(tmp_path, "--tasks", "loss", "--arms", "window", "larger window", "full", *_OWN) == 0
    losses = {(row["arm"], row["item"]): row["values"] for row in rows(tmp_path) if row["task"] == "loss"}
    assert {arm for arm, _ in losses} == {"window", "larger window", "full", "wide"}
    for (arm, item), values in losses.items():
        assert (values == losses["full", item]) == (arm in ("full", "larger window", "wide")), (arm, item)


@pytest.mark.slow
def test_a_stopped_run_goes_on_and_gives_what_a_whole_one_gives(
    evaluate: Callable[..., int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert evaluate(tmp_path / "whole", *_FEW) == 0
    measured = evaluation.measured
    done: list[Unit] = []

    def until_stopped(unit: Unit, bench: Any) -> Any:
        if len(done) == 4:
            raise KeyboardInterrupt
        done.append(unit)
        return measured(unit, bench)

    monkeypatch.setattr(evaluation, "measured", until_stopped)
    assert evaluate(tmp_path / "parts", *_FEW) == 130
    assert len(rows(tmp_path / "parts")) == 4
    assert "Not finished" in (tmp_path / "parts" / "evaluation.md").read_text()
    json.loads((tmp_path / "parts" / "evaluation.json").read_text())
    with (tmp_path / "parts" / "results.jsonl").open("a") as file:
        file.write('{"key": "cut off by a ki')  # as a kill in the middle of a write leaves it
    done.clear()
    monkeypatch.setattr(evaluation, "measured", lambda unit, bench: (done.append(unit), measured(unit, bench))[1])
    assert evaluate(tmp_path / "parts", *_FEW) == 0
    assert figures(tmp_path / "parts") == figures(tmp_path / "whole")
    assert len(done) == len(rows(tmp_path / "whole")) - 4, "a unit was measured again"


def test_without_matplotlib_everything_but_the_plots_is_written(
    whole: Path, evaluate: Callable[..., int], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for plot in whole.glob("*.png"):
        plot.unlink()
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setattr(evaluation, "measured", lambda *_: pytest.fail("a unit was measured again"))
    copy = whole / "copy.md"
    assert evaluate(whole, "--tasks", *sorted(_QUICK), *_TWO, "--write-docs", str(copy)) == 0
    assert copy.read_text() == (whole / "evaluation.md").read_text()
    said = capsys.readouterr()
    assert "no plots: matplotlib is not installed" in said.err
    assert not list(whole.glob("*.png"))
    assert json.loads((whole / "evaluation.json").read_text())["tables"]


def test_an_arm_that_the_engine_refuses_is_named_before_anything_is_measured(
    evaluate: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert evaluate(tmp_path, *_FEW, "--arm", 'odd={"window_size": 200}') == 2
    assert "arm 'odd': window_size: " in capsys.readouterr().err
    assert not (tmp_path / "results.jsonl").exists()


@pytest.mark.slow
def test_other_seeds_give_other_questions_and_the_same_documents(evaluate: Callable[..., int], tmp_path: Path) -> None:
    assert evaluate(tmp_path, "--tasks", "loss", "lists", "--arms", "full", "--seeds", "2") == 0
    found = rows(tmp_path)
    assert {row["seed"] for row in found if row["task"] == "loss"} == {0}
    lists = {
        row["seed"]: row["values"][0]["wanted"] for row in found if row["task"] == "lists" and row["arm"] == "full"
    }
    assert len(lists) == 2
    assert len(set(lists.values())) == 2


@pytest.mark.slow
def test_nearest_neighbours_know_losses_and_nothing_else(evaluate: Callable[..., int], tmp_path: Path) -> None:
    assert evaluate(tmp_path, "--tasks", "loss", "lists", "--arms", "window", "nearest neighbours") == 0
    nearest = [row for row in rows(tmp_path) if row["arm"] == "nearest neighbours"]
    assert {row["task"]: bool(row["values"]) for row in nearest} == {"loss": True, "lists": False}
    losses = {row["arm"]: row["values"][0]["value"] for row in rows(tmp_path) if row["task"] == "loss"}
    assert losses["nearest neighbours"] < losses["window"], "a random model's window is worse than any earlier text"
