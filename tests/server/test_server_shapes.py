"""What an answer must match, under every name clients have for it, on every endpoint that generates text."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import pytest

from tests.server.live_server import Live

SCHEMA: dict[str, Any] = {"type": "object", "properties": {"a": {"type": "integer"}}}
CLOSED: dict[str, Any] = {**SCHEMA, "additionalProperties": False}
GBNF = 'root ::= "yes" | "no"'
BODIES: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": {"messages": [{"role": "user", "content": "x"}], "max_tokens": 2},
    "/v1/completions": {"prompt": "x", "max_tokens": 2},
    "/completion": {"prompt": "x", "n_predict": 2},
}
NAMED: list[tuple[dict[str, Any], tuple[str, Any, str]]] = [
    ({"guided_json": SCHEMA}, ("json", CLOSED, "guided_json")),
    ({"guided_json": json.dumps(SCHEMA)}, ("json", CLOSED, "guided_json")),
    ({"json_schema": SCHEMA}, ("json", CLOSED, "json_schema")),
    ({"json_schema": json.dumps(SCHEMA)}, ("json", CLOSED, "json_schema")),
    ({"guided_regex": "[ab]+"}, ("regex", "[ab]+", "guided_regex")),
    ({"regex": "[ab]+"}, ("regex", "[ab]+", "regex")),
    ({"guided_choice": ["a", "b"]}, ("choice", ["a", "b"], "guided_choice")),
    ({"guided_grammar": GBNF}, ("grammar", GBNF, "guided_grammar")),
    ({"grammar": GBNF}, ("grammar", GBNF, "grammar")),
    ({"ebnf": GBNF}, ("grammar", GBNF, "ebnf")),
    ({"structured_outputs": {"json": SCHEMA}}, ("json", CLOSED, "structured_outputs.json")),
    ({"structured_outputs": {"regex": "a"}}, ("regex", "a", "structured_outputs.regex")),
    ({"structured_outputs": {"choice": ["a"]}}, ("choice", ["a"], "structured_outputs.choice")),
    ({"structured_outputs": {"grammar": GBNF}}, ("grammar", GBNF, "structured_outputs.grammar")),
    ({"structured_outputs": {"json_object": True}}, ("json", {"type": "object"}, "structured_outputs.json_object")),
    ({"response_format": {"type": "json_object"}}, ("json", {"type": "object"}, "response_format")),
    (
        {"response_format": {"type": "json_schema", "json_schema": {"name": "n", "schema": SCHEMA}}},
        ("json", CLOSED, "response_format.json_schema.schema"),
    ),
]
everywhere = pytest.mark.parametrize("path", BODIES)


@everywhere
def test_every_name_is_the_same_grammar(live: Live, path: str) -> None:
    for given, expected in NAMED:
        answer = live.post(path, {**BODIES[path], **given})
        assert answer.status_code == 200, (given, answer.text)
        made = live.engine.requests[-1].grammar.schema
        assert (made.kind, made.wanted, made.field) == expected
    for nothing in (
        {"grammar": ""},
        {"guided_choice": []},
        {"structured_outputs": {}},
        {"response_format": {"type": "text"}},
    ):
        assert live.post(path, {**BODIES[path], **nothing}).status_code == 200
        assert live.engine.requests[-1].grammar is None


@everywhere
@pytest.mark.parametrize(
    ("given", "param"),
    [
        ({"guided_json": SCHEMA, "regex": "a"}, "regex"),
        ({"grammar": GBNF, "response_format": {"type": "json_object"}}, "response_format"),
        ({"structured_outputs": {"regex": "a", "choice": ["a"]}}, "structured_outputs.choice"),
        ({"structured_outputs": {"structural_tag": "{}"}}, "structured_outputs.structural_tag"),
        ({"structured_outputs": {"other": 1}}, "structured_outputs.other"),
        ({"guided_json": "[]"}, "guided_json"),
        ({"json_schema": "{"}, "json_schema"),
        ({"guided_choice": [""]}, "guided_choice"),
        ({"guided_choice": "a"}, "guided_choice"),
        ({"response_format": {"type": "structural_tag"}}, "response_format.type"),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"schema": 1}}},
            "response_format.json_schema.schema",
        ),
        ({"structural_tag": "{}"}, "structural_tag"),
    ],
    ids=str,
)
def test_what_is_wrong_is_named(live: Live, path: str, given: dict[str, Any], param: str) -> None:
    answer = live.post(path, {**BODIES[path], **given})
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, param), answer.text
    assert live.engine.requests == []


def test_a_raw_prompt_of_ollama_takes_a_format(live: Live) -> None:
    body = {"model": "any", "prompt": "x", "raw": True, "stream": False, "options": {"num_predict": 2}}
    for form, schema in (("json", {"type": "object"}), (SCHEMA, CLOSED)):
        assert live.post("/api/generate", {**body, "format": form}).status_code == 200
        assert live.engine.requests[-1].grammar.schema.wanted == schema


def test_a_gap_is_filled_where_the_model_was_taught_to(live: Live) -> None:
    engine = live.engine
    engine.model = dataclasses.replace(engine.model, infill=((1,), (2,), (3,)))
    try:
        expected = [1, *b"def", 2, *b"return", 3]
        for path, body in (
            ("/v1/completions", {"prompt": "def", "suffix": "return", "max_tokens": 2}),
            ("/api/generate", {"model": "any", "prompt": "def", "suffix": "return", "stream": False}),
            ("/infill", {"input_prefix": "def", "input_suffix": "return", "n_predict": 2}),
        ):
            assert live.post(path, body).status_code == 200
            assert list(engine.requests[-1].prompt) == expected
        for more, param in (({"echo": True}, "echo"), ({"prompt": ["a"]}, "prompt")):
            body = {"prompt": "a", "suffix": "b", **more}
            assert live.post("/v1/completions", body).json()["error"]["param"] == param
    finally:
        engine.model = dataclasses.replace(engine.model, infill=None)
