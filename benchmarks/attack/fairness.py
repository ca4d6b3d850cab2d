"""One owner who takes what he can: places, threads, streams that nobody reads."""

from __future__ import annotations

import contextlib
import json
import socket
import threading
import time
from collections.abc import Iterator
from typing import Any

import httpx

from benchmarks.attack.registry import Scene, attack
from benchmarks.attack.target import ATTACKER, MEMORY, VICTIM, Target, key_of

_PATIENCE = 10.0
_BUSY_MIB = 4096.0
"""What a server that is as busy as it may be takes beside its weights: the host tier's 1 024 MiB of sessions, 32 rows of 24
MiB with their memories in the decode batch, twice while it is resized, as much in prefill, and what the C library keeps."""
_BEGIN_SECONDS = 60.0
_ENDLESS = {"prompt": "Once upon a time", "stream": True, "ignore_eos": True, "max_tokens": 1 << 31, "temperature": 0}


@contextlib.contextmanager
def _unread(
    target: Target, bodies: list[dict[str, Any]], path: str = "/v1/completions"
) -> Iterator[list[socket.socket]]:
    """Requests on connections whose answers nobody reads."""
    url = httpx.URL(target.url)
    with contextlib.ExitStack() as stack:
        connections = []
        for body in bodies:
            connection = stack.enter_context(socket.create_connection(("127.0.0.1", url.port or 80), 30))
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            raw = json.dumps(body).encode()
            head = f"POST {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nAuthorization: Bearer {key_of(ATTACKER)}\r\n"
            head += f"Content-Type: application/json\r\nContent-Length: {len(raw)}\r\n\r\n"
            connection.sendall(head.encode() + raw)
            connections.append(connection)
        yield connections


@contextlib.contextmanager
def _streams(target: Target, bodies: list[dict[str, Any]]) -> Iterator[None]:
    """Streams that are read as they come; the first has begun."""
    done, begun = threading.Event(), threading.Event()
    clients = [target.client(ATTACKER, 600) for _ in bodies]

    def read(http: httpx.Client, body: dict[str, Any]) -> None:
        with contextlib.suppress(Exception), http.stream("POST", "/v1/completions", json=body) as response:
            for line in response.iter_lines():
                if line.startswith("data: {"):
                    begun.set()
                if done.is_set():
                    return

    threads = [threading.Thread(target=read, args=pair, daemon=True) for pair in zip(clients, bodies, strict=True)]
    for thread in threads:
        thread.start()
    try:
        if not begun.wait(_BEGIN_SECONDS):
            raise TimeoutError("no stream began")
        yield
    finally:
        done.set()
        for thread in threads:
            thread.join(5)
        for http in clients:
            http.close()


def _settle(seconds: float = 2.0) -> None:
    time.sleep(seconds)


@attack(
    "resets of a busy session",
    does="keeps an endless stream on a session and resets the session twelve times meanwhile",
    holds="another owner's list, save and chat are served in 10 s each",
)
def resets(scene: Scene) -> None:
    target = scene.target
    target.say(ATTACKER, "busy", "Hello").raise_for_status()  # before its first turn is over a session cannot be reset
    stream = {**_ENDLESS, "atlas": {"session_id": "busy", **MEMORY}}
    with _streams(target, [stream]):
        _settle()
        calls = [{"session_id": "busy"}] * 12
        with _unread(target, calls, "/v1/atlas/memory/reset"):
            scene.count(len(calls))
            _settle()
            scene.served(VICTIM, _PATIENCE, "beside resets of a busy session")


@attack(
    "endless answers",
    does="asks for 32 answers of 2³¹ tokens in 32 sessions",
    holds="another owner's list, save and chat are served in 10 s each",
    growth_mib=_BUSY_MIB,
)
def endless(scene: Scene) -> None:
    bodies = [{**_ENDLESS, "atlas": {"session_id": f"endless{number}", **MEMORY}} for number in range(32)]
    scene.count(len(bodies))
    with _streams(scene.target, bodies):
        _settle(4.0)
        scene.served(VICTIM, _PATIENCE, "beside 32 endless answers")


@attack(
    "streams that are not read",
    does="opens 50 streams and reads none of them",
    holds="another owner's list, save and chat are served in 10 s each, and every place is free again in a minute",
    flags=("--client-timeout", "10"),
    growth_mib=_BUSY_MIB,
)
def unread(scene: Scene) -> None:
    bodies = [{**_ENDLESS, "max_tokens": 4000, "atlas": {"session_id": f"unread{n}", **MEMORY}} for n in range(50)]
    scene.count(len(bodies))
    with _unread(scene.target, bodies):
        _settle(4.0)
        scene.served(VICTIM, _PATIENCE, "beside 50 streams that are not read")
        scene.must(scene.target.wait_idle(60.0), "streams that nobody reads hold their places")


@attack(
    "one owner's queue",
    does="sends 200 requests at once",
    holds="another owner's list, save and chat are served in 10 s each",
    growth_mib=_BUSY_MIB,
)
def queue(scene: Scene) -> None:
    bodies = [{**_ENDLESS, "max_tokens": 64, "stream": False, "prompt": f"Tell {n}"} for n in range(200)]
    scene.count(len(bodies))
    with _unread(scene.target, bodies):
        _settle(1.0)
        scene.served(VICTIM, _PATIENCE, "beside 200 requests")
