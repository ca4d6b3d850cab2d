"""Runs attacks one after another, on servers that those of one kind share, and judges what they have left."""

from __future__ import annotations

import importlib
import itertools
import pkgutil
import time
import traceback
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import benchmarks.attack
from benchmarks.attack.registry import Attack, Scene
from benchmarks.attack.target import CEILING_MIB, Target

for _module in pkgutil.iter_modules(benchmarks.attack.__path__):
    if _module.name not in ("__main__", "runner", "neighbour"):
        importlib.import_module(f"benchmarks.attack.{_module.name}")


@dataclass
class Row:
    """What became of one attack; `verdict` is empty if everything held."""

    family: str
    name: str
    tried: int
    deaths: int
    lost: list[str]
    growth: float
    ratio: float | None
    seconds: float
    verdict: str
    notes: list[str]

    def __str__(self) -> str:
        pace = "" if self.ratio is None else f", p99 × {self.ratio:.1f}"
        head = f"{self.family}: {self.name}: {self.tried} tries, {self.deaths} deaths, {len(self.lost)} lost, "
        head += f"{self.growth:+.0f} MiB{pace}, {self.seconds:.0f} s: "
        return head + (f"FAULT {self.verdict}" if self.verdict else "held") + "".join(f" [{x}]" for x in self.notes)


def run(
    attacks: Sequence[Attack],
    model: Path,
    folder: Path,
    flags: Sequence[str],
    *,
    quick: bool,
    seed: int,
    seconds: float,
) -> Iterator[Row]:
    """Runs attacks in the order of their families; the row of each as it ends."""
    stage = _Stage(model, folder, tuple(flags))
    try:
        for number, one in enumerate(sorted(attacks, key=lambda one: (one.family, one.alone, one.flags, one.keys))):
            place = folder / f"attack-{number}"
            place.mkdir()
            scene = Scene(
                model=model, folder=place, flags=stage.flags, quick=quick, seed=seed + number, seconds=seconds
            )
            yield _run(one, scene, stage)
    finally:
        stage.close()


class _Stage:
    """The server that attacks share, as long as it lives and has what the next one needs."""

    def __init__(self, model: Path, folder: Path, flags: tuple[str, ...]) -> None:
        # what the attacking clients compute is time the server has not got; a log full of that would hide the rest
        self.flags = ("--atlas-latency-budget-ms", "60000", *flags)
        self._model, self._folder = model, folder
        self._numbers = itertools.count()
        self._kind: tuple[str, tuple[str, ...], bool] | None = None
        self.target: Target | None = None

    def ready(self, one: Attack) -> Target:
        """A server with the victim's sessions, at rest."""
        kind = (one.family, one.flags, one.keys)
        if self.target is None or not self.target.alive or one.fresh or kind != self._kind:
            self.close()
            place = self._folder / f"shared-{next(self._numbers)}"
            self.target = Target(self._model, place, (*self.flags, *one.flags), keys=one.keys)
            self.target.plant()
            self._kind = kind
        self.target.rest()
        return self.target

    def again(self) -> Target:
        """The same server once more, over its memory, after it has ended."""
        assert self.target is not None
        assert self._kind is not None
        planted = self.target.planted
        self.target.kill()
        self.target = Target(self._model, self.target.folder, (*self.flags, *self._kind[1]), keys=self.target.keys)
        self.target.planted = planted
        return self.target

    def close(self) -> None:
        """Ends the server."""
        if self.target is not None:
            self.target.kill()
        self.target = None


def _run(one: Attack, scene: Scene, stage: _Stage) -> Row:
    growth = 0.0
    began = time.monotonic()
    try:
        if one.alone:
            stage.close()
        else:
            scene.target = stage.ready(one)
            began = time.monotonic()
        one.run(scene)
    except Exception as error:  # what an attack did not foresee is a finding, and the others are to run
        scene.faults.append(f"{type(error).__name__}: {' '.join(str(error).split())[-200:]}")
        scene.note(" ".join(traceback.format_exc().splitlines()[-6:]))
    finally:
        scene.close()
    seconds = time.monotonic() - began
    if not one.alone and stage.target is not None:
        try:
            growth = _inspect(one, scene, stage, stage.target)
        except Exception as error:
            scene.faults.append(f"afterwards: {type(error).__name__}: {' '.join(str(error).split())[-200:]}")
            stage.close()
    if scene.deaths:
        scene.faults.insert(0, f"{scene.deaths} deaths")
    scene.faults += scene.lost
    return Row(
        one.family, one.name, scene.tried, scene.deaths, scene.lost, growth, scene.ratio, seconds, scene.verdict,
        scene.notes,
    )  # fmt: skip


def _inspect(one: Attack, scene: Scene, stage: _Stage, target: Target) -> float:
    """Whether the server lives, is well and has its sessions; by how much its memory grew."""
    growth = target.peak - target.base
    if target.alive:
        idle = scene.must(target.wait_idle(60.0), "something still runs a minute later")
        if idle:
            scene.lost += target.lost()
        scene.must(growth <= one.growth_mib, f"it grew by {growth:.0f} MiB, more than {one.growth_mib:.0f}")
        scene.must("Traceback" not in target.log, "a traceback is in the log")
        if scene.faults or scene.lost:  # the next attack is not to be blamed for what this one has left
            stage.close()
        return growth
    scene.deaths += 1
    if target.burst:
        scene.faults.append(f"it grew by {CEILING_MIB:.0f} MiB and was ended")
    scene.note(" ".join(target.log.splitlines()[-3:])[-300:])
    scene.lost += [f"{fault} after a restart" for fault in stage.again().lost()]
    return growth
