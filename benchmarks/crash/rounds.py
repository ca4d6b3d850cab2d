"""Rounds of load, each ended by a kill or a stop, and what is checked after the next start."""

from __future__ import annotations

import asyncio
import random
import signal
import statistics
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import asdict, dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Any

from benchmarks.crash.clients import Load, features
from benchmarks.crash.disk import SlowDisk
from benchmarks.crash.ledger import Kind, Operation, Session, judge
from benchmarks.crash.oracle import Oracle
from benchmarks.crash.process import SIGNALS, Launcher, Process, Refused

_DELETE = "/v1/atlas/memory/delete"
_LOAD = "/v1/atlas/memory/load"
KINDS = ("lost", "half", "resurrected", "changed", "left over", "state", "refused", "trouble", "slow stop")
"""Kinds of violations."""
_SAMPLED_STATES = 20
_MOST_FILES_LEFT, _MOST_BYTES_LEFT = 8, 64 << 10


class End(StrEnum):
    """How a round ends."""

    KILL = "kill"
    SLOW_STOP = "stop on a slow disk"
    STOP = "stop"


@dataclass(frozen=True)
class Plan:
    """What is run.

    Attributes:
      operations: acknowledged in a round before its end, at most.
      window: seconds of load in a round, at most.
      stop_limit: seconds after which a supervisor kills a server that was told to stop.
      only: the one round to run, of those the seed gives.
    """

    kills: int
    stops: int
    clean_stops: int
    sessions: int
    clients: int
    seed: str
    operations: int
    window: float
    stop_limit: float
    only: int | None = None

    @property
    def rounds(self) -> list[tuple[int, End]]:
        """Their numbers and ends."""
        ends = [End.KILL] * self.kills + [End.SLOW_STOP] * self.stops + [End.STOP] * self.clean_stops
        random.Random(self.seed).shuffle(ends)
        return [(number, end) for number, end in enumerate(ends) if self.only in (None, number)]


