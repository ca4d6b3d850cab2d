"""Servers that share one object store (docs/design/sessions.md), as a discrete-event model.

Conversations begin at random; each is some turns of one session, with time to think between them. Whom a turn goes to is
either the session's own replica (affinity: the highest of the replicas' hashes, the next where its queue is long) or any.
A replica asks the store for the session's manifest; where what it holds in main memory is not the newest state, it reads
the snapshot, from its own disk if a copy is there, and prefills what the journal has since; then it prefills the new text,
decodes, and writes the manifest. Snapshots are written some time after a change, when the journal is full, and when a
session leaves main memory. Prefill is a queue; while rows decode it gets half the time.

What is put in was measured elsewhere (`Costs`); queues, hits and traffic come out. Not in the model: faults of the network,
two requests to one session at once, a store that slows down under load.
"""

from __future__ import annotations

import hashlib
import heapq
import math
import random
from collections import OrderedDict, deque
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

_SHARE = 0.5
"""Of the time of a step that prefill has while rows decode."""
_WARM = 0.25
"""Of all turns at the beginning, while caches fill, that are not counted."""
_AGAIN = 1.0
"""Seconds until a client asks again whose server has gone."""
_MEAN = math.exp(0.5)
"""Of a log-normal distribution with σ 1, by its median."""
_FILL = 3_000_000
"""Sessions drawn to fill memories and disks, at most."""


@dataclass(frozen=True)
class Costs:
    """What a replica and a store take: the default model on two cores, and an object store of the same region."""

    prefill_rate: float = 2700.0  # tokens per second, docs/benchmarks/memory_cost.md
    step_fixed: float = 0.0031  # seconds of a step, and of each row in it: 249 and 1 302 tokens per second at 1 and 32
    step_row: float = 0.00067
    rows: int = 32  # that decode at once
    snapshot_bytes: float = 16.8e6  # of a session whose memory_budget is used up
    manifest_bytes: float = 4e3
    host_bytes: float = 32e9  # main memory for sessions
    copies_bytes: float = 200e9  # snapshots on the replica's own disk
    disk_bandwidth: float = 1e9
    store_latency: float = 0.015  # seconds, median; a hundredth take `store_tail`
    store_tail: float = 0.120
    store_bandwidth: float = 200e6  # bytes per second of one object
    save_interval: float = 300.0  # memory_save_interval
    journal_tokens: int = 6000
    put_price: float = 5e-6  # dollars a request, and a GB kept for a month: the list price of S3 Standard
    get_price: float = 4e-7
    month_price: float = 0.023


@dataclass(frozen=True)
class Habits:
    """How people use sessions."""

    conversation: float = 6.0  # turns, mean of a geometric distribution
    think: float = 30.0  # seconds between turns, median of a log-normal distribution, σ 1
    text: float = 60.0  # tokens of a turn, median, σ 1
    answer: float = 150.0  # median, σ 0.8
    skew: float = 0.8  # exponent of Zipf's law by which conversations choose their sessions


@dataclass
class Session:
    """The newest state of one session, which the store has."""

    turn: int = 1  # all have been used before
    snapshot: int = 1  # the turn the snapshot is of
    journal: int = 0  # tokens since then
    where: int = -1  # the replica that has the newest in main memory
    busy: bool = False
    due: float = math.inf


@dataclass
class Job:
    """A turn on its way."""

    session: int
    text: int
    answer: int
    left: int  # turns of the conversation after it
    asked: float
    kind: str = "memory"
    replay: int = 0


@dataclass
class Replica:
    """One server: sessions in main memory and on disk by last use, a queue of prefill, rows that decode."""

    held: OrderedDict[int, int] = field(default_factory=OrderedDict)
    copies: OrderedDict[int, int] = field(default_factory=OrderedDict)
    queue: deque[tuple[Job, float]] = field(default_factory=deque)
    rows: list[tuple[float, int, Job]] = field(default_factory=list)
    waiting: deque[Job] = field(default_factory=deque)
    decoded: float = 0.0  # tokens of each row since the start
    now: float = 0.0
    version: int = 0
    busy: float = 0.0
    jobs: int = 0


