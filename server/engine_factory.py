"""Builds the real engine from the settings; the one place that knows `atlas_jax.engine.Engine`."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from atlas_jax.engine.api import EngineProtocol
from server.config.settings import Settings, SettingsError

EngineFactory = Callable[[], EngineProtocol]


def engine_factory(settings: Settings) -> EngineFactory:
    """A function that opens the engine of these settings (slow: it reads the weights and compiles)."""
    server, atlas = settings.server, settings.atlas
    if not server.model:
        raise SettingsError("no model: give --model, ATLAS_MODEL or server.model in the configuration file")
    return partial(
        open_engine,
        model_path=server.model,
        adapter_path=atlas.adapter,
        memory_enabled=atlas.enabled,
        memory_path=atlas.memory_path if atlas.memory_persist else None,
        memory_file=atlas.memory_file,
        journal_sync=atlas.journal_sync,
        threads=server.threads,
        speculate=server.speculate,
        native_kernels=server.native_kernels,
        mesh_data=server.mesh_data,
        mesh_model=server.mesh_model,
        prefix_cache_bytes=server.prefix_cache_size,
        max_running=server.max_concurrent,
        max_waiting=server.max_waiting,
        max_window=atlas.max_window,
        memory_dim=atlas.memory_dim,
        device_cache_bytes=atlas.l1_cache_size,
        host_cache_bytes=atlas.l2_cache_size,
        disk_cache_bytes=atlas.l3_cache_size,
        owner_quota_bytes=_owner_quota(settings),
    )


def check_files(settings: Settings) -> None:
    """Looks at the files an engine will read, before anybody waits for it; raises SettingsError."""
    from atlas_jax.gguf import GGUFError, GGUFFile  # not needed for `--print-config`

    for name, path in (("model", settings.server.model), ("adapter", settings.atlas.adapter)):
        if path is None:
            continue
        try:
            if name == "model":
                GGUFFile.open(path).close()
            else:
                open(path, "rb").close()
        except OSError as error:
            raise SettingsError(f"{name} {path}: {error.strerror}") from None
        except GGUFError as error:
            raise SettingsError(f"{name} {path}: {error}") from None


def open_engine(
    *,
    model_path: str,
    adapter_path: str | None,
    memory_enabled: bool,
    memory_path: str | None,
    memory_file: str | None,
    journal_sync: float,
    threads: int,
    speculate: bool,
    native_kernels: bool,
    mesh_data: int,
    mesh_model: int,
    prefix_cache_bytes: int,
    max_running: int,
    max_waiting: int,
    max_window: int,
    memory_dim: int | None,
    device_cache_bytes: int,
    host_cache_bytes: int,
    disk_cache_bytes: int,
    owner_quota_bytes: int | None,
) -> EngineProtocol:
    """Opens the engine.

    Args:
      memory_path: folder of stored sessions; None keeps sessions in main memory and off the disk.
      memory_file: name of the file of all sessions; None is the default one.
      journal_sync: seconds the disk may be behind what was answered.
      threads: CPU threads; 0 takes every core.
      max_running: sequences that decode at once.
      max_waiting: sequences the engine may queue beyond them.
      device_cache_bytes: of idle sessions on the device; 0 keeps them in main memory.
      owner_quota_bytes: of one owner's sessions and files on disk; None is no limit of its own.
    """
    from atlas_jax.engine import Engine  # imports JAX, which takes seconds and is not needed for `--print-config`

    return Engine.open(
        model_path=model_path,
        adapter_path=adapter_path,
        memory_enabled=memory_enabled,
        memory_path=memory_path,
        memory_file=memory_file,
        journal_sync=journal_sync,
        threads=threads,
        speculate=speculate,
        native_kernels=native_kernels,
        mesh_data=mesh_data,
        mesh_model=mesh_model,
        prefix_cache_bytes=prefix_cache_bytes,
        max_running=max_running,
        max_waiting=max_waiting,
        max_window=max_window,
        memory_dim=memory_dim,
        device_cache_bytes=device_cache_bytes,
        host_cache_bytes=host_cache_bytes,
        disk_cache_bytes=disk_cache_bytes,
        owner_quota_bytes=owner_quota_bytes,
    )


def _owner_quota(settings: Settings) -> int | None:
    if settings.atlas.owner_quota is not None:
        return settings.atlas.owner_quota
    return settings.atlas.l3_cache_size // 2 if settings.server.api_keys_file else None
