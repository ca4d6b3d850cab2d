"""What one caller may take, and what is left for the others while it does."""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.server.fake_engine import FakeEngine
from tests.server.live_server import Live, Start, wait_for

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
HELLO = {"messages": [{"role": "user", "content": "hello"}], "max_tokens": 2}
ENDLESS = {"prompt": "x", "ignore_eos": True, "max_tokens": 1 << 31}
LONG = {"messages": HELLO["messages"] * 100, "max_tokens": 2}  # type: ignore[operator]


def ask(live: Live, path: str, body: dict[str, Any], key: str, *, source: str = "127.0.0.1") -> socket.socket:
    """Sends a request and leaves its answer for later."""
    data = json.dumps(body).encode()
    connection = live.connect(source=source)
    connection.sendall(
        f"POST {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\nAuthorization: Bearer {key}\r\n"
        f"Content-Length: {len(data)}\r\nConnection: close\r\n\r\n".encode()
        + data
    )
    return connection


def status(connection: socket.socket) -> int:
    connection.settimeout(10)
    line = connection.recv(65_536).split(b"\r\n")[0]
    return int(line.split(b" ")[1])


def call(live: Live, path: str, body: dict[str, Any], key: str) -> Any:
    return live.http.post(path, json=body, headers={"Authorization": f"Bearer {key}"})


@pytest.fixture
def keys(tmp_path: Path) -> str:
    path = tmp_path / "keys"
    path.write_text("alpha:team-a\nbeta:team-b\ngamma:team-c\n")
    return str(path)


@pytest.fixture
def busy() -> Iterator[threading.Event]:
    free = threading.Event()
    yield free
    free.set()


def test_calls_that_wait_for_a_session_hold_up_nobody_else(start: Start, keys: str, busy: threading.Event) -> None:
    live = start(server={"api_keys_file": keys})
    for key in ("alpha", "beta"):
        assert call(live, CHAT, {**HELLO, "atlas": {"session_id": f"of-{key}"}}, key).status_code == 200
    live.engine.sessions.busy["of-alpha"] = busy
    waiting = [ask(live, "/v1/atlas/memory/reset", {"session_id": "of-alpha"}, "alpha") for _ in range(40)]
    wait_for(lambda: sum(thread.name == "atlas-sessions" for thread in threading.enumerate()) >= 6)
    # The neighbour: its list, its save, and a chat long enough to be tokenised in a thread; and the caller's own chat.
    assert call(live, "/v1/atlas/memory/list", {}, "beta").status_code == 200
    assert call(live, "/v1/atlas/memory/save", {"session_id": "of-beta"}, "beta").status_code == 200
    assert call(live, "/v1/atlas/memory/reset", {"session_id": "of-beta"}, "beta").status_code == 200
    assert call(live, CHAT, LONG, "beta").status_code == call(live, CHAT, LONG, "alpha").status_code == 200
    busy.set()
    assert [status(connection) for connection in waiting] == [200] * 40
    for connection in waiting:
        connection.close()


def test_too_many_such_calls_are_refused_and_automatic_saves_go_on(
    start: Start, keys: str, busy: threading.Event, tmp_path: Path
) -> None:
    live = start(
        FakeEngine(root=tmp_path / "saved"),
        server={"api_keys_file": keys},
        atlas={"auto_save_memory": True, "memory_save_interval": 1.0},
    )
    assert call(live, CHAT, {**HELLO, "atlas": {"session_id": "used"}}, "alpha").status_code == 200
    live.engine.sessions.busy["used"] = busy
    waiting = [ask(live, "/v1/atlas/memory/reset", {"session_id": "used"}, "alpha") for _ in range(100)]
    refused = [connection for connection in waiting[-5:] if status(connection) == 429]
    assert len(refused) == 5
    before = live.engine.sessions.saves
    wait_for(lambda: live.engine.sessions.saves >= before + 3)  # one for each owner
    busy.set()
    for connection in waiting:
        connection.close()


