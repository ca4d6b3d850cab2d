"""The OpenAPI document, served from memory as JSON at `/schema`; nothing is fetched from elsewhere.

Litestar drops some of msgspec's constraints (a bound of 0, bounds inside lists and optional fields), so the component
schemas are written by msgspec itself, and what Litestar cannot know is added: streams, headers, which bodies may be empty.

`python -m server.openapi --output docs/atlas-openapi.yaml` writes the same document as YAML.
"""

from __future__ import annotations

import argparse
import inspect
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec
from litestar import Request, Router
from litestar.openapi.config import OpenAPIConfig
from litestar.openapi.plugins import JsonRenderPlugin

from atlas_jax import __version__
from server.errors import envelope_of
from server.schemas import (
    atlas,
    chat,
    completions,
    conversations,
    embeddings,
    errors,
    llamacpp,
    messages,
    models,
    ollama,
    response_events,
    responses,
    root,
    runtime_config,
    shape,
)

_MODULES = (
    *(
        atlas,
        chat,
        completions,
        conversations,
        embeddings,
        errors,
        llamacpp,
        messages,
        models,
        ollama,
        response_events,
        responses,
        root,
    ),
    runtime_config,
    shape,
)
_SSE = "text/event-stream"
_NDJSON, _OPENAPI = "application/x-ndjson", "application/vnd.oai.openapi+json"
_MESSAGE_EVENTS = (
    *("MessageStart", "ContentBlockStart", "ContentBlockDelta", "ContentBlockStop", "MessageDelta", "MessageStop"),
    "AnthropicError",
)
_RESPONSE_EVENTS = (
    *("ResponseEvent", "OutputItemEvent", "ContentPartEvent", "TextDeltaEvent", "TextDoneEvent"),
    *("ReasoningDeltaEvent", "ReasoningDoneEvent", "SummaryPartEvent", "SummaryDeltaEvent", "SummaryDoneEvent"),
    *("ArgumentsDeltaEvent", "ArgumentsDoneEvent"),
)
# Path to what a stream is made of.
_STREAMS: dict[str, tuple[str, tuple[str, ...]]] = {
    **dict.fromkeys(("/v1/completions", "/completions"), (_SSE, ("Completion",))),
    **dict.fromkeys(("/v1/chat/completions", "/chat/completions"), (_SSE, ("ChatChunk",))),
    **dict.fromkeys(("/v1/responses", "/responses"), (_SSE, _RESPONSE_EVENTS)),
    "/v1/messages": (_SSE, _MESSAGE_EVENTS),
    "/completion": (_SSE, ("LlamaCompletion",)),
    "/infill": (_SSE, ("LlamaCompletion",)),
    "/api/chat": (_NDJSON, ("OllamaChat",)),
    "/api/generate": (_NDJSON, ("OllamaGenerated",)),
}
# Paths whose sessions are named by what came before, and not by a header.
_OWN_SESSIONS = ("/v1/responses", "/responses")
_METRICS_STREAM = "/v1/atlas/metrics/stream"
# Answers that are no structs.
_NO_STRUCTS = {
    "/metrics": ("text/plain", "string"),
    "/schema": (_OPENAPI, "object"),
    "/schema/openapi.json": (_OPENAPI, "object"),
}
_BODY_MAY_BE_EMPTY = ("/v1/atlas/memory/save", "/v1/atlas/memory/list", "/v1/conversations", "/conversations")
_RETRIED = ("429", "503", "507")
_HIDDEN = "/schema/{path}"  # Litestar's own answer to what it does not have
_HEADER = "# Written by `make openapi`; a running server has the same at /schema/openapi.json.\n"
_RETRY_AFTER = {"description": "Seconds to wait, where waiting helps", "schema": {"type": "integer", "minimum": 1}}
_SESSION_HEADER = {
    "name": "X-Session-ID",
    "in": "header",
    "required": False,
    "description": "Name of the memory session, as `atlas.session_id`; if both are there, they must be the same",
    "schema": {"type": "string", "minLength": 1, "maxLength": 128},
}

