"""Which web pages may call the API from a browser; by default only the server's own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from server.errors import Forbidden

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
_DEFAULT_PORTS = {b"http": b":80", b"https": b":443"}
_EXPOSED = (b"access-control-expose-headers", b"x-request-id, x-session-id, x-atlas-schema-ignored, retry-after")


class Cors:
    """Answers preflight requests, marks responses for the listed origins, and refuses what other pages would change.

    Credentials are never allowed.
    """

    def __init__(self, origins: Sequence[str]) -> None:
        self._any = "*" in origins
        self._origins = frozenset(origin.rstrip("/").lower().encode() for origin in origins)

    def _origin(self, given: Mapping[bytes, bytes]) -> bytes | None:
        origin = given.get(b"origin")
        if origin is None or origin == b"null" or not (self._any or origin.lower() in self._origins):
            return None
        return origin

    def check(self, given: Mapping[bytes, bytes]) -> None:
        """Raises Forbidden for a request that a page of an origin which is not listed has sent.

        For requests that change something or cost something. CORS only keeps such a page from reading the answer: the
        request itself needs no preflight as long as its content type is a form's or it has none. A program that is no
        browser sends neither header, and a page can leave out or change neither.
        """
        if self._origin(given) is not None:
            return
        origin, site = given.get(b"origin"), given.get(b"sec-fetch-site", b"same-origin").lower()
        if (origin is not None and not _is_own(origin, given.get(b"host"))) or site in (b"cross-site", b"same-site"):
            raise Forbidden(
                "Pages of this origin may not use the server; see the setting cors_origins", code="origin_not_allowed"
            )

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


def _is_own(origin: bytes, host: bytes | None) -> bool:
    """Whether a page of this origin came from the host the request is addressed to.

    The scheme is not compared: behind a proxy that ends TLS this server cannot know its own.
    """
    scheme, separator, authority = origin.lower().partition(b"://")
    port = _DEFAULT_PORTS.get(scheme)
    if not separator or port is None or host is None:
        return False
    return authority.removesuffix(port) == host.lower().removesuffix(port)