@dataclass
class Figures:
    """What was seen.

    Attributes:
      violations: by kind.
      found: every violation in words.
    """

    kills: int = 0
    stops: int = 0
    acknowledged: dict[str, int] = field(default_factory=dict)
    sessions_checked: int = 0
    in_doubt: dict[str, int] = field(default_factory=dict)
    violations: dict[str, int] = field(default_factory=lambda: dict.fromkeys(KINDS, 0))
    answers_equal: int = 0
    answers_equal_rebuilt: int = 0
    answers_other_rebuilt: int = 0
    states_checked: int = 0
    start_seconds: list[float] = field(default_factory=list)
    stop_seconds: list[float] = field(default_factory=list)
    idle_stop_seconds: list[float] = field(default_factory=list)
    most_files: int = 0
    most_bytes: int = 0
    found: list[str] = field(default_factory=list)

    def as_json(self) -> dict[str, Any]:
        """The figures as JSON values."""
        return asdict(self)

    def table(self) -> str:
        """The figures in words."""
        done, doubt = Counter(self.acknowledged), Counter(self.in_doubt)
        rows: list[tuple[str, object]] = [
            ("kills", self.kills),
            ("stops", self.stops),
            ("acknowledged turns checked", done[Kind.TURN] + done[Kind.AGAIN]),
            ("acknowledged saves, resets, deletions", ", ".join(str(done[k]) for k in ("save", "reset", "delete"))),
            ("contexts saved with a state, and loads checked", f"{done[Kind.STATE]}, {self.states_checked}"),
            ("saves of everything, lists", f"{done['save all']}, {done['list']}"),
            ("sessions checked after starts", self.sessions_checked),
            ("requests cut: happened, not, in part (stops)", f"{doubt['whole']}, {doubt['not']}, {doubt['part']}"),
            *self.violations.items(),
            ("answers equal to a server never stopped", self.answers_equal),
            ("after a replay: equal, other", f"{self.answers_equal_rebuilt}, {self.answers_other_rebuilt}"),
            ("seconds to ready, median and most", _spread(self.start_seconds)),
            ("seconds to stop under load", _spread(self.stop_seconds)),
            ("seconds to stop idle", _spread(self.idle_stop_seconds)),
            ("most files, MiB", f"{self.most_files}, {self.most_bytes / 2**20:.1f}"),
        ]
        return "\n".join(["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows)])


def _spread(seconds: list[float]) -> str:
    return f"{statistics.median(seconds):.2f}, {max(seconds):.2f}" if seconds else "–"


class Rounds:
    """Runs a plan against servers of one memory folder, beside an oracle that is never stopped."""

    def __init__(
        self, plan: Plan, launcher: Launcher, disk: SlowDisk, folder: Path, say: Callable[[str], None]
    ) -> None:
        self._plan, self._launcher, self._disk, self._say = plan, launcher, disk, say
        self._memory = folder / "memory"
        self._oracle_memory = folder / "oracle"
        self._memory.mkdir()
        self.figures = Figures()
        tag = random.Random(plan.seed).randrange(1 << 20)
        self._sessions = [Session(f"s-{tag:05x}-{number:04d}") for number in range(plan.sessions)]
        self._round = "before the first round"
        self._usual_start = 3.0
        self._seen: set[str] = set()
        self._state_bytes = 0

    async def run(self) -> Figures:
        """Runs all rounds and the checks after the last."""
        self._oracle_server = self._launcher.start(self._oracle_memory, *self._flags_of_oracle())
        await self._oracle_server.ready()
        status = await self._oracle_server.http.get("/v1/atlas/status")
        self._state_bytes = status.json()["data"]["state_bytes_per_session"]
        self._load = Load(await features(self._oracle_server))
        self._oracle = Oracle(self._oracle_server, self._load)
        try:
            for number, end in self._plan.rounds:
                await self._one(number, end)
            await self._finish()
        except (RuntimeError, TimeoutError) as error:  # it does not start any more
            self._blame("trouble", [str(error)])
        await self._oracle_server.hang_up()
        figures = self.figures
        figures.acknowledged = dict(self._load.done)
        figures.answers_equal, figures.answers_other_rebuilt = self._oracle.exact, self._oracle.other
        figures.answers_equal_rebuilt = self._oracle.exact_rebuilt
        return figures

    async def _one(self, number: int, end: End) -> None:
        began = time.monotonic()
        before = len(self.figures.found)
        rng = random.Random(f"{self._plan.seed}-{number}")
        server = await self._start(rng, slow=end == End.SLOW_STOP or (end == End.KILL and rng.random() < 0.3))
        await self._verify(server)
        self._round = f"round {number} ({end}; repeat with --seed {self._plan.seed} --only {number})"
        if end != End.KILL:
            await self._fill(server, rng)
        idle = end != End.KILL and rng.random() < 0.5
        self._load.stopping = False
        loaded = time.monotonic()
        clients = [
            asyncio.create_task(
                self._load.client(server, self._sessions[i :: self._plan.clients], random.Random(rng.random()))
            )
            for i in range(self._plan.clients)
        ]
        await self._wait(self._load.done.total() + rng.randint(0, self._plan.operations), rng, clients)
        seconds = time.monotonic() - loaded
        stopped = await self._end(server, end, rng, idle, clients)
        await asyncio.gather(*clients)
        for session in self._sessions:
            session.stopped = session.doubt is not None and stopped is not False
            session.restarted(complete=end == End.STOP and stopped is True)
        self._blame("trouble", server.trouble)
        await server.hang_up()
        fresh = len(self.figures.found) - before
        self._say(
            f"round {number}, {end}: {seconds:.1f} s of load, {self._load.done.total()} operations acknowledged so far, "
            f"{fresh} violations, {time.monotonic() - began:.1f} s"
        )

    async def _wait(self, operations: int, rng: random.Random, clients: list[asyncio.Task[None]]) -> None:
        """Waits for a number of operations in all, and then for a moment that lies anywhere in the next."""
        end = time.monotonic() + self._plan.window
        while self._load.done.total() < operations and time.monotonic() < end:
            if any(client.done() for client in clients):
                return
            await asyncio.sleep(0.002)
        await asyncio.sleep(rng.uniform(0, 0.1))

    async def _start(self, rng: random.Random, *, slow: bool) -> Process:
        """Starts the server, now and then after a start that was killed before its end."""
        environ = self._disk.environ(self._memory) if slow else {}
        flags = self._flags(rng)
        while rng.random() < 0.1 and self.figures.kills:
            early = self._launcher.start(self._memory, *flags, environ=environ)
            await asyncio.sleep(rng.uniform(0, 1.2 * self._usual_start))
            early.kill()
            self.figures.kills += 1
            await early.hang_up()
        server = self._launcher.start(self._memory, *flags, environ=environ)
        replay = asyncio.create_task(self._oracle.apply(self._sessions))  # while the processor is not in use anyway
        self._usual_start = await server.ready()
        self.figures.start_seconds.append(self._usual_start)
        self._scan(server)
        await replay
        return server

    def _flags(self, rng: random.Random) -> list[str]:
        """Settings that decide when something is written, where this build has them."""
        choices = {
            "--atlas-memory-save-interval": ("300", "1"),
            "--atlas-journal-sync": ("1", "0"),
            "--atlas-l2-cache-size": (str(8 << 30), str(8 << 30), str(8 << 30), str(16 * self._state_bytes)),
        }
        out: list[str] = []
        for flag, values in choices.items():
            value = rng.choice(values)
            if flag in self._launcher.known:
                out += [flag, value]
        return out

    def _flags_of_oracle(self) -> list[str]:
        return ["--atlas-l2-cache-size", str(8 << 30)]

    async def _end(
        self, server: Process, end: End, rng: random.Random, idle: bool, clients: list[asyncio.Task[None]]
    ) -> bool | None:
        """Ends the server: False where it was killed, True where it stopped, None where it was killed while it stopped."""
        if end == End.KILL and rng.random() < 0.9:
            self.figures.kills += 1
            server.kill()
            self._load.stopping = True
            return False
        self._load.stopping = True
        if idle:
            await asyncio.wait(clients)
        self._load.stopping = True
        if end == End.KILL:
            self.figures.kills += 1
            await server.stop(signal.SIGTERM, rng.uniform(0, 3))
            server.kill()
            return None
        number = SIGNALS[self.figures.stops % len(SIGNALS)]
        self.figures.stops += 1
        seconds = await server.stop(number, self._plan.stop_limit)
        if seconds is None:
            self._blame("slow stop", [f"it had not ended {self._plan.stop_limit} s after {number.name}"])
            return None
        (self.figures.idle_stop_seconds if idle else self.figures.stop_seconds).append(seconds)
        return True

    async def _fill(self, server: Process, rng: random.Random) -> None:
        """Gives every session that does not exist a first turn."""
        missing = iter([session for session in self._sessions if not session.exists])

        async def client() -> None:
            for session in missing:
                await self._turn(server, session, rng)

        await asyncio.gather(*(client() for _ in range(self._plan.clients)))

    # --- checks ------------------------------------------------------------------------------------------------------
    def _blame(self, kind: str, what: list[str]) -> None:
        self.figures.violations[kind] += len(what)
        for text in what:
            self.figures.found.append(f"{self._round}: {kind}: {text}")

    def _scan(self, server: Process) -> None:
        """Looks for what an earlier process has left half-written."""
        files = [path for path in self._memory.rglob("*") if path.is_file()]
        sizes: list[int] = []
        for path in files:
            try:
                status = path.stat()
            except FileNotFoundError:  # the server is at work
                continue
            sizes.append(status.st_size)
            name = str(path.relative_to(self._memory))
            half = path.suffix == ".tmp" or path.name.startswith(".")
            if half and status.st_ctime < server.began and name not in self._seen:
                self._seen.add(name)
                self._blame("left over", [f"{name}, {status.st_size} bytes"])
        self.figures.most_files = max(self.figures.most_files, len(sizes))
        self.figures.most_bytes = max(self.figures.most_bytes, sum(sizes))
        names = {path.name for path in files}
        self._blame("lost", [f"{name}, which was saved" for name in sorted(self._load.exports - names)])
        self._load.exports &= names

    async def _verify(self, server: Process) -> None:
        """Compares all sessions with what was acknowledged."""
        found = await server.sessions()
        known = {session.name for session in self._sessions}
        self._blame("resurrected", [f"{name}, which nobody made" for name in found.keys() - known])
        retired: list[Session] = []
        for session in self._sessions:
            row = found.get(session.name)
            doubt, session.doubt = session.doubt, None
            tokens = None if row is None else int(row["tokens"])
            sure = await self._resolve(session, doubt, tokens)
            if row is not None and sure and bool(row["has_state"]) != session.has_state:
                self._blame("state", [f"{session.name} has {'no ' * session.has_state}state"])
                sure = False
            if not sure or session.diverged:
                retired.append(session)
        self.figures.sessions_checked += len(self._sessions)
        await self._check_states(server, [session for session in self._sessions if session not in retired], retired)
        for session in retired:
            await self._retire(server, session)
        for faults in (self._load.faults, self._oracle.faults):
            for kind, text in (fault.split(": ", 1) for fault in faults):
                self._blame(kind, [text])
            faults.clear()

    async def _resolve(self, session: Session, doubt: Operation | None, tokens: int | None) -> bool:
        """Whether a session is as it must be, so that the clients may go on with it."""
        counts = session.counts
        if doubt is None or doubt.kind == Kind.SAVE:
            verdict, number = judge(tokens, counts)
            if verdict != "ok":
                text = f"{session.name} has {tokens} tokens, {session.expected} were acknowledged after {counts[-6:-1]}"
                self._blame_session(verdict, number, text)
            return verdict == "ok"
        if tokens == session.expected:
            self._doubt("not")
            # the same number of tokens, or a JSON nobody can see without changing something: either may be the case
            return doubt.kind not in (Kind.AGAIN, Kind.STATE) or not session.exists
        before = session.expected
        after = await self._oracle.settle(session, doubt)
        if tokens == after:
            self._doubt("whole")
            session.acknowledge(doubt)
            session.todo.pop()
            session.loose |= session.exists and doubt.kind in (Kind.TURN, Kind.AGAIN)
            return True
        least = before or 0 if doubt.kind == Kind.TURN and not session.whole else 0
        if session.stopped and doubt.answer and tokens is not None and least <= tokens <= (after or 0):
            self._doubt("part")
            return False
        verdict, number = judge(tokens, counts[:-1])
        self._blame_session(
            verdict,
            number,
            f"{session.name} has {tokens} tokens after a {doubt.kind} that was cut; right were {before} or {after}",
        )
        return False

    def _doubt(self, outcome: str) -> None:
        self.figures.in_doubt[outcome] = self.figures.in_doubt.get(outcome, 0) + 1

    def _blame_session(self, verdict: str, number: int, text: str) -> None:
        self._blame(verdict, [text])
        self.figures.violations[verdict] += max(0, number - 1)

    async def _check_states(self, server: Process, sessions: list[Session], retired: list[Session]) -> None:
        """Loads some contexts that had no turn since their JSON was saved, so that loading changes nothing."""
        for session in [one for one in sessions if one.has_state and one.state_is_last][:_SAMPLED_STATES]:
            try:
                state = (await server.post(_LOAD, {"context_id": session.name}))["state"]
            except Refused as refused:
                state = str(refused)
            self.figures.states_checked += 1
            if state != session.state:
                self._blame("state", [f"{session.name} has {state!r}, saved was {session.state!r}"])
                retired.append(session)

    async def _retire(self, server: Process, session: Session) -> None:
        """Deletes a session whose bits, or whose text, can no longer be compared; wherever it exists."""
        for one in (server, self._oracle_server):
            try:
                await one.post(_DELETE, {"context_id": session.name})
            except Refused as refused:
                if refused.status != 404:
                    self._blame("refused", [f"{session.name} cannot be deleted: {refused}"])
        session.counts.append(None)
        session.gone()

    async def _finish(self) -> None:
        """A last turn for all, then nothing: what is deleted leaves no file."""
        rng = random.Random(f"{self._plan.seed}-end")
        server = await self._start(rng, slow=False)
        await self._verify(server)
        self._round = "after the last round"
        self._load.stopping = False
        await self._everyone(lambda one: self._turn(server, one, rng))
        await self._oracle.apply(self._sessions)
        await self._verify(server)
        await self._everyone(lambda one: self._retire(server, one))
        await self._stop(server)
        server = self._launcher.start(self._memory)
        await server.ready()
        self._blame("resurrected", [f"{name} was deleted" for name in await server.sessions()])
        await self._stop(server)
        left = [p for p in self._memory.rglob("*") if p.is_file() and p.name not in self._load.exports]
        size = sum(path.stat().st_size for path in left)
        if len(left) > _MOST_FILES_LEFT or size > _MOST_BYTES_LEFT:
            self._blame("left over", [f"{len(left)} files of {size} bytes when all sessions are deleted"])

    async def _turn(self, server: Process, session: Session, rng: random.Random) -> None:
        try:
            await self._load.perform(server, session, self._load.operation(session, Kind.TURN, rng))
        except Refused as refused:
            session.doubt = None
            self._blame("refused", [f"{session.name}: {refused}"])

    async def _everyone(self, work: Callable[[Session], Awaitable[None]]) -> None:
        alive = iter([session for session in self._sessions if session.exists])

        async def client() -> None:
            for session in alive:
                await work(session)

        await asyncio.gather(*(client() for _ in range(self._plan.clients)))

    async def _stop(self, server: Process) -> None:
        seconds = await server.stop(signal.SIGTERM, self._plan.stop_limit)
        if seconds is None:
            self._blame("slow stop", ["the last one"])
        self._blame("trouble", server.trouble)
        await server.hang_up()
