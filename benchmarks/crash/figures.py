"""How long starts and stops take with many sessions, and what keeping sessions costs the streams."""

from __future__ import annotations

import asyncio
import signal
import statistics
import time
from dataclasses import dataclass
from itertools import count
from pathlib import Path

from benchmarks.crash.process import Launcher, Process

_STOP_BAR = 5.0
_START_BAR = 10.0
_ROOM_MIB = 256
"""Beside the sessions that may rest in main memory, a server that has started with many may take this much more."""
_HOST_MIB = 64
_AT_ONCE = 8
_LAST_RESORT = 120.0
_NOTHING_KEPT = "nothing kept"


@dataclass(frozen=True)
class Row:
    """A figure and its bar, in words."""

    name: str
    value: float
    bar: str = ""


async def _ask(server: Process, session: str, text: str, tokens: int) -> None:
    """A greedy turn of a session, as a stream."""
    body = {
        "messages": [{"role": "user", "content": text}],
        "max_tokens": tokens,
        "temperature": 0,
        "ignore_eos": True,
        "stream": True,
        "atlas": {"session_id": session},
    }
    async with server.http.stream("POST", "/v1/chat/completions", json=body) as response:
        last = b""
        async for piece in response.aiter_raw():
            last = (last + piece)[-64:]
        if not last.rstrip().endswith(b"data: [DONE]"):
            raise RuntimeError(f"a stream ended with {last!r}")


async def _make(server: Process, numbers: range) -> None:
    """Sessions of one short turn, several at once."""
    left = iter(numbers)

    async def client() -> None:
        for number in left:
            await _ask(server, f"many-{number:05d}", f"Session {number} begins.", 2)

    await asyncio.gather(*(client() for _ in range(_AT_ONCE)))


_NOTHING_KEPT = "nothing kept"


async def _stop(server: Process) -> float:
    await asyncio.sleep(1.0)  # what is done after the last answer
    seconds = await server.stop(signal.SIGTERM, _LAST_RESORT)
    await server.hang_up()
    return _LAST_RESORT if seconds is None else seconds


async def measure_many(start: Launcher, folder: Path, most: int, first: int) -> tuple[list[Row], list[str]]:
    """Starts and stops a server with no session, `first` and `most`, and once kills it.

    Returns:
      The figures, and what is over its bar or missing.
    """
    memory = folder / "memory"
    flags = ("--atlas-l2-cache-size", str(_HOST_MIB << 20))
    server = start.start(folder / "none", *flags)
    await server.ready(warm=True)
    await _stop(server)
    server = start.start(folder / "none", *flags)
    rows = [Row("s to ready without sessions", await server.ready())]
    await server.sessions()
    empty = server.resident
    rows.append(Row("MiB in use without sessions", empty))
    await _stop(server)
    faults: list[str] = []

    def over(row: Row, bar: float) -> None:
        rows.append(Row(row.name, row.value, f"≤ {bar:g}"))
        if row.value > bar:
            faults.append(f"{row.name}: {row.value:.1f}, the bar is {bar:g}")

    server = start.start(memory, *flags)
    await server.ready()
    await _make(server, range(first))
    over(Row(f"s to stop with {first} idle sessions", await _stop(server)), _STOP_BAR)
    server = start.start(memory, *flags)
    await server.ready()
    await _make(server, range(first, most))
    over(Row(f"s to stop with {most} idle sessions", await _stop(server)), _STOP_BAR)
    for after in ("a stop", "a kill"):
        server = start.start(memory, *flags)
        over(Row(f"s to ready with {most} sessions after {after}", await server.ready()), _START_BAR)
        found = await server.sessions()
        if len(found) != most:
            faults.append(f"after {after} {len(found)} sessions are there")
        over(Row(f"MiB in use with {most} sessions after {after}", server.resident), empty + _HOST_MIB + _ROOM_MIB)
        await _make(server, range(0, most, max(1, most // 100)))  # a turn that rests in the journal
        if after == "a stop":
            server.kill()
            await server.hang_up()
        else:
            over(Row(f"s to stop with {most} sessions, 100 of them used", await _stop(server)), _STOP_BAR)
        faults += server.trouble
    rows.append(Row(f"MiB on disk with {most} sessions", sum(p.stat().st_size for p in memory.rglob("*")) / 2**20))
    return rows, faults


async def measure_cost(
    start: Launcher, folder: Path, streams: int, tokens: int, rounds: int, bar: float
) -> tuple[list[Row], list[str]]:
    """Speed and processor time of session streams with and without persistence, in turns.

    The bar is on the processor's time: it is what persistence takes of a machine that others use as well, whose speed
    differs more between two rounds than between the two kinds.

    Args:
      rounds: an even number, so that both kinds come first equally often.

    Returns:
      The figures, and whether persistence takes more than `bar`.
    """
    kinds: dict[str, tuple[str, ...]] = {_NOTHING_KEPT: ("--no-atlas-memory-persist",), "kept": ()}
    if "--atlas-journal-sync" in start.known:
        kinds["kept, each answer synced"] = ("--atlas-journal-sync", "0")
    servers = {kind: start.start(folder / f"cost-{i}", *flags) for i, (kind, flags) in enumerate(kinds.items())}
    for server in servers.values():
        await server.ready(warm=True)
    names = count()

    async def measure(server: Process) -> tuple[float, float]:
        sessions = [f"cost-{next(names)}" for _ in range(streams)]
        started, used = time.monotonic(), server.processor_seconds
        await asyncio.gather(*(_ask(server, one, f"A story of {one}.", tokens) for one in sessions))
        seconds, used = time.monotonic() - started, server.processor_seconds - used
        for one in sessions:
            await server.post("/v1/atlas/memory/delete", {"context_id": one})
        return streams * tokens / seconds, 1e3 * used / (streams * tokens)

    found: dict[str, list[tuple[float, float]]] = {kind: [] for kind in kinds}
    for server in servers.values():
        await measure(server)
    for number in range(rounds):
        for kind in sorted(kinds, reverse=number % 2 == 1):
            found[kind].append(await measure(servers[kind]))
            speed, used = found[kind][-1]
            print(f"round {number + 1}, {kind}: {speed:.0f} tokens/s, {used:.3f} ms of a processor a token", flush=True)
    for server in servers.values():
        await _stop(server)
    rows, faults = [], []
    for kind, values in found.items():
        speeds, uses = zip(*values, strict=True)
        rows.append(Row(f"tokens/s of {streams} streams, {kind}", statistics.median(speeds)))
        rows.append(Row(f"ms of a processor a token, {kind}", statistics.median(uses)))
    for kind in kinds:
        if kind == _NOTHING_KEPT:
            continue
        # not pair by pair: what is measured first in a round takes a fifth less, whichever it is
        (speed, used), (least, base) = (
            [statistics.median(values) for values in zip(*found[one], strict=True)] for one in (kind, _NOTHING_KEPT)
        )
        share, slower = used / base - 1, 1 - speed / least
        limited = kind == "kept"
        rows.append(Row(f"more of a processor, {kind}", share, f"≤ {bar:g}" if limited else ""))
        rows.append(Row(f"less speed, {kind}", slower))
        if limited and share > bar:
            faults.append(f"persistence takes {share:.1%} of the processor")
    return rows, faults
