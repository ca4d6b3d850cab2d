"""The command line: `atlas-jax [serve] [flags]`, and `atlas-jax eval MODEL.gguf`."""

from __future__ import annotations

import argparse
import logging
import os
import stat
import sys
import traceback
from collections.abc import Sequence
from typing import Any, NoReturn

import msgspec

from atlas_jax import __version__
from server.config.settings import Settings, SettingsError
from server.config.sources import CONFIG_ENV, add_flags, load, suggestion
from server.engine_factory import check_files, engine_factory
from server.middleware.auth import KeyFileError

log = logging.getLogger("atlas.server")
_FAILED, _USAGE_ERROR = 1, 2
_COMMANDS = ("serve", "eval")
# What the short help shows.
_FIRST = (
    *("model", "hf_repo", "host", "port", "api_keys_file", "temperature", "threads", "memory_path", "log_level"),
    *("config", "print_config", "version"),
)


class _UsageError(Exception):
    """A command line that cannot be understood; the message is one line."""


class _Parser(argparse.ArgumentParser):
    """A parser that raises instead of printing its whole usage, and knows what a mistyped flag was meant to be."""

    def error(self, message: str) -> NoReturn:
        raise _UsageError(message.removeprefix("argument "))

    def parse(self, arguments: Sequence[str]) -> dict[str, Any]:
        """The values of the flags; raises _UsageError."""
        given, rest = self.parse_known_args(list(arguments))
        for flag in (one.partition("=")[0] for one in rest if one.startswith("-")):
            raise _UsageError(f"unknown flag {flag}{suggestion(flag.replace('_', '-'), self._option_string_actions)}")
        if rest:
            raise _UsageError(f"unexpected argument '{rest[0]}'")
        return vars(given)

    def overview(self) -> str:
        """The help of the flags that are needed first."""
        formatter = self._get_formatter()
        first = [action for action in self._actions if action.dest.rpartition(".")[2] in _FIRST]
        formatter.add_usage("atlas-jax [serve] [flags]", [], [])
        formatter.add_text(self.description)
        formatter.start_section("flags that are needed first")
        formatter.add_arguments(sorted(first, key=lambda action: _FIRST.index(action.dest.rpartition(".")[2])))
        formatter.end_section()
        formatter.add_text(
            "Every flag, in groups: atlas-jax serve --help. What a model's memory is worth: atlas-jax eval --help"
        )
        return formatter.format_help()


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        return _run(arguments)
    except ModuleNotFoundError as error:
        extra, missing = "eval" if arguments[:1] == ["eval"] else "serve", str(error.name)
        if missing.partition(".")[0] in ("atlas_jax", "server"):
            raise
        _complain(f"{missing} is not installed; it comes with the extra '{extra}': pip install 'atlas-jax[{extra}]'")
        return _FAILED


def _run(arguments: list[str]) -> int:
    if arguments[:1] == ["eval"]:
        from atlas_jax.evaluation import command

        return command.main(arguments[1:])
    parser = _parser()
    try:
        if arguments in (["-h"], ["--help"]):
            print(parser.overview(), end="")
            return 0
        given = parser.parse(_after_command(arguments))
        config, show = given.pop("config"), given.pop("print_config")
        settings = load(config=config, flags=given)
        if show:
            print(msgspec.json.format(msgspec.json.encode(settings.public()), indent=2).decode())
            return 0
        _serve(settings)
    except (_UsageError, SettingsError, KeyFileError) as error:
        _complain(error)
        return _USAGE_ERROR


def _after_command(arguments: Sequence[str]) -> Sequence[str]:
    if not arguments or arguments[0].startswith("-"):
        return arguments
    command, *rest = arguments
    if command not in _COMMANDS:
        raise _UsageError(
            f"unknown command '{command}'{suggestion(command, _COMMANDS) or '; there are serve and eval'}"
        )
    return rest


def _parser() -> _Parser:
    parser = _Parser(
        prog="atlas-jax",
        usage="atlas-jax [serve] [flags]",
        description="Serves a GGUF or safetensors model with ATLAS memory sessions behind an OpenAI-compatible API.",
        epilog="Settings come from the defaults, the configuration file, the environment and the flags, in this order. "
        "Brackets hold a setting's environment variable.",
        formatter_class=lambda prog: argparse.HelpFormatter(prog, max_help_position=32),
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"atlas-jax {__version__}", help="print the version")
    parser.add_argument("--config", metavar="FILE", help=f"JSON configuration file [{CONFIG_ENV}]")
    parser.add_argument("--print-config", action="store_true", help="print the settings, secrets hidden, and stop")
    add_flags(parser)
    return parser


def _serve(settings: Settings) -> NoReturn:
    factory = engine_factory(settings)
    check_files(settings)
    from server.serve import StartError, serve  # so that --print-config and a wrong flag answer at once

    _configure_logging(settings.server.log_level)
    keys = settings.server.api_keys_file
    if keys and os.path.exists(keys) and os.stat(keys).st_mode & (stat.S_IRGRP | stat.S_IROTH):
        log.warning("The API keys file can be read by other users")
    try:
        code = serve(settings, factory)
    except StartError as error:
        _complain(error)
        code = _FAILED
    except KeyFileError:
        raise
    except Exception as error:
        log.debug("%s", traceback.format_exc())
        _complain(f"{type(error).__name__}: {error} (--log-level debug shows where)")
        code = _FAILED
    logging.shutdown()
    sys.stderr.flush()
    os._exit(code)  # a thread may be compiling, and the interpreter's own way out would abort in it


def _complain(error: Exception | str) -> None:
    print(f"atlas-jax: error: {' '.join(str(error).split())}", file=sys.stderr)


def _configure_logging(level: str) -> None:
    """Our lines at the level asked for; other packages' only where something is wrong, or at `trace`."""
    logging.basicConfig(
        level=logging.DEBUG if level == "trace" else logging.ERROR if level == "error" else logging.WARNING,
        format="%(asctime)s %(levelname)s %(name)s %(message)s",
        stream=sys.stderr,
    )
    logging.getLogger("atlas").setLevel(logging.DEBUG if level == "trace" else level.upper())
    if level != "trace":  # it warns of each request that is no HTTP: a port scan writes hundreds of lines
        logging.getLogger("uvicorn").setLevel(logging.ERROR)
