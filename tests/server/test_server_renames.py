"""`/v1/atlas/memory/rename` and `…/branch`: sessions get names that are free, and only their owner's."""

from __future__ import annotations

from typing import Any

import pytest

from tests.server.live_server import Live, Start

PATHS = ["/v1/atlas/memory/rename", "/v1/atlas/memory/branch"]


def begin(live: Live, *names: str) -> None:
    for name in names:
        assert live.post(
            "/v1/completions", {"prompt": "hello", "max_tokens": 2, "atlas": {"session_id": name}}
        ).is_success


def names(live: Live) -> list[str]:
    return [row["context_id"] for row in live.post("/v1/atlas/memory/list").json()["contexts"]]


def test_a_session_is_renamed(live: Live) -> None:
    begin(live, "old", "other")
    answer = live.post(PATHS[0], {"session_id": "old", "new_session_id": "ne\u0301e"}).json()
    assert (answer["success"], answer["session_id"]) == (True, "n\u00e9e")  # as it is kept: composed
    assert names(live) == ["n\u00e9e", "other"]


def test_a_session_is_branched(live: Live) -> None:
    begin(live, "trunk")
    answer = live.post(PATHS[1], {"session_id": "trunk", "new_session_id": "twig"}).json()
    assert (answer["success"], answer["session_id"], answer["branched_from"]) == (True, "twig", "trunk")
    assert names(live) == ["trunk", "twig"]


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(
    ("body", "status", "param"),
    [
        ({"session_id": "old", "new_session_id": "taken"}, 409, None),
        ({"session_id": "old", "new_session_id": "old"}, 409, None),
        ({"session_id": "nobody", "new_session_id": "free"}, 404, None),
        ({"session_id": "old"}, 400, "new_session_id"),
        ({"new_session_id": "free"}, 400, "session_id"),
        ({"session_id": "old", "new_session_id": ""}, 400, "new_session_id"),
        ({"session_id": "old", "new_session_id": "a/b"}, 400, "new_session_id"),
        ({"session_id": "old", "new_session_id": "x" * 129}, 400, "new_session_id"),
        ({"session_id": "old", "new_session_id": 1}, 400, "new_session_id"),
        ({"session_id": "old", "new_session_id": "free", "force": True}, 400, "force"),
    ],
)
def test_a_name_that_cannot_be_given_is_refused_by_name(
    live: Live, path: str, body: dict[str, Any], status: int, param: str | None
) -> None:
    begin(live, "old", "taken")
    response = live.post(path, body)
    assert response.status_code == status, response.text
    error = response.json()["error"]
    assert (error["code"], error["param"]) == (status, param)
    assert names(live) == ["old", "taken"]


@pytest.mark.parametrize("path", PATHS)
def test_without_a_memory_there_is_nothing_to_rename(start: Start, path: str) -> None:
    live = start(atlas={"enabled": False})
    response = live.post(path, {"session_id": "a", "new_session_id": "b"})
    assert (response.status_code, response.json()["error"]["message"]) == (503, "ATLAS not enabled")
