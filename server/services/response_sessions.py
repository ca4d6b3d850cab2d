"""The sessions that responses and conversations are generated in, and whose turn it is in a conversation."""

from __future__ import annotations

import asyncio
import contextlib
from weakref import WeakValueDictionary

from atlas_jax.engine.api import EngineError, SessionNotFound
from server.config.settings import Settings
from server.errors import ServerError, Unavailable
from server.middleware.request_context import RequestContext
from server.services.engine_supervisor import EngineSupervisor
from server.services.thread_pools import ThreadPools


class ResponseSessions:
    """Sessions by their names; for the event loop."""

    def __init__(self, supervisor: EngineSupervisor, pools: ThreadPools, settings: Settings) -> None:
        self._supervisor, self._pools = supervisor, pools
        self._memory_enabled, self._patience = settings.atlas.enabled, settings.server.queue_timeout
        self._tasks: set[asyncio.Task[None]] = set()
        self._locks: WeakValueDictionary[tuple[str, str], asyncio.Lock] = WeakValueDictionary()

    @property
    def there(self) -> bool:
        """Whether there are sessions at all."""
        return self._memory_enabled and self._supervisor.engine.model.memory_unavailable is None

    async def lock(self, owner: str, conversation: str, context: RequestContext) -> None:
        """Waits for whoever is changing a conversation; it is ours until the request ends."""
        lock = self._locks.setdefault((owner, conversation), asyncio.Lock())
        try:
            async with asyncio.timeout(self._patience):
                await lock.acquire()
        except TimeoutError:
            raise Unavailable("The conversation is in use", code="overloaded", retry_after=5.0) from None
        context.cleanup.append(lock.release)

    async def fork(self, owner: str, source: str, target: str) -> None:
        """Begins a session that goes on from another, if that one is there."""
        if self.there:
            sessions = self._supervisor.engine.sessions
            await self._pools.run("sessions", lambda: sessions.fork(owner, source, target))

    async def delete(self, owner: str, session: str) -> None:
        """Deletes a session, if it is there."""
        if not self.there:
            return
        sessions = self._supervisor.engine.sessions
        try:
            with contextlib.suppress(SessionNotFound):
                await self._pools.run("sessions", lambda: sessions.delete(owner, session))
        except OSError as error:
            raise Unavailable("The session cannot be deleted now", code="storage_failed", retry_after=30.0) from error

    def abandon(self, owner: str, session: str) -> None:
        """Deletes a session, some time, that a response would have had which did not come to its end."""

        async def delete() -> None:
            with contextlib.suppress(ServerError, EngineError):  # it is there no longer, or expires with the others
                await self.delete(owner, session)

        task = asyncio.get_running_loop().create_task(delete())
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
