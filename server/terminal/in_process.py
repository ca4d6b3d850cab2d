"""The server inside this process, without a socket: an `AtlasServer` on its own event loop, and an httpx transport to it."""

from __future__ import annotations

import asyncio
import queue
import threading
from collections.abc import Iterator
from typing import Any

import httpx

from server.app import EngineSource
from server.config.settings import Settings
from server.embed import AtlasServer

ADDRESS = "http://127.0.0.1"
_SAVE_SECONDS = 60.0
Message = dict[str, Any]


class InProcess:
    """A server that lives as long as its `with`; requests to it go through `transport`."""

    def __init__(self, settings: Settings, engine: EngineSource | None = None) -> None:
        """Opens nothing yet; raises as `AtlasServer`."""
        self._server = AtlasServer(settings, engine)
        self._memory = settings.atlas.enabled and settings.atlas.memory_persist
        self._loop = asyncio.new_event_loop()
        self._ready: queue.Queue[BaseException | None] = queue.Queue()
        self._stop = asyncio.Event()
        self._thread = threading.Thread(target=self._run, name="in-process-server", daemon=True)

    def __enter__(self) -> InProcess:
        """Opens the engine and waits for it; raises what stands in the way."""
        self._thread.start()
        error = self._ready.get()
        if error is not None:
            self._thread.join()
            raise error
        return self

    def save(self) -> None:
        """Writes a snapshot of every session that has gone on; what was answered is in their journals already.

        With that the process can end: closing the engine would wait for whatever it is compiling.
        """
        asyncio.run_coroutine_threadsafe(self._save(), self._loop).result()

    async def _save(self) -> None:
        engine = self._server.lifecycle.supervisor.engine
        if self._memory and engine.model.memory_unavailable is None:
            await asyncio.to_thread(engine.sessions.save_changed, timeout=_SAVE_SECONDS)

    def __exit__(self, *_: object) -> None:
        """Saves the sessions and closes the engine."""
        self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join()

    @property
    def transport(self) -> httpx.BaseTransport:
        """How a client reaches it."""
        return _Transport(self._server, self._loop)

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        try:
            self._loop.run_until_complete(self._serve())
        finally:
            self._loop.close()

    async def _serve(self) -> None:
        opened = False
        try:
            async with self._server:
                opened = True
                self._ready.put(None)
                await self._stop.wait()
                await self._save()
        except BaseException as error:
            if not opened:
                self._ready.put(error)


class _Transport(httpx.BaseTransport):
    def __init__(self, app: AtlasServer, loop: asyncio.AbstractEventLoop) -> None:
        self._app, self._loop = app, loop

    def handle_request(self, request: httpx.Request) -> httpx.Response:
        """Runs a request; the answer's body comes as it is made."""
        exchange = _Exchange(self._app, self._loop, request)
        try:
            start = exchange.next()
        except BaseException:  # Ctrl-C as well
            exchange.close()
            raise
        return httpx.Response(start["status"], headers=start["headers"], stream=exchange, request=request)


class _Exchange(httpx.SyncByteStream):
    """One request, and its answer's body; closing it is a client that leaves."""

    def __init__(self, app: AtlasServer, loop: asyncio.AbstractEventLoop, request: httpx.Request) -> None:
        self._answer: queue.Queue[Message | BaseException] = queue.Queue()
        self._gone = asyncio.Event()
        self._loop = loop
        url = request.url
        scope = {
            "type": "http",
            "asgi": {"version": "3.0"},
            "http_version": "1.1",
            "method": request.method,
            "scheme": url.scheme,
            "path": url.path,
            "raw_path": url.raw_path.partition(b"?")[0],
            "query_string": url.query,
            "root_path": "",
            "headers": [(name.lower(), value) for name, value in request.headers.raw],
            "client": ("127.0.0.1", 0),
            "server": (url.host, url.port or 80),
        }
        self._work = asyncio.run_coroutine_threadsafe(self._run(app, scope, request.read()), loop)

    async def _run(self, app: AtlasServer, scope: Message, body: bytes) -> None:
        sent = False

        async def receive() -> Message:
            nonlocal sent
            if not sent:
                sent = True
                return {"type": "http.request", "body": body, "more_body": False}
            await self._gone.wait()
            return {"type": "http.disconnect"}

        async def send(message: Any) -> None:
            self._answer.put(message)

        try:
            await app(scope, receive, send)
            self._answer.put(httpx.RemoteProtocolError("the answer was cut off"))
        except BaseException as error:
            self._answer.put(error)
            raise

    def next(self) -> Message:
        """The next message of the application."""
        message = self._answer.get()
        if isinstance(message, BaseException):
            raise message
        return message

    def __iter__(self) -> Iterator[bytes]:
        more = True
        while more:
            message = self.next()
            more = message.get("more_body", False)
            if message.get("body"):
                yield message["body"]

    def close(self) -> None:
        """Tells the application that nobody listens any more."""
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._gone.set)
