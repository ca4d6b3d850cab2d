"""JSON schemas whose objects have the properties that are named, and no others."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

# whose parts all hold for one value, or whose meaning turns round when a part is narrower
_TOGETHER = ("allOf", "not", "if", "dependentSchemas", "dependencies", "unevaluatedProperties", "unevaluatedItems")
_OTHERS = ("anyOf", "oneOf", "$ref")
_NAMED = ("properties", "patternProperties", "$defs", "definitions")
_LISTS = ("anyOf", "oneOf", "prefixItems", "items")
_ONE = ("items", "additionalProperties")
_OPEN = ("additionalProperties", "patternProperties", "minProperties")


class _CannotTell(Exception):
    """Whether a value of the narrower schema is one of the schema."""


def closed(schema: Mapping[str, Any]) -> dict[str, Any]:
    """A schema that allows nothing the given one does not, and no property that is made up.

    By JSON Schema an object may have any properties besides those that are named, unless `additionalProperties` says
    otherwise, and a model under a grammar that lets it makes some up for as long as it may. Where parts are put together of
    several schemas for one value, all parts stay as they are.
    """
    try:
        return _closed(schema)
    except (_CannotTell, RecursionError):
        return {**schema, "additionalProperties": False} if _may_be_closed(schema) else dict(schema)


def _closed(schema: Mapping[str, Any]) -> dict[str, Any]:
    named = isinstance(schema.get("properties"), dict)
    if any(keyword in schema for keyword in _TOGETHER) or (named and any(word in schema for word in _OTHERS)):
        raise _CannotTell
    made = dict(schema)
    for keyword in _NAMED:
        if isinstance(found := schema.get(keyword), dict):
            made[keyword] = {name: _part(one) for name, one in found.items()}
    for keyword in _LISTS:
        if isinstance(found := schema.get(keyword), list):
            made[keyword] = [_part(one) for one in found]
    for keyword in _ONE:
        if isinstance(found := schema.get(keyword), dict):
            made[keyword] = _part(found)
    if _may_be_closed(schema):
        made["additionalProperties"] = False
    return made


def _part(schema: Any) -> Any:
    return _closed(schema) if isinstance(schema, dict) else schema


def _may_be_closed(schema: Mapping[str, Any]) -> bool:
    """Whether an object names properties, needs no others, and nothing else says which it may have."""
    named, required = schema.get("properties"), schema.get("required", [])
    if not isinstance(named, dict) or any(keyword in schema for keyword in (*_OPEN, *_OTHERS, *_TOGETHER)):
        return False
    return isinstance(required, list) and all(isinstance(one, str) and one in named for one in required)
