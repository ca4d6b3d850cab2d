"""A server that is never stopped, given what the others have acknowledged."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from dataclasses import dataclass, field

from benchmarks.crash.clients import Load
from benchmarks.crash.ledger import Answer, Count, Kind, Operation, Session
from benchmarks.crash.process import Process, Refused

_AT_ONCE = 4


@dataclass
class Oracle:
    """Applies operations, each session's in their order.

    Attributes:
      exact: answers equal to its own.
      exact_rebuilt, other: of sessions rebuilt from their tokens, answers equal to its own and others.
      checked: answers compared.
    """

    server: Process
    load: Load
    faults: list[str] = field(default_factory=list)
    exact: int = 0
    exact_rebuilt: int = 0
    other: int = 0
    checked: int = 0

    async def apply(self, sessions: Iterable[Session]) -> None:
        """Applies what is to be done of all sessions, and compares the answers."""
        room = asyncio.Semaphore(_AT_ONCE)

        async def one(session: Session) -> None:
            async with room:
                await self._apply(session)

        await asyncio.gather(*(one(session) for session in sessions if session.todo))

    async def _apply(self, session: Session) -> None:
        reread = diverged = False
        for operation in session.todo:
            try:
                answer = await self.load.send(self.server, operation)
            except Refused as refused:
                self.faults.append(
                    f"refused: a {operation.kind} of {session.name} only where nothing was stopped: {refused}"
                )
                session.diverged = True
                break
            session.counts.append(await self.count(session.name))
            if operation.kind in (Kind.RESET, Kind.DELETE):
                reread = diverged = False
            if answer is None or operation.answer is None or diverged:
                continue
            # an earlier state may be gone after a restart: the text is then read again, in other pieces
            reread |= operation.kind == Kind.AGAIN and answer.cached != operation.answer.cached
            diverged = not self._same(session, operation, operation.answer, answer, operation.loose or reread)
        session.todo.clear()
        session.loose |= reread
        session.diverged |= diverged

    def _same(self, session: Session, operation: Operation, found: Answer, right: Answer, loose: bool) -> bool:
        self.checked += 1
        if found.text == right.text:
            self.exact_rebuilt += loose
            self.exact += not loose
        elif loose:
            self.other += 1
        else:
            self.faults.append(
                f"changed: {session.name} answered {found.text!r}, a server that was never stopped {right.text!r} "
                f"({operation.kind}, cached {found.cached} and {right.cached})"
            )
        return found.text == right.text

    async def settle(self, session: Session, operation: Operation) -> Count:
        """Applies an operation that was in doubt; the tokens after it."""
        operation.answer = await self.load.send(self.server, operation)
        session.counts.append(await self.count(session.name))
        return session.expected

    async def count(self, name: str) -> Count:
        """Tokens of a session."""
        row = (await self.server.sessions()).get(name)
        return None if row is None else int(row["tokens"])
