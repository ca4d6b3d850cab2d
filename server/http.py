"""What the controllers share: a request's context, JSON and event streams, errors, and noticing a client that left."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from typing import Any, TypeVar

import msgspec
from litestar import Request, Response
from litestar.exceptions import HTTPException, ValidationException
from litestar.openapi.datastructures import ResponseSpec
from litestar.response import Stream

from server.errors import Problem, body, headers, http_problem, problem
from server.middleware.bodies import Bodies
from server.middleware.not_found import advice
from server.middleware.request_context import STATE_KEY, RequestContext
from server.schemas.errors import AnthropicError, AtlasError, OllamaError, OpenAIError
from server.services.generation import Generation

HttpRequest = Request[Any, Any, Any]
T = TypeVar("T")
log = logging.getLogger("atlas.server")
_NO_CACHE = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
_MEANINGS = {
    400: "The request is not valid; the message names the field",
    401: "No valid API key",
    403: "A web page of an origin that is not listed, or a key that may not do this",
    404: "No such model, session or file",
    405: "Another method than this path has; Allow names those",
    408: "The body stopped coming, or comes too slowly",
    409: "Another server has changed the session meanwhile: send the request again; or a new name is taken. Nothing was kept",
    413: "The body is too large, or holds too much",
    415: "The body is not JSON",
    429: "Over a limit; see Retry-After",
    500: "The engine has failed",
    501: "The model that is served cannot do this",
    503: "Loading, draining, full, without a free memory context, or not enabled; see Retry-After",
    507: "The disk or the key's quota is full; nothing was changed",
}
# What any path may answer, what asking for a key adds, and what a body adds.
_ALWAYS, _KEYED, _BODY = (400, 405, 503), (401, 429), (403, 408, 413, 415)


def context_of(request: HttpRequest) -> RequestContext:
    """What the middleware knows about the request."""
    context: RequestContext = request.scope["state"][STATE_KEY]
    return context


def json_request(bodies: Bodies) -> type[HttpRequest]:
    """The class of the requests of an application whose bodies are read by `bodies`."""

    class JsonRequest(HttpRequest):
        async def json(self) -> Any:
            return await bodies.decode(await self.body())

    return JsonRequest


def json_response(value: msgspec.Struct | bytes, *, status: int = 200) -> Response[Any]:
    """A JSON response of a struct, or of JSON that is encoded already."""
    content = value if isinstance(value, bytes) else msgspec.json.encode(value)
    return Response(content, status_code=status, media_type="application/json")


def event_stream(frames: AsyncIterator[bytes], *, media_type: str = "text/event-stream") -> Response[Any]:
    """A response of server-sent events, or of lines, that are encoded already."""
    return Stream(frames, media_type=media_type, headers=_NO_CACHE)


async def generate(
    request: HttpRequest, data: Any, start: Callable[[Any, RequestContext], Awaitable[Generation | bytes]]
) -> Response[Any]:
    """Runs one generation; a stream is answered once its first event is there, or its first silence over."""

    async def begin() -> Response[Any]:
        generation = await start(data, context_of(request))
        if isinstance(generation, bytes):  # there was nothing to generate
            return json_response(generation)
        if not generation.stream:
            return json_response(await generation.whole())
        frames = generation.events()
        return event_stream(_again(await anext(frames), frames), media_type=generation.media_type)

    return await _unless_gone(request, begin())


async def answer(
    request: HttpRequest, data: Any, work: Callable[[Any, RequestContext], Awaitable[bytes]]
) -> Response[Any]:
    """The JSON that `work` makes of a body; it is cancelled if the client leaves first."""

    async def begin() -> Response[Any]:
        return json_response(await work(data, context_of(request)))

    return await _unless_gone(request, begin())


async def _again(first: bytes, rest: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    yield first
    async for frame in rest:
        yield frame


async def _unless_gone(request: HttpRequest, work: Coroutine[Any, Any, T]) -> T:
    """The result of `work`, which is cancelled if the client closes the connection first."""
    task = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(_disconnected(request))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise _client_gone()
        return task.result()
    finally:
        gone.cancel()
        if not task.done():
            task.cancel()
            await asyncio.wait({task})


def _client_gone() -> HTTPException:
    """An answer nobody reads, but which is counted under a status of its own."""
    return HTTPException(status_code=499, detail="Client closed request")


async def _disconnected(request: HttpRequest) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


# --- errors -------------------------------------------------------------------------------------------------------
def error_response(request: HttpRequest, error: Exception) -> Response[Any]:
    """The response to any error, in the envelope that belongs to the path."""
    context = context_of(request)
    if context.gone:
        error = _client_gone()
    found = _http_problem(request, error) if isinstance(error, HTTPException) else problem(error)
    if found.status == 500:
        log.error("Request %s failed", context.request_id, exc_info=error)
    context.refusal = found.code
    extra = dict(getattr(error, "headers", None) or {}) if isinstance(error, HTTPException) else {}
    return Response(
        body(found, request.scope["path"]),
        status_code=found.status,
        media_type="application/json",
        headers={**extra, **headers(found)},
    )


def _http_problem(request: HttpRequest, error: HTTPException) -> Problem:
    if error.status_code == 404:
        return http_problem(404, advice(request.scope["path"], (route.path for route in request.app.routes)))
    if isinstance(error, ValidationException) and isinstance(error.extra, list) and error.extra:
        first: dict[str, Any] = error.extra[0]
        field = first.get("key")
        if field == "data":
            return http_problem(400, "The request body must be a JSON object")
        return http_problem(400, f"Validation error in field '{field}': {first.get('message')}", param=field)
    return http_problem(error.status_code, error.detail)


def openai_responses(answer: Any, *more: int, body: bool = False, public: bool = False) -> dict[int, ResponseSpec]:
    """The documented responses of an endpoint outside `/v1/atlas/*`.

    Args:
      answer: the type of the body of a 200.
      more: statuses beside those every endpoint of its kind has.
      body: whether requests have one.
      public: whether no key is needed.
    """
    return _responses(answer, OpenAIError, (*more, *(_BODY if body else ()), *(() if public else _KEYED)))


def generation_responses(answer: Any, *more: int) -> dict[int, ResponseSpec]:
    """The documented responses of an endpoint that generates text."""
    return openai_responses(answer, 404, 409, 500, 507, *more, body=True)


def anthropic_responses(answer: Any, *more: int) -> dict[int, ResponseSpec]:
    """The documented responses of an endpoint of Anthropic's API; the arguments are those of `openai_responses`."""
    return _responses(answer, AnthropicError, (*more, *_BODY, *_KEYED))


def ollama_responses(answer: Any, *more: int, body: bool = False) -> dict[int, ResponseSpec]:
    """The documented responses of an endpoint of Ollama's API; the arguments are those of `openai_responses`."""
    return _responses(answer, OllamaError, (*more, *(_BODY if body else ()), *_KEYED))


def atlas_responses(answer: Any, *more: int, body: bool = False) -> dict[int, ResponseSpec]:
    """The documented responses of an endpoint of `/v1/atlas/*`; the arguments are those of `openai_responses`."""
    return _responses(answer, AtlasError, (*more, *(_BODY if body else ()), *_KEYED))


def _responses(answer: Any, error: type[msgspec.Struct], more: tuple[int, ...]) -> dict[int, ResponseSpec]:
    out = {200: ResponseSpec(answer, description="Success", generate_examples=False)}
    for status in sorted({*_ALWAYS, *more}):
        out[status] = ResponseSpec(error, description=_MEANINGS[status], generate_examples=False)
    return out
