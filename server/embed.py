"""The server as a part of another program: an ASGI application to mount, whose engine lives as long as an `async with`."""

from __future__ import annotations

from contextlib import AbstractAsyncContextManager
from types import TracebackType

from server.app import EngineSource, create_app, lifecycle_of
from server.config.settings import Settings
from server.engine_factory import engine_factory
from server.lifecycle import Lifecycle
from server.middleware.asgi import Receive, Scope, Send


class AtlasServer:
    """An ASGI application with every endpoint of the server, at the root or under any path of another application.

    Entering it opens the engine and starts what runs beside the requests; leaving it saves the sessions and closes the
    engine. A server that runs it by itself, such as `uvicorn.run(AtlasServer(settings))`, does both by its lifespan.
    Limits on connections, the size of the listening queue and what happens on signals are those of the program that
    listens.

    Args:
      settings: `server.model` is needed; `server.host` says which address the program listens on, and with it which
        Host headers are accepted.
      engine: an engine, or a function that opens one, instead of the settings' own.

    Raises:
      SettingsError: no model is named.
      KeyFileError: the keys file cannot be used.
    """

    def __init__(self, settings: Settings, engine: EngineSource | None = None) -> None:
        self._app, self._middleware = create_app(settings, engine_factory(settings) if engine is None else engine)
        self._running: AbstractAsyncContextManager[None] | None = None

    @property
    def lifecycle(self) -> Lifecycle:
        """Start, state and end of the engine."""
        return lifecycle_of(self._app)

    async def __aenter__(self) -> AtlasServer:
        """Opens the engine and waits for it; raises what stands in the way, and RuntimeError the second time."""
        if self._running is not None:
            raise RuntimeError("An AtlasServer can be entered once")
        self._running = self._app.lifespan()
        await self._running.__aenter__()
        try:
            await self.lifecycle.supervisor.loaded()
        except BaseException:
            await self._running.__aexit__(None, None, None)
            raise
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Ends what still runs, saves every session and closes the engine."""
        assert self._running is not None
        await self._running.__aexit__(None, None, None)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """The ASGI entry point."""
        if scope["type"] != "lifespan":
            # Some applications leave the path they mount at in front of ours, as ASGI has it, others take it off. What the
            # outer one keeps in the state is its own, and named as ours is if it is made with the same library.
            root, path = scope.get("root_path", "").rstrip("/"), scope["path"]
            if root and (path == root or path.startswith(root + "/")):
                path = path.removeprefix(root)
            scope = {**scope, "path": path or "/", "root_path": "", "state": {}}
        await self._middleware(scope, receive, send)
