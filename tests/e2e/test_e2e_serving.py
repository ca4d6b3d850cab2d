"""One server with the real engine: the `openai` client, many clients at once, and the memory endpoints."""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from tests.e2e.real_server import RealServer, content, conversation, remember, text

CLIENTS = 32
PROMPT = "The session reads and never again the memory. "
GREEDY: dict[str, Any] = {"max_tokens": 40, "temperature": 0, "extra_body": {"ignore_eos": True}}


def complete(server: RealServer, prompt: str = PROMPT, **options: Any) -> Any:
    return server.openai.completions.create(model=server.name, prompt=prompt, **{**GREEDY, **options})


def tokens_of(server: RealServer, prompt: str) -> int:
    return len(server.post("/tokenize", {"content": prompt}).json()["tokens"])


# --- the openai client --------------------------------------------------------------------------------------------
def test_chat(server: RealServer) -> None:
    answer = server.chat("Hello")
    choice = answer.choices[0]
    assert (choice.message.role, choice.finish_reason) == ("assistant", "length")
    assert choice.message.content
    rendered = server.post("/apply-template", {"messages": conversation("Hello")}).json()["prompt"]
    body = {"content": rendered, "parse_special": True}
    assert answer.usage.prompt_tokens == len(server.post("/tokenize", body).json()["tokens"])
    assert answer.usage.completion_tokens == 12
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + 12
    assert content(server.chat("Hello")) == choice.message.content
    assert content(server.chat("Hello, you")) != choice.message.content


def test_completion(server: RealServer) -> None:
    answer = complete(server)
    assert answer.choices[0].text
    assert answer.choices[0].finish_reason == "length"
    assert answer.usage.prompt_tokens == tokens_of(server, PROMPT)
    assert answer.usage.completion_tokens == 40


def test_an_answer_may_end_by_itself(server: RealServer) -> None:
    """With a bias towards the end of generation nothing else can come."""
    (end,) = server.post("/tokenize", {"content": "<|im_end|>", "parse_special": True}).json()["tokens"]
    answer = complete(server, logit_bias={str(end): 100}, extra_body={})
    assert (answer.choices[0].text, answer.choices[0].finish_reason) == ("", "stop")


@pytest.mark.parametrize("session", [False, True])
def test_streams_bring_the_same_text(server: RealServer, session: bool) -> None:
    def ask(name: str, **options: Any) -> Any:
        return server.chat(text("stream", 60), session=name if session else None, max_tokens=30, **options)

    whole = ask("whole")
    chunks = list(ask("streamed", stream=True, stream_options={"include_usage": True}))
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices) == content(whole)
    assert [chunk.choices[0].finish_reason for chunk in chunks if chunk.choices][-1] == "length"
    assert chunks[-1].usage.completion_tokens == 30
    assert chunks[-1].usage.prompt_tokens == whole.usage.prompt_tokens
    completion = list(complete(server, stream=True))
    assert "".join(chunk.choices[0].text for chunk in completion) == complete(server).choices[0].text
    if session:
        assert whole.atlas_stats["tokens_absorbed"] >= 128
        assert [hasattr(chunk, "atlas_stats") for chunk in chunks].count(True) == 1


@pytest.mark.parametrize("stream", [False, True])
def test_stop_strings_end_the_text_before_them(server: RealServer, stream: bool) -> None:
    full = complete(server).choices[0].text
    pairs = [full[i : i + 2] for i in range(4, len(full) - 1)]
    stop = next(pair for pair in pairs if pair.isprintable() and "�" not in pair)
    answer = complete(server, stop=["never in the text", stop], stream=stream)
    if stream:
        chunks = list(answer)
        found, reason = "".join(chunk.choices[0].text for chunk in chunks), chunks[-1].choices[0].finish_reason
    else:
        found, reason = answer.choices[0].text, answer.choices[0].finish_reason
    assert (found, reason) == (full[: full.index(stop)], "stop")


def test_seeds(server: RealServer) -> None:
    texts = [complete(server, temperature=1.0, seed=seed).choices[0].text for seed in (7, 7, 8)]
    assert texts[0] == texts[1] != texts[2]
    assert texts[0] != complete(server).choices[0].text


def test_three_choices(server: RealServer) -> None:
    answer = server.chat("Hello", n=3, temperature=1.0, seed=5)
    assert [choice.index for choice in answer.choices] == [0, 1, 2]
    texts = [choice.message.content for choice in answer.choices]
    assert len(set(texts)) == 3
    assert texts[0] == content(server.chat("Hello", temperature=1.0, seed=5))
    assert answer.usage.prompt_tokens == server.chat("Hello").usage.prompt_tokens
    assert answer.usage.completion_tokens == 3 * 12
    greedy = server.chat("Hello", n=3)
    assert {choice.message.content for choice in greedy.choices} == {content(server.chat("Hello"))}


