"""Loads the memory files at start, saves sessions at every interval and at the end, and deletes unused ones."""

from __future__ import annotations

import asyncio
import logging
import random
import time
from collections.abc import Sequence
from functools import partial

from atlas_jax.engine.api import EngineError, EngineProtocol, SessionStore
from server.config.settings import Settings
from server.errors import ServerError
from server.prometheus import Metrics
from server.services.engine_supervisor import EngineSupervisor
from server.services.response_store import ResponseStore
from server.services.runtime_config import RuntimeConfig
from server.services.thread_pools import in_thread

log = logging.getLogger("atlas.server")
_JITTER = 0.1
_SWEEP_SECONDS = 60.0


class Persistence:
    """Automatic loading and saving for every owner; each has a file of the same name in a folder of its own."""

    def __init__(
        self,
        *,
        supervisor: EngineSupervisor,
        config: RuntimeConfig,
        settings: Settings,
        owners: Sequence[str],
        metrics: Metrics,
        responses: ResponseStore,
    ) -> None:
        self._supervisor, self._config, self._settings = supervisor, config, settings.atlas
        self._owners, self._metrics, self._responses = owners, metrics, responses
        self._saved_at = time.monotonic()

    def load(self, engine: EngineProtocol) -> None:
        """Has the memory files read, now or as soon as the engine has a memory."""
        if not (self._settings.enabled and self._settings.memory_persist and self._settings.auto_load_memory):
            return
        file = self._file(engine)
        engine.before_memory(lambda sessions: self._load(sessions, file))
        if engine.model.memory_unavailable is None:
            self._load(engine.sessions, file)

    def _load(self, sessions: SessionStore, file: str) -> None:
        """Brings in what every owner's memory file has that is newer than the sessions stored; damage is set aside."""
        counts: list[int] = []
        for owner in self._owners:
            try:
                with self._metrics.load_seconds.time():
                    count = sessions.load_default(owner)
            except EngineError as error:
                log.error("ATLAS memory could not be loaded: %s", error)
            except Exception:
                log.exception("ATLAS memory could not be loaded")
            else:
                if count is not None:
                    counts.append(count)
        if counts:  # one line, however many owners there are
            log.info("Loaded ATLAS memory from %s (%d sessions newer than those stored)", file, sum(counts))

    @property
    def saving(self) -> bool:
        """Whether sessions are saved without being asked."""
        return self._settings.enabled and self._settings.memory_persist and self._settings.auto_save_memory

    @property
    def age(self) -> float:
        """Seconds since the last complete automatic save, or the start; 0 where nothing is saved automatically."""
        return time.monotonic() - self._saved_at if self.saving else 0.0

    def save(self, engine: EngineProtocol, *, timeout: float | None = None) -> None:
        """Writes the sessions that have changed, and every owner's memory file; one failure does not keep back the rest.

        Args:
          timeout: seconds it may take, at the end. What is not written is in the sessions' journals all the same.
        """
        if not self.saving or engine.model.memory_unavailable is not None:
            return
        started = time.monotonic()
        # half of the time: a file that is being written when it is over is written to its end
        left = engine.sessions.save_changed(timeout=None if timeout is None else timeout / 2)
        if left:
            log.warning("[ATLAS] %d sessions stay in their journals and are read again when they are next used", left)
        complete, counts = not left, list[int]()
        for owner in self._owners:
            rest = None if timeout is None else max(0.0, timeout - (time.monotonic() - started))
            try:
                with self._metrics.save_seconds.time():
                    saved = engine.sessions.save_default(owner, timeout=rest)
            except EngineError as error:
                complete = False
                log.error("Failed to save ATLAS memory: %s", error)
            except Exception:
                complete = False
                log.exception("Failed to save ATLAS memory")
            else:
                if saved is not None:
                    counts.append(saved.sessions)
        # Saves that went well at every interval are what `age` is for; the last one is what a stop waited for.
        level = logging.DEBUG if timeout is None else logging.INFO
        if counts:
            log.log(level, "[ATLAS] Memory state saved to %s (%d sessions)", self._file(engine), sum(counts))
        elif complete:
            log.log(level, "[ATLAS] Memory state saved; %s is as it was", self._file(engine))
        if complete:
            self._saved_at = time.monotonic()

    def _file(self, engine: EngineProtocol) -> str:
        return self._settings.memory_file or f"{engine.model.name}_memory.atlas"

    def expire(self, engine: EngineProtocol) -> None:
        """Deletes the sessions that nobody has used for longer than `session_ttl`."""
        try:
            count = engine.sessions.expire(self._settings.session_ttl)
        except Exception:
            log.exception("[ATLAS] Unused sessions could not be deleted")
        else:
            if count:
                log.info("[ATLAS] %d sessions were unused for %.0f s and deleted", count, self._settings.session_ttl)

    async def _expire_responses(self) -> None:
        """Deletes the responses that nobody has followed for longer than `session_ttl`."""
        for owner in self._owners:
            try:
                count = await self._responses.expire(owner, self._settings.session_ttl)
            except (ServerError, EngineError) as error:
                log.error("[ATLAS] Unused responses could not be deleted: %s", error)
            else:
                if count:
                    log.info("[ATLAS] %d responses were unused and deleted", count)

    async def run(self) -> None:
        """Saves at every interval, give or take a tenth so that replicas do not all save at once; until cancelled."""
        saved = swept = time.monotonic()
        spread = random.uniform(1 - _JITTER, 1 + _JITTER)
        while True:
            await asyncio.sleep(1.0)
            now = time.monotonic()
            save = now - saved >= self._config.values.memory_save_interval * spread
            sweep = self._settings.session_ttl > 0 and now - swept >= min(_SWEEP_SECONDS, self._settings.session_ttl)
            if not (save or sweep) or not self._supervisor.ready:
                continue
            try:
                engine = self._supervisor.engine
                if sweep:
                    await self._expire_responses()
                    swept = now
                if sweep and self._settings.enabled and engine.model.memory_unavailable is None:
                    await in_thread(partial(self.expire, engine), name="atlas-sweep")
                if save:
                    await in_thread(partial(self.save, engine), name="atlas-saves")
            except ServerError:
                log.debug("No engine to save")
            if save:
                saved = time.monotonic()
                spread = random.uniform(1 - _JITTER, 1 + _JITTER)
