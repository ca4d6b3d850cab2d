"""Connections that are not used as they are meant to: silent ones, half-closed ones, bytes that are not HTTP."""

from __future__ import annotations

import contextlib
import json
import re
import socket
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import httpx

from benchmarks.attack.registry import Scene, attack
from benchmarks.attack.target import ATTACKER, VICTIM, Target, key_of

_HELD_SECONDS = 30.0
_STALL_SECONDS = "3"


def _connect(target: Target, timeout: float = 30.0) -> socket.socket:
    port = httpx.URL(target.url).port
    assert port is not None
    return socket.create_connection(("127.0.0.1", port), timeout)


@attack(
    "silent connections",
    does="opens 1 100 connections without a key to a server that may have 1 024 files open, and says nothing",
    holds="it lives, serves another client meanwhile, and has its sessions",
    alone=True,
)
def silent(scene: Scene) -> None:
    target = scene.start(open_files=1024, folder="silent")
    target.plant()
    target.rest()
    target.say(VICTIM, "unsaved", "This was said and not saved.").raise_for_status()
    planted = target.planted | {(VICTIM, "unsaved"): target.contexts(VICTIM)["unsaved"]["tokens"]}
    with contextlib.ExitStack() as stack:
        for _ in range(1100):
            try:
                stack.enter_context(_connect(target, 2.0))
                scene.count()
            except OSError:
                break  # a server that refuses is one that holds its own
        answered = False
        end = time.monotonic() + (10.0 if scene.quick else _HELD_SECONDS)
        while time.monotonic() < end and target.alive:
            if not answered:
                with contextlib.suppress(httpx.HTTPError):
                    answered = target.say(VICTIM, None, "Hello", timeout=5).status_code == 200
            time.sleep(0.5)
        scene.must(answered, f"nobody else was served in {_HELD_SECONDS:.0f} s")
    if not scene.must(target.alive, "it died"):
        scene.deaths += 1
        target.kill()
        target = scene.start(folder="silent")
    end = time.monotonic() + 15
    status = 0
    while time.monotonic() < end and status != 200:
        with contextlib.suppress(httpx.HTTPError):
            status = target.say(VICTIM, None, "Hello", timeout=10).status_code
    scene.must(status == 200, "nobody is served after the connections were closed")
    scene.lost += target.lost(planted)
    if target.alive:
        target = scene.restart(target)
        scene.lost += [f"{fault} after a restart" for fault in target.lost(planted)]


@attack(
    "half-closed connections",
    does="closes its own direction after a whole request",
    holds="the answer comes, also a stream's",
)
def half_closed(scene: Scene) -> None:
    for stream in (False, True):
        body = {"prompt": "Once upon a time", "max_tokens": 8, "stream": stream, "ignore_eos": True}
        answer = _half_close(scene.target, "POST", "/v1/completions", json.dumps(body).encode())
        scene.count()
        what = "a stream" if stream else "a completion"
        scene.must(answer.startswith(b"HTTP/1.1 200"), f"{what} after a half-close: {answer[:60]!r}")
        scene.must((b"[DONE]" if stream else b'"usage"') in answer, f"{what} after a half-close is not whole")
    for path in ("/v1/models", "/v1/atlas/status", "/health"):
        answer = _half_close(scene.target, "GET", path, b"")
        scene.count()
        scene.must(answer.startswith(b"HTTP/1.1 200"), f"GET {path} after a half-close: {answer[:60]!r}")


def _half_close(target: Target, method: str, path: str, body: bytes) -> bytes:
    with _connect(target) as connection:
        connection.sendall(_request(method, path, body))
        connection.shutdown(socket.SHUT_WR)
        return re.sub(rb"\A(HTTP/1\.1 100 [^\r]*\r\n\r\n)+", b"", _read(connection))  # interim ones, which clients skip


def _request(method: str, path: str, body: bytes, *extra: bytes, length: bytes | None = None) -> bytes:
    lines = [f"{method} {path} HTTP/1.1".encode(), b"Host: 127.0.0.1", b"Connection: close"]
    lines.append(f"Authorization: Bearer {key_of(ATTACKER)}".encode())
    if body or length is not None:
        lines += [b"Content-Type: application/json", b"Content-Length: " + (length or str(len(body)).encode())]
    return b"\r\n".join([*lines, *extra, b"", b""]) + body


def _read(connection: socket.socket) -> bytes:
    out = b""
    with contextlib.suppress(OSError):
        while piece := connection.recv(65536):
            out += piece
    return out


