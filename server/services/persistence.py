"""Loads the memory file at start, and saves it at every interval and at the end."""

from __future__ import annotations

import asyncio
import functools
import logging
import random
import time
from collections.abc import Sequence

from atlas_jax.engine.api import EngineError, EngineProtocol, SessionNotFound
from server.errors import ServerError
from server.metrics import Metrics
from server.services.host import EngineHost
from server.services.runtime_config import RuntimeConfig
from server.services.workers import in_thread
from server.settings import Settings

log = logging.getLogger("atlas.server")
_JITTER = 0.1


class Persistence:
    """Automatic loading and saving for every owner; each has a file of the same name in a folder of its own."""

    def __init__(
        self, *, host: EngineHost, config: RuntimeConfig, settings: Settings, owners: Sequence[str], metrics: Metrics
    ) -> None:
        self._host, self._config, self._settings = host, config, settings.atlas
        self._owners, self._metrics = owners, metrics
        self._saved_at = time.monotonic()

    def _file(self, engine: EngineProtocol) -> str:
        return self._settings.memory_file or f"{engine.model.name}_memory.atlas"

    def load(self, engine: EngineProtocol) -> None:
        """Loads every owner's file that exists; a damaged one is reported and left alone."""
        if not (self._settings.enabled and self._settings.memory_persist and self._settings.auto_load_memory):
            return
        file = self._file(engine)
        for owner in self._owners:
            try:
                with self._metrics.load_seconds.time():
                    count = engine.sessions.load_file(owner, file)
            except SessionNotFound:
                continue
            except EngineError as error:
                log.error("ATLAS memory in %s could not be loaded: %s", file, error)
            except Exception:
                log.exception("ATLAS memory in %s could not be loaded", file)
            else:
                log.info("Loaded ATLAS memory from %s (%d sessions)", file, count)

    @property
    def saving(self) -> bool:
        """Whether sessions are saved without being asked."""
        return self._settings.enabled and self._settings.memory_persist and self._settings.auto_save_memory

    @property
    def age(self) -> float:
        """Seconds since the last complete automatic save, or the start; 0 where nothing is saved automatically."""
        return time.monotonic() - self._saved_at if self.saving else 0.0

    def save(self, engine: EngineProtocol) -> None:
        """Saves every owner's sessions; one owner's failure does not keep the others from being saved."""
        if not self.saving:
            return
        complete = True
        for owner in self._owners:
            try:
                with self._metrics.save_seconds.time():
                    saved = engine.sessions.save_all(owner, self._file(engine))
            except EngineError as error:
                complete = False
                log.error("Failed to save ATLAS memory: %s", error)
            except Exception:
                complete = False
                log.exception("Failed to save ATLAS memory")
            else:
                log.info("[ATLAS] Memory state saved to %s (%d sessions)", saved.filename, saved.sessions)
        if complete:
            self._saved_at = time.monotonic()

    async def run(self) -> None:
        """Saves at every interval, give or take a tenth so that replicas do not all save at once; until cancelled."""
        saved = time.monotonic()
        spread = random.uniform(1 - _JITTER, 1 + _JITTER)
        while True:
            await asyncio.sleep(1.0)
            if time.monotonic() - saved < self._config.values.memory_save_interval * spread or not self._host.ready:
                continue
            try:
                engine = self._host.engine
                await in_thread(functools.partial(self.save, engine), name="atlas-saves")
            except ServerError:
                log.debug("No engine to save")
            saved = time.monotonic()
            spread = random.uniform(1 - _JITTER, 1 + _JITTER)
