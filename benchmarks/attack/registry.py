"""What an attack is, and what it may use.

An attack is a function of a `Scene`, registered with its name, what it does and what must hold:

    @attack("silent connections", does="opens 1 100 connections and says nothing", holds="others are served")
    def silent(scene: Scene) -> None:
        ...
        scene.count(1100)
        scene.must(answered, "nobody else was served")
"""

from __future__ import annotations

import random
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx

from benchmarks.attack.neighbour import Interval, Pace, beside
from benchmarks.attack.target import COMPANION, NEIGHBOUR, Target, key_of

RATIO = 3.0
"""How much longer a neighbour's pauses may become, at their 99th percentile, beside any one client's request."""
_FLOOR_SECONDS = 0.002
"""Shorter pauses are the timer's."""
_LEAK = re.compile(r"Traceback|File \"|site-packages|\.py\b|object at 0x|/tmp/|/home/|/root/|Internal server error")
_FAULTS_SHOWN = 6


@dataclass(frozen=True)
class Attack:
    """One attack.

    Attributes:
      does: what the attacker does, in words.
      holds: what must hold.
      flags: of the server it needs.
      keys: whether that server has owners with keys.
      fresh: whether the attack needs a server that no other has touched.
      alone: whether it starts the servers it needs itself, or needs none.
      growth_mib: by how much the server's memory may grow meanwhile.
    """

    name: str
    family: str
    does: str
    holds: str
    run: Callable[[Scene], None]
    flags: tuple[str, ...] = ()
    keys: bool = True
    fresh: bool = False
    alone: bool = False
    growth_mib: float = 768.0


ATTACKS: dict[str, Attack] = {}


def attack(
    name: str, *, does: str, holds: str, **rest: Any
) -> Callable[[Callable[[Scene], None]], Callable[[Scene], None]]:
    """Registers an attack; the family is its module."""

    def register(run: Callable[[Scene], None]) -> Callable[[Scene], None]:
        assert name not in ATTACKS, name
        family = run.__module__.rpartition(".")[2]
        ATTACKS[name] = Attack(name=name, family=family, does=does, holds=holds, run=run, **rest)
        return run

    return register


