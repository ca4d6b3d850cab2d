"""How long a server takes to go on with a session that another has answered last, beside reading its text anew."""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Sequence

from benchmarks.crash.process import Process

_PATH = "/v1/completions"
_NEW = 20
_VOCABULARY = 300
_ANEW = 3


async def measure_resumption(start: Callable[[int], Process], lengths: Sequence[int], turns: int) -> int:
    """Prints a table, a row for each length of a session."""
    servers = [start(0), start(1)]
    for server in servers:
        await server.ready(warm=True)
    rng = random.Random(1)
    print("| tokens | same server p50 | other server p50 | p99 | read anew p50 |\n|---|---|---|---|---|", flush=True)
    for length in lengths:
        name, text = f"of-{length}", [rng.randrange(_VOCABULARY) for _ in range(length)]
        await _ask(servers[0], text, name)
        stays = [await _ask(servers[0], _new(rng), name) for _ in range(max(4, turns // 4))]
        moves = [await _ask(servers[(number + 1) % 2], _new(rng), name) for number in range(turns)]
        anew = [await _ask(servers[0], [*text, *_new(rng)], None) for _ in range(_ANEW)]
        moves.sort()
        figures = (statistics.median(stays), statistics.median(moves), moves[min(turns - 1, int(0.99 * turns))])
        shown = [f"{1000 * seconds:.0f} ms" for seconds in (*figures, statistics.median(anew))]
        print(f"| {length} | {' | '.join(shown)} |", flush=True)
    return 0


def _new(rng: random.Random) -> list[int]:
    return [rng.randrange(_VOCABULARY) for _ in range(_NEW)]


async def _ask(server: Process, tokens: list[int], session: str | None) -> float:
    """Seconds until the answer of one token to more text of a session, or to a whole text without one."""
    body = {"model": "any", "prompt": tokens, "max_tokens": 1, "temperature": 0}
    body["atlas"] = {} if session is None else {"session_id": session}
    begin = time.monotonic()
    await server.post(_PATH, body)
    return time.monotonic() - begin
