"""What a web page can make a browser send to a server on the same machine: nothing that changes or costs anything."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import httpx
import pytest

from tests.server.live_server import Live, Start

CHAT = "/v1/chat/completions"
HELLO = {"messages": [{"role": "user", "content": "hello"}], "max_tokens": 2}
KEY = {"Authorization": "Bearer alpha"}
# Every path that changes or costs something, and one that does not exist.
PATHS = [
    CHAT,
    "/v1/completions",
    "/tokenize",
    "/v1/atlas/config",
    "/v1/atlas/memory/save",
    "/v1/atlas/memory/load",
    "/v1/atlas/memory/list",
    "/v1/atlas/memory/delete",
    "/v1/atlas/memory/reset",
    "/v1/atlas/memory/fork",
    "/nothing",
]
FOREIGN = [
    {"Origin": "https://evil.example"},
    {"Origin": "null"},
    {"Origin": ""},
    {"Origin": "http://localhost.evil.example"},
    {"Origin": "http://127.0.0.1:1"},  # another port of this machine is another site's page
    {"Origin": "http://127.0.0.1"},
    {"Origin": "chrome-extension://abc"},
    {"Sec-Fetch-Site": "cross-site"},
    {"Sec-Fetch-Site": "same-site"},
    {"Sec-Fetch-Site": "Cross-Site", "Sec-Fetch-Mode": "no-cors"},
]


def refused(response: httpx.Response) -> bool:
    return response.status_code == 403 and "cors_origins" in response.json()["error"]["message"]


@pytest.mark.parametrize("headers", FOREIGN, ids=lambda given: " ".join(given.values()))
def test_a_foreign_page_changes_nothing(live: Live, headers: dict[str, str]) -> None:
    live.post(CHAT, {**HELLO, "atlas": {"session_id": "kept"}})
    tokens = list(live.engine.sessions.live["local", "kept"].tokens)
    count = len(live.engine.requests)
    for path in PATHS:
        # As a form, as text and without a body a page may send without asking; as JSON where somebody allowed it.
        assert refused(live.http.post(path, headers=headers)), path
        assert refused(
            live.http.post(path, content=b'{"all": true}', headers={**headers, "Content-Type": "text/plain"})
        )
        assert refused(live.http.post(path, json={"all": True}, headers=headers)), path
        for method in ("PUT", "PATCH", "DELETE"):
            assert refused(live.http.request(method, path, headers=headers)), (method, path)
    assert live.engine.sessions.live["local", "kept"].tokens == tokens
    assert len(live.engine.requests) == count
    # Reading does no harm: CORS keeps the answer from the page.
    answer = live.http.get("/v1/models", headers=headers)
    assert answer.status_code == 200
    assert "access-control-allow-origin" not in answer.headers


def test_pages_of_the_server_itself_and_programs_may(live: Live) -> None:
    own: list[dict[str, str]] = [
        {},
        {"Origin": live.url},
        {"Origin": live.url, "Sec-Fetch-Site": "same-origin"},
        {"Sec-Fetch-Site": "none"},
        {"Host": "localhost", "Origin": "http://localhost"},
        {"Host": "localhost", "Origin": "https://localhost"},  # behind a proxy that ends TLS
        {"Host": "localhost:443", "Origin": "https://localhost"},
        {"Host": "LOCALHOST:9999", "Origin": "http://localhost:9999"},
    ]
    for headers in own:
        assert live.http.post(CHAT, json=HELLO, headers=headers).status_code == 200, headers


@pytest.fixture
def listed(start: Start, tmp_path: Path) -> Callable[[str], Live]:
    def begin(*origins: str) -> Live:
        keys = tmp_path / "keys"
        keys.write_text("alpha:team\n")
        return start(server={"cors_origins": origins, "api_keys_file": str(keys)})

    return begin


def test_listed_pages_may_and_a_key_changes_nothing_for_the_others(listed: Callable[..., Live]) -> None:
    live = listed("https://app.example")
    for headers in (
        {"Origin": "https://app.example"},
        {"Origin": "https://APP.example", "Sec-Fetch-Site": "cross-site"},
    ):
        assert live.http.post(CHAT, json=HELLO, headers={**KEY, **headers}).status_code == 200
    for headers in FOREIGN:
        assert refused(live.http.post(CHAT, json=HELLO, headers={**KEY, **headers}))
    assert live.http.post(CHAT, json=HELLO, headers=KEY).status_code == 200


def test_any_page_may_where_the_operator_says_so_but_none_without_a_name(listed: Callable[..., Live]) -> None:
    live = listed("*")
    given = {**KEY, "Origin": "https://anybody.example", "Sec-Fetch-Site": "cross-site"}
    assert live.http.post(CHAT, json=HELLO, headers=given).status_code == 200
    assert refused(live.http.post(CHAT, json=HELLO, headers={**KEY, "Origin": "null"}))


def test_a_browser_says_that_it_sends_json_also_where_it_sends_nothing(live: Live) -> None:
    save = "/v1/atlas/memory/save"
    assert live.http.post(save).status_code == 200  # curl -X POST
    for headers in ({"Origin": live.url}, {"Sec-Fetch-Site": "same-origin"}):
        assert live.http.post(save, headers=headers).status_code == 415
        assert live.http.post(save, headers={**headers, "Content-Type": "application/json"}).status_code == 200
