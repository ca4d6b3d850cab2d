"""An hour of ordinary use: which lines does an operator find in the log, and how many?

    python -m benchmarks.log_hour MODEL.gguf [--minutes 60] [--most 30] [--log-level info]

Starts the server with the shipped defaults and uses it as a few people with a monitoring system would: a chat every half
minute, streamed or not, in sessions or without; a memory saved, reset and deleted; a request with a mistyped field, one
for a path that is not there, a client that leaves in the middle of an answer; /metrics every 15 seconds, /health and
/ready every ten. Then it stops the server, prints every line of the log and how many there are of each kind, and ends
with 1 if there are more than `--most`, or if a request did not end as it should.
"""

from __future__ import annotations

import argparse
import re
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any

import httpx

from benchmarks.server_process import Server

_CHAT = "/v1/chat/completions"
_SESSIONS = ("notes", "travel", "kitchen")
_QUESTIONS = (
    "Name three rivers.",
    "How long does an egg have to boil?",
    "Write two sentences about the sea.",
    "What is a good name for a black cat?",
    "Explain in one sentence what a compiler does.",
    "What should I pack for a week in the mountains?",
    "Summarise what we have said so far.",
)
_LONG = 4000
"""Characters of the text that every tenth chat brings along; more than a window holds."""
_NUMBER = re.compile(r"\d+(?:\.\d+)?")


@dataclass
class Use:
    """What is done to a server, and what came back that should not have."""

    server: Server
    chats: int = 0
    counts: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)

    def chat(self) -> None:
        """The next chat: one in three without a session, one in two streamed, one in ten with a long text."""
        number, self.chats = self.chats, self.chats + 1
        text = _QUESTIONS[number % len(_QUESTIONS)]
        if number % 10 == 9:
            prose = (resources.files("atlas_jax.memory") / "texts" / "prose.txt").read_text("utf-8")
            start = number * 700 % (len(prose) - _LONG)
            text = f"{prose[start : start + _LONG]}\n\n{text}"
        body: dict[str, Any] = {"messages": [{"role": "user", "content": text}], "max_tokens": 96}
        if number % 3:
            body["atlas"] = {"session_id": _SESSIONS[number % len(_SESSIONS)]}
        if number % 2:
            self._stream(body | {"stream": True})
        else:
            self.call("POST", _CHAT, body)

    def leave(self) -> None:
        """A client that goes away after a few tokens of a long answer."""
        body = {"messages": [{"role": "user", "content": "Tell a long story."}], "max_tokens": 400, "stream": True}
        self._stream(body, leave_after=5)

    def call(self, method: str, path: str, body: dict[str, Any] | None = None, *, expected: int = 200) -> None:
        """One request, and whether its status was the one expected."""
        answer = self.server.http.request(method, path, json=body)
        self.counts[f"{method} {path}: {answer.status_code}"] += 1
        if answer.status_code != expected:
            self.wrong.append(f"{method} {path}: {answer.status_code} {answer.text[:200]}")

    def _stream(self, body: dict[str, Any], *, leave_after: int | None = None) -> None:
        events, ended = 0, False
        with self.server.http.stream("POST", _CHAT, json=body) as answer:
            self.counts[f"POST {_CHAT} (stream): {answer.status_code}"] += 1
            for line in answer.iter_lines():
                events += line.startswith("data: ")
                ended = ended or line == "data: [DONE]"
                if leave_after is not None and events >= leave_after:
                    return
        if not ended:
            self.wrong.append(f"a stream ended after {events} events")


def hour(use: Use, seconds: float, *, clock: Callable[[], float] = time.monotonic) -> None:
    """Uses the server for some time. What happens once happens at the same share of it, however long it is."""
    once: list[tuple[float, Callable[[], None]]] = [
        (0.1, lambda: use.call("POST", _CHAT, {"messages": [], "max_token": 5}, expected=400)),
        (0.15, lambda: use.call("GET", "/v1/chat/completion", expected=404)),
        (0.2, use.leave),
        (0.4, lambda: use.call("POST", "/v1/atlas/memory/save", {"session_id": _SESSIONS[1]})),
        (0.5, lambda: use.call("GET", "/v1/atlas/memory?session_id=" + _SESSIONS[1])),
        (0.6, lambda: use.call("POST", "/v1/atlas/memory/reset", {"session_id": _SESSIONS[2]})),
        (0.8, lambda: use.call("POST", "/v1/atlas/memory/delete", {"context_id": _SESSIONS[2]})),
    ]
    every: list[tuple[float, Callable[[], None]]] = [
        (30.0, use.chat),
        (15.0, lambda: use.call("GET", "/metrics")),
        (10.0, lambda: use.call("GET", "/health")),
        (10.0, lambda: use.call("GET", "/ready")),
        (60.0, lambda: use.call("GET", "/v1/atlas/status")),
    ]
    began = clock()
    due = [0.0] * len(every)
    while (now := clock() - began) < seconds:
        while once and now >= once[0][0] * seconds:
            once.pop(0)[1]()
        for index, (period, action) in enumerate(every):
            if now >= due[index]:
                due[index] += period
                action()
        time.sleep(max(0.0, min(due) - (clock() - began)))


def kinds(log: str) -> Counter[str]:
    """The lines of a log by logger and words, numbers left out; lines that do not begin like a line of ours count too."""
    found: Counter[str] = Counter()
    for line in log.splitlines():
        _, _, rest = line.partition(",")  # the time
        found[_NUMBER.sub("#", rest.partition(" ")[2] or line)] += 1
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--minutes", type=float, default=60.0)
    parser.add_argument("--most", type=int, default=30, help="lines there may be")
    parser.add_argument("--log-level", default="info")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        server = Server(args.model, Path(name), ("--log-level", args.log_level))
        use = Use(server)
        try:
            hour(use, args.minutes * 60)
        except httpx.HTTPError as error:
            use.wrong.append(f"{type(error).__name__}: {error}")
        stopped = server.end()
        log = server.log
    print(log)
    lines = len(log.splitlines())
    print(f"{args.minutes:g} minutes, stopped in {stopped:.1f} s; {lines} lines in the log, by kind:")
    for kind, count in kinds(log).most_common():
        print(f"{count:5d}  {kind[:150]}")
    print("requests:")
    for request, count in sorted(use.counts.items()):
        print(f"{count:5d}  {request}")
    if lines > args.most:
        use.wrong.append(f"{lines} lines in the log, at most {args.most} were wanted")
    for problem in use.wrong:
        print(f"WRONG: {problem}", file=sys.stderr)
    return 1 if use.wrong else 0


if __name__ == "__main__":
    sys.exit(main())
