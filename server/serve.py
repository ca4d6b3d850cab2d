"""Runs the server: uvicorn inside this process, and the way it stops."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import socket
import sys
import threading
from collections.abc import Iterator
from types import FrameType
from typing import cast

import uvicorn

from server.app import EngineSource, connections_of, create_app, lifecycle_of
from server.config.settings import Settings
from server.gc_pauses import settled
from server.lifecycle import Lifecycle
from server.middleware.connections import Connections, raise_file_limit

log = logging.getLogger("atlas.server")
_HEADER_BYTES = 32_768
_KEEP_ALIVE_SECONDS = 30
# asyncio accepts as many connections in one go as it tells the kernel to queue, each an open file before anybody can
# refuse it; so it is told a few, and the kernel afterwards as many as may come while the loop is busy.
_ACCEPTED_AT_ONCE = 64
_BACKLOG = 1024
# How long the engine's thread may keep the interpreter from the event loop while it runs Python (5 ms by default).
_SWITCH_SECONDS = 0.0005


class StartError(Exception):
    """Why the server could not start; one line for the person who started it."""


class Server(uvicorn.Server):
    """uvicorn with an end in order: refuse, let running requests finish, tell the rest, save, close.

    A second signal ends the waiting, not the saving. SIGHUP, a terminal that was closed, is as good as SIGTERM.
    """

    def __init__(self, config: uvicorn.Config, lifecycle: Lifecycle, connections: Connections) -> None:
        super().__init__(config)
        self.lifecycle, self._connections = lifecycle, connections
        self._loop: asyncio.AbstractEventLoop | None = None
        self._address = ""
        lifecycle.supervisor.on_ready = self._engine_ready
        lifecycle.supervisor.on_failure = self._engine_failed

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Starts to listen."""
        self._loop = asyncio.get_running_loop()
        if sockets:
            self._address = reachable(sockets[0])
        await super().startup(sockets)
        for server in self.servers:
            for listener in server.sockets:
                with socket.fromfd(listener.fileno(), listener.family, listener.type) as same:
                    same.listen(_BACKLOG)
        if self.started and self.lifecycle.supervisor.state == "loading":
            log.info("Listening on http://%s; the model is being loaded", self._address)

    async def on_tick(self, counter: int) -> bool:
        """Looks after the connections twice a second."""
        if counter % 5 == 0:
            self._connections.sweep()
        return await super().on_tick(counter)

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Notes signals until the server has stopped, and raises them again then; `nohup` keeps SIGHUP ignored."""
        hangup = getattr(signal, "SIGHUP", None)  # there is none on Windows
        with super().capture_signals():
            main = threading.current_thread() is threading.main_thread()
            if hangup is None or not main or signal.getsignal(hangup) is signal.SIG_IGN:
                yield
                return
            before = signal.signal(hangup, self.handle_exit)
            try:
                yield
            finally:
                signal.signal(hangup, before)

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

    def _engine_ready(self) -> None:
        log.info(self.lifecycle.front_page.ready(self._address))

    def _engine_failed(self) -> None:
        self.should_exit = True


def build(settings: Settings, engine: EngineSource) -> Server:
    """The server, ready to run."""
    app, middleware = create_app(settings, engine)
    connections = connections_of(app)
    proxies = list(settings.server.trusted_proxies)
    config = uvicorn.Config(
        middleware,
        host=settings.server.host,
        port=settings.server.port,
        workers=1,
        lifespan="on",
        http=cast(type[asyncio.Protocol], connections.protocol),  # uvicorn only calls it
        ws="none",
        h11_max_incomplete_event_size=_HEADER_BYTES,
        backlog=_ACCEPTED_AT_ONCE,
        timeout_keep_alive=_KEEP_ALIVE_SECONDS,
        timeout_graceful_shutdown=settings.server.shutdown_grace,
        server_header=False,
        access_log=False,
        log_config=None,
        proxy_headers=bool(proxies),
        forwarded_allow_ips=proxies,
    )
    return Server(config, lifecycle_of(app), connections)


def serve(settings: Settings, engine: EngineSource) -> int:
    """Runs until a signal or the engine's death; returns the exit code.

    uvicorn raises a captured signal again once everything has been saved and closed, so a process ended by SIGTERM
    reports 143, one ended by SIGHUP 129 (and one ended by Ctrl-C comes back here).

    Raises:
      KeyFileError: the keys file cannot be used.
      StartError: the address cannot be listened on, or the engine could not be opened.
    """
    raise_file_limit()
    server = build(settings, engine)
    sockets = listen(settings.server.host, settings.server.port)
    sys.setswitchinterval(_SWITCH_SECONDS)
    try:
        with settled():
            server.run(sockets)
    except KeyboardInterrupt:
        return 130
    if (error := server.lifecycle.supervisor.error) is not None:
        raise StartError(reason_of(error, hint=" (--log-level debug shows where)")) from error
    return 1 if server.lifecycle.supervisor.dead or not server.started else 0


def listen(host: str, port: int) -> list[socket.socket]:
    """Takes an address before anything else is begun; a name may stand for several, and port 0 is the same for all.

    Raises:
      StartError: it cannot be had.
    """
    sockets: list[socket.socket] = []
    try:
        found = socket.getaddrinfo(host or None, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        for family, _, _, _, address in dict.fromkeys(found):
            sockets.append(socket.create_server((str(address[0]), port), family=family))
            port = sockets[0].getsockname()[1]
    except OSError as error:
        for one in sockets:
            one.close()
        # What create_server adds to the system's words says the address again; a name nobody knows has other numbers.
        number = error.errno or 0
        why = os.strerror(number) if number > 0 else error.strerror or str(error)
        raise StartError(f"cannot listen on {host}:{port}: {why.lower()}") from None
    return sockets


def reachable(listening: socket.socket) -> str:
    """Host and port that reach a socket from this machine."""
    host, port = listening.getsockname()[:2]
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def reason_of(error: BaseException, *, hint: str = "") -> str:
    """Why the engine could not be opened. What the library refuses, it refuses in words for people.

    Args:
      hint: how to find out more about an error that nobody has foreseen.
    """
    if isinstance(error, OSError) and error.strerror:
        where = "" if error.filename is None else f"{error.filename}: "
        return f"the model cannot be served: {where}{error.strerror}"
    if isinstance(error, ValueError) and str(error):
        return f"the model cannot be served: {error}"
    return f"the model cannot be served: {type(error).__name__}: {error}{hint}"
