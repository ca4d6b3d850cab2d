"""What an answer must look like, from a request's fields of any API, and the engine's grammars of such answers."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from concurrent.futures import Future
from typing import Any

import msgspec

from atlas_jax.engine.api import AnswerShape
from server.closed_schema import closed
from server.middleware.request_context import RequestContext
from server.schemas.shape import ShapedFields
from server.validation import invalid, unsupported

_TYPES = ("text", "json_object", "json_schema")
_OBJECT: dict[str, Any] = {"type": "object"}
# Fields by the language they are in; `structured_outputs` has members of these names.
_FIELDS = {
    "json": ("guided_json", "json_schema"),
    "regex": ("guided_regex", "regex"),
    "choice": ("guided_choice",),
    "grammar": ("guided_grammar", "grammar", "ebnf"),
}


def shape_of(body: ShapedFields) -> AnswerShape | None:
    """What the answer to a completion or a chat must match, or None where any text will do.

    Raises:
      BadRequest: a field is wrong, or two of them say it.
    """
    found = [
        made
        for kind, names in _FIELDS.items()
        for name in names
        if (made := _shape(kind, getattr(body, name), name)) is not None
    ]
    found += filter(None, (format_shape(body.response_format), *_structured(body)))
    if len(found) > 1:
        raise invalid(found[1].field.partition(".")[0], f"cannot be combined with {found[0].field.partition('.')[0]}")
    return found[0] if found else None


def _structured(body: ShapedFields) -> list[AnswerShape | None]:
    given = body.structured_outputs
    if given is None:
        return []
    if given.structural_tag:
        raise unsupported("structured_outputs.structural_tag")
    found = [_shape(kind, getattr(given, kind), f"structured_outputs.{kind}") for kind in _FIELDS]
    if given.json_object:
        found.append(AnswerShape(wanted=_OBJECT, field="structured_outputs.json_object"))
    named = [one for one in found if one is not None]
    if len(named) > 1:
        raise invalid(named[1].field, f"cannot be combined with {named[0].field}")
    return found


def _shape(kind: Any, given: Any, field: str) -> AnswerShape | None:
    if given is None or given in ("", []) or (given == {} and kind != "json"):
        return None
    if kind == "json":
        given = closed(_schema(given, field))
    if kind == "choice" and not any(given):
        raise invalid(field, "must have an answer that is not empty")
    return AnswerShape(kind=kind, wanted=given, field=field)


def _schema(given: str | Mapping[str, Any], field: str) -> Any:
    if not isinstance(given, str):
        return given
    try:
        schema = msgspec.json.decode(given)
    except (msgspec.DecodeError, UnicodeEncodeError, RecursionError):
        raise invalid(field, "must be a JSON schema, as an object or as JSON in a string") from None
    if not isinstance(schema, dict):
        raise invalid(field, "must be a JSON schema, as an object or as JSON in a string")
    return schema


def format_shape(given: Mapping[str, Any] | None, field: str = "response_format") -> AnswerShape | None:
    """What a `response_format` demands, or None where any text will do.

    Args:
      given: as OpenAI's chat completions have it; its schema may stand in it, as in other APIs, or in `json_schema`.

    Raises:
      BadRequest: a type nobody knows, or a part that is not what it should be.
    """
    if not given:
        return None
    kind = given.get("type")
    if kind not in _TYPES:
        raise invalid(f"{field}.type", f"must be one of {', '.join(_TYPES)}")
    if kind == "text":
        return None
    holder = given
    if kind == "json_schema" and "schema" not in given:
        field = f"{field}.json_schema"
        holder = given.get("json_schema")  # type: ignore[assignment]
        if not isinstance(holder, dict):
            raise invalid(field, "must be an object")
    schema = holder.get("schema")
    if schema is None:
        return AnswerShape(wanted=_OBJECT, field=field)
    if not isinstance(schema, dict):
        raise invalid(f"{field}.schema", "must be an object")
    return AnswerShape(wanted=closed(schema), field=f"{field}.schema")


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
