"""The OpenAPI document, served from memory as JSON at `/schema`; nothing is fetched from elsewhere.

Litestar drops some of msgspec's constraints (a bound of 0, bounds inside lists and optional fields), so the component
schemas are written by msgspec itself, and the streams are described as what they are.
"""

from __future__ import annotations

from typing import Any

import msgspec
from litestar import Request, Router
from litestar.openapi.config import OpenAPIConfig
from litestar.openapi.plugins import JsonRenderPlugin

from atlas_jax import __version__
from server.schemas import atlas, chat, completions, errors, llamacpp, models, root

_MODULES = (atlas, chat, completions, errors, llamacpp, models, root)
_STREAMS = {
    "/v1/completions": "Completion",
    "/completions": "Completion",
    "/v1/chat/completions": "ChatChunk",
    "/chat/completions": "ChatChunk",
}
_METRICS_STREAM = "/v1/atlas/metrics/stream"


class LocalJson(JsonRenderPlugin):
    """Renders the corrected document once."""

    def __init__(self) -> None:
        super().__init__(path="/openapi.json")
        self._rendered: bytes | None = None

    def render(self, request: Request[Any, Any, Any], openapi_schema: dict[str, Any]) -> bytes:
        """The document as JSON."""
        if self._rendered is None:
            self._rendered = self.render_json(request, corrected(openapi_schema))
        return self._rendered


def corrected(document: dict[str, Any]) -> dict[str, Any]:
    """The document with exact component schemas, event streams, and the ways to authenticate."""
    structs = tuple(
        kind
        for module in _MODULES
        for kind in vars(module).values()
        if isinstance(kind, type) and issubclass(kind, msgspec.Struct) and kind.__module__ == module.__name__
    )
    _, components = msgspec.json.schema_components(structs, ref_template="#/components/schemas/{name}")
    document.setdefault("components", {}).setdefault("schemas", {}).update(components)
    document["components"]["securitySchemes"] = {
        "bearer": {"type": "http", "scheme": "bearer"},
        "apiKey": {"type": "apiKey", "in": "header", "name": "X-Api-Key"},
    }
    document["security"] = [{"bearer": []}, {"apiKey": []}, {}]
    for path, chunk in _STREAMS.items():
        content = document["paths"][path]["post"]["responses"]["200"]["content"]
        content["text/event-stream"] = {"schema": {"$ref": f"#/components/schemas/{chunk}"}}
    stream = document["paths"][_METRICS_STREAM]["get"]["responses"]["200"]
    stream["content"] = {"text/event-stream": {"schema": {"$ref": "#/components/schemas/MetricsEvent"}}}
    return document


def openapi_config() -> OpenAPIConfig:
    """Litestar's configuration of the document; it needs no key."""
    return OpenAPIConfig(
        title="atlas-jax",
        version=__version__,
        description="OpenAI-compatible inference with ATLAS memory sessions",
        render_plugins=[LocalJson()],
        openapi_router=Router("/schema", route_handlers=[], opt={"public": True}),
    )