def _shapes() -> Iterator[tuple[str, bytes]]:
    """Bytes that are not quite a request."""
    good = b'{"prompt": "x", "max_tokens": 1}'
    host = b"Host: 127.0.0.1\r\n"
    key = f"Authorization: Bearer {key_of(ATTACKER)}\r\n".encode()
    head = (
        b"POST /v1/completions HTTP/1.1\r\n" + host + key + b"Connection: close\r\nContent-Type: application/json\r\n"
    )
    for line in (
        b"GET", b"GET /", b"GET / HTTP/0.9", b"GET / HTTP/1.0", b"GET / HTTP/1.2", b"GET / HTTP/2.0", b"GET / HTTP/9.9",
        b"GET / HTTP/1.1 extra", b"GET  / HTTP/1.1", b"get / HTTP/1.1", b"\x00\x01\x02", b"GET /\x00 HTTP/1.1",
        b"GET /\xff\xfe HTTP/1.1", b"GET /%00 HTTP/1.1", b"GET /%zz HTTP/1.1",
        b"GET /%2e%2e/%2e%2e/etc/passwd HTTP/1.1",
        b"GET //v1/models HTTP/1.1", b"GET /v1//models HTTP/1.1", b"GET /v1/models/ HTTP/1.1",
        b"GET /v1/models/..%2f..%2fetc HTTP/1.1",
        b"GET http://evil.example/v1/models HTTP/1.1", b"GET *  HTTP/1.1", b"OPTIONS * HTTP/1.1",
        b"CONNECT evil.example:443 HTTP/1.1",
        b"TRACE / HTTP/1.1", b"DELETE /v1/models HTTP/1.1", b"PATCH /v1/completions HTTP/1.1", b"PROPFIND / HTTP/1.1",
        b"A" * 4000 + b" / HTTP/1.1", b"GET /" + b"a" * 70_000 + b" HTTP/1.1",
        b"GET /?" + b"a=b&" * 9000 + b" HTTP/1.1",
        b"HEAD /v1/models HTTP/1.1", b"GET /v1/atlas/memory?session_id= HTTP/1.1",
        b"GET /v1/atlas/memory?session_id=%ff%fe HTTP/1.1", b"GET /v1/atlas/memory?session_id=a&session_id=b HTTP/1.1",
        b"GET /v1/atlas/memory?session_id=" + b"x" * 3000 + b" HTTP/1.1",
        b"PRI * HTTP/2.0", b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03", b"GET /v1/models HTTP/1.1\nX: y",
    ):  # fmt: skip
        yield f"line {line[:30]!r}", line + b"\r\n" + host + key + b"Connection: close\r\n\r\n"
    for header in (
        b"", b"Host: \r\n", b"Host: evil.example\r\n", host + host, b"Host: 127.0.0.1:99999\r\n", b"Host: [::1\r\n",
        b"Host: a b\r\n",
        b"Host: 127.0.0.1, evil.example\r\n", b"Host: \xff\xfe\r\n", host + b" folded: x\r\n", host + b"X : y\r\n",
        host + b": y\r\n",
        host + b"X: a\x00b\r\n", host + b"X: a\rb\r\n", host + b"no colon\r\n", host + b"X: " + b"a" * 60_000 + b"\r\n",
        host + b"".join(b"X-%d: y\r\n" % n for n in range(3000)), host + b"Cookie: " + b"a=b; " * 5000 + b"\r\n",
        host + b"Authorization: Bearer \xff\xfe\r\n", host + b"Authorization: Bearer\r\n",
        host + b"Authorization: Basic eDp5\r\n",
        host + key + b"X-Session-ID: \xc3\xa9\r\n", host + key + b"X-Session-ID: ../../x\r\n",
        host + key + b"Upgrade: websocket\r\nConnection: Upgrade\r\nSec-WebSocket-Version: 13\r\n"
        b"Sec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\n",
        host + key + b"Upgrade: h2c\r\nHTTP2-Settings: AAMAAABkAARAAAAAAAIAAAAA\r\nConnection: Upgrade, HTTP2-Settings\r\n",
        host + key + b"Range: bytes=0-1\r\n", host + key + b"Expect: 200-maybe\r\n",
    ):  # fmt: skip
        yield f"header {header[:40]!r}", b"GET /v1/models HTTP/1.1\r\n" + header + b"Connection: close\r\n\r\n"
    for rest in (
        b"Content-Length: -1\r\n\r\n", b"Content-Length: 1e3\r\n\r\n",
        b"Content-Length: 99999999999999999999999\r\n\r\n",
        b"Content-Length: 32\r\nContent-Length: 33\r\n\r\n" + good, b"Content-Length: 32, 32\r\n\r\n" + good,
        b"Content-Length: 32\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        b"Transfer-Encoding: gzip, chunked\r\n\r\n0\r\n\r\n",
        b"Transfer-Encoding: chunked, chunked\r\n\r\n0\r\n\r\n", b"Transfer-Encoding: xchunked\r\n\r\n",
        b"Transfer-Encoding: chunked\r\n\r\nzz\r\n",
        b"Transfer-Encoding: chunked\r\n\r\n-1\r\n\r\n", b"Transfer-Encoding: chunked\r\n\r\nffffffffffffffff\r\nabc",
        b"Transfer-Encoding: chunked\r\n\r\n1;" + b"x" * 40_000 + b"\r\na\r\n0\r\n\r\n",
        b"Transfer-Encoding: chunked\r\n\r\n" + b"1\r\n[\r\n" * 3000 + b"0\r\n\r\n",
        b"Content-Length: 500\r\n\r\n" + good, b"Content-Length: 4\r\n\r\n" + good,
        b"Expect: 100-continue\r\nContent-Length: 32\r\n\r\n" + good,
        b"Content-Encoding: gzip\r\nContent-Length: 32\r\n\r\n" + good,
        b"Content-Length: 32\r\n\r\n" + good + b"GARBAGE",
        b"Content-Length: 32\r\n\r\n" + good + b"POST /v1/completions HTTP/1.1\r\n\r\n",
    ):  # fmt: skip
        yield f"body {rest[:50]!r}", head + rest


