"""Where a command's answers come from: a model in this process, or a server that is running."""

from __future__ import annotations

import argparse
import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec

from server.config.settings import AtlasSection, ServerSection, Settings
from server.config.sources import CONFIG_ENV, KEY_ENV, load
from server.terminal.arguments import CommandError, UsageError, engine_opened
from server.terminal.client import Client


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Gives a parser the flags that say which model answers."""
    group = parser.add_argument_group("which model answers")
    group.add_argument(
        "--url", metavar="URL", help=f"a running server, e.g. http://127.0.0.1:8080; its key is in {KEY_ENV}"
    )
    group.add_argument(
        *("--hf-repo", "-hf", "-hfr"), metavar="ORG/NAME[:QUANT]", help="fetch the model from this repository"
    )
    group.add_argument("--offline", action="store_true", help="take a repository's model from the cache and ask nobody")
    group.add_argument("--config", metavar="FILE", help=f"JSON configuration file, as for `serve` [{CONFIG_ENV}]")
    group.add_argument("--lora", action="append", metavar="FILE[=SCALE]", help="LoRA adapter beside the model")
    group.add_argument("--threads", type=int, metavar="N", help="CPU threads; 0 takes every core")


@contextmanager
def connected(args: argparse.Namespace, *, memory_path: Path | None = None, memory: bool = True) -> Iterator[Client]:
    """A client of the server that the flags name, or of one in this process with the model that they name.

    Args:
      memory_path: folder for sessions of a model in this process; None keeps none.
      memory: whether a model in this process is opened with its memory.

    Raises:
      UsageError, SettingsError: the flags name no model, two, or one that cannot be opened.
      CommandError: the server cannot be reached, or the model cannot be served.
    """
    if args.url is not None:
        with _remote(args) as client:
            yield client
        return
    settings = _settings(args, memory_path=memory_path, memory=memory)
    from server.engine_factory import check_files, engine_config, engine_factory

    engine_config(settings)
    check_files(settings)
    from server.serve import reason_of
    from server.terminal.in_process import ADDRESS, InProcess

    quiet()
    model = Path(settings.server.model or settings.server.hf_repo or "").name
    with _loading(f"loading {model} …"):
        server = InProcess(settings, engine_factory(settings))
        engine_opened()
        try:
            server.__enter__()
        except Exception as error:
            raise CommandError(_in_use(reason_of(error))) from error
    client = Client(ADDRESS, place="the model", transport=server.transport)
    try:
        yield client
    finally:
        client.close()
        server.save()


@contextmanager
def _remote(args: argparse.Namespace) -> Iterator[Client]:
    given = [flag for flag in ("hf_repo", "config", "lora", "threads") if getattr(args, flag) is not None]
    if args.offline:
        given.append("offline")
    if getattr(args, "model", None) is not None:
        raise UsageError("--url and a model are given: which of them is to answer?")
    if given:
        raise UsageError(f"--{given[0].replace('_', '-')} says how a model is opened here, --url that none is")
    url = args.url if "://" in args.url else f"http://{args.url}"
    url = url.rstrip("/").removesuffix("/v1")
    if not url.startswith(("http://", "https://")):
        raise UsageError(f"--url must begin with http:// or https://, got '{args.url}'")
    client = Client(url, place=url, key=os.environ.get(KEY_ENV) or None)
    try:
        yield client
    finally:
        client.close()


def _settings(args: argparse.Namespace, *, memory_path: Path | None, memory: bool) -> Settings:
    """As `serve` would have them, for one person: no keys, one sequence at a time, no exports nobody asked for."""
    flags: dict[str, Any] = {
        "server.model": args.model,
        "server.hf_repo": args.hf_repo,
        "server.offline": args.offline or None,
        "server.lora": args.lora,
        "server.threads": args.threads,
    }
    settings = load(config=args.config, flags=flags)
    server: ServerSection = msgspec.structs.replace(
        settings.server,
        # a model that is named here is meant, whatever a configuration names for a server
        model=args.model or (None if args.hf_repo else settings.server.model),
        hf_repo=args.hf_repo or (None if args.model else settings.server.hf_repo),
        host="127.0.0.1",
        api_keys_file=None,
        max_concurrent=1,
        reserved_concurrent=None,
        rate_limit_requests=0,
        rate_limit_tokens=0,
    )
    atlas: AtlasSection = msgspec.structs.replace(
        settings.atlas,
        enabled=settings.atlas.enabled and memory,
        memory_path=str(memory_path) if memory_path is not None else settings.atlas.memory_path,
        session_store=None,
        memory_persist=memory_path is not None,
        enable_memory_endpoints=True,
        auto_load_memory=False,
        auto_save_memory=False,
        context_pool_size=None,
        session_ttl=0.0,
    )
    return msgspec.structs.replace(settings, server=server, atlas=atlas)


def _in_use(reason: str) -> str:
    if "is in use by another server" in reason:
        return f"{reason}; talk to that one with --url, or keep other sessions with --memory-path"
    return reason


def quiet() -> None:
    """Logs nothing but what is wrong: a person reads stderr between the answers."""
    logging.basicConfig(level=logging.ERROR, format="%(levelname)s %(name)s %(message)s", stream=sys.stderr)
    logging.getLogger("atlas").setLevel(logging.WARNING)


@contextmanager
def _loading(what: str) -> Iterator[None]:
    if not sys.stderr.isatty():
        yield
        return
    from server.terminal.output import console

    with console(stderr=True).status(what):
        yield
