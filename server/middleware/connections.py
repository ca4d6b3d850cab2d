"""Connections: how many are open at once, how long one may stay without a request, and clients that stop reading.

uvicorn has a limit on requests and a time-out between two of them. What is missing there is here: a connection that
never sends a request, one that sends a byte of it now and then, one that never reads, and one whose client has closed
its own side and still waits for the answer.
"""

from __future__ import annotations

import asyncio
import logging
import socket
import sys
import time
from collections import Counter, OrderedDict
from collections.abc import Callable
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import STATUS_PHRASES, H11Protocol

from server.errors import BadRequest, RequestTimeout, ServerError, Unavailable, body, headers, problem
from server.middleware.rate_limits import network

log = logging.getLogger("atlas.server")
# Open files kept back from the connections: the engine's, and what is accepted before the loop gets to refuse it.
_RESERVED_FILES = 256
_MOST_FILES = 65_536
_MOST_CONNECTIONS = 4096
# The kernel's default lets megabytes pile up for a client that does not read before anybody can notice.
_SEND_BUFFER = 16 << 10
# How long a client may not read while others wait for what it holds.
_CROWDED_SECONDS = 10.0
_READ_BYTES_PER_SECOND = 4096
_FIRST_PROBE, _LAST_PROBE = 0.1, 15.0


