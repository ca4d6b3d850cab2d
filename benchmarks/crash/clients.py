"""Clients that keep a server busy and write down what it has acknowledged."""

from __future__ import annotations

import asyncio
import json
import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import httpx

from benchmarks.crash.ledger import Answer, Kind, Operation, Session
from benchmarks.crash.process import Process, Refused

_CHAT = "/v1/chat/completions"
_MEMORY = "/v1/atlas/memory/"
_TURNS_OF_A_HISTORY = 6
_EXPORTS = ("export-0.atlas", "export-1.atlas")
_WEIGHTS = {
    Kind.TURN: 60,
    Kind.AGAIN: 14,
    Kind.STATE: 6,
    Kind.SAVE: 6,
    Kind.RESET: 3,
    Kind.DELETE: 5,
}


class Cut(Exception):
    """The connection broke, or the server ended the request because it is stopping."""


@dataclass
class Features:
    """What this build of the server offers.

    Attributes:
      digits: a bias that leaves the model no tokens but digits.
      regenerate: whether a request says that it asks for the last turn again.
    """

    digits: dict[str, float]
    regenerate: bool


async def features(server: Process) -> Features:
    """Asks a server."""
    tokens = (await server.post("/tokenize", {"content": "0123456789"}))["tokens"]
    schema = (await server.http.get("/schema/openapi.json")).json()
    options = [known for name, known in schema["components"]["schemas"].items() if name.endswith("AtlasOptions")]
    return Features(
        {str(token): 100.0 for token in tokens}, any("regenerate" in known["properties"] for known in options)
    )


