"""Measures what the server adds: `python -m benchmarks.server_overhead [clients] [requests] [--stream] [--load …]`.

A server with the fake engine runs in a process of its own; the clients speak HTTP over plain sockets, so that they cost
little. Two loads: `paced`, where every answer takes the engine about a quarter of a second, and `closed`, where it
takes none and every client asks again at once: with more clients than cores that shows how long requests queue for the
event loop, not what one of them costs.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import statistics
import subprocess
import sys
import time
import urllib.request

TOKENS = 16
ENGINE_SECONDS = 0.25


def server_main(port: int, delay: float) -> None:
    from server.config.settings import ServerSection, Settings
    from server.serve import serve
    from tests.server.fake_engine import FakeEngine

    engine = FakeEngine(delay=delay)
    sys.exit(serve(Settings(server=ServerSection(port=port)), engine))


async def client(port: int, requests: int, stream: bool, paced: bool, times: list[float]) -> None:
    body = json.dumps(
        {
            "model": "fake-7b",
            "messages": [{"role": "user", "content": "How much does the server add to a request? " * 4}],
            "max_tokens": TOKENS,
            "stream": stream,
            "atlas": {"memory_layers": 3, "cache_strategy": "adaptive"},
        }
    ).encode()
    head = (
        f"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(body)}\r\n\r\n"
    ).encode()
    if paced:
        await asyncio.sleep(random.random() * ENGINE_SECONDS)  # real clients do not ask in step
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    for _ in range(requests):
        started = time.perf_counter()
        writer.write(head + body)
        header = await reader.readuntil(b"\r\n\r\n")
        assert b" 200 " in header.split(b"\r\n", 1)[0], header
        if b"content-length" in header:
            length = int(header.split(b"content-length: ")[1].split(b"\r\n")[0])
            await reader.readexactly(length)
        else:
            await reader.readuntil(b"\r\n0\r\n\r\n")
        times.append(time.perf_counter() - started)
    writer.close()


async def load(port: int, clients: int, requests: int, stream: bool, paced: bool) -> list[float]:
    times: list[float] = []
    await asyncio.gather(*(client(port, requests, stream, paced, times) for _ in range(clients)))
    return times


def reported(port: int) -> dict[str, float]:
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/v1/atlas/metrics") as answer:
        current: dict[str, float] = json.load(answer)["data"]["current"]
    return {name: current[name] for name in ("avg_latency_ms", "max_latency_ms", "min_latency_ms")}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("clients", type=int, nargs="?", default=1)
    parser.add_argument("requests", type=int, nargs="?", default=100, help="per client")
    parser.add_argument("--stream", action="store_true")
    parser.add_argument("--load", choices=("paced", "closed"), default="paced")
    parser.add_argument("--serve", type=int, metavar="PORT", help=argparse.SUPPRESS)
    args = parser.parse_args()
    paced = args.load == "paced"
    delay = ENGINE_SECONDS / TOKENS if paced else 0.0
    if args.serve:
        server_main(args.serve, delay)
    port = 18_734
    command = [sys.executable, "-m", "benchmarks.server_overhead", "--serve", str(port), "--load", args.load]
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    try:
        for _ in range(100):
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health").close()
                break
            except OSError:
                time.sleep(0.1)
        asyncio.run(load(port, args.clients, 3, args.stream, paced))
        started = time.perf_counter()
        times = sorted(asyncio.run(load(port, args.clients, args.requests, args.stream, paced)))
        wall = time.perf_counter() - started
        print(f"{args.load}, {args.clients} clients, stream={args.stream}: {len(times) / wall:.0f} requests/s")
        print(
            f"  whole request, seen by the client: median {statistics.median(times) * 1e3:.2f} ms, "
            f"p99 {times[int(len(times) * 0.99)] * 1e3:.2f} ms"
        )
        print("  added by the server, as it reports:", reported(port))
    finally:
        process.terminate()
        process.wait()


if __name__ == "__main__":
    main()
