"""What the outermost layer knows about a request and hands to everything inside."""

from __future__ import annotations

from collections.abc import Callable
from contextvars import ContextVar
from dataclasses import dataclass, field

from server.middleware.auth import LOCAL, Identity

STATE_KEY = "atlas"
# Whose share the request of the current task uses: the key's, or without keys its address's. Known to the whole task, as
# work is handed to threads far from where requests come in.
PARTY: ContextVar[str] = ContextVar("PARTY", default="local")


@dataclass(slots=True)
class RequestContext:
    """One HTTP request.

    Attributes:
      request_id: the client's `X-Request-Id` if it is well formed, else a new one.
      peer: the client's address.
      arrived: when the request came (`time.perf_counter`).
      receiving: seconds spent waiting for the client to send its body.
      session: the value of `X-Session-ID`, or None.
      cleanup: called in reverse order however the request ends, also where a stream was never read; must not block.
      response_headers: added to the response, whoever writes it.
      response_started: whether the status has been sent.
      status: the status that was sent, 0 before.
      gone: whether the client has closed the connection.
      refusal: the code of the error that was answered, or None.
    """

    request_id: str
    peer: str
    arrived: float
    receiving: float = 0.0
    session: str | None = None
    identity: Identity = LOCAL
    cleanup: list[Callable[[], None]] = field(default_factory=list)
    response_headers: list[tuple[bytes, bytes]] = field(default_factory=list)
    response_started: bool = False
    status: int = 0
    gone: bool = False
    refusal: str | None = None
