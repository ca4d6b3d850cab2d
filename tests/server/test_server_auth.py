"""API keys: who gets in, and who sees what."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from litestar.routes import HTTPRoute

from server.middleware.auth import LOCAL, Identity, KeyFileError, KeyRing
from tests.server.fake_engine import FakeEngine
from tests.server.live_server import Live, Start, make_settings

KEYS = "# comment\n\nalpha-key:team-a\nbeta-key:team-b\nroot-key:ops:admin\nbare-key\nadmin-only::admin\n"
PAGE = {
    f"/web/{file.name}" for file in (Path(__file__).parents[2] / "server" / "web").iterdir() if file.suffix != ".html"
}
PUBLIC = PAGE | {"/", "/health", "/v1/health", "/ready", "/schema", "/schema/openapi.json"}


@pytest.fixture
def keys(tmp_path: Path) -> str:
    path = tmp_path / "keys"
    path.write_text(KEYS)
    return str(path)


@pytest.fixture(scope="module")
def _guarded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    path = tmp_path_factory.mktemp("keys") / "keys"
    path.write_text(KEYS)
    server = Live(make_settings(server={"api_keys_file": str(path), "failure_limit": 0}), FakeEngine())
    yield server
    server.stop()


@pytest.fixture
def guarded(_guarded: Live) -> Live:
    """A server with keys, and an engine that remembers nothing of the test before."""
    for memory in (_guarded.engine.requests, _guarded.engine.sessions.live, _guarded.engine.sessions.files_of):
        memory.clear()
    return _guarded


def bearer(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}


def call(live: Live, key: str, path: str, body: Any = None) -> httpx.Response:
    if body is None:
        return live.http.get(path, headers=bearer(key))
    return live.http.post(path, json=body, headers=bearer(key))


# --- the keys file ------------------------------------------------------------------------------------------------
def test_keys_file(keys: str) -> None:
    ring = KeyRing.from_file(keys)
    assert ring.authenticate({b"authorization": b"Bearer alpha-key"}).owner == "team-a"
    assert ring.authenticate({b"x-api-key": b"root-key"}).admin
    bare = ring.authenticate({b"api-key": b"bare-key"})
    assert re.fullmatch(r"key-[0-9a-f]{12}", bare.owner)
    assert bare.owner == bare.key_id
    assert not bare.admin
    assert ring.authenticate({b"api-key": b"admin-only"}).admin
    assert len(ring.owners) == 5


@pytest.mark.parametrize(
    "text",
    [
        "",
        "# only a comment\n",
        ":owner\n",
        "a key:owner\n",
        "kéy\n",
        "k:o:x\n",
        "k:o:admin:x\n",
        "k:../x\n",
        "k:o\nk:p\n",
    ],
)
def test_keys_files_that_are_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "keys"
    path.write_text(text)
    with pytest.raises(KeyFileError) as caught:
        KeyRing.from_file(str(path))
    assert "secret" not in str(caught.value)


def test_a_missing_keys_file_is_an_error_and_never_an_open_server(tmp_path: Path) -> None:
    with pytest.raises(KeyFileError):
        KeyRing.from_file(str(tmp_path / "none"))


def test_an_open_server_is_one_owner() -> None:
    assert KeyRing().authenticate({}) == LOCAL == Identity("local", "local", True)


# --- who gets in --------------------------------------------------------------------------------------------------
def test_every_route_needs_a_key_except_the_marked_ones(guarded: Live) -> None:
    app = guarded.server.config.app.app  # type: ignore[union-attr]
    seen = set()
    for route in app.routes:
        assert isinstance(route, HTTPRoute)
        path = re.sub(r"\{[^}]*\}", "x", route.path)
        for method in {*route.methods, "POST", "GET"}:
            response = guarded.http.request(method, path, json={} if method == "POST" else None)
            if path in PUBLIC:
                assert response.status_code != 401
                seen.add(path)
            else:
                assert response.status_code == 401, (method, path)
    assert seen == PUBLIC


@pytest.mark.parametrize(
    "path",
    [
        "/health/",
        "//health",
        "/v1/../health",
        "/health/../v1/models",
        "/v1/models/../../health",
        "/HEALTH",
        "/health%2f",
        "/v1/atlas/memory/health",
        "/health?x=/v1/models",
        "/nothing",
        "/v1/models//",
        "/schema/x",
    ],
)
def test_paths_that_are_merely_like_a_public_one(guarded: Live, path: str) -> None:
    head = f"GET {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n".encode()
    status = int(guarded.raw(head).split(b" ")[1])
    assert status == (200 if path.startswith("/health?") else 401)


@pytest.mark.parametrize(
    "headers",
    [
        {"Authorization": ""},
        {"Authorization": "Bearer"},
        {"Authorization": "Bearer alpha-ke"},
        {"Authorization": "Bearer alpha-keyy"},
        {"Authorization": "Bearer ALPHA-KEY"},
        {"Authorization": "Bearer  alpha-key"},
        {"Authorization": "Basic alpha-key"},
        {"Authorization": "alpha-key"},
        {"Authorization": "Bearer alpha-key:team-a"},
        {"Authorization": "Bearer #"},
        {"X-Api-Key": ""},
        {"X-Api-Key": "alpha"},
        {"api-key": "k\u00e9y"},
        {"Authorization": "Bearer " + "x" * 20_000},
    ],
)
def test_keys_that_do_not_open(guarded: Live, headers: dict[str, str]) -> None:
    encoded = {name: value.encode("latin-1") for name, value in headers.items()}
    response = guarded.http.get("/v1/models", headers=encoded)
    assert response.status_code == 401
    assert response.headers["www-authenticate"] == "Bearer"
    assert response.json()["error"]["type"] == "authentication_error"
    assert response.json()["error"]["code"] == "invalid_api_key"


def test_keys_that_open(guarded: Live) -> None:
    for headers in (
        {"Authorization": "Bearer alpha-key"},
        {"Authorization": "bearer alpha-key"},
        {"X-Api-Key": "alpha-key"},
        {"api-key": "alpha-key"},
        {"Authorization": "Basic zzz", "X-Api-Key": "alpha-key"},
        {"Authorization": "Bearer alpha-key", "X-Api-Key": "alpha-key", "api-key": "alpha-key"},
    ):
        assert guarded.http.get("/v1/models", headers=headers).status_code == 200
    assert guarded.http.get("/v1/models?api_key=alpha-key").status_code == 401


def test_the_first_of_two_authorization_headers_counts(guarded: Live) -> None:
    head = b"GET /v1/models HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n"
    wrong, right = b"Authorization: Bearer wrong\r\n", b"Authorization: Bearer alpha-key\r\n"
    assert guarded.raw(head + wrong + right + b"\r\n").startswith(b"HTTP/1.1 401")
    assert guarded.raw(head + right + wrong + b"\r\n").startswith(b"HTTP/1.1 200")


def test_garbage_keys_are_limited_and_do_not_lock_others_out(start: Start, keys: str) -> None:
    live = start(server={"api_keys_file": keys, "failure_limit": 5})
    statuses = [live.http.get("/v1/models", headers=bearer(f"garbage{n}")).status_code for n in range(8)]
    assert statuses == [401] * 5 + [429] * 3
    limited = live.http.get("/v1/models")
    assert int(limited.headers["retry-after"]) >= 1
    assert live.http.get("/v1/models", headers=bearer("alpha-key")).status_code == 200
    assert live.http.get("/health").status_code == 200


def test_an_unknown_path_tells_nothing_without_a_key(guarded: Live) -> None:
    assert guarded.http.get("/v1/unknown").status_code == 401
    assert guarded.http.get("/v1/unknown", headers=bearer("alpha-key")).status_code == 404
    assert guarded.http.put("/v1/models").status_code == 401
    assert guarded.http.put("/v1/models", headers=bearer("alpha-key")).status_code == 405


def test_error_envelopes_of_refusals(guarded: Live) -> None:
    refused = guarded.http.get("/v1/atlas/status").json()["error"]
    assert (refused["code"], refused["type"]) == (401, "authentication_error")
    assert "timestamp" in refused


# --- who sees what ------------------------------------------------------------------------------------------------
def test_owners_do_not_see_each_other(guarded: Live) -> None:
    chat = {"messages": [{"role": "user", "content": "secret"}], "atlas": {"session_id": "shared-name"}}
    assert call(guarded, "alpha-key", "/v1/chat/completions", chat).status_code == 200
    assert call(guarded, "alpha-key", "/v1/atlas/memory/save", {"filename": "mine.atlas"}).status_code == 200
    call(guarded, "alpha-key", "/v1/atlas/memory/save", {"context_id": "ctx", "state": {"a": 1}})

    listed = call(guarded, "beta-key", "/v1/atlas/memory/list", {}).json()
    assert listed["contexts"] == []
    # What exists for another owner and what exists for nobody look the same.
    for path, there, nowhere in (
        ("memory/load", {"context_id": "ctx"}, {"context_id": "xyz"}),
        ("memory/load", {"filename": "mine.atlas"}, {"filename": "none.atlas"}),
        ("memory/delete", {"context_id": "shared-name"}, {"context_id": "another-name"}),
        ("memory/reset", {"session_id": "shared-name"}, {"session_id": "another-name"}),
        ("memory/save", {"session_id": "shared-name"}, {"session_id": "another-name"}),
        (
            "memory/fork",
            {"session_id": "shared-name", "target": "x"},
            {"session_id": "another-name", "target": "x"},
        ),
    ):
        one = call(guarded, "beta-key", f"/v1/atlas/{path}", there)
        two = call(guarded, "beta-key", f"/v1/atlas/{path}", nowhere)
        assert one.status_code == two.status_code == 404
        assert one.json()["error"]["type"] == two.json()["error"]["type"]
    assert call(guarded, "beta-key", "/v1/atlas/memory?session_id=shared-name").status_code == 404
    assert call(guarded, "beta-key", "/v1/atlas/memory/reset", {"all": True}).json()["sessions_reset"] == 0

    answer = call(guarded, "beta-key", "/v1/chat/completions", chat).json()
    assert answer["usage"]["prompt_tokens_details"]["cached_tokens"] == 0
    assert {owner for owner, _ in guarded.engine.sessions.live} == {"team-a", "team-b"}
    assert [request.owner for request in guarded.engine.requests] == ["team-a", "team-b"]


def test_only_admins_change_the_configuration(guarded: Live) -> None:
    refused = call(guarded, "alpha-key", "/v1/atlas/config", {"blend_ratio": 0.1})
    assert (refused.status_code, refused.json()["error"]["type"]) == (403, "permission_error")
    assert call(guarded, "alpha-key", "/v1/atlas/config").json()["data"]["blend_ratio"] == 0.5
    assert call(guarded, "root-key", "/v1/atlas/config", {"blend_ratio": 0.1}).status_code == 200


def test_the_owner_cannot_be_chosen_by_the_client(guarded: Live) -> None:
    body = {"prompt": "x", "user": "team-b", "atlas": {"session_id": "s"}}
    assert call(guarded, "alpha-key", "/v1/completions", {**body, "owner": "team-b"}).status_code == 400
    call(guarded, "alpha-key", "/v1/completions", body)
    assert guarded.engine.requests[-1].owner == "team-a"
    assert guarded.engine.requests[-1].memory.session.owner == "team-a"


def test_request_and_token_limits(start: Start, keys: str) -> None:
    live = start(server={"api_keys_file": keys, "rate_limit_requests": 4, "rate_limit_tokens": 100})
    body = {"prompt": "x" * 20, "max_tokens": 20}
    first = call(live, "alpha-key", "/v1/completions", body)
    assert first.headers["x-ratelimit-limit-requests"] == "4"
    assert first.headers["x-ratelimit-remaining-requests"] == "3"
    assert first.headers["x-ratelimit-limit-tokens"] == "100"
    call(live, "alpha-key", "/v1/completions", body)
    over = call(live, "alpha-key", "/v1/completions", body)
    assert over.status_code == 429
    assert "tokens per minute" in over.json()["error"]["message"]
    assert over.json()["error"]["code"] == "rate_limit_exceeded"
    assert float(over.headers["retry-after-ms"]) > 1000
    assert call(live, "beta-key", "/v1/completions", body).status_code == 200
    assert call(live, "alpha-key", "/v1/models").status_code == 200
    over = call(live, "alpha-key", "/v1/models")
    assert (over.status_code, over.headers["x-ratelimit-remaining-requests"]) == (429, "0")


def test_tokens_not_used_are_given_back(start: Start, keys: str) -> None:
    live = start(server={"api_keys_file": keys, "rate_limit_tokens": 1000})
    for _ in range(4):  # each reserves 510 tokens and uses 13
        body = {"prompt": "x" * 10, "max_tokens": 500, "stop": "xxxx"}
        assert call(live, "alpha-key", "/v1/completions", body).status_code == 200