# Paths of lists of items.
_PAGED = "items"
_PAGE = [
    {"name": name, "in": "query", "required": False, "description": text, "schema": schema}
    for name, text, schema in (
        ("limit", "Items a page", {"type": "integer", "minimum": 1, "maximum": 100, "default": 20}),
        ("order", "The oldest or the latest first", {"type": "string", "enum": ["asc", "desc"], "default": "desc"}),
        ("after", "The item before the page", {"type": "string"}),
    )
]


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
    """The document with exact component schemas, streams, headers, optional bodies, and the ways to authenticate."""
    structs = tuple(
        kind
        for module in _MODULES
        for kind in vars(module).values()
        if isinstance(kind, type) and issubclass(kind, msgspec.Struct) and kind.__module__ == module.__name__
        if not kind.__name__.startswith("_")
    )
    _, components = msgspec.json.schema_components(structs, ref_template="#/components/schemas/{name}")
    schemas = {**document.get("components", {}).get("schemas", {}), **components}
    paths = {path: item for path, item in sorted(document["paths"].items()) if path != _HIDDEN}
    refusals: dict[str, Any] = {}
    for path, item in paths.items():
        for operation in item.values():
            _correct(path, operation, refusals)
    for path, (media, chunks) in _STREAMS.items():
        operation = paths[path]["post"]
        if path not in _OWN_SESSIONS:
            operation["parameters"] = [_SESSION_HEADER]
        answer = operation["responses"]["200"]
        references = [{"$ref": f"#/components/schemas/{chunk}"} for chunk in chunks]
        answer["content"][media] = {"schema": references[0] if len(references) == 1 else {"oneOf": references}}
        answer["headers"] = {
            "X-Session-ID": {"description": "The session the request went on with", "schema": {"type": "string"}}
        }
    stream = paths[_METRICS_STREAM]["get"]["responses"]["200"]
    stream["content"] = {_SSE: {"schema": {"$ref": "#/components/schemas/MetricsEvent"}}}
    for path, (media, kind) in _NO_STRUCTS.items():
        if path in paths:
            paths[path]["get"]["responses"]["200"]["content"] = {media: {"schema": {"type": kind}}}
    corrected_document: dict[str, Any] = _clean(
        {
            "openapi": document["openapi"],
            "info": document["info"],
            "servers": document["servers"],
            "security": [{"bearer": []}, {"apiKey": []}, {}],
            "paths": paths,
            "components": {
                "schemas": dict(sorted(schemas.items())),
                "responses": dict(sorted(refusals.items())),
                "securitySchemes": {
                    "bearer": {"type": "http", "scheme": "bearer"},
                    "apiKey": {"type": "apiKey", "in": "header", "name": "X-Api-Key"},
                },
            },
        }
    )
    return corrected_document


def _correct(path: str, operation: dict[str, Any], refusals: dict[str, Any]) -> None:
    """Corrects one operation in place; what it may refuse with goes to `refusals`, once for every envelope."""
    responses = operation["responses"]
    if path.endswith(_PAGED) and "requestBody" not in operation:
        operation["parameters"] = [*operation.get("parameters", ()), *_PAGE]
    if "401" not in responses:
        operation["security"] = []
    envelope = envelope_of(path)
    for status in [status for status in responses if int(status) >= 400]:
        if status in _RETRIED:
            responses[status]["headers"] = {"Retry-After": _RETRY_AFTER}
        refusals[f"{envelope}{status}"] = responses[status]
        responses[status] = {"$ref": f"#/components/responses/{envelope}{status}"}
    body = operation.get("requestBody")
    if body is not None:
        body["required"] = path not in _BODY_MAY_BE_EMPTY
        content = body["content"]["application/json"]
        # `null` is what the handlers get for no body at all.
        content["schema"] = next(
            (one for one in content["schema"].get("oneOf", ()) if "$ref" in one), content["schema"]
        )


def _clean(value: Any) -> Any:
    """The same with the indentation of docstrings taken out, which Python 3.13 does by itself."""
    if isinstance(value, dict):
        return {key: _clean(one) for key, one in value.items()}
    if isinstance(value, list):
        return [_clean(one) for one in value]
    return inspect.cleandoc(value) if isinstance(value, str) and "\n" in value else value


def openapi_config() -> OpenAPIConfig:
    """Litestar's configuration of the document; it needs no key."""
    return OpenAPIConfig(
        title="atlas-jax",
        version=__version__,
        description="OpenAI-compatible inference with ATLAS memory sessions",
        render_plugins=[LocalJson()],
        openapi_router=Router("/schema", route_handlers=[], opt={"public": True}),
        use_handler_docstrings=True,
    )


def as_yaml() -> str:
    """The document of a server with default settings, as YAML."""
    import yaml

    from server.app import create_app
    from server.config.settings import Settings

    app, _ = create_app(Settings(), _no_engine)
    document = corrected(app.openapi_schema.to_schema())
    text: str = yaml.dump(document, Dumper=_without_anchors(yaml), sort_keys=False, allow_unicode=True, width=120)
    return _HEADER + text


def _without_anchors(yaml: Any) -> Any:
    class Dumper(yaml.SafeDumper):  # type: ignore[misc]
        def ignore_aliases(self, data: Any) -> bool:
            return True

    return Dumper


def _no_engine() -> Any:
    raise AssertionError("the document needs no engine")


def main(argv: Sequence[str] | None = None) -> None:
    """Writes the document to a file, or to the standard output."""
    parser = argparse.ArgumentParser(
        prog="python -m server.openapi", description="Writes the OpenAPI document as YAML."
    )
    parser.add_argument("--output", type=Path, metavar="FILE")
    output: Path | None = parser.parse_args(argv).output
    if output is None:
        sys.stdout.write(as_yaml())
    else:
        output.write_text(as_yaml(), "utf-8")


if __name__ == "__main__":
    main()