def test_endless_answers_of_one_key_leave_places_for_the_others(start: Start, keys: str) -> None:
    live = start(server={"api_keys_file": keys, "max_concurrent": 8})
    live.engine.delay = 0.002
    greedy = [ask(live, COMPLETIONS, {**ENDLESS, "stream": True}, "alpha") for _ in range(20)]
    wait_for(lambda: (live.admission.running, live.admission.waiting) == (6, 14))
    assert call(live, CHAT, HELLO, "beta").status_code == 200
    one = ask(live, COMPLETIONS, {**ENDLESS, "stream": True}, "beta")
    wait_for(lambda: live.admission.running == 7)
    assert call(live, CHAT, HELLO, "gamma").status_code == 200
    for connection in (*greedy, one):
        connection.close()
    wait_for(lambda: live.admission.running == 0)


def test_many_sequences_of_one_request_take_as_much_as_many_requests(start: Start, keys: str) -> None:
    live = start(server={"api_keys_file": keys, "max_concurrent": 8})
    live.engine.delay = 0.002
    options = {"atlas": {"batch_size": 32}}
    greedy = ask(live, COMPLETIONS, {**ENDLESS, **options, "n": 32}, "alpha")
    wait_for(lambda: live.engine.running == 6)
    assert live.admission.running == 6
    assert call(live, CHAT, HELLO, "beta").status_code == 200
    assert live.engine.running == 6
    greedy.close()
    wait_for(lambda: live.admission.running == 0 and live.engine.running == 0)
    # All of them are answered in the end, the places given back as they are needed less.
    some = {"prompt": ["a", "bb", "ccc"] * 5, "n": 2, "max_tokens": 20, "ignore_eos": True, "atlas": {"batch_size": 32}}
    answer = call(live, COMPLETIONS, some, "alpha").json()
    assert len(answer["choices"]) == 30
    assert live.admission.running == 0


def test_metrics_streams_of_one_key_leave_some_to_the_others(start: Start, keys: str) -> None:
    live = start(server={"api_keys_file": keys})
    watch = "GET /v1/atlas/metrics/stream HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer {}\r\n\r\n"
    readers = []
    for key, expected in (*(("alpha", 200),) * 64, ("alpha", 429), ("beta", 200)):
        readers.append(live.connect())
        readers[-1].sendall(watch.format(key).encode())
        assert status(readers[-1]) == expected
    for connection in readers:
        connection.close()


def test_one_key_or_this_machine_alone_has_every_place(start: Start, tmp_path: Path) -> None:
    path = tmp_path / "one"
    path.write_text("alpha\n")
    for server in ({"api_keys_file": str(path)}, {}):
        live = start(server={"max_concurrent": 4, **server})
        live.engine.delay = 0.002
        all_of_them = [ask(live, COMPLETIONS, ENDLESS, "alpha") for _ in range(5)]
        wait_for(lambda live=live: (live.admission.running, live.admission.waiting) == (4, 1))  # type: ignore[misc]
        for connection in all_of_them:
            connection.close()
        wait_for(lambda live=live: live.admission.running == 0)  # type: ignore[misc]


def test_without_keys_addresses_take_turns(start: Start) -> None:
    live = start(server={"host": "0.0.0.0", "max_concurrent": 4, "max_waiting": 8})
    live.engine.delay = 0.002
    greedy = [ask(live, COMPLETIONS, ENDLESS, "", source="127.0.0.2") for _ in range(12)]
    wait_for(lambda: (live.admission.running, live.admission.waiting) == (3, 4))  # one place kept, and half the queue
    assert live.post(CHAT, HELLO).status_code == 200
    for connection in greedy:
        connection.close()
    wait_for(lambda: live.admission.running == 0)


@pytest.mark.parametrize("wanted", [{"max_tokens": 1 << 31}, {"max_tokens": -1}, {"n_predict": 10_000}])
def test_no_answer_is_longer_than_the_server_allows(start: Start, wanted: dict[str, int]) -> None:
    live = start(server={"max_answer_tokens": 50})
    for path, body in ((COMPLETIONS, {"prompt": "x"}), (CHAT, {"messages": HELLO["messages"]})):
        answer = live.post(path, {**body, **wanted, "ignore_eos": True}).json()
        assert answer["usage"]["completion_tokens"] == 50
        assert answer["choices"][0]["finish_reason"] == "length"
    short = live.post(COMPLETIONS, {"prompt": "x", "max_tokens": 7, "ignore_eos": True}).json()
    assert short["usage"]["completion_tokens"] == 7


