"""A proxy before an S3 server that does to requests what networks do: late, refused, cut off, taken without an answer."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Callable
from typing import Literal, Self
from urllib.parse import urlsplit

Fate = Literal["pass", "slow", "error", "cut", "lost"]
"""`error` answers 500 and `cut` ends the connection, before the server sees the request; `lost` ends it after the server has
answered."""
Choose = Callable[[str, str], Fate]
_SLOW_SECONDS = 0.2
_ERROR = b"HTTP/1.1 500 Internal Server Error\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"


class FaultProxy:
    """Passes requests on, one a connection, as `choose` says of their method and path; `choose` may be set anew.

    Attributes:
      endpoint: its URL.
      seen: every request's method, path and fate.
    """

    def __init__(self, target: str, choose: Choose = lambda _method, _path: "pass") -> None:
        self.choose = choose
        self.seen: list[tuple[str, str, Fate]] = []
        self._target = urlsplit(target)
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="fault-proxy", daemon=True)
        self._thread.start()
        self._server = asyncio.run_coroutine_threadsafe(
            asyncio.start_server(self._serve, "127.0.0.1", 0), self._loop
        ).result()
        self.endpoint = f"http://127.0.0.1:{self._server.sockets[0].getsockname()[1]}"

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        async def end() -> None:
            self._server.close()
            tasks = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

        asyncio.run_coroutine_threadsafe(end(), self._loop).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            head = await reader.readuntil(b"\r\n\r\n")
            first, *rest = head.decode("latin-1").split("\r\n")
            method, path, _ = first.split(" ", 2)
            fields = dict(line.lower().split(": ", 1) for line in rest if ": " in line)
            body = await reader.readexactly(int(fields.get("content-length", 0)))
            fate = self.choose(method, path)
            self.seen.append((method, path, fate))
            if fate == "slow":
                await asyncio.sleep(_SLOW_SECONDS)
            if fate == "error":
                writer.write(_ERROR)
            elif fate != "cut":
                answer = await self._ask(head, body)
                if fate != "lost":
                    writer.write(answer)
            await writer.drain()
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            writer.close()
            with contextlib.suppress(ConnectionError):
                await writer.wait_closed()

    async def _ask(self, head: bytes, body: bytes) -> bytes:
        """The server's whole answer; a field that is not signed makes it end the connection."""
        reader, writer = await asyncio.open_connection(self._target.hostname, self._target.port)
        try:
            writer.write(head[:-2] + b"Connection: close\r\n\r\n" + body)
            await writer.drain()
            return await reader.read(-1)
        finally:
            writer.close()
