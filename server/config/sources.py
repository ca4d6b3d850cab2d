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
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args, get_origin

import msgspec

from server.config.settings import Settings, SettingsError
from server.errors import BadRequest
from server.services.memory_options import check_windows
from server.validation import explain

CONFIG_ENV = "ATLAS_CONFIG"
KEY_ENV = "ATLAS_API_KEY"
"""What the commands that talk to a server send it as their key."""
_MAX_FILE_BYTES = 1 << 20
_ENV = {
    "atlas.memory_save_interval": "ATLAS_AUTO_SAVE_INTERVAL",
    "atlas.default_config.enabled": "ATLAS_DEFAULT_ENABLED",
    "atlas.default_config.memory_budget": "ATLAS_DEFAULT_MEMORY_BUDGET",
}
_FLAGS = {
    "atlas.session_store": "--session-store",
    "atlas.session_store_endpoint": "--session-store-endpoint",
    "atlas.enabled": "--atlas",
    "atlas.default_config.enabled": "--atlas-default-enabled",
    "atlas.default_config.memory_budget": "--atlas-default-memory-budget",
    "atlas.default_config.window_size": "--atlas-window",
    "atlas.default_config.blend_ratio": "--atlas-blend",
}
# What llama-server's users type.
_SHORT = {"server.hf_repo": ("-hf", "-hfr")}
# Headings of the help. What is not named here stands under its section's.
_SECTIONS = {
    "server": "Server",
    "sampling": "Sampling: what requests get that leave a field out (default: as the model's file recommends)",
    "atlas": "Memory",
    "atlas.default_config": "Memory of a request: defaults of its `atlas` object",
}
_GROUPS = {
    "Model": ("model", "hf_repo", "offline", "lora", "model_alias", "strict_model"),
    "Security": ("api_keys_file", "allowed_hosts", "cors_origins", "trusted_proxies", "failure_limit"),
    "Limits": (
        *(
            "max_body_bytes",
            "max_context",
            "max_concurrent",
            "context_pool_size",
            "max_waiting",
            "max_waiting_per_key",
            "queue_timeout",
        ),
        *("rate_limit_requests", "rate_limit_tokens", "client_timeout"),
    ),
    "Speed": (
        *("threads", "weight_dtype", "kv_dtype", "native_kernels", "gpu_kernels", "prefix_cache_size", "speculate"),
        *("mesh_data", "mesh_model", "distributed", "coordinator_address", "num_processes", "process_id", "cache_path"),
    ),
    "Storage": (
        *("memory_path", "session_store", "session_store_endpoint", "journal_sync"),
        *("memory_file", "memory_persist", "auto_load_memory", "auto_save_memory"),
        *("memory_save_interval", "l1_cache_size", "l2_cache_size", "l3_cache_size"),
    ),
    "Statistics and logs": (
        *(
            "enable_metrics",
            "enable_realtime_stats",
            "stats_update_interval",
            "metrics_interval",
            "metrics_history_size",
        ),
        *("latency_budget_ms", "log_atlas_operations", "log_level"),
    ),
}
_ORDER = (
    *("Model", "Server", "Security", "Limits", _SECTIONS["sampling"], "Memory", _SECTIONS["atlas.default_config"]),
    *("Storage", "Statistics and logs", "Speed"),
)
_GROUP_OF = {name: title for title, names in _GROUPS.items() for name in names}
# What Kubernetes sets in every container beside a Service that is called "atlas".
_SERVICE_LINK = re.compile(r"ATLAS_(SERVICE_(HOST|PORT\w*)|PORT_\w+)")


@dataclass(frozen=True, slots=True)
class Option:
    """One setting and its names.

    Attributes:
      path: section and field, e.g. `("atlas", "default_config", "window_size")`.
      kind: the type of one value, without None.
      many: whether it is a list: its flag may repeat, and each time have several values with commas between them.
      group: its heading in the help.
    """

    path: tuple[str, ...]
    kind: type
    many: bool
    env: str
    flag: str
    help: str
    default: Any
    group: str

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
            group=_SECTIONS[".".join(path)] if len(path) > 1 else _GROUP_OF.get(item.name, _SECTIONS[path[0]]),
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
    """Gives the parser one flag for every setting, in groups; a flag that is not used leaves nothing in the result."""
    groups: dict[str, argparse._ArgumentGroup] = {}
    for option in sorted(options(), key=lambda option: _ORDER.index(option.group)):
        if option.group not in groups:
            groups[option.group] = parser.add_argument_group(option.group)
        group = groups[option.group]
        default = "" if option.default in (None, msgspec.NODEFAULT, ()) else f" (default: {option.default})"
        text = f"{option.help}{default} [{option.env}]".replace("%", "%%")
        if option.kind is bool:
            group.add_argument(
                option.flag,
                dest=option.key,
                action=argparse.BooleanOptionalAction,
                default=argparse.SUPPRESS,
                help=text,
            )
        else:
            group.add_argument(
                option.flag,
                *_SHORT.get(option.key, ()),
                dest=option.key,
                action="append" if option.many else "store",
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


def suggestion(name: str, known: Iterable[str], cutoff: float = 0.6) -> str:
    """`; did you mean …?` with the nearest known name, or nothing where none is near."""
    close = difflib.get_close_matches(name, list(known), 1, cutoff)
    return f"; did you mean {close[0]}?" if close else ""


def _refuse_unknown_keys(tree: Any, struct: type[msgspec.Struct], path: tuple[str, ...], source: str) -> None:
    """Raises SettingsError for the first key no section has, with the nearest one that there is."""
    if not isinstance(tree, dict):
        return
    hints = typing.get_type_hints(struct)
    for name, value in tree.items():
        if name not in hints:
            here = ".".join((*path, name))
            # The right name in the wrong section is as easily written as a wrong name.
            moved = [option.key for option in options() if option.path[-1] == name]
            hint = (
                f"; did you mean {moved[0]}?" if moved else suggestion(here, (option.key for option in options()), 0.7)
            )
            raise SettingsError(f"{source}: unknown key '{here[:128]}'{hint}")
        if isinstance(hints[name], type) and issubclass(hints[name], msgspec.Struct):
            _refuse_unknown_keys(value, hints[name], (*path, name), source)


def _convert(tree: Any, source: str) -> Settings:
    _refuse_unknown_keys(tree, Settings, (), source)
    try:
        return msgspec.convert(tree, Settings, strict=True)
    except msgspec.ValidationError as error:
        raise SettingsError(f"{source}: {explain(Settings, str(error))}") from None


def _value(option: Option, given: Any, source: str) -> Any:
    if option.many:
        texts = [given] if isinstance(given, str) else given
        return [part.strip() for text in texts for part in text.split(",") if part.strip()]
    if not isinstance(given, str):
        return given
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
    known = {option.env for option in options()} | {CONFIG_ENV, KEY_ENV}
    for name in environ:
        if name.startswith("ATLAS_") and name not in known and not _SERVICE_LINK.fullmatch(name):
            raise SettingsError(f"unknown environment variable {name}{suggestion(name, known)}")
