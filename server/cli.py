"""The command line: `atlas-jax [serve] [flags]`, and the commands of `server.terminal`."""

from __future__ import annotations

import argparse
import logging
import os
import stat
import sys
import traceback
from collections.abc import Sequence
from typing import NoReturn

import msgspec

from atlas_jax import __version__
from atlas_jax.engine.config import EngineConfig
from server.config.settings import Settings, SettingsError
from server.config.sources import CONFIG_ENV, add_flags, load, suggestion
from server.engine_factory import check_files, engine_config, engine_factory
from server.middleware.auth import KeyFileError
from server.terminal.arguments import DONE, FAILED, USAGE_ERROR, Parser, UsageError
from server.terminal.commands import COMMANDS, SERVE

log = logging.getLogger("atlas.server")
# What the short help shows.
_FIRST = (
    *("model", "hf_repo", "host", "port", "api_keys_file", "temperature", "threads", "memory_path", "log_level"),
    *("config", "print_config", "version"),
)


class _Parser(Parser):
    def overview(self) -> str:
        """The help of the commands, and of the flags of `serve` that are needed first."""
        formatter = self._get_formatter()
        first = [action for action in self._actions if action.dest.rpartition(".")[2] in _FIRST]
        formatter.add_usage("atlas-jax [COMMAND] [flags]", [], [])
        formatter.add_text("Language models with a test-time memory: serves them, and talks with them at the terminal.")
        formatter.start_section("commands")
        formatter.add_arguments(
            argparse.Action([], name, nargs=0, metavar=name, help=about)
            for name, about in (
                (SERVE, "serve a model over HTTP (the default)"),
                *((one.name, one.about) for one in COMMANDS.values()),
            )
        )
        formatter.end_section()
        formatter.start_section("flags of serve that are needed first")
        formatter.add_arguments(sorted(first, key=lambda action: _FIRST.index(action.dest.rpartition(".")[2])))
        formatter.end_section()
        formatter.add_text("Every flag of a command: atlas-jax serve --help, and so on")
        return formatter.format_help()


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    command = COMMANDS.get(arguments[0]) if arguments else None
    try:
        return _run(arguments) if command is None else command.main(arguments[1:])
    except ModuleNotFoundError as error:
        extra, missing = "serve" if command is None else command.extra, str(error.name).partition(".")[0]
        if missing in ("atlas_jax", __package__):
            raise
        _complain(f"{missing} is not installed; it comes with the extra '{extra}': pip install 'atlas-jax[{extra}]'")
        return FAILED


def _run(arguments: list[str]) -> int:
    parser = serve_parser()
    try:
        if arguments in (["-h"], ["--help"]):
            print(parser.overview(), end="")
            return DONE
        given = vars(parser.parse(_after_command(arguments)))
        config, show = given.pop("config"), given.pop("print_config")
        settings = load(config=config, flags=given)
        if show:
            print(msgspec.json.format(msgspec.json.encode(settings.public()), indent=2).decode())
            return DONE
        _serve(settings)
    except (UsageError, SettingsError, KeyFileError) as error:
        _complain(error)
        return USAGE_ERROR


def _after_command(arguments: Sequence[str]) -> Sequence[str]:
    if not arguments or arguments[0].startswith("-"):
        return arguments
    command, *rest = arguments
    if command != SERVE:
        known = (SERVE, *COMMANDS)
        near = suggestion(command, known) or f"; there are {', '.join(known[:-1])} and {known[-1]}"
        raise UsageError(f"unknown command '{command}'{near}")
    return rest


def serve_parser() -> _Parser:
    """The flags of `serve`, which are the settings."""
    parser = _Parser(
        prog="atlas-jax",
        usage="atlas-jax [serve] [flags]",
        description="Serves a GGUF or safetensors model with ATLAS memory sessions behind an OpenAI-compatible API.",
        epilog="Settings come from the defaults, the configuration file, the environment and the flags, in this order. "
        "Brackets hold a setting's environment variable.",
    )
    parser.add_argument("--version", action="version", version=f"atlas-jax {__version__}", help="print the version")
    parser.add_argument("--config", metavar="FILE", help=f"JSON configuration file [{CONFIG_ENV}]")
    parser.add_argument("--print-config", action="store_true", help="print the settings, secrets hidden, and stop")
    add_flags(parser)
    return parser


def _serve(settings: Settings) -> NoReturn:
    config = engine_config(settings)
    check_files(settings)
    from server.serve import StartError  # so that --print-config and a wrong flag answer at once

    _configure_logging(settings.server.log_level)
    keys = settings.server.api_keys_file
    if keys and os.path.exists(keys) and os.stat(keys).st_mode & (stat.S_IRGRP | stat.S_IROTH):
        log.warning("The API keys file can be read by other users")
    try:
        run = _serve_with_others if config.several_processes else _serve_alone
        code = run(settings, config)
    except StartError as error:
        _complain(error)
        code = FAILED
    except KeyFileError:
        raise
    except Exception as error:
        log.debug("%s", traceback.format_exc())
        _complain(f"{type(error).__name__}: {error} (--log-level debug shows where)")
        code = FAILED
    logging.shutdown()
    sys.stderr.flush()
    os._exit(code)  # a thread may be compiling, and the interpreter's own way out would abort in it


def _serve_alone(settings: Settings, _: EngineConfig) -> int:
    from server.serve import serve

    return serve(settings, engine_factory(settings))


def _serve_with_others(settings: Settings, config: EngineConfig) -> int:
    """Serves as process 0 of several, or follows that; returns the exit code."""
    from atlas_jax.engine.hosts.follower import await_process_0_on_signals
    from atlas_jax.engine.hosts.group import follow_process_0, join
    from atlas_jax.engine.hosts.leader import HostsError
    from server.serve import StartError, reason_of, serve

    try:
        group = join(config)
        if group.process_id:
            await_process_0_on_signals()
            follow_process_0(config, group)
            return DONE
    except HostsError as error:
        raise StartError(str(error)) from error
    except (ValueError, OSError) as error:
        raise StartError(reason_of(error)) from error
    return serve(settings, engine_factory(settings, group))


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