def test_slots_count_the_callers_own_tokens_only(start: Start, keys: str) -> None:
    live = start(server={"api_keys_file": keys})
    live.engine.delay = 0.005
    connection = ask(live, COMPLETIONS, {**ENDLESS, "prompt": "secret of some length"}, "alpha")
    wait_for(lambda: live.engine.running == 1)

    def first(key: str) -> dict[str, Any]:
        slot: dict[str, Any] = live.http.get("/slots", headers={"Authorization": f"Bearer {key}"}).json()[0]
        return slot

    wait_for(lambda: first("alpha")["n_decoded"] > 0)
    assert first("alpha")["n_prompt_tokens"] == 21
    other = first("beta")
    assert (other["is_processing"], other["n_prompt_tokens"], other["n_decoded"]) == (True, 0, 0)
    assert other["session"] is False
    connection.close()
    wait_for(lambda: live.engine.running == 0)


# --- what holds up the event loop ---------------------------------------------------------------------------------
HOSTILE = {
    "a million lists": b'{"prompt": [' + b",".join([b"[]"] * 1_300_000) + b"]}",
    "a million strings": b'{"prompt": [' + b",".join([b'""'] * 1_300_000) + b"]}",
    "a million keys": b'{"prompt": "x", "metadata": {' + b",".join(b'"%x":1' % n for n in range(350_000)) + b"}}",
    "two million numbers": b'{"prompt": [' + b",".join([b"1"] * 2_000_000) + b"]}",
    "lists behind escapes": b'{"prompt": "\\\\", "metadata": [' + b",".join([b"[]"] * 600_000) + b', "\\\\\\""]}',
}


@pytest.mark.parametrize("name", HOSTILE)
@pytest.mark.parametrize("path", [COMPLETIONS, "/v1/atlas/memory/save"])
def test_a_body_of_a_million_things_is_not_built(live: Live, path: str, name: str) -> None:
    response = live.http.post(path, content=HOSTILE[name], headers={"content-type": "application/json"})
    assert response.status_code == 413
    assert "131072 strings, arrays and objects" in response.json()["error"]["message"]


def test_large_bodies_of_text_and_tokens_pass(live: Live) -> None:
    quoted = 'He said: "[{,}] \\ and so on", '
    saved = live.post("/v1/atlas/memory/save", {"context_id": "book", "state": {"text": quoted * 60_000}})
    assert saved.status_code == 200, saved.text
    assert live.engine.sessions.live["local", "book"].state == {"text": quoted * 60_000}
    answer = live.post("/tokenize", {"content": "x" * 1_000_000})
    assert len(answer.json()["tokens"]) == 1_000_000
    refused = live.post(COMPLETIONS, {"prompt": [65] * 500_000})
    assert refused.json()["error"]["code"] == "context_length_exceeded"


@pytest.mark.parametrize(
    "body",
    [
        {"messages": [{"role": "user", "content": ""}] * 8192},
        {"messages": [{"role": "user", "content": [{"type": "text", "text": ""}] * 5000}]},
        {"messages": [{"role": "user", "content": "long " * 2000}]},
    ],
    ids=["many messages", "many parts", "much text"],
)
def test_long_conversations_are_written_out_off_the_event_loop(live: Live, body: dict[str, Any]) -> None:
    threads: list[str] = []
    render = live.engine.render_chat

    def watched(*args: Any, **kwargs: Any) -> Any:
        threads.append(threading.current_thread().name)
        return render(*args, **kwargs)

    live.engine.render_chat = watched
    try:
        assert live.post(CHAT, {**body, "max_tokens": 1}).status_code in (200, 400)
        assert live.post(CHAT, HELLO).status_code == 200
    finally:
        live.engine.render_chat = render
    assert threads[0] == "atlas-tokenization"
    assert threads[1] == live._thread.name  # a short one is not worth a thread
