"""Connections that are held open, half open, half closed, or never read from."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from tests.patience import PATIENCE
from tests.server.live_server import Live, Start, wait_for

ROOT = Path(__file__).parents[2]
COMPLETIONS = "/v1/completions"
GET = b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n"
ENDLESS = {"prompt": "x" * 2000, "ignore_eos": True, "max_tokens": -1}


def request(body: dict[str, Any], *, version: str = "1.1") -> bytes:
    data = json.dumps(body).encode()
    lines = (f"POST {COMPLETIONS} HTTP/{version}", "Host: localhost", "Content-Type: application/json")
    return "\r\n".join((*lines, f"Content-Length: {len(data)}", "", "")).encode() + data


def read_all(connection: socket.socket, *, seconds: float = 5.0) -> bytes:
    """Everything until the server closes; fails if it does not."""
    connection.settimeout(seconds)
    out = b""
    try:
        while chunk := connection.recv(65_536):
            out += chunk
    except ConnectionResetError:
        pass
    return out


def is_open(connection: socket.socket) -> bool:
    connection.setblocking(False)
    try:
        return connection.recv(1, socket.MSG_PEEK) != b""
    except BlockingIOError:
        return True
    except ConnectionResetError:
        return False
    finally:
        connection.settimeout(5)


def goes_on(stream: socket.socket) -> bool:
    """Whether more comes after what is there already."""
    stream.setblocking(False)
    try:
        while stream.recv(65_536):
            pass
    except BlockingIOError:
        stream.settimeout(5)
        return stream.recv(1) != b""
    return False


def metrics(live: Live) -> str:
    return live.http.get("/metrics").text


def count(live: Live) -> int:
    return len(live.server._connections)


# --- how many -----------------------------------------------------------------------------------------------------
def test_silent_connections_lock_nobody_out_and_end_no_answer(start: Start) -> None:
    live = start(server={"max_connections": 8})
    live.engine.delay = 0.005
    stream = live.connect()
    stream.sendall(request({**ENDLESS, "stream": True}))
    assert stream.recv(100).startswith(b"HTTP/1.1 200")
    long_answer = live.connect()
    long_answer.sendall(request({**ENDLESS, "max_tokens": 300}))
    wait_for(lambda: live.admission.running == 2)

    silent = [live.connect() for _ in range(50)]
    wait_for(lambda: count(live) == 8)
    wait_for(lambda: sum(is_open(one) for one in silent) == 6)
    assert [is_open(one) for one in silent] == [False] * 44 + [True] * 6  # the oldest went
    with live.connect() as newcomer:  # who has something to say is heard
        newcomer.sendall(GET)
        assert newcomer.recv(100).startswith(b"HTTP/1.1 200")
    assert goes_on(stream)
    long_answer.settimeout(10)
    assert long_answer.recv(100).startswith(b"HTTP/1.1 200")
    assert count(live) <= 8
    for connection in (stream, long_answer, *silent):
        connection.close()


def test_an_address_with_many_connections_loses_to_one_with_few(start: Start) -> None:
    live = start(server={"max_connections": 6})
    modest = [live.connect() for _ in range(2)]
    for connection in modest:
        connection.sendall(GET)
        assert connection.recv(1000).startswith(b"HTTP/1.1 200")
    greedy = [live.connect(source="127.0.0.2") for _ in range(30)]
    wait_for(lambda: count(live) == 6 and sum(is_open(one) for one in greedy) == 4)
    assert all(is_open(one) for one in modest)
    late = live.connect(source="127.0.0.3")
    wait_for(lambda: sum(is_open(one) for one in greedy) == 3)
    assert is_open(late)
    assert "atlas_connections_open 6.0" in metrics(live)
    for connection in (*modest, *greedy, late):
        connection.close()


def test_where_every_connection_is_answered_a_newcomer_is_told_so(start: Start) -> None:
    live = start(server={"max_connections": 2})
    live.engine.delay = 0.005
    streams = [live.connect() for _ in range(2)]
    for stream in streams:
        stream.sendall(request({**ENDLESS, "stream": True}))
        assert stream.recv(100).startswith(b"HTTP/1.1 200")
    with live.connect() as newcomer:
        answer = read_all(newcomer)
    assert answer.startswith(b"HTTP/1.1 503")
    assert b"retry-after: 1" in answer.lower()
    assert json.loads(answer.partition(b"\r\n\r\n")[2])["error"]["code"] == "overloaded"
    assert all(goes_on(stream) for stream in streams)
    for stream in streams:
        stream.close()


LIMITED = """
import resource, socket, sys, threading, time
soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
resource.setrlimit(resource.RLIMIT_NOFILE, (min(400, hard), min(400, hard)))
from tests.server.fake_engine import FakeEngine
from tests.server.live_server import make_settings
from server.serve import serve
sys.exit(serve(make_settings(server={"port": int(sys.argv[1])}), FakeEngine()))
"""


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


class Process:
    """The server in a process of its own, with few open files."""

    def __init__(self, *, ignore: int | None = None) -> None:
        self.port = free_port()
        self.process = subprocess.Popen(
            [sys.executable, "-c", LIMITED, str(self.port)],
            cwd=ROOT,
            preexec_fn=None if ignore is None else lambda: signal.signal(ignore, signal.SIG_IGN) and None,
        )
        wait_for(lambda: b"200" in self.get())

    def connect(self) -> socket.socket:
        return socket.create_connection(("127.0.0.1", self.port), timeout=PATIENCE)

    def get(self) -> bytes:
        try:
            with self.connect() as connection:
                connection.sendall(GET)
                return connection.recv(100)
        except OSError:
            return b""

    def end(self) -> None:
        self.process.kill()
        self.process.wait(10)


def test_more_connections_than_open_files(start: Start) -> None:
    server = Process()
    try:
        silent = [server.connect() for _ in range(600)]
        for _ in range(20):
            assert server.get().startswith(b"HTTP/1.1 200")
        files = len(os.listdir(f"/proc/{server.process.pid}/fd"))
        assert files < 300  # of 400: the engine can open its own
        for connection in silent:
            connection.close()
        assert server.process.poll() is None
    finally:
        server.end()


# --- how long -----------------------------------------------------------------------------------------------------
def test_a_head_that_does_not_come(start: Start) -> None:
    live = start(server={"header_timeout": 0.4})
    live.engine.delay = 0.005
    stream = live.connect()
    stream.sendall(request({**ENDLESS, "stream": True}))
    silent, half, late = live.connect(), live.connect(), live.connect()
    half.sendall(b"GET /health HTTP/1.1\r\nHost: loc")
    late.sendall(GET)
    answered = b""
    while not answered.endswith(b"}"):  # head and body come in one piece or in two
        answered += late.recv(1000)
    assert answered.startswith(b"HTTP/1.1 200")
    late.sendall(b"G")
    assert read_all(silent) == b""
    for connection in (half, late):
        answer = read_all(connection)
        assert answer.startswith(b"HTTP/1.1 408")
        assert json.loads(answer.partition(b"\r\n\r\n")[2])["error"]["code"] == "request_timeout"
    assert goes_on(stream)  # which has gone on for longer than the time-out
    for connection in (stream, silent, half, late):
        connection.close()


@pytest.mark.parametrize("dripped", ["head", "body", "the body of a refused request"])
def test_a_byte_now_and_then_keeps_nothing_alive(start: Start, dripped: str) -> None:
    live = start(server={"header_timeout": 0.5, "client_timeout": 0.5})
    connection = live.connect()
    path = COMPLETIONS if dripped == "body" else "/nothing"
    if dripped != "head":
        kind = "application/json" if dripped == "body" else "text/plain"
        connection.sendall(
            f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: {kind}\r\nContent-Length: 9999\r\n\r\n".encode()
        )

    def drip() -> bool:
        """Sends a byte; tells whether the server has hung up."""
        try:
            connection.sendall(b"x")
        except OSError:
            return True
        return False

    wait_for(drip)
    connection.close()
    wait_for(lambda: count(live) == 0)


def test_an_idle_connection_is_kept_for_the_next_request(start: Start) -> None:
    live = start(server={"header_timeout": 0.2})
    with live.connect() as connection:
        for _ in range(3):
            connection.sendall(GET)
            assert connection.recv(1000).startswith(b"HTTP/1.1 200")
            time.sleep(1.2)  # longer than two looks at the connections


def test_clients_that_do_not_read_lose_their_places_at_once(start: Start) -> None:
    live = start(server={"client_timeout": 1.0, "max_concurrent": 8})
    live.engine.delay = 0.001
    unread = []
    for _ in range(8):
        connection = socket.socket()
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.connect(("127.0.0.1", live.port))
        connection.sendall(request({**ENDLESS, "stream": True}))
        unread.append(connection)
    wait_for(lambda: live.admission.running == 8)
    began = time.monotonic()
    assert live.post(COMPLETIONS, {"prompt": "x"}).status_code == 200
    # Filling the buffers, one time-out, and one look at the connections; it took four time-outs.
    assert time.monotonic() - began < 3.5
    wait_for(lambda: live.admission.running == 0 and count(live) <= 1)
    for connection in unread:
        connection.close()


def test_an_answer_nobody_fetches_does_not_keep_its_connection(start: Start) -> None:
    live = start(server={"client_timeout": 0.5})
    connection = socket.socket()
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    connection.connect(("127.0.0.1", live.port))
    connection.sendall(b"GET /schema/openapi.json HTTP/1.1\r\nHost: localhost\r\n\r\n" * 40)
    wait_for(lambda: count(live) == 1)
    wait_for(lambda: count(live) == 0)
    connection.close()


def test_a_large_answer_on_a_slow_way_arrives(start: Start) -> None:
    live = start(server={"client_timeout": 0.5})
    whole = b"GET /schema/openapi.json HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"
    expected = live.http.get("/schema/openapi.json").content
    connection = socket.socket()
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    connection.connect(("127.0.0.1", live.port))
    connection.sendall(whole)
    connection.settimeout(5)
    answer = b""
    while chunk := connection.recv(len(expected) // 40):  # some two seconds in all, four times the time-out
        answer += chunk
        time.sleep(0.05)
    connection.close()
    assert answer.endswith(expected)


# --- half closed --------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("version", ["1.0", "1.1"])
@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_has_closed_its_side_gets_its_answer(start: Start, stream: bool, version: str) -> None:
    live = start()
    live.engine.delay = 0.01
    with live.connect() as connection:
        connection.sendall(request({"prompt": "abc", "max_tokens": 80, "stream": stream}, version=version))
        connection.shutdown(socket.SHUT_WR)
        answer = read_all(connection, seconds=10)
    lines = answer.split(b"\r\n\r\n")
    while lines[0] == b"HTTP/1.1 100 Continue":  # how the server finds out that somebody is still there
        assert version == "1.1"
        del lines[0]
    assert lines[0].startswith(b"HTTP/1.1 200")
    if stream:
        assert answer.rstrip().endswith(b"data: [DONE]" if version == "1.0" else b"0")
        assert b"[DONE]" in answer
    else:
        assert json.loads(lines[1])["usage"]["completion_tokens"] == 80


def test_pipelined_requests_are_all_answered_after_the_end(start: Start) -> None:
    live = start()
    with live.connect() as connection:
        connection.sendall(request({"prompt": "abc", "max_tokens": 5}) + GET * 2)
        connection.shutdown(socket.SHUT_WR)
        assert read_all(connection).count(b"HTTP/1.1 200") == 3


def test_a_client_that_has_left_altogether_is_found_out(start: Start) -> None:
    live = start()
    live.engine.delay = 0.005
    for _ in range(4):
        connection = live.connect()
        connection.sendall(request(ENDLESS))
        wait_for(lambda: live.admission.running == 1)
        connection.close()
        wait_for(lambda: live.admission.running == 0 and live.engine.running == 0)
    wait_for(lambda: count(live) == 0)


def test_a_request_cut_in_half_is_none(start: Start) -> None:
    live = start()
    for part in (b"", b"GET /heal", request({"prompt": "x"})[:-5]):
        with live.connect() as connection:
            connection.sendall(part)
            connection.shutdown(socket.SHUT_WR)
            assert read_all(connection) == b""
    assert live.engine.requests == []


def test_what_is_not_http_is_answered_in_json(start: Start) -> None:
    live = start()
    with live.connect() as connection:
        connection.sendall(b"\x00\x01\r\n\r\n")
        answer = read_all(connection)
    assert answer.startswith(b"HTTP/1.1 400")
    assert json.loads(answer.partition(b"\r\n\r\n")[2])["error"]["code"] == "invalid_http"


# --- signals ------------------------------------------------------------------------------------------------------
def test_a_terminal_that_closes_stops_the_server_in_order() -> None:
    server = Process()
    try:
        with server.connect() as stream:
            stream.sendall(request({"prompt": "abc", "max_tokens": 5}))
            assert stream.recv(100).startswith(b"HTTP/1.1 200")
        os.kill(server.process.pid, signal.SIGHUP)
        assert server.process.wait(15) == -signal.SIGHUP  # 129 to a shell, as SIGTERM is 143
    finally:
        server.end()


def test_nohup_keeps_the_server() -> None:
    server = Process(ignore=signal.SIGHUP)
    try:
        os.kill(server.process.pid, signal.SIGHUP)
        for _ in range(5):
            assert server.get().startswith(b"HTTP/1.1 200")
            time.sleep(0.1)
        assert server.process.poll() is None
    finally:
        server.end()
