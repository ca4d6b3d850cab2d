"""Objects of a schema have the properties that are named, where nothing else is said."""

from __future__ import annotations

from typing import Any

import pytest

from server.closed_schema import closed

A: dict[str, Any] = {"type": "object", "properties": {"a": {"type": "integer"}}}
CLOSED = {**A, "additionalProperties": False}


@pytest.mark.parametrize(
    ("given", "wanted"),
    [
        (A, CLOSED),
        ({**A, "required": ["a"]}, {**CLOSED, "required": ["a"]}),
        ({"type": "array", "items": A}, {"type": "array", "items": CLOSED}),
        ({"type": "array", "prefixItems": [A, True]}, {"type": "array", "prefixItems": [CLOSED, True]}),
        ({"anyOf": [A, {"type": "null"}]}, {"anyOf": [CLOSED, {"type": "null"}]}),
        (
            {"properties": {"b": {"$ref": "#/$defs/A"}}, "$defs": {"A": A}},
            {"properties": {"b": {"$ref": "#/$defs/A"}}, "$defs": {"A": CLOSED}, "additionalProperties": False},
        ),
        ({"additionalProperties": A}, {"additionalProperties": CLOSED}),
        ({"properties": {"properties": A}}, {"properties": {"properties": CLOSED}, "additionalProperties": False}),
        # one part says more than the other parts know
        (
            {"properties": {"b": {"allOf": [A, {"properties": {"c": {}}}]}, "d": A}},
            {"properties": {"b": {"allOf": [A, {"properties": {"c": {}}}]}, "d": A}, "additionalProperties": False},
        ),
    ],
)
def test_objects_that_name_their_properties_have_no_others(given: dict[str, Any], wanted: dict[str, Any]) -> None:
    assert closed(given) == wanted
    assert closed(wanted) == wanted


@pytest.mark.parametrize(
    "given",
    [
        {},
        {"type": "object"},
        {"type": "string"},
        {**A, "additionalProperties": True},
        {**A, "additionalProperties": {"type": "string"}},
        {**A, "patternProperties": {"^x": {}}},
        {**A, "minProperties": 2},
        {**A, "required": ["b"]},
        {**A, "anyOf": [{"required": ["a"]}, {"properties": {"b": {}}}]},
        {**A, "allOf": [{"properties": {"b": {}}, "required": ["b"]}]},
        {**A, "if": {"required": ["a"]}, "then": {"required": ["b"]}},
        {"not": A},
        {"allOf": [{"$ref": "#/$defs/A"}, {"properties": {"b": {}}}], "$defs": {"A": A}},
        {"properties": [], "required": 3, "items": 7, "anyOf": "x"},
    ],
)
def test_a_schema_that_says_what_else_there_may_be_stays(given: dict[str, Any]) -> None:
    assert closed(given) == given


def test_a_schema_as_deep_as_a_body_may_be_is_not_an_error() -> None:
    deep: dict[str, Any] = dict(A)
    for _ in range(5000):
        deep = {"type": "array", "items": deep}
    assert closed(deep)["type"] == "array"
