"""The first page: what this server is, for a person with a browser and for a program."""

from __future__ import annotations

import html
from importlib import resources
from string import Template
from typing import Any

from litestar import Controller, Response, get
from litestar.di import NamedDependency

from atlas_jax import __version__
from server.http import HttpRequest, json_response, openai_responses
from server.schemas.root import Root
from server.services.front_page import FrontPage

_PAGE = Template((resources.files("server") / "web" / "index.html").read_text("utf-8"))
_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Vary": "Accept",
}


class RootController(Controller):
    """`/` needs no key, and with keys tells neither model nor memory."""

    tags = ("Operations",)

    @get("/", opt={"public": True}, responses=openai_responses(Root, public=True))
    async def root(self, request: HttpRequest, front_page: NamedDependency[FrontPage]) -> Response[Any]:
        """What this server is: a page for a browser, else JSON."""
        found = front_page.root()
        if not _wants_html(request.headers.get("accept", "")):
            return json_response(found)
        content = _page(found, front_page.example(str(request.headers.get("host", ""))))
        return Response(content, media_type="text/html", headers=_HEADERS)


def _wants_html(accept: str) -> bool:
    """Whether a page is asked for by name, as browsers do and no API client does."""
    return any(part.partition(";")[0].strip().lower() == "text/html" for part in accept.split(","))


def _page(found: Root, example: str) -> str:
    facts = {"Version": __version__, "Status": found.status}
    if found.model is not None:
        facts |= {"Model": found.model, "Memory": "on" if found.memory else "off"}
    return _PAGE.substitute(
        refresh='<meta http-equiv="refresh" content="5">\n' if found.status == "loading" else "",
        facts="\n".join(f"<dt>{name}</dt><dd>{html.escape(text)}</dd>" for name, text in facts.items()),
        example=html.escape(example),
        more="" if found.model is None else ' · <a href="/v1/models">models</a> · <a href="/props">properties</a>',
    )
