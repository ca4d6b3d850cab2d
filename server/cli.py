"""The command line: `atlas-jax [serve] [flags]`."""

from __future__ import annotations

import argparse
import logging
import os
import stat
import sys
from collections.abc import Sequence
from typing import NoReturn

import msgspec

from atlas_jax import __version__
from server.auth import KeyFileError
from server.engine_factory import engine_factory
from server.options import CONFIG_ENV, add_flags, load
from server.settings import Settings, SettingsError

log = logging.getLogger("atlas.server")
_USAGE_ERROR = 2


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    parser = _parser()
    given = vars(parser.parse_args(arguments))
    config, show = given.pop("config"), given.pop("print_config")
    given.pop("command")
    try:
        settings = load(config=config, flags=given)
        if show:
            print(msgspec.json.format(msgspec.json.encode(settings.public()), indent=2).decode())
            return 0
        _serve(settings)
    except (SettingsError, KeyFileError) as error:
        print(f"atlas-jax: {error}", file=sys.stderr)
        return _USAGE_ERROR


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="atlas-jax",
        description="Serves a GGUF model with ATLAS memory sessions behind an OpenAI-compatible API.",
        epilog="Settings come from the defaults, the configuration file, the environment and the flags, in this order.",
        allow_abbrev=False,
    )
    parser.add_argument("command", nargs="?", choices=("serve",), default="serve", help="what to do (default: serve)")
    parser.add_argument("--version", action="version", version=f"atlas-jax {__version__}")
    parser.add_argument("--config", metavar="FILE", help=f"JSON configuration file [{CONFIG_ENV}]")
    parser.add_argument("--print-config", action="store_true", help="print the settings, secrets hidden, and stop")
    add_flags(parser)
    return parser


def _serve(settings: Settings) -> NoReturn:
    from server.serve import serve  # so that --print-config and a wrong flag answer at once

    logging.basicConfig(
        level=settings.server.log_level.upper(),
        format="%(asctime)s %(levelname)s %(name)s %(message)s",
        stream=sys.stderr,
    )
    keys = settings.server.api_keys_file
    if keys and os.path.exists(keys) and os.stat(keys).st_mode & (stat.S_IRGRP | stat.S_IROTH):
        log.warning("The API keys file can be read by other users")
    try:
        code = serve(settings, engine_factory(settings))
    except SystemExit as end:  # uvicorn's, where the port is taken
        code = end.code if isinstance(end.code, int) else 1
    logging.shutdown()
    os._exit(code)  # a thread may be compiling, and the interpreter's own way out would abort in it
