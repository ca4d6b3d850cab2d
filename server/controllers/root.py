"""The first page: a conversation for a person with a browser, and what this server is for a program."""

from __future__ import annotations

import hashlib
import html
from importlib import resources
from pathlib import PurePath
from string import Template
from typing import Any

from litestar import Controller, Response, get
from litestar.di import NamedDependency

from atlas_jax import __version__
from server.http import HttpRequest, json_response, openai_responses
from server.schemas.root import Root
from server.services.front_page import FrontPage

_WEB = resources.files(__package__.partition(".")[0]) / "web"
_PAGE, _ABOUT = (Template((_WEB / name).read_text("utf-8")) for name in ("index.html", "about.html"))
_TYPES = {".css": "text/css", ".js": "text/javascript", ".svg": "image/svg+xml"}
_FILES = {
    f"/web/{file.name}": (file.read_bytes(), _TYPES[PurePath(file.name).suffix])
    for file in _WEB.iterdir()
    if PurePath(file.name).suffix in _TYPES
}
"""What the page is made of, by its path."""
_SAME_FILE = {path: f'"{hashlib.sha256(data).hexdigest()[:32]}"' for path, (data, _) in _FILES.items()}
_HEADERS = {
    # nothing from elsewhere, nothing inline, and no text becomes markup or a program
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'; "
    "require-trusted-types-for 'script'; trusted-types 'none'",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Permissions-Policy": "camera=(), microphone=(), geolocation=()",
}


class RootController(Controller):
    """`/` needs no key, and with keys tells neither model nor memory; what the page does needs one."""

    tags = ("Operations",)

    @get("/", opt={"public": True}, responses=openai_responses(Root, public=True))
    async def root(self, request: HttpRequest, front_page: NamedDependency[FrontPage]) -> Response[Any]:
        """What this server is: a page for a browser, else JSON."""
        found = front_page.root()
        if not _wants_html(request.headers.get("accept", "")):
            return json_response(found)
        content = _page(found, front_page.example(str(request.headers.get("host", ""))))
        return Response(
            content, media_type="text/html", headers={**_HEADERS, "Vary": "Accept", "Cache-Control": "no-store"}
        )

    @get(sorted(_FILES), opt={"public": True, "unmetered": True}, include_in_schema=False)
    async def part(self, request: HttpRequest) -> Response[bytes]:
        """A file of the page, which a browser asks for again only to hear that it is still the same."""
        path = request.scope["path"]
        data, media_type = _FILES[path]
        headers = {**_HEADERS, "ETag": _SAME_FILE[path], "Cache-Control": "no-cache"}
        if request.headers.get("if-none-match") == _SAME_FILE[path]:
            return Response(b"", status_code=304, headers=headers)
        return Response(data, media_type=media_type, headers=headers)


def _wants_html(accept: str) -> bool:
    """Whether a page is asked for by name, as browsers do and no API client does."""
    return any(part.partition(";")[0].strip().lower() == "text/html" for part in accept.split(","))


def _page(found: Root, example: str) -> str:
    facts = {"Version": __version__, "Status": found.status}
    if found.model is not None:
        facts |= {"Model": found.model, "Memory": "on" if found.memory else "off"}
    about = _ABOUT.substitute(
        facts="\n".join(f"<dt>{name}</dt><dd>{html.escape(text)}</dd>" for name, text in facts.items()),
        example=html.escape(example),
        more="" if found.model is None else ' · <a href="/v1/models">models</a> · <a href="/props">properties</a>',
    )
    again = '<noscript><meta http-equiv="refresh" content="5"></noscript>\n' if found.status == "loading" else ""
    return _PAGE.substitute(refresh=again, about=about)
