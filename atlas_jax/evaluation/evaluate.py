"""The evaluation itself: which units there are, and measuring those that no earlier run has."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Mapping, Sequence
from typing import Any

from atlas_jax.config import PAGE, ModelConfig
from atlas_jax.engine.api import InvalidRequest
from atlas_jax.evaluation.arms import MEMORY, Arm, ArmError
from atlas_jax.evaluation.bench import Bench, window_of_bytes
from atlas_jax.evaluation.measures import NotPossible, Setup, Task
from atlas_jax.evaluation.progress import progress
from atlas_jax.evaluation.results import ResultsFile, Row, Unit, row_of, unit_key


def token_bytes(model: ModelConfig) -> int:
    """Bytes of a token's keys and values in int8, a float32 scale with each vector of a head."""
    attending = sum(layer.kind == "attention" for layer in model.layers)
    return attending * model.kv_heads * 2 * (model.head_dim + 4)


def sized(arms: Sequence[Arm], bench: Bench) -> list[Arm]:
    """The arms, the larger window being given as many bytes as a session of the memory takes."""
    memory = next((arm for arm in arms if arm.name == MEMORY), None)
    out = []
    for arm in arms:
        if arm.kind == "larger window":
            like = memory or Arm(MEMORY, type(arm.options)())
            window = window_of_bytes(
                bench.state_bytes(like)[0],
                bench.token_bytes,
                least=like.options.window_size + PAGE,
                most=bench.engine.config.max_window,
            )
            arm = dataclasses.replace(arm, options=_with_window(arm, window))
        out.append(arm)
    return out


def check(arms: Sequence[Arm], bench: Bench) -> None:
    """Asks the engine for one token of every arm; raises ArmError, naming the option, for one that it refuses."""
    for arm in arms:
        try:
            bench.run(bench.tokens("a"), arm.params(1), max_tokens=0)
        except InvalidRequest as error:
            option = "" if error.param is None else f"{error.param.removeprefix('atlas.')}: "
            raise ArmError(f"arm '{arm.name}': {option}{error}") from error


def _with_window(arm: Arm, window: int) -> Any:
    names = arm.options.__struct_fields__
    return type(arm.options)(**{name: getattr(arm.options, name) for name in names} | {"window_size": window})


def plan(tasks: Sequence[Task], arms: Sequence[Arm], setup: Setup, identity: Mapping[str, Any]) -> list[Unit]:
    """All units, the arms of an item one after the other: a run that is stopped has whole rows."""
    return [
        Unit(task, arm, item, unit_key(identity, task, arm, item))
        for task in tasks
        for item in task.items(setup)
        for arm in arms
    ]


def measure(units: Sequence[Unit], bench: Bench, results: ResultsFile, *, show: bool = True) -> list[Row]:
    """Measures what the file does not have yet, and returns the rows of all units.

    KeyboardInterrupt leaves the file with every unit that was finished.
    """
    left = [unit for unit in units if unit.key not in results]
    with progress(len(left), show=show) as step:
        for unit in left:
            step(f"{unit.task.name}, {unit.item.name}, {unit.arm.name}")
            results.append(measured(unit, bench))
    return rows_of(units, results)


def rows_of(units: Sequence[Unit], results: ResultsFile) -> list[Row]:
    """The rows of the units that are measured, under the arms' present names."""
    return [_renamed(results[unit.key], unit.arm.name) for unit in units if unit.key in results]


def measured(unit: Unit, bench: Bench) -> Row:
    """One unit."""
    started = time.monotonic()
    skipped = None
    try:
        values = unit.task.run(bench, unit.arm, unit.item)
    except NotPossible as error:
        values, skipped = (), str(error)
    return row_of(unit, bench.model.name, values, skipped, time.monotonic() - started)


def _renamed(row: Row, arm: str) -> Row:
    return row if row.arm == arm else Row(**{name: getattr(row, name) for name in row.__struct_fields__} | {"arm": arm})
