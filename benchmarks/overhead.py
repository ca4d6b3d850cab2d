"""What does the server add to the engine's time? Latency of a request and of an event, and processor time.

    python -m benchmarks.overhead [--rounds 5] [--seconds 4] [--streams 1 16 64]
    [--peer-python PYTHON] [--output docs/benchmarks/overhead.md]

The engine is a made-up one whose time is known: every text it sends is the moment at which it was sent, on the clock that
all processes share. So a client can tell what lies outside the engine: from its request to the engine's submit and from
the engine's end to the last byte (a request), from the engine's sending to the arrival (an event). `answers at once` means
that the engine takes no time, `streams` that it takes a step every 10 ms for all requests together, as a decode batch does.

Beside the server stands the least that does the same on uvicorn: an application that decodes JSON, hands it to the same
engine and writes what comes as server-sent events, without checks, limits, templates or statistics. Both are processes of
their own, asked in turns; what is printed is the median of the rounds. Processor time is the server process's own, all
threads, the made-up engine's too, which is the same in both.

With `--peer-python` (an interpreter that has llama_cpp.server) both servers run the same tiny model, which is made for it:
the whole time of a request of one token, and the server process's processor time.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import re
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from atlas_jax.engine.api import Delta, Finished, GenerationRequest, Listener
from tests.server.fake_engine import FakeEngine, Running

TOKENS = 24
STEP_SECONDS = 0.01
_MOST = 64
"""Requests at once that no server lets wait; more would show how they queue."""
_STAMP = re.compile(rb"<(\d+)>")
_TICKS = os.sysconf("SC_CLK_TCK")
_MESSAGES = [
    {"role": "system", "content": "You are a helpful assistant."},
    {"role": "user", "content": "How much does the server add to a request? " * 4},
]


# --- the engine -------------------------------------------------------------------------------------------------------
def stamp() -> str:
    """The moment, as text."""
    return f"<{time.monotonic_ns()}>"


class StampEngine(FakeEngine):
    """An engine that sends the moment of sending; the first text is the moment of the submit."""

    def __init__(self) -> None:
        super().__init__()
        self._paced: list[tuple[Listener, int, int]] = []
        self._news = threading.Condition()
        threading.Thread(target=self._steps, daemon=True).start()

    def submit(self, request: GenerationRequest, listener: Listener) -> Any:
        """Answers at once if a request has a seed, else a text a step."""
        first = stamp()
        if request.sampling.seed is not None:
            listener(Delta(first))
            self._end(listener, len(request.prompt), 1)
        else:
            listener(Delta(first))
            with self._news:
                self._paced.append((listener, len(request.prompt), 0))
                self._news.notify()
        return _NoHandle()

    def _end(self, listener: Listener, prompt: int, tokens: int) -> None:
        listener(Delta(stamp()))
        listener(
            Finished(
                reason="stop", prompt_tokens=prompt, completion_tokens=tokens, cached_tokens=0, seed=0, stop=None,
                prompt_seconds=0.001, decode_seconds=0.001, memory=None,
            )
        )  # fmt: skip

    def _steps(self) -> None:
        due = time.monotonic()
        while self.alive():
            due = max(due + STEP_SECONDS, time.monotonic())
            time.sleep(max(0.0, due - time.monotonic()))
            with self._news:
                self._news.wait_for(lambda: self._paced)
                rows, self._paced = self._paced, []
            going = []
            for listener, prompt, sent in rows:
                if sent + 1 == TOKENS:
                    self._end(listener, prompt, TOKENS)
                else:
                    listener(Delta(stamp()))
                    going.append((listener, prompt, sent + 1))
            with self._news:
                self._paced += going


class _NoHandle(Running):
    def __init__(self) -> None:
        pass

    def cancel(self) -> None:
        pass


# --- servers ----------------------------------------------------------------------------------------------------------
def serve(kind: str, port: int) -> None:
    """Runs one of the servers in this process, for ever."""
    engine = StampEngine()
    if kind == "atlas-jax":
        from server.config.settings import ServerSection, Settings
        from server.serve import serve as serve_atlas

        sys.exit(serve_atlas(Settings(server=ServerSection(port=port, max_concurrent=_MOST)), engine))
    import uvicorn

    uvicorn.run(minimal(engine), port=port, log_level="error", access_log=False)


def minimal(engine: StampEngine) -> Any:
    """An ASGI application that does nothing but pass on what the engine says."""

    async def app(scope: dict[str, Any], receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            return
        body, more = b"", True
        while more:
            message = await receive()
            body += message.get("body", b"")
            more = message.get("more_body", False)
        asked = json.loads(body or b"{}")
        loop, events = asyncio.get_running_loop(), asyncio.Queue[Any]()
        request = GenerationRequest(prompt=[1], max_tokens=TOKENS, owner="", sampling=_sampling(asked.get("seed")))
        engine.submit(request, lambda event: loop.call_soon_threadsafe(events.put_nowait, event))
        stream = asked.get("stream")
        kind = b"text/event-stream" if stream else b"application/json"
        start = {"type": "http.response.start", "status": 200, "headers": [(b"content-type", kind)]}
        text = ""
        if stream:
            await send(start)
        while isinstance(event := await events.get(), Delta):
            text += event.text
            if stream:
                chunk = {"object": "chat.completion.chunk", "choices": [{"index": 0, "delta": {"content": event.text}}]}
                data = f"data: {json.dumps(chunk)}\n\n".encode()
                await send({"type": "http.response.body", "body": data, "more_body": True})
        if stream:
            await send({"type": "http.response.body", "body": b"data: [DONE]\n\n"})
        else:
            answer = json.dumps({"choices": [{"index": 0, "message": {"content": text}}]}).encode()
            start["headers"] += [(b"content-length", str(len(answer)).encode())]  # type: ignore[operator]
            await send(start)
            await send({"type": "http.response.body", "body": answer})

    return app


def _sampling(seed: int | None) -> Any:
    from atlas_jax.engine.api import SamplingParams

    return SamplingParams(seed=seed)


class Process:
    """A server as a process.

    Attributes:
      port: where it listens.
    """

    def __init__(self, command: Sequence[str], *, port: int, path: str, environ: dict[str, str] | None = None) -> None:
        self.port = port
        environ = {**os.environ, **(environ or {})}
        self._process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=environ)
        end = time.monotonic() + 600
        while True:
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}{path}").close()
                return
            except OSError:
                assert self._process.poll() is None, f"{command[0]} ended"
                assert time.monotonic() < end, f"{command[0]} is not ready"
                time.sleep(0.1)

    @property
    def seconds(self) -> float:
        """Processor time that it has used."""
        fields = Path(f"/proc/{self._process.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / _TICKS

    def stop(self) -> None:
        """Ends it."""
        self._process.kill()
        self._process.wait()


def free_port() -> int:
    """A port nobody listens on."""
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        port: int = one.getsockname()[1]
        return port


# --- clients ----------------------------------------------------------------------------------------------------------
@dataclass
class Seen:
    """What clients have seen.

    Attributes:
      requests: seconds that requests spent outside the engine.
      events: seconds from the engine to the client.
      whole: seconds that requests took in all.
    """

    requests: list[float] = field(default_factory=list)
    events: list[float] = field(default_factory=list)
    whole: list[float] = field(default_factory=list)


class Connection(asyncio.Protocol):
    """Notes when each stamp arrives, as early as a client can."""

    def __init__(self) -> None:
        self.data, self.stamps = b"", list[tuple[int, int]]()
        self.over = asyncio.get_running_loop().create_future()

    def connection_made(self, transport: Any) -> None:
        self.transport = transport

    def data_received(self, data: bytes) -> None:
        now = time.monotonic_ns()
        self.stamps += [(int(found), now) for found in _STAMP.findall(data)]
        self.data += data
        if self._complete() and not self.over.done():
            self.over.set_result(now)

    def connection_lost(self, error: Exception | None) -> None:
        if not self.over.done() and self.data:
            self.over.set_exception(error or ConnectionError("closed"))

    def _complete(self) -> bool:
        head, found, body = self.data.partition(b"\r\n\r\n")
        if not found:
            return False
        length = re.search(rb"(?i)content-length: (\d+)", head)
        return self.data.endswith(b"\r\n0\r\n\r\n") if length is None else len(body) >= int(length[1])

    async def ask(self, request: bytes, seen: Seen) -> None:
        """Sends a request and notes what it took."""
        self.data, self.stamps = b"", []
        self.over = asyncio.get_running_loop().create_future()
        sent = time.monotonic_ns()
        self.transport.write(request)
        over = await self.over
        assert self.data.startswith(b"HTTP/1.1 200"), self.data[:500]
        seen.whole.append((over - sent) / 1e9)
        if self.stamps:
            seen.requests.append((self.stamps[0][0] - sent + over - self.stamps[-1][0]) / 1e9)
            seen.events += [(arrived - made) / 1e9 for made, arrived in self.stamps]


def request_of(path: str, body: dict[str, Any]) -> bytes:
    """A request as bytes."""
    content = json.dumps({"model": "fake-7b", "messages": _MESSAGES, **body}).encode()
    head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    return f"{head}Content-Length: {len(content)}\r\n\r\n".encode() + content


async def load(port: int, request: bytes, clients: int, seconds: float, *, pause: float) -> Seen:
    """Clients that ask again and again, each with a pause between two requests."""
    seen = Seen()
    end = time.monotonic() + seconds

    async def one(number: int) -> None:
        _, connection = await asyncio.get_running_loop().create_connection(Connection, "127.0.0.1", port)
        await asyncio.sleep(pause * number / clients)  # real clients do not ask in step
        while time.monotonic() < end:
            await connection.ask(request, seen)
            await asyncio.sleep(pause)
        connection.transport.close()

    await asyncio.gather(*(one(number) for number in range(clients)))
    return seen


# --- figures ----------------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Case:
    """One load.

    Attributes:
      pause: seconds between two requests of a client.
    """

    name: str
    clients: int
    body: dict[str, Any]
    pause: float


def cases(clients: Sequence[int]) -> list[Case]:
    """All of them: as many requests a second from any number of clients where the engine answers at once."""
    whole = {"max_tokens": TOKENS, "seed": 1}
    return [Case("answers at once", count, whole, 0.02 * count) for count in clients] + [
        Case("streams", count, {"max_tokens": TOKENS, "stream": True}, 0.1) for count in clients
    ]


def percentile(values: Sequence[float], share: float) -> float:
    """In milliseconds."""
    return sorted(values)[min(len(values) - 1, int(len(values) * share))] * 1e3 if values else float("nan")


def figures(seen: Seen, seconds: float) -> dict[str, float]:
    """What one round has shown, in milliseconds."""
    return {
        "request p50": percentile(seen.requests, 0.5),
        "request p99": percentile(seen.requests, 0.99),
        "event p50": percentile(seen.events, 0.5),
        "event p99": percentile(seen.events, 0.99),
        "whole p50": percentile(seen.whole, 0.5),
        "whole p99": percentile(seen.whole, 0.99),
        "processor a request": seconds / max(1, len(seen.whole)) * 1e3,
        "processor an event": seconds / max(1, len(seen.events)) * 1e3,
    }


Rows = dict[tuple[str, int, str], list[dict[str, float]]]


def measure(servers: dict[str, Process], wanted: Sequence[Case], *, rounds: int, seconds: float, path: str) -> Rows:
    """Every case at every server, in turns."""
    rows: Rows = {}
    for number in range(rounds + 1):  # the first is to warm up
        for case in wanted:
            for name, server in servers.items():
                before = server.seconds
                span = seconds if number else min(1.0, seconds)
                seen = asyncio.run(load(server.port, request_of(path, case.body), case.clients, span, pause=case.pause))
                if number:
                    found = figures(seen, server.seconds - before)
                    rows.setdefault((case.name, case.clients, name), []).append(found)
    return rows


def table(rows: Rows, columns: Sequence[str]) -> str:
    """Medians over the rounds."""
    lines = [
        "| load | clients | server | " + " | ".join(columns) + " |",
        "|---|" + "---:|---|" + "---:|" * len(columns),
    ]
    for (case, clients, name), found in rows.items():
        values = [statistics.median(one[column] for one in found) for column in columns]
        lines.append(f"| {case} | {clients} | {name} | " + " | ".join(f"{value:.2f}" for value in values) + " |")
    return "\n".join(lines)


COLUMNS = ("request p50", "request p99", "event p50", "event p99", "processor a request", "processor an event")
PEER_COLUMNS = ("whole p50", "whole p99", "processor a request")


def made_up(clients: Sequence[int], *, rounds: int, seconds: float) -> str:
    """The table of the made-up engine."""
    servers = {}
    try:
        for kind, path in (("atlas-jax", "/health"), ("uvicorn alone", "/")):
            port = free_port()
            command = [sys.executable, "-m", "benchmarks.overhead", "--serve", kind, str(port)]
            servers[kind] = Process(command, port=port, path=path)
        found = measure(servers, cases(clients), rounds=rounds, seconds=seconds, path="/v1/chat/completions")
        return table(found, COLUMNS)
    finally:
        for server in servers.values():
            server.stop()


def beside_peer(peer: str, clients: Sequence[int], *, rounds: int, seconds: float) -> str:
    """The table of the tiny model, in both servers."""
    from tests import tiny_model

    with tempfile.TemporaryDirectory() as folder:
        model = tiny_model.write_model(Path(folder) / "tiny.gguf", tiny_model.LLAMA)
        adapter = tiny_model.write_adapter(Path(folder) / "tiny.safetensors", model)
        ours, theirs = free_port(), free_port()
        servers = {}
        try:
            command = [sys.executable, "-m", "server", "serve", "--model", str(model), "--port", str(ours)]
            command += ["--atlas-adapter", str(adapter), "--atlas-memory-path", folder]
            servers["atlas-jax"] = Process(command, port=ours, path="/ready")
            command = [peer, "-m", "llama_cpp.server", "--model", str(model), "--port", str(theirs), "--n_threads", "1"]
            servers["llama_cpp.server"] = Process(command, port=theirs, path="/v1/models")
            body = {"max_tokens": 1}
            wanted = [Case("one token of a tiny model", count, body, 0.02 * count) for count in clients]
            found = measure(servers, wanted, rounds=rounds, seconds=seconds, path="/v1/chat/completions")
            return table(found, PEER_COLUMNS)
        finally:
            for server in servers.values():
                server.stop()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=4.0, help="of one round of one case")
    parser.add_argument("--streams", type=int, nargs="+", default=[1, 16, 64], help="how many clients at once")
    parser.add_argument("--peer-python", help="an interpreter that has llama_cpp.server")
    parser.add_argument("--output", type=Path, help="page whose tables are written")
    parser.add_argument("--serve", nargs=2, metavar=("KIND", "PORT"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.serve:
        serve(args.serve[0], int(args.serve[1]))
        return
    page = f"Milliseconds, medians of {args.rounds} rounds.\n\n"
    page += made_up(args.streams, rounds=args.rounds, seconds=args.seconds) + "\n"
    if args.peer_python:
        page += "\n" + beside_peer(args.peer_python, args.streams, rounds=args.rounds, seconds=args.seconds) + "\n"
    if args.output is None:
        print(page)
    else:
        head = args.output.read_text("utf-8").partition("Milliseconds, medians")[0] if args.output.exists() else ""
        args.output.write_text(head + page, "utf-8")


if __name__ == "__main__":
    main()
