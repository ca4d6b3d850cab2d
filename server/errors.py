"""Every error a client can see: the server's own error classes, and the one table that gives each its status."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from dataclasses import dataclass, field

import msgspec

from atlas_jax.engine import api
from server.schemas.errors import (
    AnthropicError,
    AnthropicErrorBody,
    AnthropicErrorDetails,
    AtlasError,
    AtlasErrorBody,
    OllamaError,
    OpenAIError,
    OpenAIErrorBody,
)

ATLAS_PREFIX = "/v1/atlas"
ANTHROPIC_PREFIX = "/v1/messages"
OLLAMA_PREFIX = "/api"


class ServerError(Exception):
    """An error with a message fit for a client to read.

    Attributes:
      param: the request field at fault, as a client wrote it, or None.
      code: short machine-readable reason; None takes the class's own from the table.
      retry_after: seconds a client should wait, or None where waiting does not help.
    """

    def __init__(
        self, message: str, *, param: str | None = None, code: str | None = None, retry_after: float | None = None
    ) -> None:
        super().__init__(message)
        self.param = param
        self.code = code
        self.retry_after = retry_after


class BadRequest(ServerError):
    """A request that can never succeed as it was sent."""


class Unauthorized(ServerError):
    """No key, or not one of ours."""


class Forbidden(ServerError):
    """A key that may not do this."""


class NotFound(ServerError):
    """No such model or path."""


class UnsupportedMedia(ServerError):
    """A body that does not call itself JSON."""


class TooLarge(ServerError):
    """A body over the limit."""


class RequestTimeout(ServerError):
    """A body that stopped coming."""


class TooManyRequests(ServerError):
    """A key or an address over its share."""


class Unavailable(ServerError):
    """The server cannot do this now: loading, draining, full, or without an engine."""


class NotEnabled(ServerError):
    """A feature the operator has turned off; trying again does not help."""


class NotSupported(ServerError):
    """What the model that is served cannot do."""


class ContextExceeded(BadRequest):
    """A prompt longer than the context; carries both lengths.

    Clients know this error by its words as much as by its code, and cut or compact what they send: LangChain, LiteLLM and
    agents look for "maximum context length", Anthropic's for "prompt is too long".
    """

    def __init__(self, message: str, *, param: str | None, prompt_tokens: int, context: int) -> None:
        super().__init__(message, param=param, code="context_length_exceeded")
        self.extra = {"n_prompt_tokens": prompt_tokens, "n_ctx": context}


@dataclass(frozen=True, kw_only=True, slots=True)
class Problem:
    """One error, ready to be written in either envelope."""

    status: int
    type: str
    message: str
    code: str | None = None
    param: str | None = None
    retry_after: float | None = None
    final: bool = False
    extra: Mapping[str, int] = field(default_factory=dict)


# First match wins, so a subclass stands before its base. (class, status, type, code)
_TABLE: tuple[tuple[type[Exception], int, str, str | None], ...] = (
    (BadRequest, 400, "invalid_request_error", None),
    (Unauthorized, 401, "authentication_error", "invalid_api_key"),
    (Forbidden, 403, "permission_error", "forbidden"),
    (NotFound, 404, "not_found_error", "not_found"),
    (UnsupportedMedia, 415, "invalid_request_error", "unsupported_media_type"),
    (TooLarge, 413, "invalid_request_error", "request_too_large"),
    (RequestTimeout, 408, "timeout_error", "request_timeout"),
    (TooManyRequests, 429, "rate_limit_error", "rate_limit_exceeded"),
    (NotSupported, 501, "not_supported_error", "not_supported"),
    (NotEnabled, 503, "unavailable_error", "not_enabled"),
    (Unavailable, 503, "unavailable_error", "unavailable"),
    (api.InvalidRequest, 400, "invalid_request_error", None),
    (api.MemoryUnavailable, 503, "unavailable_error", "memory_unavailable"),
    (api.Overloaded, 503, "unavailable_error", "overloaded"),
    (api.SessionNotFound, 404, "not_found_error", "session_not_found"),
    (api.SessionConflict, 409, "conflict_error", "session_conflict"),
    (api.SessionExists, 409, "conflict_error", "session_exists"),
    (api.SnapshotInvalid, 400, "invalid_request_error", "snapshot_invalid"),
    (api.StorageFull, 507, "insufficient_storage_error", "storage_full"),
    (api.EngineError, 500, "server_error", "engine_error"),
    (msgspec.DecodeError, 400, "invalid_request_error", "invalid_json"),
    # What a client can do to the decoder: bytes that are not UTF-8, and nesting deeper than the stack.
    (UnicodeDecodeError, 400, "invalid_request_error", "invalid_json"),
    (RecursionError, 400, "invalid_request_error", "invalid_json"),
)
_MALFORMED = "The request body is not valid JSON"
_INTERNAL = Problem(status=500, type="server_error", code="internal_error", message="Internal server error")
_HTTP_TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    405: "invalid_request_error",
    413: "invalid_request_error",
    415: "invalid_request_error",
    429: "rate_limit_error",
    503: "unavailable_error",
}
_HTTP_CODES = {404: "not_found", 405: "method_not_allowed", 413: "request_too_large", 415: "unsupported_media_type"}


def problem(error: Exception) -> Problem:
    """The problem an error stands for; an error that is not in the table is a 500 that tells nothing."""
    for kind, status, type_, code in _TABLE:
        if isinstance(error, kind):
            return Problem(
                status=status,
                type=type_,
                code=getattr(error, "code", None) or code,
                message=_MALFORMED if code == "invalid_json" else str(error),
                param=getattr(error, "param", None),
                retry_after=getattr(error, "retry_after", None),
                final=isinstance(error, NotEnabled),
                extra=getattr(error, "extra", {}),
            )
    return _INTERNAL


def http_problem(status: int, message: str, *, param: str | None = None) -> Problem:
    """The problem of an error that only HTTP knows: an unknown path, a wrong method, a broken body."""
    if status >= 500:
        return _INTERNAL
    return Problem(
        status=status,
        type=_HTTP_TYPES.get(status, "invalid_request_error"),
        message=message,
        code=_HTTP_CODES.get(status),
        param=param,
    )


def openai_error(found: Problem) -> OpenAIError:
    """The error object of OpenAI's API."""
    return OpenAIError(
        error=OpenAIErrorBody(
            message=found.message, type=found.type, param=found.param, code=found.code, **dict(found.extra)
        )
    )


