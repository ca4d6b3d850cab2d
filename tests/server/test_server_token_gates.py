"""`atlas.token_gates`: what weight the memory had for each token of an answer."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tests.server.live_server import Live

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
GATES = {"atlas": {"token_gates": True}}
ASK = {CHAT: {"messages": [{"role": "user", "content": "hé 42"}]}, COMPLETIONS: {"prompt": "hé 42"}}


def choices(live: Live, path: str, **more: Any) -> list[dict[str, Any]]:
    """The choices of an answer, or of the chunks of a stream."""
    response = live.post(path, {**ASK[path], "max_tokens": 12, **more})
    assert response.status_code == 200, response.text
    if not more.get("stream"):
        return list(response.json()["choices"])
    frames = [line.removeprefix("data: ") for line in response.text.splitlines() if line.startswith("data: {")]
    return [choice for frame in frames for choice in json.loads(frame)["choices"]]


def text_of(choice: dict[str, Any]) -> str:
    part = choice.get("message") or choice.get("delta") or choice
    return part.get("content") or part.get("text") or ""


@pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("logprobs", [False, True])
def test_every_token_of_the_text_comes_with_its_gate(live: Live, path: str, stream: bool, logprobs: bool) -> None:
    more = {"logprobs": True if path == CHAT else 1} if logprobs else {}
    found = choices(live, path, stream=stream, **GATES, **more)
    assert any(choice["logprobs"] for choice in found) == logprobs
    for choice in found:
        gates = choice.get("token_gates", [])
        data = b"".join(bytes(one["bytes"]) for one in gates)
        assert data.decode() == text_of(choice)
        assert [one["gate"] for one in gates] == [byte % 10 / 10 for byte in data]
    assert sum(len(choice.get("token_gates", [])) for choice in found) == 12


@pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
@pytest.mark.parametrize(
    "atlas", [None, {}, {"token_gates": False}, {"token_gates": None}, {"enabled": False, **GATES["atlas"]}]
)
def test_without_being_asked_or_without_a_memory_there_are_none(live: Live, path: str, atlas: Any) -> None:
    for stream in (False, True):
        assert not any("token_gates" in one for one in choices(live, path, stream=stream, atlas=atlas))


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/messages", {**ASK[CHAT], "model": "m", "max_tokens": 3}),
        ("/v1/responses", {"input": "x"}),
        ("/api/chat", {**ASK[CHAT], "model": "m"}),
        ("/api/generate", {"prompt": "x", "model": "m"}),
        ("/completion", {"prompt": "x"}),
    ],
)
def test_an_api_without_a_place_for_them_says_so(live: Live, path: str, body: dict[str, Any]) -> None:
    response = live.post(path, {**body, **GATES})
    assert response.status_code == 400
    assert "atlas.token_gates" in response.text
