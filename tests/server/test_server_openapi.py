"""The OpenAPI document, the file that is made of it, and whether the server does what it says."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from server.app import create_app
from server.config.settings import Settings
from server.openapi import as_yaml
from tests.server.live_server import Live, Start

ROOT = Path(__file__).parents[2]
FILE = ROOT / "docs" / "atlas-openapi.yaml"
GENERATION = (
    *("/v1/completions", "/completions", "/v1/chat/completions", "/chat/completions", "/v1/messages"),
    *("/completion", "/infill", "/api/chat", "/api/generate"),
)
RESPONSES = ("/v1/responses", "/responses")
SESSIONS = {f"/v1/atlas/memory/{what}" for what in ("save", "load", "rename", "fork", "reset", "delete")}
ENVELOPES = {"/v1/atlas": "Atlas", "/v1/messages": "Anthropic", "/api/": "Ollama"}
ALWAYS, KEYED, BODY = {"200", "400", "405", "503"}, {"401", "429"}, {"403", "408", "413", "415"}


@pytest.fixture(scope="module")
def document() -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load(FILE.read_text("utf-8"))
    return found


def operations(document: dict[str, Any]) -> list[tuple[str, str, dict[str, Any]]]:
    return [(path, method, one) for path, item in document["paths"].items() for method, one in item.items()]


def test_the_file_is_up_to_date() -> None:
    same = FILE.read_text("utf-8") == as_yaml()
    assert same, "docs/atlas-openapi.yaml is not what the server says of itself: run `make openapi` and commit the file"


def test_the_file_is_the_same_whenever_it_is_made(tmp_path: Path) -> None:
    output = tmp_path / "api.yaml"
    command = [sys.executable, "-m", "server.openapi", "--output", str(output)]
    subprocess.run(command, check=True, cwd=ROOT, env={**os.environ, "PYTHONHASHSEED": "7", "ATLAS_PORT": "1"})
    assert output.read_bytes() == FILE.read_bytes()


def test_a_running_server_says_the_same(live: Live, document: dict[str, Any]) -> None:
    assert live.http.get("/schema/openapi.json").json() == document


def test_references_lead_somewhere(document: dict[str, Any]) -> None:
    def references(value: Any) -> list[str]:
        if isinstance(value, list):
            return [one for item in value for one in references(item)]
        if not isinstance(value, dict):
            return []
        own = [value["$ref"]] if isinstance(value.get("$ref"), str) else []
        return own + [one for item in value.values() for one in references(item)]

    for reference in set(references(document)):
        place: Any = document
        for name in reference.removeprefix("#/").split("/"):
            place = place[name]
    app, _ = create_app(Settings(), lambda: None)  # type: ignore[arg-type,return-value]
    served = {re.sub(r"{(\w+):\w+}", r"{\1}", route.path) for route in app.routes}
    page = {path for path in served if path.startswith("/web/")}  # the files of a page are no part of the API
    assert set(document["paths"]) == served - page - {"/schema/{path}"}


def test_every_operation_documents_what_it_may_answer(document: dict[str, Any]) -> None:
    for path, method, operation in operations(document):
        if path.startswith("/schema"):
            continue
        statuses = set(operation["responses"])
        expected = ALWAYS | {"post": BODY, "delete": {"403"}}.get(method, set())
        public = path in ("/", "/health", "/v1/health", "/ready")
        expected |= set() if public else KEYED
        assert (operation.get("security") == []) == public, path
        if path in SESSIONS or (path in RESPONSES and method == "post"):
            expected |= {"404", "409"}
        if path in GENERATION:
            expected |= {"404", "409", "500", "507"}
        assert expected <= statuses <= expected | {"404", "500", "501", "507"}, path
        envelope = next((name for prefix, name in ENVELOPES.items() if path.startswith(prefix)), "OpenAI")
        for status in statuses - {"200"}:
            assert operation["responses"][status] == {"$ref": f"#/components/responses/{envelope}{status}"}
            shared = document["components"]["responses"][f"{envelope}{status}"]
            schema = shared["content"]["application/json"]["schema"]["$ref"]
            assert schema == f"#/components/schemas/{envelope}Error"
            assert ("Retry-After" in shared.get("headers", {})) == (status in ("429", "503", "507"))


def test_generation_documents_the_session_header(document: dict[str, Any], live: Live) -> None:
    for path, _, operation in operations(document):
        headers = [one for one in operation.get("parameters", ()) if one["in"] == "header"]
        assert [one["name"] for one in headers] == (["X-Session-ID"] if path in GENERATION else [])
        assert not any(one["required"] for one in headers)
    body = {"prompt": "x", "max_tokens": 1}
    answer = live.post("/v1/completions", body, X_Session_ID="documented")
    assert answer.json()["atlas_stats"]["session_id"] == answer.headers["x-session-id"] == "documented"
    assert live.post("/v1/completions", body, X_Session_ID="x" * 129).status_code == 400


def test_bodies_that_may_be_empty_are_those_that_are_not_required(document: dict[str, Any], live: Live) -> None:
    optional = set()
    for path, method, operation in operations(document):
        if method != "post":
            assert "requestBody" not in operation
            continue
        if "requestBody" not in operation:
            assert path.endswith("/cancel")
            continue
        body = operation["requestBody"]["content"]["application/json"]["schema"]
        assert set(body.get("items", body)) == {"$ref"}
        answered = live.http.post(path).status_code
        assert (answered == 200) == (not operation["requestBody"]["required"]), path
        assert answered in (200, 400), path
        if answered == 200:
            optional.add(path)
    saving = {"/v1/atlas/memory/save", "/v1/atlas/memory/list"}
    assert optional == {*saving, "/v1/conversations", "/conversations"}


def test_a_body_of_null_is_no_fault_of_the_servers(document: dict[str, Any], live: Live) -> None:
    for path, method, _ in operations(document):
        if method == "post":
            headers = {"content-type": "application/json"}
            answer = live.http.post(re.sub(r"{\w+}", "x", path), content=b"null", headers=headers)
            assert answer.status_code in (200, 400, 404, 501), path


def test_another_method_is_answered_as_documented(document: dict[str, Any], live: Live) -> None:
    for path, item in document["paths"].items():
        other = "put"
        assert other not in item
        answer = live.http.put(re.sub(r"{\w+}", "x", path), json={})
        assert answer.status_code == 405, path
        assert {method.upper() for method in item} <= set(answer.headers["allow"].replace(" ", "").split(","))


def test_statuses_of_bodies_happen_as_documented(start: Start, document: dict[str, Any]) -> None:
    live = start(server={"max_body_bytes": 2048})
    wrong: list[tuple[str, bytes, dict[str, str]]] = [
        ("403", b"{}", {"origin": "http://elsewhere.example", "content-type": "application/json"}),
        ("413", b'{"x": "' + b"x" * 4096 + b'"}', {"content-type": "application/json"}),
        ("415", b"x=1", {"content-type": "text/plain", "sec-fetch-site": "same-origin"}),
    ]
    for path, method, operation in operations(document):
        if method != "post":
            continue
        for status, body, headers in wrong:
            assert str(live.http.post(path, content=body, headers=headers).status_code) == status
            assert status in operation["responses"]