_ANTHROPIC_TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    408: "timeout_error",
    413: "request_too_large",
    429: "rate_limit_error",
    500: "api_error",
    503: "overloaded_error",
}


def anthropic_error(found: Problem) -> AnthropicError:
    """The error object of Anthropic's API, whose message names the field."""
    kind = _ANTHROPIC_TYPES.get(found.status, "api_error" if found.status > 500 else "invalid_request_error")
    message = _with_field(found)
    if found.code == "context_length_exceeded":
        tokens, most = found.extra["n_prompt_tokens"], found.extra["n_ctx"]
        why = f"{tokens} tokens > {most} maximum" if tokens > most else found.message
        message = f"{found.param}: prompt is too long: {why}"
    threads = found.param == "thread" and found.code == "unsupported_parameter"
    return AnthropicError(
        error=AnthropicErrorBody(
            type=kind, message=message, details=AnthropicErrorDetails() if threads else msgspec.UNSET
        )
    )


def ollama_error(found: Problem) -> OllamaError:
    """The error object of Ollama's API, whose message names the field."""
    return OllamaError(error=_with_field(found))


def _with_field(found: Problem) -> str:
    known = found.param is None or found.param in found.message
    return found.message if known else f"{found.param}: {found.message}"


def envelope_of(path: str) -> str:
    """Whose error objects a path answers with: Atlas, Anthropic, Ollama or OpenAI."""
    prefixes = {"Atlas": ATLAS_PREFIX, "Anthropic": ANTHROPIC_PREFIX, "Ollama": OLLAMA_PREFIX}
    found = (name for name, prefix in prefixes.items() if path == prefix or path.startswith(prefix + "/"))
    return next(found, "OpenAI")


def body(found: Problem, path: str) -> bytes:
    """The JSON body of a problem in the envelope that belongs to the path."""
    envelope = envelope_of(path)
    if envelope == "Anthropic":
        return msgspec.json.encode(anthropic_error(found))
    if envelope == "Ollama":
        return msgspec.json.encode(ollama_error(found))
    if envelope == "Atlas":
        return msgspec.json.encode(
            AtlasError(
                error=AtlasErrorBody(
                    code=found.status,
                    message=found.message,
                    type="validation_error" if found.status == 400 else found.type,
                    param=found.param,
                    timestamp=int(time.time()),
                )
            )
        )
    return msgspec.json.encode(openai_error(found))


def headers(found: Problem) -> dict[str, str]:
    """What a client needs beside the body: when to try again, and how to authenticate."""
    out: dict[str, str] = {}
    if found.retry_after is not None:
        out["Retry-After"] = str(max(1, math.ceil(found.retry_after)))
        out["retry-after-ms"] = str(max(1, math.ceil(found.retry_after * 1000)))
    if found.final:
        out["x-should-retry"] = "false"
    if found.status == 401:
        out["WWW-Authenticate"] = "Bearer"
    return out