def test_logprobs_of_a_chat(server: RealServer) -> None:
    answer = server.chat("Hello", logprobs=True, top_logprobs=3)
    items = answer.choices[0].logprobs.content
    assert len(items) == answer.usage.completion_tokens
    written = b"".join(bytes(item.bytes) for item in items if not item.token.startswith("<|"))
    assert written.decode(errors="replace") == content(answer), "control tokens have log-probabilities and no text"
    for item in items:
        best = [one.logprob for one in item.top_logprobs]
        assert best == sorted(best, reverse=True)
        assert len(best) == 3
        assert item.logprob == pytest.approx(best[0], abs=1e-5)
        assert sum(map(math.exp, best)) <= 1 + 1e-5


def test_logprobs_of_a_prompt_are_those_of_writing_it(server: RealServer) -> None:
    """Text read back by `echo` is as likely as it was when it was written."""
    written = complete(server, max_tokens=4, logprobs=2).choices[0]
    ids = server.post("/tokenize", {"content": PROMPT}).json()["tokens"]
    length = len(ids)
    read = complete(server, echo=True, max_tokens=4, logprobs=2).choices[0]
    assert read.text == PROMPT + written.text
    assert len(read.logprobs.token_logprobs) == length + 4
    assert read.logprobs.token_logprobs[0] is None
    assert all(value <= 0 for value in read.logprobs.token_logprobs[1:])
    assert read.logprobs.token_logprobs[length:] == pytest.approx(written.logprobs.token_logprobs, abs=1e-4)


# --- many clients -------------------------------------------------------------------------------------------------
def test_many_clients_at_once_get_what_they_would_get_alone(server: RealServer) -> None:
    """Half of them have sessions, whose first turn already overflows the window."""
    together = threading.Barrier(CLIENTS)

    def client(number: int, prefix: str, *, wait: bool) -> list[Any]:
        session = f"{prefix}-{number}" if number % 2 else None
        turns, answers = [text(f"c{number} ", 50 if session else 10)], []
        if wait:
            together.wait(60)
        for _ in range(2 if session else 1):
            answers.append(server.chat(*turns, session=session))
            turns += [content(answers[-1]), f"and then {number}?"]
        return answers

    with ThreadPoolExecutor(CLIENTS) as pool:
        crowd = list(pool.map(lambda number: client(number, "crowd", wait=True), range(CLIENTS)))
    assert len({content(answers[-1]) for answers in crowd}) > CLIENTS // 2, "the texts must tell clients apart"
    for number, answers in enumerate(crowd):
        alone = client(number, "alone", wait=False)
        assert [content(answer) for answer in answers] == [content(answer) for answer in alone], number
        for one, other in zip(answers, alone, strict=True):
            assert one.choices[0].finish_reason == "length"
            assert one.usage.prompt_tokens == other.usage.prompt_tokens
        if number % 2:
            stats, same = answers[1].atlas_stats, alone[1].atlas_stats
            assert stats["cache_hit"]
            assert stats["degraded"] is None
            assert {**stats, "session_id": None} == {**same, "session_id": None}
    assert server.http.get("/v1/atlas/status").json()["data"]["contexts_in_use"] == 0


# --- the memory endpoints -----------------------------------------------------------------------------------------
@pytest.fixture
def clean(server: RealServer) -> Iterator[RealServer]:
    """The server without sessions."""
    for name in server.contexts():
        assert server.post("/v1/atlas/memory/delete", {"context_id": name}).status_code == 200
    yield server
    assert server.http.get("/ready").status_code == 200


def test_status(server: RealServer) -> None:
    body = server.http.get("/v1/atlas/status").json()
    data = body["data"]
    assert body["status"] == "healthy"
    assert (data["initialized"], data["enabled"], data["memory_persistence"]) == (True, True, True)
    assert (data["model"], data["context_pool_size"], data["memory_layers"]) == ("tiny", 4, [1, 0])
    assert data["state_bytes_per_session"] > 0
    assert data["adapter"]


