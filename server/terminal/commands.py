"""Every command of `atlas-jax`: what it is for, where it is, and which extra has what it needs."""

from __future__ import annotations

import argparse
import importlib
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Command:
    """One command; its module has `main(argv) -> int` and `parser()`, and is imported when it is run."""

    name: str
    about: str
    module: str
    extra: str = "serve"

    def main(self, argv: Sequence[str]) -> int:
        """Runs it and returns its exit code."""
        code: int = importlib.import_module(self.module).main(argv)
        return code

    def parser(self) -> argparse.ArgumentParser:
        """Its flags."""
        made: argparse.ArgumentParser = importlib.import_module(self.module).parser()
        return made


SERVE = "serve"
"""The command that runs where none is named; its flags are the settings."""
COMMANDS = {
    one.name: one
    for one in (
        Command("chat", "talk with a model in sessions that remember", f"{__package__}.chat"),
        Command("generate", "one completion, to stdout", f"{__package__}.generate"),
        Command("inspect", "what is in a model, and what becomes of it", f"{__package__}.inspect"),
        Command("sessions", "look after a folder of sessions", f"{__package__}.sessions"),
        Command("bench", "how fast a model is on this machine", f"{__package__}.bench"),
        Command("eval", "what a model's memory is worth", "atlas_jax.evaluation.command", "eval"),
        Command("completion", "completion for bash, zsh or fish", f"{__package__}.completion"),
    )
}
