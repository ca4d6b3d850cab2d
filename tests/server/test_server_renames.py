"""`/v1/atlas/memory/rename`: a session gets a name that is free, and only its owner's."""

from __future__ import annotations

from typing import Any

import pytest

from tests.server.live_server import Live, Start

PATH = "/v1/atlas/memory/rename"


def begin(live: Live, *names: str) -> None:
    for name in names:
        assert live.post(
            "/v1/completions", {"prompt": "hello", "max_tokens": 2, "atlas": {"session_id": name}}
        ).is_success


def names(live: Live) -> list[str]:
    return [row["context_id"] for row in live.post("/v1/atlas/memory/list").json()["contexts"]]


def test_a_session_is_renamed(live: Live) -> None:
    begin(live, "old", "other")
    answer = live.post(PATH, {"session_id": "old", "target": "ne\u0301e"}).json()
    assert answer == {"success": True, "session_id": "old", "target": "n\u00e9e"}  # as it is kept: composed
    assert names(live) == ["n\u00e9e", "other"]


@pytest.mark.parametrize(
    ("body", "status", "param"),
    [
        ({"session_id": "old", "target": "taken"}, 409, None),
        ({"session_id": "old", "target": "old"}, 409, None),
        ({"session_id": "nobody", "target": "free"}, 404, None),
        ({"session_id": "old"}, 400, "target"),
        ({"target": "free"}, 400, "session_id"),
        ({"session_id": "old", "target": ""}, 400, "target"),
        ({"session_id": "old", "target": "a/b"}, 400, "target"),
        ({"session_id": "old", "target": "x" * 129}, 400, "target"),
        ({"session_id": "old", "target": 1}, 400, "target"),
        ({"session_id": "old", "target": "free", "force": True}, 400, "force"),
    ],
)
def test_a_name_that_cannot_be_given_is_refused_by_name(
    live: Live, body: dict[str, Any], status: int, param: str | None
) -> None:
    begin(live, "old", "taken")
    response = live.post(PATH, body)
    assert response.status_code == status, response.text
    error = response.json()["error"]
    assert (error["code"], error["param"]) == (status, param)
    assert names(live) == ["old", "taken"]


def test_without_a_memory_there_is_nothing_to_rename(start: Start) -> None:
    live = start(atlas={"enabled": False})
    response = live.post(PATH, {"session_id": "a", "target": "b"})
    assert (response.status_code, response.json()["error"]["message"]) == (503, "ATLAS not enabled")