def test_memory_of_a_session(clean: RealServer) -> None:
    turn = text("info", 150)
    answer = clean.chat(turn, session="info")
    pages = answer.usage.prompt_tokens // 128 - 1
    assert pages >= 2
    memory = clean.http.get("/v1/atlas/memory", params={"session_id": "info"}).json()
    assert (memory["session_id"], memory["window_size"]) == ("info", 128)
    assert 0 < memory["window_fill"] <= 256
    assert memory["total_updates"] >= pages
    assert 0 < memory["memory_used"] <= memory["memory_capacity"]
    assert memory["last_update_time"] > 1.7e9
    (layer,) = memory["layers"]
    assert layer["norm"] > 0
    assert layer["effective_rank"] > 0
    row = clean.contexts()["info"]
    assert row["tokens"] >= answer.usage.prompt_tokens
    missing = clean.http.get("/v1/atlas/memory", params={"session_id": "nobody"})
    assert (missing.status_code, missing.json()["error"]["code"]) == (404, 404)


def test_saved_and_loaded_sessions_go_on_from_the_save(clean: RealServer) -> None:
    def turn(words: str) -> Any:
        body = {"model": clean.name, "prompt": words, "max_tokens": 12, "temperature": 0, "ignore_eos": True}
        response = clean.post("/v1/completions", {**body, "atlas": remember("kept")})
        assert response.status_code == 200
        answer = response.json()
        return answer["choices"], answer["atlas_stats"]

    turn(text("first", 150))
    before = clean.http.get("/v1/atlas/memory", params={"session_id": "kept"}).json()
    saved = clean.post("/v1/atlas/memory/save").json()
    assert (saved["success"], saved["filename"], saved["context_id"]) == (True, "tiny_memory.atlas", None)
    named = clean.post("/v1/atlas/memory/save", {"filename": "mine.atlas"}).json()
    for answer in (saved, named):
        (file,) = clean.memory.rglob(answer["filename"])
        assert file.stat().st_size == answer["bytes"]
    state = {"notes": ["one", {"two": 2.5}]}
    context = clean.post("/v1/atlas/memory/save", {"context_id": "kept", "state": state}).json()
    assert (context["success"], context["context_id"]) == (True, "kept")
    expected = turn(text("second", 80))
    for body in ({"filename": "tiny_memory.atlas"}, {"filename": "mine.atlas"}, {"context_id": "kept"}):
        assert clean.http.get("/v1/atlas/memory", params={"session_id": "kept"}).json() != before
        loaded = clean.post("/v1/atlas/memory/load", body).json()
        assert loaded["success"]
        assert loaded.get("state", state) == state
        assert clean.http.get("/v1/atlas/memory", params={"session_id": "kept"}).json() == before
        assert turn(text("second", 80)) == expected, body
    alone = clean.post("/v1/atlas/memory/save", {"session_id": "kept"}).json()
    assert (alone["success"], alone["context_id"]) == (True, "kept")


def test_list_reset_and_delete(clean: RealServer) -> None:
    for name in ("a", "b", "c"):
        clean.chat(text(name, 100), session=name)
    first = clean.post("/v1/atlas/memory/list", {"limit": 2}).json()
    second = clean.post("/v1/atlas/memory/list", {"limit": 2, "after": first["next"]}).json()
    assert [row["context_id"] for page in (first, second) for row in page["contexts"]] == ["a", "b", "c"]
    assert second["next"] is None
    assert clean.post("/v1/atlas/memory/reset", {"session_id": "a"}).json()["sessions_reset"] == 1
    assert clean.http.get("/v1/atlas/memory", params={"session_id": "a"}).json()["total_updates"] == 0
    assert clean.http.get("/v1/atlas/memory", params={"session_id": "b"}).json()["total_updates"] > 0
    assert content(clean.chat(text("x", 100), session="a")) == content(clean.chat(text("x", 100), session="d"))
    clean.post("/v1/atlas/memory/save")
    assert clean.post("/v1/atlas/memory/delete", {"context_id": "b"}).json() == {"success": True, "context_id": "b"}
    assert clean.post("/v1/atlas/memory/delete", {"context_id": "b"}).status_code == 404
    assert clean.post("/v1/atlas/memory/load", {"filename": "tiny_memory.atlas"}).status_code == 200
    assert set(clean.contexts()) == {"a", "c", "d"}, "what was deleted stays deleted"
    assert clean.post("/v1/atlas/memory/reset", {"all": True}).json()["sessions_reset"] == 3


def test_statistics_follow(server: RealServer) -> None:
    before = server.http.get("/v1/atlas/metrics").json()["data"]["current"]
    server.chat("count me", session="counted")
    after = server.http.get("/v1/atlas/metrics").json()["data"]["current"]
    assert after["completed_requests"] == before["completed_requests"] + 1
    assert (after["active_requests"], after["failed_requests"]) == (0, before["failed_requests"])
    assert server.http.get("/v1/atlas/stats").json()["requests_processed"] > 0
    assert "atlas_" in server.http.get("/metrics").text