class Scene:
    """What one run of an attack has at hand, and what it has found.

    Attributes:
      target: the server, with the victim's sessions in it; an attack that is `alone` has none.
      folder: an empty folder of the attack.
      rng: seeded.
      tried: how many times something was tried.
      faults: what did not hold.
      deaths: servers that ended by themselves.
    """

    def __init__(
        self, *, model: Path, folder: Path, flags: tuple[str, ...], quick: bool, seed: int, seconds: float
    ) -> None:
        self.model, self.folder, self.flags, self.quick, self.seconds = model, folder, flags, quick, seconds
        self.rng = random.Random(seed)
        self.tried = self.deaths = 0
        self.faults: list[str] = []
        self.notes: list[str] = []
        self.lost: list[str] = []
        self.peak = 0.0
        self.ratio: float | None = None
        self._target: Target | None = None
        self._started: list[Target] = []

    @property
    def target(self) -> Target:
        """The server."""
        assert self._target is not None, "this attack starts its own servers"
        return self._target

    @target.setter
    def target(self, target: Target) -> None:
        self._target = target

    def times(self, full: int) -> int:
        """How often to try: as given, or a twentieth in a quick run."""
        return max(1, full // 20) if self.quick else full

    def count(self, number: int = 1) -> None:
        """Says that something was tried."""
        self.tried += number

    def must(self, condition: object, fault: str) -> bool:
        """Notes a fault unless the condition holds; whether it did."""
        if not condition:
            self.faults.append(fault)
        return bool(condition)

    def note(self, text: str) -> None:
        """Keeps something that is worth a look and no fault."""
        self.notes.append(text)

    def start(self, *flags: str, folder: str = "server", model: Path | None = None, **rest: Any) -> Target:
        """Starts another server; the same folder's name is the same memory."""
        target = Target(model or self.model, self.folder / folder, (*self.flags, *flags), **rest)
        self._started.append(target)
        return target

    def restart(self, target: Target, *flags: str, kill: bool = False) -> Target:
        """Ends a server of `insert_decode_state`, in order or at once, and starts it again over its memory."""
        target.kill() if kill else self.stop(target)
        return self.start(*flags, folder=target.folder.name, keys=target.keys)

    def stop(self, target: Target) -> None:
        """Stops a server as a supervisor does, and notes what went wrong."""
        try:
            target.end()
        except Exception as error:
            self.faults.append(f"the server did not stop in order: {_line(str(error))}")
        finally:
            self.peak = max(self.peak, target.peak)
            target.kill()

    def close(self) -> None:
        """Ends the servers of `insert_decode_state`."""
        for target in self._started:
            self.peak = max(self.peak, target.peak)
            target.kill()

    def check(self, response: httpx.Response, what: str) -> bool:
        """Whether an answer is one that a client's mistake may get: no 5xx but 503 and 507, nothing of our insides.

        A refusal for want of room must say when to try again.
        """
        status, text = response.status_code, response.text
        fine = self.must(status < 500 or status in (503, 507), f"{what}: status {status}, {_line(text)}")
        if status in (429, 503) and "retry-after" not in response.headers:
            fine &= self.must(False, f"{what}: {status} without Retry-After")
        if status >= 400:
            leak = _LEAK.search(text)
            fine &= self.must(leak is None, f"{what}: {status} shows {leak and leak[0]!r}: {_line(text)}")
        return fine

    def send(self, owner: str, path: str, body: Any, what: str, timeout: float = 30.0) -> httpx.Response | None:
        """Posts a body and checks the answer; None where there was none in time."""
        self.count()
        try:
            response = self.target.post(owner, path, body, timeout)
        except httpx.HTTPError as error:
            self.faults.append(f"{what}: no answer within {timeout:.0f} s ({type(error).__name__})")
            return None
        self.check(response, what)
        return response

    def served(self, owner: str, within: float, what: str) -> None:
        """Checks that another owner is still listed, saved and answered, each within a time."""
        calls: dict[str, Callable[[], httpx.Response]] = {
            "list": lambda: self.target.post(owner, "/v1/atlas/memory/list", timeout=within),
            "save": lambda: self.target.post(owner, "/v1/atlas/memory/save", timeout=within),
            "chat": lambda: self.target.say(owner, None, "Hello", timeout=within),
        }
        for name, call in calls.items():
            began = time.monotonic()
            try:
                status = call().status_code
            except httpx.HTTPError as error:
                self.faults.append(f"{what}: {name} of another owner got no answer in {within:.0f} s")
                self.note(f"{name}: {type(error).__name__}")
                continue
            took = time.monotonic() - began
            self.must(status == 200, f"{what}: {name} of another owner got {status}")
            self.must(took <= within, f"{what}: {name} of another owner took {took:.1f} s")

    @contextmanager
    def pace(self) -> Iterator[Meter]:
        """A neighbour beside the block, measured first beside one plain stream of another client."""
        target = self.target
        target.wait_idle()
        with beside(target.url, target.name, key_of(NEIGHBOUR)) as neighbour:
            with beside(target.url, target.name, key_of(COMPANION)):
                began = time.monotonic()
                time.sleep(2.0 if self.quick else 5.0)
                plain = neighbour.felt([(began, time.monotonic())])
            meter = Meter()
            try:
                yield meter
            finally:
                end = time.monotonic()
                if target.alive:
                    self.must(neighbour.wait_until(end), "the neighbour got no token for a minute after the attack")
                self._judge(plain, neighbour.felt(meter.spans))

    def _judge(self, plain: Pace, felt: Pace) -> None:
        self.faults += [f"the neighbour: {error}" for error in dict.fromkeys(felt.errors)]
        waits = [*felt.gaps, *felt.firsts]
        if not self.must(waits and plain.gaps, "the neighbour got no token at all"):
            return
        ratio = felt.p99 / max(plain.p99, _FLOOR_SECONDS)
        self.ratio = max(self.ratio or 0.0, ratio)
        figures = f"p99 {felt.p99 * 1e3:.0f} ms beside {plain.p99 * 1e3:.0f}, longest {max(waits) * 1e3:.0f} ms"
        self.note(figures)
        self.must(ratio <= RATIO, f"the neighbour's pauses became {ratio:.1f} times as long: {figures}")
        if felt.health:
            worst, before = max(felt.health), max(plain.health, default=0.0)
            self.note(f"/health {worst * 1e3:.0f} ms beside {before * 1e3:.0f}")
            self.must(worst <= max(0.3, 3 * before), f"/health took {worst:.2f} s, {before:.2f} before")

    @property
    def verdict(self) -> str:
        """One line: what was found."""
        shown = list(dict.fromkeys(self.faults))
        more = f" (and {len(shown) - _FAULTS_SHOWN} more)" if len(shown) > _FAULTS_SHOWN else ""
        return "; ".join(shown[:_FAULTS_SHOWN]) + more


@dataclass
class Meter:
    """When the attack's requests were under way."""

    spans: list[Interval] = field(default_factory=list)

    @contextmanager
    def span(self) -> Iterator[None]:
        """Measures the neighbour within the block."""
        began = time.monotonic()
        try:
            yield
        finally:
            self.spans.append((began, time.monotonic()))

    def repeat(self, work: Callable[[], object], seconds: float = 3.0, most: int = 200) -> None:
        """Does something again and again, so that short requests give enough pauses to judge by."""
        spent, done = 0.0, 0
        while not done or (spent < seconds and done < most):
            began = time.monotonic()
            with self.span():
                work()
            spent += time.monotonic() - began
            done += 1


def _line(text: str) -> str:
    found = " ".join(text.split())
    return found if len(found) <= 160 else f"{found[:60]} … {found[-90:]}"
