"""The outermost layer, a plain ASGI application round the Litestar one.

It sees every request, also those no route answers, and its `finally` runs however a request ends: a stream generator's
own `finally` does not when the client stops reading or never reads at all.
"""

from __future__ import annotations

import asyncio
import logging
import re
import time
import uuid
from collections.abc import Awaitable, Callable, Collection, MutableMapping
from typing import Any

from server.errors import (
    BadRequest,
    RequestTimeout,
    ServerError,
    TooLarge,
    Unauthorized,
    UnsupportedMedia,
    body,
    envelope_of,
    headers,
    problem,
)
from server.middleware.auth import KeyRing
from server.middleware.cors import Cors
from server.middleware.hosts import HostCheck
from server.middleware.rate_limits import FailureBudget, KeyLimits, network
from server.middleware.request_context import PARTY, STATE_KEY, RequestContext
from server.prometheus import Metrics

Message = MutableMapping[str, Any]
Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

log = logging.getLogger("atlas.server")
_REQUEST_ID = re.compile(rb"[A-Za-z0-9._-]{1,128}")
_WITH_BODY = ("POST", "PUT", "PATCH")
_CHANGING = (*_WITH_BODY, "DELETE")
# Below this, on the average over a body, a client that sends is taken for one that has stopped.
_BODY_BYTES_PER_SECOND = 4096
_OVERLOADED = "overloaded"
# The second is what LiteLLM calls it.
_SESSION_HEADERS = ((b"x-session-id", "X-Session-ID"), (b"x-litellm-session-id", "x-litellm-session-id"))
_METHODS = ("GET", "POST", "PUT", "PATCH", "DELETE", "HEAD", "OPTIONS")


class AsgiMiddleware:
    """Request ids, Host and Origin checks, keys, limits, clean-up, and the count of responses.

    Args:
      public: paths that need no key, compared exactly: a path that is merely like one of them needs a key.
      unmetered: paths outside the limit on requests, compared exactly: a scrape must not use up what clients have.
    """

    def __init__(
        self,
        app: App,
        *,
        hosts: HostCheck,
        cors: Cors,
        keys: KeyRing,
        limits: KeyLimits,
        failures: FailureBudget,
        metrics: Metrics,
        public: Collection[str],
        unmetered: Collection[str],
        max_body_bytes: int,
        client_timeout: float,
    ) -> None:
        self.app, self.cors, self.metrics, self.client_timeout = app, cors, metrics, client_timeout
        self._hosts, self._keys = hosts, keys
        self._limits, self._failures = limits, failures
        self._public, self._unmetered = frozenset(public), frozenset(unmetered)
        self._max_body_bytes = max_body_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """The ASGI entry point."""
        if scope["type"] == "http":
            await _Exchange(self, scope, receive, send).run()
        elif scope["type"] == "lifespan":
            await self.app(scope, receive, send)
        else:
            await send({"type": "websocket.close", "code": 1008})

    def admit(self, scope: Scope, given: dict[bytes, bytes], context: RequestContext) -> None:
        """Raises what keeps a request from the application."""
        self._hosts.check([value for name, value in scope["headers"] if name == b"host"])
        if scope["method"] in _CHANGING:
            self.cors.check(given)
        if scope["path"] not in self._public:
            self._authenticate(given, context, metered=scope["path"] not in self._unmetered)
        if scope["method"] in _WITH_BODY:
            self._check_body(scope["path"], given)
        for header, name in _SESSION_HEADERS:
            session = given.get(header)
            if session is not None:
                if not session.isascii():
                    raise BadRequest(f"{name} must be ASCII", param=name)
                context.session = session.decode("ascii")
                break

    def _authenticate(self, given: dict[bytes, bytes], context: RequestContext, *, metered: bool) -> None:
        try:
            context.identity = self._keys.authenticate(given)
            PARTY.set(network(context.peer) if self._keys.open else context.identity.key_id)
        except Unauthorized:
            self._failures.failed(context.peer)
            raise
        key_id = context.identity.key_id
        if not metered:
            return
        try:
            self._limits.request(key_id)
        finally:
            for kind, quota in self._limits.quota(key_id).items():
                context.response_headers += [
                    (f"x-ratelimit-limit-{kind}".encode(), str(quota.limit).encode()),
                    (f"x-ratelimit-remaining-{kind}".encode(), str(quota.remaining).encode()),
                    (f"x-ratelimit-reset-{kind}".encode(), f"{quota.reset_seconds:.3f}s".encode()),
                ]

    def _check_body(self, path: str, given: dict[bytes, bytes]) -> None:
        length = given.get(b"content-length", b"")
        if length and b"transfer-encoding" in given:
            raise BadRequest("Content-Length and Transfer-Encoding exclude each other")
        if length.isdigit() and int(length[:20]) > self._max_body_bytes:
            raise TooLarge(f"The request body is larger than {self._max_body_bytes} bytes")
        kind = given.get(b"content-type", b"").partition(b";")[0].strip().lower()
        if kind == b"application/json":
            return
        # `curl -X POST` sends neither a body nor a type, and is understood. What has a body, or comes out of a browser,
        # must say that it is JSON, which a web page cannot do across origins without asking first. Clients of Ollama
        # rely on its reading any type as JSON: the `curl -d` of its documentation, LiteLLM.
        if b"origin" not in given and b"sec-fetch-site" not in given:
            empty = length == b"0" or (not length and b"transfer-encoding" not in given)
            if (empty and not kind) or envelope_of(path) == "Ollama":
                return
        raise UnsupportedMedia("Content-Type must be application/json")