@dataclass
class Counts:
    """What happened."""

    resumed: list[float] = field(
        default_factory=list
    )  # seconds until the new text's prefill ends, less that prefill alone
    first: list[float] = field(default_factory=list)  # seconds to the first token
    kinds: dict[str, int] = field(default_factory=dict)
    gets: int = 0
    puts: int = 0
    read: float = 0.0
    written: float = 0.0
    turns: int = 0
    since: float = 0.0
    until: float = 0.0


class Simulation:
    """A number of replicas under a load, until so many turns have been answered."""

    def __init__(
        self, costs: Costs, habits: Habits, sessions: int, replicas: int, load: float, affinity: bool, seed: int = 0
    ) -> None:
        self.costs, self.habits, self.affinity = costs, habits, affinity
        self.rng = random.Random(seed)
        self.sessions: dict[int, Session] = {}
        self.replicas = [Replica() for _ in range(replicas)]
        self.alive = list(range(replicas))
        self.counts = Counts()
        self.events: list[tuple[float, int, Callable[[float], None]]] = []
        self.done = 0
        self.number = 0
        a_turn = self._seconds_of_a_turn()
        self.conversations = load * replicas / a_turn / habits.conversation  # begun a second
        self.draw = _zipf(sessions, habits.skew)
        self.homes: dict[int, list[int]] = {}
        self._fill()

    def _fill(self) -> None:
        """Main memories and disks as they are after a long time: what was drawn last."""
        room = int((self.costs.host_bytes + self.costs.copies_bytes) / self.costs.snapshot_bytes)
        for _ in range(min(_FILL, 2 * room * len(self.replicas))):
            session = self.draw(self.rng)
            name = self._route(session)
            state = self.sessions.setdefault(session, Session())
            state.turn = state.snapshot = state.turn + 1
            state.where = name
            self._hold(self.replicas[name], session, state)
            self._copy(self.replicas[name], session, state.snapshot)
        self.counts = Counts()

    def _seconds_of_a_turn(self) -> float:
        """Of a replica's time, where the batch is half full."""
        costs, habits = self.costs, self.habits
        text, answer = habits.text * _MEAN, habits.answer * math.exp(0.32)
        rows = costs.rows / 2
        return text / costs.prefill_rate + answer * (costs.step_fixed / rows + costs.step_row)

    def _at(self, when: float, what: Callable[[float], None]) -> None:
        self.number += 1
        heapq.heappush(self.events, (when, self.number, what))

    def run(self, turns: int, lose: int = 0) -> Counts:
        """Answers so many turns; half-way `lose` replicas are gone at once."""
        self._at(0.0, self._begin)
        thinking = self.habits.conversation * self.habits.think * _MEAN
        for _ in range(int(self.conversations * thinking)):  # those that are in the midst of a conversation
            start = partial(self._ask, session=self.draw(self.rng), left=self._turns())
            self._at(self._think() * self.rng.random(), start)
        skipped = int(_WARM * turns)
        counted = lost = False
        while self.done < turns:
            now, _, what = heapq.heappop(self.events)
            what(now)
            if not counted and self.done >= skipped:
                counted, self.counts = True, Counts(since=now)
            if lose and not lost and self.done >= (skipped + turns) // 2:
                lost = True
                self._lose(now, lose)
            self.counts.until = now
        return self.counts

    def _begin(self, now: float) -> None:
        """A conversation begins, and the next will."""
        self._at(now + self.rng.expovariate(self.conversations), self._begin)
        self._ask(now, self.draw(self.rng), self._turns())

    def _turns(self) -> int:
        """Of a conversation, after the one that is asked."""
        return min(100, int(math.log(1 - self.rng.random()) / math.log(1 - 1 / self.habits.conversation)))

    def _lose(self, now: float, count: int) -> None:
        """Kills some: what they answer is asked again elsewhere, what they hold is gone."""
        for name in self.alive[-count:]:
            replica = self.replicas[name]
            again = [job for job, _ in replica.queue] + [job for _, _, job in replica.rows] + list(replica.waiting)
            replica.version += 1
            self.alive.remove(name)
            self.homes.clear()
            for job in again:
                self.sessions[job.session].busy = False
                self._at(now + _AGAIN, partial(self._ask, session=job.session, left=job.left))

    def _ask(self, now: float, session: int, left: int) -> None:
        state = self.sessions.setdefault(session, Session())
        if state.busy:  # another conversation of the same session: its turns are in order
            self._at(now + self.habits.think, partial(self._ask, session=session, left=left))
            return
        state.busy = True
        name = self._route(session)
        replica = self.replicas[name]
        replica.jobs += 1
        habits = self.habits
        job = Job(session, self._tokens(habits.text, 1.0), self._tokens(habits.answer, 0.8), left, now)
        wait = self._store(get=1)
        newest = state.turn
        if replica.held.get(session) != newest:
            job.replay = state.journal
            if replica.copies.get(session) == state.snapshot:
                job.kind = "disk"
                wait += self.costs.snapshot_bytes / self.costs.disk_bandwidth
            else:
                job.kind = "store"
                wait += self._store(get=1) + self.costs.snapshot_bytes / self.costs.store_bandwidth
                self.counts.read += self.costs.snapshot_bytes
                self._copy(replica, session, state.snapshot)
        self._at(now + wait, partial(self._prefill, job=job, name=name))

    def _route(self, session: int) -> int:
        if not self.affinity:
            return self.rng.choice(self.alive)
        order = self.homes.get(session)
        if order is None:
            marks = (hashlib.blake2b(b"%d %d" % (session, name), digest_size=8).digest() for name in self.alive)
            order = [name for _, name in heapq.nlargest(2, zip(marks, self.alive, strict=True))]
            self.homes[session] = order
        first = order[0]
        if len(order) > 1 and self.replicas[first].jobs > 2 * self.costs.rows:
            return min(order, key=lambda name: self.replicas[name].jobs)
        return first

    def _prefill(self, now: float, job: Job, name: int) -> None:
        if name not in self.alive:
            self.sessions[job.session].busy = False
            self._at(now + _AGAIN, partial(self._ask, session=job.session, left=job.left))
            return
        replica = self.replicas[name]
        self._advance(replica, now)
        replica.queue.append((job, float(job.replay + job.text)))
        self._next(replica, name)

    def _advance(self, replica: Replica, now: float) -> None:
        """Lets prefill and decoding go on until now, at the rates they have had since the last event."""
        passed, replica.now = now - replica.now, now
        if not (replica.queue or replica.rows):
            return
        replica.busy += passed
        prefill, decode = self._rates(replica)
        if replica.queue:
            job, left = replica.queue[0]
            replica.queue[0] = (job, left - passed * prefill)
        replica.decoded += passed * decode

    def _rates(self, replica: Replica) -> tuple[float, float]:
        costs, rows = self.costs, len(replica.rows)
        share = _SHARE if rows and replica.queue else 1.0
        decode = (1 - share if replica.queue else 1.0) / (costs.step_fixed + costs.step_row * rows) if rows else 0.0
        return (costs.prefill_rate * share if replica.queue else 0.0), decode

    def _next(self, replica: Replica, name: int) -> None:
        """Sets the moment of the next thing that ends; what was set before counts no more."""
        replica.version += 1
        prefill, decode = self._rates(replica)
        times = []
        if replica.queue and prefill:
            times.append(max(0.0, replica.queue[0][1]) / prefill)
        if replica.rows:
            times.append(max(0.0, replica.rows[0][0] - replica.decoded) / decode)
        if times:
            self._at(replica.now + min(times), partial(self._progress, name=name, version=replica.version))

    def _progress(self, now: float, name: int, version: int) -> None:
        replica = self.replicas[name]
        if version != replica.version:
            return
        self._advance(replica, now)
        while replica.rows and replica.rows[0][0] <= replica.decoded + 1e-6:
            _, _, job = heapq.heappop(replica.rows)
            took = self._store(put=1, size=self.costs.manifest_bytes)
            self._at(now + took, partial(self._end, job=job, name=name))
        if replica.queue and replica.queue[0][1] <= 1e-6:
            job, _ = replica.queue.popleft()
            took = now - job.asked
            self.counts.first.append(took)
            anew = job.text / self.costs.prefill_rate
            if job.kind != "memory":
                self.counts.resumed.append(took - anew)
            self.counts.kinds[job.kind] = self.counts.kinds.get(job.kind, 0) + 1
            replica.waiting.append(job)
        while replica.waiting and len(replica.rows) < self.costs.rows:
            job = replica.waiting.popleft()
            self.number += 1
            heapq.heappush(replica.rows, (replica.decoded + job.answer, self.number, job))
        self._next(replica, name)

    def _end(self, now: float, job: Job, name: int) -> None:
        state, replica = self.sessions[job.session], self.replicas[name]
        state.busy = False
        state.turn += 1
        state.journal += job.text + job.answer
        state.where = name
        replica.jobs -= 1
        self.counts.turns += 1
        self.done += 1
        self._hold(replica, job.session, state)
        if state.journal > self.costs.journal_tokens:
            self._save(replica, job.session, state)
        elif state.due == math.inf:
            state.due = now + self.costs.save_interval
            self._at(state.due, partial(self._save_if_due, session=job.session))
        if job.left:
            self._at(now + self._think(), partial(self._ask, session=job.session, left=job.left - 1))

    def _hold(self, replica: Replica, session: int, state: Session) -> None:
        replica.held[session] = state.turn
        replica.held.move_to_end(session)
        while len(replica.held) * self.costs.snapshot_bytes > self.costs.host_bytes:
            old, turn = replica.held.popitem(last=False)
            if self.sessions[old].turn == turn and self.sessions[old].snapshot != turn:
                self._save(replica, old, self.sessions[old])

    def _save_if_due(self, now: float, session: int) -> None:
        state = self.sessions[session]
        if state.due > now:
            return
        state.due = math.inf
        if state.snapshot != state.turn and state.where in self.alive:
            self._save(self.replicas[state.where], session, state)

    def _save(self, replica: Replica, session: int, state: Session) -> None:
        self._store(put=2, size=self.costs.snapshot_bytes + self.costs.manifest_bytes)
        state.snapshot, state.journal = state.turn, 0
        self._copy(replica, session, state.snapshot)

    def _copy(self, replica: Replica, session: int, turn: int) -> None:
        replica.copies[session] = turn
        replica.copies.move_to_end(session)
        while len(replica.copies) * self.costs.snapshot_bytes > self.costs.copies_bytes:
            replica.copies.popitem(last=False)

    def _tokens(self, median: float, sigma: float) -> int:
        return max(1, round(self.rng.lognormvariate(math.log(median), sigma)))

    def _think(self) -> float:
        return self.rng.lognormvariate(math.log(self.habits.think), 1.0)

    def _store(self, get: int = 0, put: int = 0, size: float = 0.0) -> float:
        """Counts requests, and says how long one of them takes."""
        self.counts.gets += get
        self.counts.puts += put
        self.counts.written += size
        costs = self.costs
        sigma = math.log(costs.store_tail / costs.store_latency) / 2.326  # of a normal distribution's 99th percentile
        return self.rng.lognormvariate(math.log(costs.store_latency), sigma)


def _zipf(count: int, skew: float) -> Callable[[random.Random], int]:
    """Draws numbers below `count`, the n-th in proportion to n^-skew, by the integral's inverse."""
    power = 1 - skew
    most = (count + 1) ** power - 1

    def draw(rng: random.Random) -> int:
        return min(count - 1, int((1 + rng.random() * most) ** (1 / power)) - 1)

    return draw
