"""A part of the check, in a process of its own: `python -m benchmarks.accelerator.parts NAME --found FILE`."""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # a part before this one may still be going away

from benchmarks.accelerator import engine_parts, kernel_part, machine_part


@dataclass(frozen=True)
class Task:
    """What a part is to do.

    Attributes:
      model: to serve; None takes random weights.
      work: folder for models and compiled programs.
      found: takes what has been found, at once.
    """

    quick: bool
    model: Path | None
    work: Path
    found: Callable[..., None]


PARTS = {
    "machine": machine_part.run,
    "kernels": kernel_part.run,
    "invariants": engine_parts.invariants,
    "golden": engine_parts.golden,
    "speed": engine_parts.speed,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("part", choices=list(PARTS))
    parser.add_argument("--found", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--model", type=Path)
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)

    def found(what: str, value: Any, *, ok: bool | None = None, **more: Any) -> None:
        with args.found.open("a") as file:
            file.write(json.dumps({"what": what, "found": value, "ok": ok, **more}) + "\n")
        print(what, value, "" if ok is None else ok, flush=True)

    PARTS[args.part](Task(args.quick, args.model, args.work, found))


if __name__ == "__main__":
    main()