@attack(
    "shapes of raw HTTP",
    does="sends bytes that are not quite a request",
    holds="no 5xx, and the connection ends in time",
    flags=("--client-timeout", _STALL_SECONDS),
)
def raw_shapes(scene: Scene) -> None:
    def send(case: tuple[str, bytes]) -> tuple[str, bytes, float]:
        name, raw = case
        began = time.monotonic()
        with _connect(scene.target, 20.0) as connection, contextlib.suppress(OSError):
            connection.sendall(raw)
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_WR) if name.startswith("line") else None
            return name, _read(connection), time.monotonic() - began
        return name, b"", time.monotonic() - began

    with ThreadPoolExecutor(16) as pool:
        for name, answer, seconds in pool.map(send, _shapes()):
            scene.count()
            for line in answer.split(b"\r\n"):
                if line.startswith(b"HTTP/1."):
                    scene.must(line[9:10] in (b"1", b"2", b"3", b"4"), f"{name}: {line[:60]!r}")
            scene.must(b"Traceback" not in answer, f"{name}: a traceback")
            scene.must(seconds < 19, f"{name}: the connection stayed open for {seconds:.0f} s")


@attack(
    "slots",
    does="looks at /slots while another owner's stream runs",
    holds="nothing of another owner's is there",
)
def slots(scene: Scene) -> None:
    body = {"prompt": "Once upon a time", "max_tokens": 400, "stream": True, "ignore_eos": True}
    with (
        scene.target.client(ATTACKER) as http,
        scene.target.client(VICTIM) as victim,
        victim.stream("POST", "/v1/completions", json=body) as response,
    ):
        events = response.iter_lines()
        for _ in range(10):
            next(events)
        found = http.get("/slots").json()
        scene.count()
    told = [slot for slot in found if slot.get("n_prompt_tokens") or slot.get("n_decoded")]
    scene.must(not told, f"/slots shows another owner's counts: {told[:1]}")


@attack(
    "two ways to write a name",
    does="names a session composed (NFC) and decomposed (NFD)",
    holds="it is one session",
)
def normal_forms(scene: Scene) -> None:
    composed, decomposed = "caf\u00e9", "cafe\u0301"
    target = scene.target
    target.say(ATTACKER, composed, "The number is 5.").raise_for_status()
    answer = target.say(ATTACKER, decomposed, "What is the number?")
    scene.count(2)
    if answer.status_code != 400:  # refusing the second is another way not to have two
        scene.must(answer.json().get("atlas_stats", {}).get("cache_hit"), "the second name found another session")
        names = [name for name in target.contexts(ATTACKER) if name.startswith("caf")]
        scene.must(len(names) == 1, f"{len(names)} sessions are listed")
