"""Builds the real engine from the settings; the one place that knows `atlas_jax.engine.Engine`."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

from atlas_jax.config import ConfigError
from atlas_jax.engine import config as engine
from atlas_jax.engine.api import EngineProtocol
from atlas_jax.engine.config import EngineConfig
from server.config.settings import Settings, SettingsError

if TYPE_CHECKING:
    from atlas_jax.engine.hosts.group import Group

EngineFactory = Callable[[], EngineProtocol]
SETTING_OF = {"model_path": "model", "adapter_path": "adapter", "memory_enabled": "enabled"}
"""Settings that are named otherwise than the engine's field."""


def engine_config(settings: Settings) -> EngineConfig:
    """What the engine of these settings is opened with; raises SettingsError."""
    server, atlas = settings.server, settings.atlas
    if not server.model and not server.hf_repo:
        raise SettingsError(
            "no model: give --model FILE or --hf-repo ORG/NAME, ATLAS_MODEL or ATLAS_HF_REPO, or server.model or "
            "server.hf_repo in the configuration file"
        )
    if server.model and server.hf_repo:
        raise SettingsError("server.model and server.hf_repo both name a model: give one")
    fields: dict[str, Any] = {}
    for field in engine.FIELDS:
        name = SETTING_OF.get(field, field)
        fields[field] = getattr(server if name in server.__struct_fields__ else atlas, name)
    for field in ("model_path", "hf_repo", "session_store", "session_store_endpoint"):
        fields[field] = fields[field] or None  # an empty variable of a container names nothing
    if not atlas.memory_persist:
        fields["memory_path"] = fields["session_store"] = None
    if atlas.owner_quota is None and server.api_keys_file:
        fields["owner_quota"] = atlas.l3_cache_size // 2
    try:
        return EngineConfig(**fields)
    except ConfigError as error:
        raise SettingsError(str(error)) from None


def engine_factory(settings: Settings, group: Group | None = None) -> EngineFactory:
    """A function that opens the engine of these settings (slow: it reads the weights and compiles).

    Args:
      group: the processes that share its devices, if there are several.
    """
    return partial(open_engine, engine_config(settings), group)


def open_engine(config: EngineConfig, group: Group | None = None) -> EngineProtocol:
    """Opens the engine."""
    from atlas_jax.engine import Engine  # imports JAX, which takes seconds and is not needed for `--print-config`

    return Engine.open(config, group=group)


def check_files(settings: Settings) -> None:
    """Looks at the files an engine will read, before anybody waits for it; raises SettingsError."""
    from atlas_jax.gguf import GGUFError, GGUFFile
    from atlas_jax.model.checkpoint import open_model_file
    from atlas_jax.model.families import UnsupportedModel  # not needed for `--print-config`

    try:
        lora = [str(path) for path, _ in engine.lora_files(settings.server.lora)]
    except ConfigError as error:
        raise SettingsError(str(error)) from None
    named = [("model", settings.server.model), ("adapter", settings.atlas.adapter), *(("lora", path) for path in lora)]
    for name, path in named:
        if not path:
            continue
        try:
            if name == "model":
                open_model_file(path).close()
            elif name == "lora":
                GGUFFile.open(path).close()
            else:
                open(path, "rb").close()
        except OSError as error:
            raise SettingsError(f"{name} {path}: {error.strerror}") from None
        except (GGUFError, UnsupportedModel) as error:
            raise SettingsError(f"{name} {path}: {error}") from None
