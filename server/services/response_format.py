"""`response_format`: what an answer must look like, as the engine's grammar."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Any

from server.middleware.request_context import RequestContext
from server.services.engine_supervisor import EngineSupervisor
from server.validation import invalid

_TYPES = ("text", "json_object", "json_schema")


async def answer_grammar(supervisor: EngineSupervisor, given: Mapping[str, Any] | None, context: RequestContext) -> Any:
    """The grammar of a `response_format`, or None where any text will do; cancelling ends its compilation.

    Keywords of the schema that cannot be enforced are named in the response header `x-atlas-schema-ignored`.

    Raises:
      BadRequest: a type nobody knows, or a part that is not what it should be.
      InvalidRequest: the engine cannot take the schema.
      Overloaded: it cannot be compiled now.
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
        schema = {"type": "object"}
    if not isinstance(schema, dict):
        raise invalid(field, "must be an object")
    grammar = await asyncio.wrap_future(supervisor.engine.json_grammar(schema, owner=context.identity.owner))
    if grammar.ignored:
        context.response_headers.append((b"x-atlas-schema-ignored", ", ".join(grammar.ignored).encode("ascii")))
    return grammar
