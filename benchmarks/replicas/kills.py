"""Kills one of two servers while it answers; each client sends its request again to the other."""

from __future__ import annotations

import asyncio
import random
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import httpx

from benchmarks.crash.clients import Features, features
from benchmarks.crash.process import Process, Refused

_CHAT = "/v1/chat/completions"
_TURNS = 8
"""Turns of a conversation, after which its client begins another."""
_TRIES = 60


@dataclass
class Client:
    """A conversation.

    Attributes:
      messages: what was acknowledged.
      tokens: of the session after the last turn that was acknowledged.
    """

    name: str
    messages: list[dict[str, str]] = field(default_factory=list)
    tokens: int = 0


@dataclass
class Figures:
    """What came of it.

    Attributes:
      cut: requests that a kill has cut off.
      lost: sessions that had less than was acknowledged.
      kept: requests cut off whose turn was there all the same: its answer's end was not sent any more.
      refused: answers of 409 and 503 before a request that was sent again was answered.
      seconds: from a kill to the answer of a request that was cut off.
      checked, equal: answers that were compared with a server that was never stopped, and those that were the same.
    """

    kills: int = 0
    turns: int = 0
    cut: int = 0
    lost: list[str] = field(default_factory=list)
    kept: int = 0
    refused: int = 0
    seconds: list[float] = field(default_factory=list)
    checked: int = 0
    equal: int = 0

    def table(self) -> str:
        """As Markdown."""
        ordered = sorted(self.seconds) or [0.0]
        rows = [
            ("kills", self.kills),
            ("turns answered", self.turns),
            ("requests cut off, and answered by the other server", self.cut),
            ("of these, in the store before the kill", self.kept),
            ("refusals (409, 503) on the way", self.refused),
            ("sessions that had lost something acknowledged", len(self.lost)),
            ("answers equal to a server's that was never stopped", f"{self.equal} of {self.checked}"),
            ("from the kill to the other's whole answer, p50", f"{statistics.median(ordered):.2f} s"),
            ("the same, p99", f"{ordered[min(len(ordered) - 1, int(0.99 * len(ordered)))]:.2f} s"),
        ]
        return "\n".join(["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows)])


async def kill_servers(
    start: Callable[[int], Process], alone: Callable[[], Process], kills: int, clients: int, seed: int
) -> int:
    """Kills servers in turns, and prints what came of it; 1 where something was lost or answered otherwise."""
    rng = random.Random(seed)
    servers = [start(0), start(1)]
    oracle = alone()
    for server in (*servers, oracle):
        await server.ready(warm=True)
    known = await features(oracle)
    figures = Figures()
    people = [Client(f"c{number}") for number in range(clients)]
    for number in range(kills):
        victim = number % 2
        await asyncio.gather(
            *(_round(one, servers, victim, rng, known, figures, oracle) for one in people), _kill(servers[victim], rng)
        )
        figures.kills += 1
        await servers[victim].hang_up()
        servers[victim] = start(victim)
        await servers[victim].ready()
        if (number + 1) % 10 == 0:
            print(f"{number + 1} kills, {figures.cut} cut off, {len(figures.lost)} lost", flush=True)
    print(figures.table())
    print("\n".join(figures.lost))
    return 1 if figures.lost else 0


async def _kill(server: Process, rng: random.Random) -> None:
    await asyncio.sleep(rng.uniform(0.0, 1.0))
    server.kill()


async def _round(
    client: Client,
    servers: list[Process],
    victim: int,
    rng: random.Random,
    known: Features,
    figures: Figures,
    oracle: Process,
) -> None:
    """Turns on the server that is killed, until it is, and the last one on the other."""
    while True:
        if len(client.messages) >= 2 * _TURNS:
            client.name, client.messages, client.tokens = f"{client.name}+", [], 0
        words = " ".join(str(rng.randrange(1000)) for _ in range(rng.randrange(10, 60)))
        body = _body(client, words, known)
        begin = time.monotonic()
        try:
            answer = await servers[victim].post(_CHAT, body)
        except (httpx.TransportError, Refused):
            figures.cut += 1
            other = servers[1 - victim]
            there = (await other.sessions()).get(client.name, {}).get("tokens", 0)
            if there < client.tokens:
                figures.lost.append(f"{client.name}: {there} tokens of {client.tokens}")
            figures.kept += there > client.tokens
            answer = await _again(other, body, figures)
            figures.seconds.append(time.monotonic() - begin)
            await _answered(client, words, answer, other, figures, oracle, body)
            return
        await _answered(client, words, answer, servers[1 - victim], figures, oracle, body)


def _body(client: Client, words: str, known: Features) -> dict[str, Any]:
    return {
        "model": "any",
        "messages": [*client.messages, {"role": "user", "content": words}],
        "max_tokens": 24,
        "temperature": 0,
        "logit_bias": known.digits,
        "atlas": {"session_id": client.name},
    }


async def _again(server: Process, body: dict[str, Any], figures: Figures) -> dict[str, Any]:
    for _ in range(_TRIES):
        try:
            return await server.post(_CHAT, body)
        except Refused as refused:
            if refused.status not in (409, 503):
                raise
            figures.refused += 1
            await asyncio.sleep(0.1)
    raise AssertionError("the other server does not answer")


async def _answered(
    client: Client,
    words: str,
    answer: dict[str, Any],
    elsewhere: Process,
    figures: Figures,
    oracle: Process,
    body: dict[str, Any],
) -> None:
    """Notes an answer, and asks a server that was never stopped the same."""
    text = answer["choices"][0]["message"]["content"]
    client.messages += [{"role": "user", "content": words}, {"role": "assistant", "content": text}]
    figures.turns += 1
    wanted = (await oracle.post(_CHAT, body))["choices"][0]["message"]["content"]
    figures.checked += 1
    figures.equal += wanted == text
    client.tokens = (await elsewhere.sessions())[client.name]["tokens"]  # at once, on the one that has not answered
