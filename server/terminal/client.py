"""A client of the server's API: JSON requests, streams of events, and errors in one line."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import httpx
import msgspec

from server.terminal.arguments import CommandError

_CONNECT_SECONDS = 10.0
# A long prompt is silent for as long as it is prefilled; a server pings its streams meanwhile.
_SILENCE_SECONDS = 600.0


class ApiError(CommandError):
    """What a server refused, in its own words.

    Attributes:
      status: of the response; 0 where there was none.
    """

    def __init__(self, message: str, status: int = 0) -> None:
        super().__init__(message)
        self.status = status


class Client:
    """A server to talk to.

    Args:
      place: how messages call the server.
    """

    def __init__(
        self,
        base_url: str,
        *,
        place: str,
        key: str | None = None,
        transport: httpx.BaseTransport | None = None,
    ) -> None:
        self.place = place
        headers = {} if key is None else {"Authorization": f"Bearer {key}"}
        timeout = httpx.Timeout(_SILENCE_SECONDS, connect=_CONNECT_SECONDS)
        self._http = httpx.Client(base_url=base_url, headers=headers, timeout=timeout, transport=transport)

    def close(self) -> None:
        """Lets go of the connections."""
        self._http.close()

    def get(self, path: str, **query: str) -> dict[str, Any]:
        """The JSON at a path; raises ApiError."""
        return self._json(self._http.build_request("GET", path, params=query))

    def post(self, path: str, body: Mapping[str, Any]) -> dict[str, Any]:
        """The JSON that answers a body; raises ApiError."""
        return self._json(self._request(path, body))

    def stream(self, path: str, body: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
        """The events of a streamed answer as they come; leaving the loop early ends the request. Raises ApiError."""
        response = self._sent(self._request(path, {**body, "stream": True}), stream=True)
        try:
            for line in response.iter_lines():
                data = line.removeprefix("data:").strip() if line.startswith("data:") else ""
                if not data or data == "[DONE]":
                    continue
                event = _decoded(data.encode())
                if "error" in event:
                    raise ApiError(_message(event, 500), 500)
                yield event
        except httpx.HTTPError as error:
            raise ApiError(f"the answer of {self.place} broke off: {_why(error)}") from None
        finally:
            response.close()

    def _request(self, path: str, body: Mapping[str, Any]) -> httpx.Request:
        content = msgspec.json.encode(body)
        return self._http.build_request("POST", path, content=content, headers={"Content-Type": "application/json"})

    def _json(self, request: httpx.Request) -> dict[str, Any]:
        return _decoded(self._sent(request).content)

    def _sent(self, request: httpx.Request, *, stream: bool = False) -> httpx.Response:
        try:
            response = self._http.send(request, stream=stream)
            if response.status_code >= 400:
                response.read()
        except httpx.HTTPError as error:
            raise ApiError(f"{self.place} cannot be reached: {_why(error)}") from None
        if response.status_code >= 400:
            try:
                found = _decoded(response.content)
            except ApiError:
                found = {}
            raise ApiError(_message(found, response.status_code), response.status_code)
        return response


def _decoded(data: bytes) -> dict[str, Any]:
    try:
        return msgspec.json.decode(data, type=dict[str, Any])
    except msgspec.MsgspecError:
        raise ApiError("the answer is not one of atlas-jax: is the address right?") from None


def _message(body: Mapping[str, Any], status: int) -> str:
    error = body.get("error")
    said = error.get("message") if isinstance(error, dict) else None
    return str(said) if said else f"the server answered with status {status}"


def _why(error: httpx.HTTPError) -> str:
    text = str(error).strip()
    return text[:1].lower() + text[1:] if text else type(error).__name__