@dataclass
class Load:
    """What the clients of one run share.

    Attributes:
      stopping: the server was told to stop, so it may refuse.
      faults: what a server did that it must not do: a kind of violation, a colon, and words.
      done: acknowledged operations by kind.
    """

    features: Features
    faults: list[str] = field(default_factory=list)
    done: Counter[str] = field(default_factory=Counter)
    exports: set[str] = field(default_factory=set)
    stopping: bool = False

    async def client(self, server: Process, sessions: Sequence[Session], rng: random.Random) -> None:
        """Sends requests about some sessions, one after the other, until the server is gone."""
        while not self.stopping:
            try:
                chance = rng.random()
                if chance < 0.03:
                    await self._list(server, sessions)
                elif chance < 0.05:
                    await self._save_all(server, rng)
                else:
                    await self.perform(server, *self.draw(rng.choice(sessions), rng))
            except Cut:
                return
            except Refused as refused:
                self.faults.append(f"refused: {refused}")
                await asyncio.sleep(0.1)

    def draw(self, session: Session, rng: random.Random) -> tuple[Session, Operation]:
        """The next operation of a session."""
        kinds = dict(_WEIGHTS)
        if not session.exists:
            kinds = {Kind.TURN: 9, Kind.STATE: 1}
            session.whole, session.digits = rng.random() < 0.5, rng.random() < 0.5
        elif len(session.messages) > 2 * _TURNS_OF_A_HISTORY:
            kinds = {Kind.DELETE: 1, Kind.RESET: 1}
        if not session.messages:
            kinds.pop(Kind.AGAIN, None)
        kind = rng.choices(list(kinds), list(kinds.values()))[0]
        return session, self.operation(session, kind, rng)

    def operation(self, session: Session, kind: Kind, rng: random.Random) -> Operation:
        """An operation of a given kind."""
        name = session.name
        match kind:
            case Kind.TURN | Kind.AGAIN:
                return self._turn(session, kind, rng)
            case Kind.STATE:
                state = {"cursor": rng.randrange(1 << 30), "notes": [words(rng, 5), None, 0.5]}
                return Operation(kind, _MEMORY + "save", {"context_id": name, "state": state})
            case Kind.SAVE:
                return Operation(kind, _MEMORY + "save", {"session_id": name})
            case Kind.RESET:
                return Operation(kind, _MEMORY + "reset", {"session_id": name})
            case Kind.DELETE:
                return Operation(kind, _MEMORY + "delete", {"context_id": name})

    def _turn(self, session: Session, kind: Kind, rng: random.Random) -> Operation:
        said = {"role": "user", "content": words(rng, rng.randint(2, 12 if rng.random() < 0.7 else 60))}
        atlas: dict[str, Any] = {}
        if kind == Kind.AGAIN:
            kept = session.messages[:-1]
            messages = kept if rng.random() < 0.6 else [*kept[:-1], said]
            if self.features.regenerate:
                atlas["regenerate"] = True
        else:
            messages = [*(session.messages if session.whole else []), said]
        headers: dict[str, str] = {}
        if rng.random() < 0.5:
            atlas["session_id"] = session.name
        else:
            headers["X-Session-ID"] = session.name
        body: dict[str, Any] = {"messages": messages, "max_tokens": rng.randint(2, 24), "temperature": 0}
        body |= {"ignore_eos": True, "stream": rng.random() < 0.5}
        if atlas:
            body["atlas"] = atlas
        if session.digits:
            body["logit_bias"] = self.features.digits
        return Operation(kind, _CHAT, body, headers)

    async def perform(self, server: Process, session: Session, operation: Operation) -> None:
        """Sends one operation and notes what came of it; raises Cut or Refused."""
        operation.loose = session.loose
        session.doubt = operation
        try:
            operation.answer = await self.send(server, operation)
        except Refused:
            session.doubt = None
            raise
        session.doubt = None
        session.acknowledge(operation)
        self.done[operation.kind] += 1

    async def send(self, server: Process, operation: Operation) -> Answer | None:
        """The answer to an operation; raises Cut or Refused."""
        try:
            if operation.kind not in (Kind.TURN, Kind.AGAIN):
                await server.post(operation.path, operation.body, headers=operation.headers)
                return None
            if not operation.body["stream"]:
                answer = await server.post(operation.path, operation.body, headers=operation.headers)
                return Answer(answer["choices"][0]["message"]["content"] or "", _cached(answer))
            return await self._stream(server, operation)
        except httpx.TransportError as error:
            raise Cut from error
        except Refused as refused:
            if not self.stopping or refused.status < 500:
                raise
            if refused.status != 503:
                self.faults.append(f"refused: while it stops, a {operation.kind} got {refused}")
            raise Cut from refused

    async def _stream(self, server: Process, operation: Operation) -> Answer:
        body = {**operation.body, "stream_options": {"include_usage": True}}
        text, cached = "", 0
        async with server.http.stream("POST", operation.path, json=body, headers=operation.headers) as response:
            if response.status_code != 200:
                raise Refused(response.status_code, (await response.aread()).decode())
            async for line in response.aiter_lines():
                if line == "data: [DONE]":
                    return Answer(text, cached)
                if not line.startswith("data: "):
                    continue
                chunk = json.loads(line.removeprefix("data: "))
                if "error" in chunk:
                    raise Refused(503, line)
                for choice in chunk["choices"]:
                    text += choice["delta"].get("content") or ""
                cached = _cached(chunk) if chunk.get("usage") else cached
        raise Cut

    async def _list(self, server: Process, sessions: Sequence[Session]) -> None:
        """A client's own sessions, none of which is in use now, are those it knows of."""
        try:
            found = await server.sessions()
        except httpx.TransportError as error:
            raise Cut from error
        except Refused as refused:
            if self.stopping:
                raise Cut from refused
            raise
        for session in sessions:
            if (session.name in found) != session.exists:
                fault = "lost: {} is not listed" if session.exists else "resurrected: {} is listed"
                self.faults.append(f"{fault.format(session.name)} while the server runs")
        self.done["list"] += 1

    async def _save_all(self, server: Process, rng: random.Random) -> None:
        """Everything, into the default file or a named one."""
        name = rng.choice((None, *_EXPORTS))
        try:
            await server.post(_MEMORY + "save", {} if name is None else {"filename": name})
        except httpx.TransportError as error:
            raise Cut from error
        except Refused as refused:
            if self.stopping:
                raise Cut from refused
            raise
        if name is not None:
            self.exports.add(name)
        self.done["save all"] += 1


def words(rng: random.Random, count: int) -> str:
    """Text that no other request has."""
    subjects = ("river", "token", "page", "window", "memory")
    return " ".join(f"{rng.choice(subjects)}{rng.randrange(1000)}" for _ in range(count))


def _cached(answer: dict[str, Any]) -> int:
    details = answer["usage"].get("prompt_tokens_details") or {}
    return int(details.get("cached_tokens") or 0)
