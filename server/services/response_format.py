"""`response_format`: what an answer must look like, and the engine's grammars of such answers."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from concurrent.futures import Future
from typing import Any

from server.middleware.request_context import RequestContext
from server.validation import invalid

_TYPES = ("text", "json_object", "json_schema")


def answer_schema(given: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """The schema of a `response_format`, or None where any text will do.

    Raises:
      BadRequest: a type nobody knows, or a part that is not what it should be.
    """
    if not given:
        return None
    kind = given.get("type")
    if kind not in _TYPES:
        raise invalid("response_format.type", f"must be one of {', '.join(_TYPES)}")
    if kind == "text":
        return None
    holder, field = given, "response_format.schema"
    if kind == "json_schema":
        holder, field = given.get("json_schema"), "response_format.json_schema.schema"  # type: ignore[assignment]
        if not isinstance(holder, dict):
            raise invalid("response_format.json_schema", "must be an object")
    schema = holder.get("schema")
    if schema is None:
        return {"type": "object"}
    if not isinstance(schema, dict):
        raise invalid(field, "must be an object")
    return schema


async def compiled(grammar: Future[Any], context: RequestContext) -> Any:
    """A grammar once it is compiled; cancelling ends its compilation.

    Keywords of its schemas that cannot be enforced are named in the response header `x-atlas-schema-ignored`.

    Raises:
      InvalidRequest: the engine cannot take a schema.
      Overloaded: it cannot be compiled now.
    """
    made = await asyncio.wrap_future(grammar)
    if made.ignored:
        context.response_headers.append((b"x-atlas-schema-ignored", ", ".join(made.ignored).encode("ascii")))
    return made
