"""Start, background work, and the order in which everything ends."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from datetime import timedelta

from atlas_jax.engine.api import EngineProtocol
from server.admission import Admission
from server.config.settings import SettingsError
from server.errors import Unavailable
from server.services.engine_supervisor import EngineSupervisor
from server.services.front_page import FrontPage
from server.services.monitoring import Monitoring
from server.services.persistence import Persistence
from server.services.runtime_config import RuntimeConfig
from server.services.stats import ServerStats
from server.services.thread_pools import ThreadPools

log = logging.getLogger("atlas.server")
# A stop takes at most the grace of the running requests, then this; together less than the ten seconds most supervisors
# wait before they kill.
CLOSE_SECONDS = 4.5


class Lifecycle:
    """What runs beside the requests, from the start of the server to its end.

    Args:
      admission, contexts: those who wait at either are told when it is over.
      config: whose defaults the engine has to accept.
      load: opens the engine.
      wait: whether the server starts to listen only when the engine is there.

    Attributes:
      front_page: how the server introduces itself.
    """

    def __init__(
        self,
        *,
        supervisor: EngineSupervisor,
        admission: Admission,
        contexts: Admission,
        pools: ThreadPools,
        monitoring: Monitoring,
        persistence: Persistence,
        config: RuntimeConfig,
        load: Callable[[], EngineProtocol],
        wait: bool,
        front_page: FrontPage,
        stats: ServerStats,
    ) -> None:
        self.supervisor, self.front_page = supervisor, front_page
        self._stats = stats
        self._admission, self._contexts, self._pools = admission, contexts, pools
        self._monitoring, self._persistence = monitoring, persistence
        self._load, self._wait, self._config = load, wait, config
        self._tasks: list[asyncio.Task[None]] = []

    async def start(self) -> None:
        """Loads the engine and starts the background tasks."""
        await self.supervisor.start(self._opened, wait=self._wait)
        for work in (self.supervisor.watch(), self._monitoring.run(), self._persistence.run()):
            task = asyncio.create_task(work)
            task.add_done_callback(_report)
            self._tasks.append(task)

    def _opened(self) -> EngineProtocol:
        engine = self._load()
        try:
            self._config.check(engine)
        except SettingsError:
            engine.close(timeout=CLOSE_SECONDS)
            raise
        self._persistence.load(engine)
        log.info("[ATLAS] Context pool initialized with %d contexts", self._contexts.places)
        return engine

    def drain(self) -> None:
        """Refuses new work and ends the streams that never end by themselves."""
        self.supervisor.drain()
        self._monitoring.close()

    def cut(self) -> None:
        """Ends what still runs or waits, with an error the clients can read."""
        error = Unavailable("The server is shutting down", code="shutting_down", retry_after=5.0)
        self._admission.close(error)
        self._contexts.close(error)
        self._pools.close(error)
        self.supervisor.abort(error)

    async def stop(self) -> None:
        """Stops the background work, saves the memory, closes the engine."""
        self.drain()
        self.cut()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self.supervisor.close(
            lambda engine, seconds: self._persistence.save(engine, timeout=seconds), timeout=CLOSE_SECONDS
        )
        stats = self._stats
        log.info(
            "Stopped after %s: %d requests, %d failed, %d left by their clients",
            timedelta(seconds=round(stats.uptime)),
            stats.total,
            stats.failed,
            stats.cancelled,
        )


def _report(task: asyncio.Task[None]) -> None:
    if not task.cancelled() and (error := task.exception()):
        log.critical("A background task has stopped", exc_info=error)