def raise_file_limit() -> None:
    """Takes the open files the system allows this process, within reason."""
    if sys.platform == "win32":
        return
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = _MOST_FILES if hard == resource.RLIM_INFINITY else min(hard, _MOST_FILES)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def connection_limit(wanted: int | None) -> int:
    """How many connections may be open: as many as wanted, or some thousands, where open files are left for them."""
    limit = _MOST_CONNECTIONS if wanted is None else wanted
    if sys.platform == "win32":
        return limit
    import resource

    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY:
        return limit
    room = max(soft - _RESERVED_FILES, soft // 2)
    if wanted is not None and wanted > room:
        log.warning("max_connections is %d, but of %d open files only %d are left for connections", wanted, soft, room)
    return min(limit, room)


class Connections:
    """The open connections of a server.

    At the limit somebody has to go: of those no request of which is being answered, the one that has waited longest, of
    the address that has most connections. Many silent connections of one address so lose to a few of another, and old
    ones to new ones. What is being answered is never closed.

    Args:
      header_timeout: seconds a request's head may take, from the connection or from its first byte.
      stall_timeout: seconds a client may not read while something is there for it.
      crowded: whether requests wait for a place, so that those who do not read are dropped sooner.

    Attributes:
      dropped: connections closed by the server, by reason.
    """

    def __init__(self, *, limit: int, header_timeout: float, stall_timeout: float, crowded: Callable[[], bool]) -> None:
        self._limit, self._header_timeout, self._stall_timeout = limit, header_timeout, stall_timeout
        self._crowded = crowded
        self._open: dict[Connection, None] = {}
        self._count: Counter[str] = Counter()
        # By address: the connections without a request that is being answered, longest waiting first.
        self._waiting: dict[str, OrderedDict[Connection, None]] = {}
        self.dropped: Counter[str] = Counter()

    def __len__(self) -> int:
        return len(self._open)

    def protocol(self, **given: Any) -> Connection:
        """A connection, made as uvicorn makes its own."""
        return Connection(self, **given)

    def added(self, connection: Connection) -> None:
        """Counts a new connection, and makes room for it."""
        self._open[connection] = None
        self._count[connection.address] += 1
        self.waits(connection)
        if len(self._open) > self._limit:
            self._make_room(connection)

    def removed(self, connection: Connection) -> None:
        """Forgets a connection; idempotent."""
        if connection not in self._open:
            return
        self.works(connection)
        del self._open[connection]
        self._count[connection.address] -= 1
        if not self._count[connection.address]:
            del self._count[connection.address]

    def waits(self, connection: Connection) -> None:
        """Notes that a connection has no request that is being answered."""
        if connection in self._open:
            self._waiting.setdefault(connection.address, OrderedDict()).setdefault(connection)

    def works(self, connection: Connection) -> None:
        """Notes that a connection's request is being answered."""
        waiting = self._waiting.get(connection.address, OrderedDict())
        waiting.pop(connection, None)
        if not waiting:
            self._waiting.pop(connection.address, None)

    def _make_room(self, newcomer: Connection) -> None:
        address = max(self._waiting, key=self._count.__getitem__)
        oldest = next(iter(self._waiting[address]))
        self._drop(oldest, "limit")
        if oldest is newcomer:
            oldest.refuse(Unavailable("Too many connections", code="overloaded", retry_after=1.0))
        else:
            oldest.transport.abort()
        self.removed(oldest)

    def _drop(self, connection: Connection, reason: str) -> None:
        self.dropped[reason] += 1
        log.debug("Dropped a connection of %s: %s", connection.address, reason)

    def sweep(self) -> None:
        """Closes what has been silent, slow or unread for too long; called about twice a second."""
        now = time.monotonic()
        stall = min(self._stall_timeout, _CROWDED_SECONDS) if self._crowded() else self._stall_timeout
        for connection in list(self._open):
            if connection.unread(now) > stall:
                self._drop(connection, "unread")
                connection.transport.abort()
            elif connection.headless(now) > self._header_timeout:
                self._drop(connection, "header_timeout")
                connection.give_up()


class Connection(H11Protocol):
    """uvicorn's HTTP/1.1 connection, which its registry can watch."""

    def __init__(self, registry: Connections, **given: Any) -> None:
        super().__init__(**given)
        self._registry = registry
        self.address = ""
        self._since = time.monotonic()  # when the wait for a request's head began
        self._begun = True  # whether the wait is for the head's end, not for its beginning
        self._paused = False  # nothing more fits into the way to the client
        self._unread: float | None = None  # since when it has not been read, as far as anybody has looked
        self._left = 0
        self._half_closed = False
        self._probe: asyncio.TimerHandle | None = None

    # --- what the registry asks ----------------------------------------------------------------------------------
    @property
    def answering(self) -> bool:
        """Whether a request is here in full and its response is not out."""
        return self.cycle is not None and not self.cycle.more_body and not self.cycle.response_complete

    def headless(self, now: float) -> float:
        """Seconds a request's head has been on its way; 0 where none is."""
        between = self.cycle is None or self.cycle.response_complete
        return now - self._since if between and self._begun and not self.transport.is_closing() else 0.0

    def unread(self, now: float) -> float:
        """Seconds for which the client has not taken what is there for it, less what it took in them is worth."""
        if not self._paused and not self.transport.is_closing():
            self._unread = None
            return 0.0
        left = self.transport.get_write_buffer_size()
        if self._unread is None:
            self._unread = now
        elif left < self._left:  # a large answer on a slow way
            self._unread = min(now, self._unread + (self._left - left) / _READ_BYTES_PER_SECOND)
        self._left = left
        return now - self._unread

    def give_up(self) -> None:
        """Ends the wait for a request, with an answer where its beginning is there."""
        if self.conn.trailing_data[0] and self.conn.our_state is h11.IDLE:
            self.refuse(RequestTimeout("The request's head did not come in time"))
        else:
            self.transport.close()

    def refuse(self, error: ServerError) -> None:
        """Answers what is no request, and closes."""
        if self.conn.our_state not in (h11.IDLE, h11.SEND_RESPONSE):  # in the middle of another answer
            self.transport.close()
            return
        found = problem(error)
        content = body(found, "")
        lines = [
            ("content-type", "application/json"),
            ("content-length", str(len(content))),
            ("connection", "close"),
            *headers(found).items(),
        ]
        response = h11.Response(status_code=found.status, headers=lines, reason=STATUS_PHRASES[found.status])
        for event in (response, h11.Data(data=content), h11.EndOfMessage()):
            self.transport.write(self.conn.send(event) or b"")
        self.transport.close()

    # --- what uvicorn's protocol does, watched -------------------------------------------------------------------
    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """A client has connected."""
        super().connection_made(transport)
        wire = transport.get_extra_info("socket")
        if wire is not None:
            wire.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _SEND_BUFFER)
        transport.set_write_buffer_limits(high=_SEND_BUFFER)
        self.address = network(self.client[0]) if self.client else ""
        self._registry.added(self)

    def connection_lost(self, exc: Exception | None) -> None:
        """The connection has ended, from either side."""
        self._registry.removed(self)
        if self._probe is not None:
            self._probe.cancel()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Bytes have come."""
        if not self._begun:
            self._begun, self._since = True, time.monotonic()
        super().data_received(data)
        self._note()

    def on_response_complete(self) -> None:
        """A response is out; the next request may be here already."""
        self._begun, self._since = False, time.monotonic()
        super().on_response_complete()
        self._note()
        if self._half_closed and not self.answering:
            self.transport.close()

    def _note(self) -> None:
        (self._registry.works if self.answering else self._registry.waits)(self)

    def eof_received(self) -> bool:  # type: ignore[override]
        """The client sends nothing more: it has left, or has only closed its side and waits for its answer."""
        self._half_closed = True
        if not self.answering:
            return False
        self._probe_later(_FIRST_PROBE)
        return True

    def _probe_later(self, pause: float) -> None:
        """Finds out which: an interim response is skipped by whoever reads, and refused by the system of who has left.

        Without, a long answer that is not a stream would run to its end for nobody. HTTP/1.0 has no interim responses.
        """
        if self.scope["http_version"] == "1.1" and self._probe is None:
            self._probe = self.loop.call_later(pause, self._send_probe, pause)

    def _send_probe(self, pause: float) -> None:
        self._probe = None
        if self.answering and not self.cycle.response_started and not self.transport.is_closing():
            interim = h11.InformationalResponse(status_code=100, headers=[], reason="Continue")
            self.transport.write(self.conn.send(interim) or b"")
            self._probe_later(min(2 * pause, _LAST_PROBE))

    def pause_writing(self) -> None:
        """The client reads more slowly than it is written to."""
        super().pause_writing()
        self._paused = True

    def resume_writing(self) -> None:
        """It has caught up."""
        super().resume_writing()
        self._paused, self._unread = False, None

    def send_400_response(self, msg: str) -> None:
        """Answers what is not HTTP."""
        self.refuse(BadRequest(msg, code="invalid_http"))
