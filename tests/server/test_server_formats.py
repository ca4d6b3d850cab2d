"""`response_format`: what becomes of a schema between a request and the engine."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import openai
import pytest

from tests.server.live_server import Live, Start, wait_for

MODEL = "fake-7b"


def ask(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


@pytest.mark.parametrize(
    ("given", "schema"),
    [
        (None, None),
        ({"type": "text"}, None),
        ({"type": "json_object"}, {"type": "object"}),
        ({"type": "json_object", "schema": {"type": "array"}}, {"type": "array"}),
        ({"type": "json_schema", "json_schema": {"name": "x"}}, {"type": "object"}),
        ({"type": "json_schema", "json_schema": {"name": "x", "strict": True, "schema": {"a": 1}}}, {"a": 1}),
    ],
)
def test_a_response_format_becomes_a_grammar(live: Live, client: openai.OpenAI, given: Any, schema: Any) -> None:
    client.chat.completions.create(model=MODEL, messages=ask("a"), max_tokens=2, response_format=given)
    grammar = live.engine.requests[-1].grammar
    assert (grammar and grammar.schema.wanted) == schema


def test_keywords_that_are_not_enforced_are_named_in_a_header(live: Live) -> None:
    for stream in (False, True):
        for schema, named in (({"uniqueItems": True}, "uniqueItems"), ({}, None)):
            given = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
            body = {"model": MODEL, "messages": ask("a"), "max_tokens": 2, "response_format": given, "stream": stream}
            response = live.post("/v1/chat/completions", body)
            assert response.status_code == 200
            assert response.headers.get("x-atlas-schema-ignored") == named


def test_a_client_that_leaves_ends_the_compilation_of_its_schema(live: Live) -> None:
    before = len(live.engine.grammars)
    given = {"type": "json_object", "schema": {"title": "never compiled"}}
    body = json.dumps({"model": MODEL, "messages": ask("a"), "response_format": given}).encode()
    with live.connect() as connection:
        head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n"
        connection.sendall(f"{head}Content-Type: application/json\r\n\r\n".encode() + body)
        wait_for(lambda: len(live.engine.grammars) > before)
        assert not live.engine.grammars[-1].done()
    wait_for(lambda: live.engine.grammars[-1].cancelled())


def test_schemas_are_compiled_for_the_owner_of_the_key(start: Start, tmp_path: Path) -> None:
    keys = tmp_path / "keys"
    keys.write_text("sk-one-0123456789abcdef:ann\nsk-two-0123456789abcdef:ben\n")
    keys.chmod(0o600)
    live = start(server={"api_keys_file": str(keys)})
    owners = []
    for key in ("sk-one-0123456789abcdef", "sk-two-0123456789abcdef"):
        live.openai(api_key=key).chat.completions.create(
            model=MODEL, messages=ask("a"), max_tokens=2, response_format={"type": "json_object"}
        )
        owners.append(live.engine.requests[-1].grammar.owner)
    assert len(set(owners)) == 2