class _Exchange:
    """One request and its response."""

    def __init__(self, middleware: AsgiMiddleware, scope: Scope, receive: Receive, send: Send) -> None:
        self._middleware, self._scope, self._receive, self._send = middleware, scope, receive, send
        self._received = False
        self._body_bytes = 0
        self._headers: dict[bytes, bytes] = {}
        for name, value in scope["headers"]:
            self._headers.setdefault(name, value)
        wanted = self._headers.get(b"x-request-id", b"")
        client = scope.get("client")
        self._context = RequestContext(
            request_id=wanted.decode() if _REQUEST_ID.fullmatch(wanted) else uuid.uuid4().hex,
            peer=client[0] if client else "",
            arrived=time.perf_counter(),
        )
        scope.setdefault("state", {})[STATE_KEY] = self._context

    async def run(self) -> None:
        """Answers the request; nothing escapes."""
        context, middleware = self._context, self._middleware
        try:
            preflight = middleware.cors.preflight(self._scope["method"], self._headers)
            if preflight is not None:
                await self._answer(204, preflight, b"")
                return
            context.response_headers += middleware.cors.headers(self._headers)
            middleware.admit(self._scope, self._headers, context)
            await middleware.app(self._scope, self._receive_timed, self._send_guarded)
        except ServerError as error:
            await self._refuse(error)
        except Exception as error:
            log.error("Request %s failed outside the application", context.request_id, exc_info=error)
            await self._refuse(error)
        finally:
            for clean in reversed(context.cleanup):
                try:
                    clean()
                except Exception:
                    log.exception("Request %s: clean-up failed", context.request_id)
            self._count()

    async def _refuse(self, error: Exception) -> None:
        if self._context.response_started:
            return
        found = problem(error)
        self._context.refusal = found.code
        extra = [(name.lower().encode(), value.encode()) for name, value in headers(found).items()]
        extra.append((b"content-type", b"application/json"))
        await self._answer(found.status, extra, body(found, self._scope["path"]))

    async def _answer(self, status: int, extra: list[tuple[bytes, bytes]], content: bytes) -> None:
        length = (b"content-length", str(len(content)).encode())
        start = {"type": "http.response.start", "status": status, "headers": [*extra, length]}
        await self._send_guarded(start if status != 204 else {**start, "headers": extra})
        await self._send_guarded({"type": "http.response.body", "body": content})

    async def _receive_timed(self) -> Message:
        started = time.perf_counter()
        try:
            async with asyncio.timeout(None if self._received else self._patience()):
                message = await self._receive()
        except TimeoutError:
            raise RequestTimeout("The request body stopped coming, or comes too slowly") from None
        if message["type"] == "http.request":
            self._context.receiving += time.perf_counter() - started
            self._received = not message.get("more_body", False)
            self._body_bytes += len(message.get("body", b""))
        elif message["type"] == "http.disconnect":
            self._context.gone = True
        return message

    def _patience(self) -> float:
        """Seconds the next part of the body may take: one byte every few seconds keeps nothing alive."""
        timeout = self._middleware.client_timeout
        allowed = timeout + self._body_bytes / _BODY_BYTES_PER_SECOND - self._context.receiving
        return max(0.0, min(timeout, allowed))

    async def _send_guarded(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self._context.response_started = True
            self._context.status = message["status"]
            message = {
                **message,
                "headers": [
                    *message["headers"],
                    (b"x-request-id", self._context.request_id.encode()),
                    (b"x-content-type-options", b"nosniff"),
                    *self._context.response_headers,
                ],
            }
        await self._send(message)

    def _count(self) -> None:
        """Counts the response under its route's template, so that no path a client makes up becomes a series."""
        route = self._scope.get("path_template") or "unmatched"
        method = self._scope["method"] if self._scope["method"] in _METHODS else "other"
        metrics = self._middleware.metrics
        metrics.http.labels(route, method, str(self._context.status)).inc()
        metrics.http_seconds.labels(route).observe(time.perf_counter() - self._context.arrived)
        # A 503 may also mean that the model is loading or that something is turned off: no limit was met there.
        if self._context.status == 429 or self._context.refusal == _OVERLOADED:
            metrics.limited.labels(self._context.refusal or "unknown").inc()
