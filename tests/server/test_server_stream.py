"""The bytes on the wire of a stream: framing, order, pings, errors, waiting."""

from __future__ import annotations

import json
import time
from typing import Any

import pytest

from atlas_jax.engine.api import EngineError, Overloaded
from tests.server.fake_engine import FakeEngine
from tests.server.live_server import Live, Start, wait_for

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"


def body(**fields: Any) -> dict[str, Any]:
    return {"prompt": "ab", "max_tokens": 3, "stream": True, "temperature": 0, **fields}


def events(text: str) -> list[Any]:
    """The decoded events; fails on anything that is not `data: …` followed by an empty line."""
    assert text.endswith("\n\n")
    frames = text[:-2].split("\n\n")
    assert all(frame.startswith(("data: ", ": ")) and "\n" not in frame for frame in frames)
    return [frame[6:] for frame in frames if frame.startswith("data: ")]


def test_frames(live: Live) -> None:
    response = live.post(COMPLETIONS, body())
    assert response.headers["content-type"].split(";")[0] == "text/event-stream"
    assert response.headers["cache-control"] == "no-cache"
    assert response.headers["x-accel-buffering"] == "no"
    assert b"\r" not in response.content
    *chunks, done = events(response.text)
    assert done == "[DONE]"
    decoded = [json.loads(chunk) for chunk in chunks]
    assert [chunk["choices"][0]["text"] for chunk in decoded] == ["a", "b", "a", ""]
    assert [chunk["choices"][0]["finish_reason"] for chunk in decoded] == [None, None, None, "length"]
    assert all("usage" not in chunk for chunk in decoded)
    assert list(decoded[0]) == ["id", "object", "created", "model", "system_fingerprint", "choices"]


def test_usage_chunk(live: Live) -> None:
    *chunks, done = events(live.post(COMPLETIONS, body(stream_options={"include_usage": True})).text)
    assert done == "[DONE]"
    decoded = [json.loads(chunk) for chunk in chunks]
    assert [chunk["usage"] for chunk in decoded[:-1]] == [None] * 4
    assert decoded[-1]["choices"] == []
    assert decoded[-1]["usage"] == {
        "prompt_tokens": 2,
        "completion_tokens": 3,
        "total_tokens": 5,
        "prompt_tokens_details": {"cached_tokens": 0},
    }


def test_an_answer_without_text_still_ends_properly(live: Live) -> None:
    messages = [{"role": "user", "content": "x"}]
    *chunks, done = events(live.post(CHAT, {"messages": messages, "stream": True, "stop": "u"}).text)
    assert done == "[DONE]"
    decoded = [json.loads(chunk)["choices"][0] for chunk in chunks]
    assert decoded[0]["delta"] == {"role": "assistant", "content": ""}
    assert (decoded[-1]["delta"], decoded[-1]["finish_reason"]) == ({}, "stop")


def test_characters_are_never_cut(live: Live) -> None:
    text = live.post(COMPLETIONS, body(prompt="é€😀", max_tokens=9)).text
    pieces = [json.loads(chunk)["choices"][0]["text"] for chunk in events(text)[:-1]]
    assert [piece for piece in pieces if piece] == ["é", "€", "😀"]


def test_silence_sends_pings_and_headers(start: Start) -> None:
    live = start(FakeEngine(delay=0.25), server={"ping_interval": 0.05})
    with live.http.stream("POST", COMPLETIONS, json=body()) as response:
        started = time.monotonic()
        text = "".join(response.iter_text())
    assert text.startswith(": ping\n\n")
    assert text.count(": ping") >= 6
    assert time.monotonic() - started > 0.5
    assert events(text)[-1] == "[DONE]"


def test_an_error_in_the_middle_is_the_last_event(live: Live) -> None:
    live.engine.fail_after = 2
    live.engine.failure = EngineError("Out of luck")
    *chunks, last = events(live.post(COMPLETIONS, body(max_tokens=5)).text)
    assert [json.loads(chunk)["choices"][0]["text"] for chunk in chunks] == ["a", "b"]
    assert json.loads(last) == {
        "error": {"message": "Out of luck", "type": "server_error", "param": None, "code": "engine_error"}
    }


def test_errors_before_the_first_event_have_a_status(live: Live) -> None:
    live.engine.submit_errors = [Overloaded("The queue is full", retry_after=2.5)]
    response = live.post(COMPLETIONS, body())
    assert (response.status_code, response.json()["error"]["code"]) == (503, "overloaded")
    assert (response.headers["retry-after"], response.headers["retry-after-ms"]) == ("3", "2500")
    assert response.headers["content-type"] == "application/json"


def test_tokens_that_arrive_together_are_sent_together(live: Live) -> None:
    """A fast engine costs few writes: far fewer network chunks than events."""
    data = json.dumps(body(max_tokens=400)).encode()
    head = (
        b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\nContent-Type: application/json\r\n"
        b"Content-Length: " + str(len(data)).encode() + b"\r\n\r\n"
    )
    raw = live.raw(head + data)
    assert raw.count(b"data: ") == 402
    sizes = raw.split(b"\r\n\r\n", 1)[1]
    chunks = 0
    while sizes:
        size, _, sizes = sizes.partition(b"\r\n")
        sizes = sizes[int(size, 16) + 2 :]
        chunks += 1
    assert chunks < 300


def test_the_queue_serves_keys_in_turn_and_everyone_gets_an_answer(start: Start) -> None:
    live = start(FakeEngine(delay=0.001), server={"max_concurrent": 2, "max_waiting": 30})
    import threading

    statuses: list[int] = []

    def run() -> None:
        statuses.append(live.post(COMPLETIONS, body(stream=False)).status_code)

    threads = [threading.Thread(target=run) for _ in range(60)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert set(statuses) <= {200, 429, 503}
    assert statuses.count(200) >= 32
    wait_for(lambda: live.admission.running == 0 and live.admission.waiting == 0)


@pytest.mark.parametrize("stream", [False, True])
def test_waiting_longer_than_the_queue_timeout(start: Start, stream: bool) -> None:
    live = start(FakeEngine(delay=0.02), server={"max_concurrent": 1, "queue_timeout": 0.1})
    held = live.http.stream("POST", COMPLETIONS, json=body(ignore_eos=True, max_tokens=-1))
    with held as response:
        held_open = response.iter_bytes()
        next(held_open)
        refused = live.post(COMPLETIONS, body(stream=stream))
    assert (refused.status_code, refused.json()["error"]["code"]) == (503, "overloaded")
