"""Owns the engine: loads it, knows whether it can be used, notices when it dies, and closes it."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from typing import Literal, Protocol

from atlas_jax.engine.api import EngineProtocol
from server.errors import ServerError, Unavailable
from server.services.event_bridge import EventBridge
from server.services.thread_pools import in_thread

log = logging.getLogger("atlas.server")
State = Literal["loading", "ready", "draining", "failed", "closed"]
_WATCH_SECONDS = 0.5
_SETTLE_SECONDS = 2.0
_CLOSING_SECONDS = 1.5


class Abortable(Protocol):
    """Something that waits for the engine and can be told not to."""

    def abort(self, error: ServerError) -> None:
        """Ends the wait with this error."""


class EngineSupervisor:
    """The engine as the services see it.

    Attributes:
      state: `loading` until the engine is there; `failed` when it could not be loaded or its thread has died.
      on_ready, on_failure: called once, on the event loop, when the state becomes `ready` or `failed`.
      error: why the engine could not be loaded, or None.
    """

    def __init__(self) -> None:
        self.state: State = "loading"
        self.on_ready: Callable[[], None] = _nothing
        self.on_failure: Callable[[], None] = _nothing
        self.error: BaseException | None = None
        self._engine: EngineProtocol | None = None
        self._bridge: EventBridge | None = None
        self._loading: asyncio.Future[EngineProtocol] | None = None
        self._running: set[Abortable] = set()

    # --- use -----------------------------------------------------------------------------------------------------
    @property
    def engine(self) -> EngineProtocol:
        """The engine, for reading; raises Unavailable while there is none."""
        if self._engine is None or self.state in ("failed", "closed") or not self._engine.alive():
            raise self._unavailable()
        return self._engine

    @property
    def accepting(self) -> EngineProtocol:
        """The engine, for new work; raises Unavailable also while draining."""
        if self.state == "draining":
            raise Unavailable("The server is shutting down", code="draining", retry_after=5.0)
        return self.engine

    @property
    def bridge(self) -> EventBridge:
        """The way of the engine's events to this event loop."""
        assert self._bridge is not None, "the engine supervisor has not been started"
        return self._bridge

    @property
    def dead(self) -> bool:
        """Whether the engine failed and only a restart helps."""
        if self.state == "closed":
            return False
        return self.state == "failed" or (self._engine is not None and not self._engine.alive())

    @property
    def ready(self) -> bool:
        """Whether new work is accepted."""
        return self.state == "ready" and not self.dead

    def _unavailable(self) -> Unavailable:
        if self.state == "loading":
            return Unavailable("The model is still loading", code="loading", retry_after=2.0)
        if self.state in ("draining", "closed") and not self.dead:
            return Unavailable("The server is shutting down", code="draining", retry_after=5.0)
        return Unavailable("The engine has stopped", code="engine_stopped", retry_after=10.0)

    def joined(self, work: Abortable) -> None:
        """Registers work that must end when the engine does."""
        self._running.add(work)

    def left(self, work: Abortable) -> None:
        """Forgets it."""
        self._running.discard(work)

    # --- life ----------------------------------------------------------------------------------------------------
    async def start(self, load: Callable[[], EngineProtocol], *, wait: bool) -> None:
        """Runs `load` in a thread of its own; returns at once unless told to wait."""
        loop = asyncio.get_running_loop()
        self._bridge = EventBridge(loop)
        self._loading = in_thread(load, name="engine-loader")
        self._loading.add_done_callback(self._loaded)
        if wait:
            await asyncio.wait({self._loading})

    async def loaded(self) -> None:
        """Waits until the engine is there; raises why it could not be loaded."""
        assert self._loading is not None, "the engine supervisor has not been started"
        await asyncio.wait({self._loading})
        if self.error is not None:
            raise self.error

    def _loaded(self, done: asyncio.Future[EngineProtocol]) -> None:
        if done.cancelled():
            return
        if error := done.exception():
            self.error = error  # who started the server says why it ended
            log.debug("The engine could not be loaded", exc_info=error)
            self._fail()
        elif self.state == "loading":
            self._engine = done.result()
            self.state = "ready"
            self.on_ready()

    async def watch(self) -> None:
        """Turns the death of the engine's thread into a failure; runs until cancelled."""
        while True:
            await asyncio.sleep(_WATCH_SECONDS)
            if self.state in ("ready", "draining") and self._engine is not None and not self._engine.alive():
                log.critical("The engine thread has died")
                self._fail()

    def _fail(self) -> None:
        self.state = "failed"
        self.abort(self._unavailable())
        self.on_failure()

    def drain(self) -> None:
        """Refuses new work from now on."""
        if self.state == "ready":
            self.state = "draining"
            if self._engine is not None:
                self._engine.drain()

    def abort(self, error: ServerError) -> None:
        """Ends everything that waits for the engine."""
        for work in list(self._running):
            work.abort(error)

    async def close(self, before: Callable[[EngineProtocol, float], None], *, timeout: float) -> None:
        """Runs `before` with the engine and the seconds it has, and closes it, all within `timeout` seconds."""
        engine, failed = self._engine, self.dead
        self.state = "failed" if failed else "closed"
        if engine is None:
            return

        def finish() -> None:
            started = time.monotonic()
            try:
                if not failed:
                    _settle(engine)
                    before(engine, max(0.0, timeout - _CLOSING_SECONDS - (time.monotonic() - started)))
            finally:
                engine.close(timeout=max(_CLOSING_SECONDS / 2, timeout - (time.monotonic() - started)))

        try:
            async with asyncio.timeout(timeout):
                await in_thread(finish, name="engine-closer")
        except TimeoutError:
            log.warning("The engine did not close within %.1f s; what was answered is in the journals", timeout)
        except Exception:
            log.exception("The engine could not be closed cleanly")


def _settle(engine: EngineProtocol) -> None:
    """Waits for the requests that were cut off: they hand their sessions back at the engine's next step."""
    end = time.monotonic() + _SETTLE_SECONDS
    while engine.alive() and engine.stats().requests_running and time.monotonic() < end:
        time.sleep(0.01)


def _nothing() -> None:
    return
