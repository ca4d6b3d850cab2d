"""JSON schemas that cost: to compile, to mask with, to keep."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from typing import Any

import httpx

from benchmarks.attack.registry import Scene, attack
from benchmarks.attack.target import ATTACKER

_SECONDS = 30.0


def _many(count: int, *, required: bool, groups: int = 1) -> dict[str, Any]:
    one: dict[str, Any] = {"type": "object", "properties": {f"property_{n}": {"type": "string"} for n in range(count)}}
    if required:
        one |= {"required": list(one["properties"]), "additionalProperties": False}
    if groups == 1:
        return one
    return {"type": "object", "properties": {f"group_{n}": one for n in range(groups)}}


def _deep(levels: int) -> str:
    """As text: deeper than the JSON encoder goes."""
    return '{"type":"object","properties":{"a":' * levels + "true" + "}}" * levels


def _arrays(levels: int) -> dict[str, Any]:
    schema: dict[str, Any] = {"type": "integer"}
    for _ in range(levels):
        schema = {"type": "array", "items": schema, "minItems": 1}
    return schema


def _any_of(levels: int) -> dict[str, Any]:
    schema: dict[str, Any] = {"type": "string"}
    for level in range(levels):
        schema = {"anyOf": [schema, {"type": "object", "properties": {f"a{level}": schema}}]}
    return schema


def _constant(first: int, second: int) -> dict[str, Any]:
    return {"type": "object", "properties": {f"{first}-{second}": {"const": second}}}


def _string(pattern: str) -> dict[str, Any]:
    return {"type": "object", "properties": {"a": {"type": "string", "pattern": pattern}}, "required": ["a"]}


SCHEMAS: dict[str, Callable[[], dict[str, Any] | str]] = {
    "multipleOf 99999999": lambda: {"type": "integer", "multipleOf": 99_999_999},
    "multipleOf 1000003": lambda: {"type": "integer", "multipleOf": 1_000_003},
    "multipleOf of fractions": lambda: {"type": "number", "multipleOf": 0.000_000_1},
    "multipleOf twice": lambda: {
        "allOf": [{"type": "integer", "multipleOf": 65_521}, {"type": "integer", "multipleOf": 65_519}]
    },
    "an enum of 250 000": lambda: {"enum": [f"v{n}" for n in range(250_000)]},
    "6 × 6 000 properties": lambda: _many(6000, required=True, groups=6),
    "500 optional properties": lambda: _many(500, required=False),
    "20 000 optional properties": lambda: _many(20_000, required=False),
    "a pattern of 100 000 repeats": lambda: _string("(a|b|c){100000}"),
    "nested repeats": lambda: _string("((((a{1,90}){1,90}){1,90}){1,90}){1,90}"),
    "a pattern that backtracks": lambda: _string("^(a+)+b(a|aa)+$" * 50),
    "a pattern of every character": lambda: _string("(?:[^\\x00-\\x1f]{0,4000}x){0,400}"),
    "maxLength 2^31": lambda: {"type": "string", "minLength": 1 << 20, "maxLength": 1 << 31},
    "maxItems 10^6": lambda: {"type": "array", "items": {"type": "integer"}, "minItems": 10**6, "maxItems": 10**6 + 1},
    "integers of a wide range": lambda: {"type": "integer", "minimum": -(10**300), "maximum": 10**300},
    "500 objects in one another": lambda: _deep(500),
    "20 000 objects in one another": lambda: _deep(20_000),
    "500 arrays in one another": lambda: _arrays(500),
    "anyOf doubled 14 times": lambda: _any_of(14),
    "a reference to itself": lambda: {"$ref": "#"},
    "references in a circle": lambda: {
        "$ref": "#/$defs/a",
        "$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}},
    },
    "references that multiply": lambda: {
        "$ref": "#/$defs/d0",
        "$defs": {
            f"d{n}": {"type": "object", "properties": {k: {"$ref": f"#/$defs/d{n + 1}"} for k in "abcdefgh"}}
            if n < 30
            else {"type": "string"}
            for n in range(31)
        },
    },
    "allOf that multiplies": lambda: {"allOf": [{"anyOf": [_constant(a, b) for b in range(12)]} for a in range(12)]},
    "a reference to another host": lambda: {"$ref": "http://127.0.0.1:9/schema.json"},
    "a reference to a file": lambda: {"$ref": "file:///etc/passwd"},
}  # fmt: skip


def _body(schema: dict[str, Any] | str) -> bytes:
    text = schema if isinstance(schema, str) else json.dumps(schema)
    head = '{"messages": [{"role": "user", "content": "Answer in JSON."}], "max_tokens": 24, "temperature": 0, '
    return f'{head}"response_format": {{"type": "json_schema", "json_schema": {{"name": "x", "schema": {text}}}}}}}'.encode()


def _register(name: str) -> None:
    @attack(
        f"schema: {name}",
        does=f"asks for JSON of a schema with {name}",
        holds="an answer or a 400 within 30 s, little memory, and a neighbour at its pace",
        growth_mib=512.0,
    )
    def run(scene: Scene) -> None:
        body = _body(SCHEMAS[name]())

        def ask() -> None:
            scene.count()
            try:
                response = http.post("/v1/chat/completions", content=body, headers={"Content-Type": "application/json"})
            except httpx.HTTPError as error:
                scene.faults.append(f"no answer within {_SECONDS:.0f} s ({type(error).__name__})")
            else:
                scene.check(response, name)
                statuses[response.status_code] += 1

        statuses = Counter[int]()
        with scene.target.client(ATTACKER, _SECONDS) as http, scene.pace() as meter:
            meter.repeat(ask, 1.0 if scene.quick else 3.0, 40)
        scene.note(f"status {', '.join(map(str, statuses))}")


for _name in SCHEMAS:
    _register(_name)
