"""Which web pages may call the API from a browser; by default none."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

Header = tuple[bytes, bytes]
_ALLOWED = (
    (b"access-control-allow-methods", b"GET, POST, OPTIONS"),
    (
        b"access-control-allow-headers",
        b"authorization, content-type, x-api-key, api-key, x-session-id, x-request-id, "
        b"x-stainless-arch, x-stainless-lang, x-stainless-os, x-stainless-package-version, x-stainless-retry-count, "
        b"x-stainless-runtime, x-stainless-runtime-version, x-stainless-timeout",
    ),
    (b"access-control-max-age", b"600"),
)
_EXPOSED = (b"access-control-expose-headers", b"x-request-id, x-session-id, x-atlas-schema-ignored, retry-after")


class Cors:
    """Answers preflight requests and marks responses for the listed origins; credentials are never allowed."""

    def __init__(self, origins: Sequence[str]) -> None:
        self._any = "*" in origins
        self._origins = frozenset(origin.rstrip("/").lower().encode() for origin in origins)

    def _origin(self, given: Mapping[bytes, bytes]) -> bytes | None:
        origin = given.get(b"origin")
        if origin is None or origin == b"null" or not (self._any or origin.lower() in self._origins):
            return None
        return origin

    def preflight(self, method: str, given: Mapping[bytes, bytes]) -> list[Header] | None:
        """The headers that answer a preflight request from a listed origin, or None for any other request."""
        origin = self._origin(given)
        if method != "OPTIONS" or b"access-control-request-method" not in given or origin is None:
            return None
        return [(b"access-control-allow-origin", origin), (b"vary", b"Origin"), *_ALLOWED]

    def headers(self, given: Mapping[bytes, bytes]) -> list[Header]:
        """What a response to this request carries."""
        origin = self._origin(given)
        if origin is None:
            return []
        return [(b"access-control-allow-origin", origin), (b"vary", b"Origin"), _EXPOSED]
