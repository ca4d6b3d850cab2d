"""Runs the server: uvicorn inside this process, and the way it stops."""

from __future__ import annotations

import asyncio
import logging
import socket
import sys
from types import FrameType

import uvicorn

from server.app import EngineSource, create_app, lifecycle_of
from server.lifecycle import Lifecycle
from server.settings import Settings

log = logging.getLogger("atlas.server")
_HEADER_BYTES = 32_768
_KEEP_ALIVE_SECONDS = 30
# How long the engine's thread may keep the interpreter from the event loop while it runs Python (5 ms by default).
_SWITCH_SECONDS = 0.0005


class Server(uvicorn.Server):
    """uvicorn with an end in order: refuse, let running requests finish, tell the rest, save, close.

    A second signal ends the waiting, not the saving.
    """

    def __init__(self, config: uvicorn.Config, lifecycle: Lifecycle) -> None:
        super().__init__(config)
        self.lifecycle = lifecycle
        self._loop: asyncio.AbstractEventLoop | None = None
        lifecycle.host.on_failure = self._engine_failed

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Starts to listen."""
        self._loop = asyncio.get_running_loop()
        await super().startup(sockets)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Notes a signal; the main loop does the rest."""
        if not self.should_exit:
            super().handle_exit(sig, frame)
        elif self._loop is not None:
            self._loop.call_soon_threadsafe(self.lifecycle.cut)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Drains, and one second before uvicorn's cut-off ends what still runs with an error clients can read."""
        self.lifecycle.drain()
        grace = self.config.timeout_graceful_shutdown or 1
        cut = asyncio.get_running_loop().call_later(max(0.1, grace - 1), self.lifecycle.cut)
        await super().shutdown(sockets)
        cut.cancel()

    def _engine_failed(self) -> None:
        self.should_exit = True


def build(settings: Settings, engine: EngineSource) -> Server:
    """The server, ready to run."""
    app, edge = create_app(settings, engine)
    proxies = list(settings.server.trusted_proxies)
    config = uvicorn.Config(
        edge,
        host=settings.server.host,
        port=settings.server.port,
        workers=1,
        lifespan="on",
        http="h11",
        ws="none",
        h11_max_incomplete_event_size=_HEADER_BYTES,
        timeout_keep_alive=_KEEP_ALIVE_SECONDS,
        timeout_graceful_shutdown=settings.server.shutdown_grace,
        server_header=False,
        access_log=False,
        log_config=None,
        proxy_headers=bool(proxies),
        forwarded_allow_ips=proxies,
    )
    return Server(config, lifecycle_of(app))


def serve(settings: Settings, engine: EngineSource) -> int:
    """Runs until a signal or the engine's death; returns the exit code.

    uvicorn raises a captured signal again once everything has been saved and closed, so a process ended by SIGTERM
    reports 143 (and one ended by Ctrl-C comes back here).
    """
    server = build(settings, engine)
    sys.setswitchinterval(_SWITCH_SECONDS)
    try:
        server.run()
    except KeyboardInterrupt:
        return 130
    return 1 if server.lifecycle.host.dead or not server.started else 0
