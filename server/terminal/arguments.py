"""Command lines that are understood or answered with one line, and what ends a command."""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NoReturn

from server.config.settings import SettingsError
from server.config.sources import suggestion

DONE, FAILED, USAGE_ERROR, INTERRUPTED = 0, 1, 2, 130


_engine_opened = False


class UsageError(Exception):
    """A command line that cannot be understood; the message is one line."""


class CommandError(Exception):
    """Why a command could not do what it was asked for; the message is one line."""


class Parser(argparse.ArgumentParser):
    """A parser that raises instead of printing its whole usage, and knows what a mistyped flag was meant to be."""

    def __init__(self, **options: Any) -> None:
        options.setdefault("allow_abbrev", False)
        options.setdefault("formatter_class", lambda prog: argparse.HelpFormatter(prog, max_help_position=32))
        super().__init__(**options)

    def error(self, message: str) -> NoReturn:
        raise UsageError(message.removeprefix("argument "))

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        if action.choices is not None and value not in action.choices:
            known = [str(choice) for choice in action.choices]
            near = suggestion(str(value), known) or f"; there are {', '.join(known)}"
            raise UsageError(f"{_what(action)} '{value}' is not known{near}")

    def parse(self, arguments: Sequence[str]) -> argparse.Namespace:
        """The values of the flags; raises UsageError."""
        given, rest = self.parse_known_args(list(arguments))
        for flag in (one.partition("=")[0] for one in rest if one.startswith("-")):
            raise UsageError(f"unknown flag {flag}{suggestion(flag.replace('_', '-'), self._flags(arguments))}")
        if rest:
            raise UsageError(f"unexpected argument '{rest[0]}'")
        return given

    def _flags(self, arguments: Sequence[str]) -> Iterable[str]:
        """Every flag that this command line could have: of the parser, and of the command it names."""
        yield from self._option_string_actions
        for action in self._actions:
            if isinstance(action, argparse._SubParsersAction):
                for name, parser in action.choices.items():
                    if name in arguments and isinstance(parser, Parser):
                        yield from parser._flags(arguments)


def _what(action: argparse.Action) -> str:
    return "/".join(action.option_strings) or str(action.metavar or action.dest)


def one_line(text: object) -> str:
    """A message without line breaks."""
    return " ".join(str(text).split())


def engine_opened() -> None:
    """This process ends at once when its command does: the interpreter's own way out would wait for what still compiles, and
    abort in it."""
    global _engine_opened
    _engine_opened = True


def run(prog: str, work: Callable[[], int]) -> int:
    """Runs a command; what it refuses is one line on stderr, and the result its exit code.

    Args:
      prog: what the line begins with.
    """
    code = _code(prog, work)
    if _engine_opened:
        with contextlib.suppress(OSError):
            sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    return code


def _code(prog: str, work: Callable[[], int]) -> int:
    try:
        code = work()
        sys.stdout.flush()
    except (UsageError, SettingsError) as error:
        print(f"{prog}: error: {one_line(error)}", file=sys.stderr)
        return USAGE_ERROR
    except CommandError as error:
        print(f"{prog}: error: {one_line(error)}", file=sys.stderr)
        return FAILED
    except BrokenPipeError:  # whoever read what was written has enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return FAILED
    except KeyboardInterrupt:
        return INTERRUPTED
    return code
