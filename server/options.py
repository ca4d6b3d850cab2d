"""Where settings come from: defaults, the JSON file, the environment, the command line, in this order.

Every setting has one environment variable and one flag, derived from its name; the few whose names the deployment
contract fixes are listed in `_ENV` and `_FLAGS`.
"""

from __future__ import annotations

import argparse
import difflib
import os
import re
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args, get_origin

import msgspec

from server.errors import BadRequest
from server.services.memory_options import check_windows
from server.settings import Settings, SettingsError
from server.validation import explain

CONFIG_ENV = "ATLAS_CONFIG"
_MAX_FILE_BYTES = 1 << 20
_ENV = {
    "atlas.memory_save_interval": "ATLAS_AUTO_SAVE_INTERVAL",
    "atlas.default_config.enabled": "ATLAS_DEFAULT_ENABLED",
}
_FLAGS = {
    "atlas.enabled": "--atlas",
    "atlas.default_config.enabled": "--atlas-default-enabled",
    "atlas.default_config.window_size": "--atlas-window",
    "atlas.default_config.blend_ratio": "--atlas-blend",
}
# What Kubernetes sets in every container beside a Service that is called "atlas".
_SERVICE_LINK = re.compile(r"ATLAS_(SERVICE_(HOST|PORT\w*)|PORT_\w+)")


@dataclass(frozen=True, slots=True)
class Option:
    """One setting and its names.

    Attributes:
      path: section and field, e.g. `("atlas", "default_config", "window_size")`.
      kind: the type of one value, without None.
    """

    path: tuple[str, ...]
    kind: type
    many: bool
    env: str
    flag: str
    help: str
    default: Any

    @property
    def key(self) -> str:
        """The path as one dotted name."""
        return ".".join(self.path)


def options() -> tuple[Option, ...]:
    """Every setting, in the order of the structs."""
    return tuple(_walk(Settings, ()))


def _walk(struct: type[msgspec.Struct], path: tuple[str, ...]) -> Iterator[Option]:
    hints = typing.get_type_hints(struct, include_extras=True)
    for item in msgspec.structs.fields(struct):
        here = (*path, item.name)
        kind, metas = _unwrap(hints[item.name])
        if isinstance(kind, type) and issubclass(kind, msgspec.Struct):
            yield from _walk(kind, here)
            continue
        key = ".".join(here)
        many = get_origin(kind) is tuple
        prefix = "--atlas-" if here[0] == "atlas" else "--"
        if get_origin(kind) is typing.Literal or many:
            kind = str
        yield Option(
            path=here,
            kind=kind,
            many=many,
            env=_ENV.get(key, f"ATLAS_{item.name.upper()}"),
            flag=_FLAGS.get(key, prefix + item.name.replace("_", "-")),
            help=next((meta.description for meta in metas if meta.description), ""),
            default=item.default,
        )


def _unwrap(annotation: Any) -> tuple[Any, list[msgspec.Meta]]:
    """A field's type without None and Annotated, and the metas found on the way."""
    metas: list[msgspec.Meta] = []
    while True:
        if get_origin(annotation) is typing.Annotated:
            annotation, *extras = get_args(annotation)
            metas += [extra for extra in extras if isinstance(extra, msgspec.Meta)]
        elif get_origin(annotation) in (typing.Union, types.UnionType):
            annotation = next(member for member in get_args(annotation) if member is not type(None))
        else:
            return annotation, metas


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Gives the parser one flag for every setting; a flag that is not used leaves nothing in the result."""
    for option in options():
        default = "" if option.default in (None, msgspec.NODEFAULT, ()) else f" (default: {option.default})"
        text = f"{option.help}{default} [{option.env}]".replace("%", "%%")
        if option.kind is bool:
            parser.add_argument(
                option.flag,
                dest=option.key,
                action=argparse.BooleanOptionalAction,
                default=argparse.SUPPRESS,
                help=text,
            )
        else:
            parser.add_argument(
                option.flag,
                dest=option.key,
                default=argparse.SUPPRESS,
                metavar=option.kind.__name__.upper() + ("[,…]" if option.many else ""),
                help=text,
            )


def load(
    *, config: str | None = None, environ: Mapping[str, str] | None = None, flags: Mapping[str, Any] | None = None
) -> Settings:
    """The settings from all sources; raises SettingsError.

    Args:
      config: path of a JSON file; None takes `ATLAS_CONFIG`, if set.
      environ: the environment; None is the process's own.
      flags: dotted name to value, as `add_flags` leaves them.
    """
    environ = os.environ if environ is None else environ
    path = config or environ.get(CONFIG_ENV)
    tree: dict[str, Any] = {} if not path else _read(path)
    for option in options():
        for source, given in (
            (f"environment variable {option.env}", environ.get(option.env)),
            (f"flag {option.flag}", (flags or {}).get(option.key)),
        ):
            if given is not None:
                _put(tree, option.path, _value(option, given, source))
    _refuse_unknown(environ)
    settings = _convert(tree, "settings")
    try:
        check_windows(
            settings.atlas.default_config,
            max_window=settings.atlas.max_window,
            prefix="atlas.default_config.",
        )
    except BadRequest as error:
        raise SettingsError(str(error)) from None
    return settings


def _read(path: str) -> dict[str, Any]:
    try:
        with Path(path).open("rb") as file:
            raw = file.read(_MAX_FILE_BYTES + 1)
    except OSError as error:
        raise SettingsError(f"{path}: {error.strerror}") from None
    if len(raw) > _MAX_FILE_BYTES:
        raise SettingsError(f"{path}: larger than 1 MiB")
    try:
        tree = msgspec.json.decode(raw)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise SettingsError(f"{path}: {error}") from None
    _convert(tree, path)
    return typing.cast(dict[str, Any], tree)


def _convert(tree: Any, source: str) -> Settings:
    try:
        return msgspec.convert(tree, Settings, strict=True)
    except msgspec.ValidationError as error:
        raise SettingsError(f"{source}: {explain(Settings, str(error))}") from None


def _value(option: Option, given: Any, source: str) -> Any:
    if not isinstance(given, str):
        return given
    if option.many:
        return [part.strip() for part in given.split(",") if part.strip()]
    if given == "null":
        return None
    try:
        return msgspec.convert(given, option.kind, strict=False)
    except msgspec.ValidationError:
        raise SettingsError(f"{source}: expected {option.kind.__name__}, got {given[:64]!r}") from None


def _put(tree: dict[str, Any], path: Sequence[str], value: Any) -> None:
    for name in path[:-1]:
        tree = tree.setdefault(name, {})
    tree[path[-1]] = value


def _refuse_unknown(environ: Mapping[str, str]) -> None:
    known = {option.env for option in options()} | {CONFIG_ENV}
    for name in environ:
        if name.startswith("ATLAS_") and name not in known and not _SERVICE_LINK.fullmatch(name):
            close = difflib.get_close_matches(name, known, 1)
            hint = f"; did you mean {close[0]}?" if close else ""
            raise SettingsError(f"unknown environment variable {name}{hint}")
