"""A hundred streams at once with settings drawn at random: do all end, does anything compile, does memory come back?

    python -m benchmarks.load MODEL.gguf [--streams 100] [--rounds 3] [--seed 0] [--output docs/benchmarks/load.md]
        [flags of the server]

Every round begins half of its streams as sessions, asks all streams at once, asks again with the same sessions (their
second turn) and other plain requests, and deletes the sessions. Ends with 1 and says why if a stream did not end as it
should, a program was compiled after the warm-up, a secret word of one conversation appeared in another, or the server
kept more memory after the last round than after the first.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import re
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any

import httpx

from benchmarks.server_process import Server

SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 12}, "count": {"type": "integer", "maximum": 99}},
    "required": ["name", "count"],
    "additionalProperties": False,
}
_STOPS = ([" the "], [".", "?"], ["never in any text"], ["\n\n", "password"])
_REST_SECONDS = 10
"""An idle engine gives memory back after five."""
_ROOM = 1.1
"""How much more memory than after the first round, in which the server takes what it keeps, the last may leave."""


@dataclass(frozen=True)
class Limits:
    """What the drawn requests keep to.

    Attributes:
      windows: sizes of attention windows.
      words: most words of a prompt; most prompts have a tenth of it at most.
      tokens: most tokens of an answer.
      vocab: tokens that a bias may be put on.
    """

    windows: tuple[int, ...] = (128, 256, 512, 1024)
    words: int = 600
    tokens: int = 48
    vocab: int = 40_000


@dataclass(frozen=True)
class Call:
    """One request: where to, its body, the word that its prompt holds and no other, and when its client leaves.

    Attributes:
      leaves: events after which the client closes the connection; None stays to the end.
    """

    path: str
    body: dict[str, Any]
    secret: str
    leaves: int | None

    @property
    def session(self) -> str | None:
        """The session it goes on with."""
        name: str | None = self.body.get("atlas", {}).get("session_id")
        return name


@dataclass
class Outcome:
    """What a client received.

    Attributes:
      error: an HTTP status or an error event, with its message.
      ended: whether the stream came to its end.
    """

    error: str = ""
    ended: bool = False
    texts: dict[int, str] = field(default_factory=dict)
    reasons: dict[int, str] = field(default_factory=dict)
    usage: dict[str, int] = field(default_factory=dict)
    stats: dict[str, Any] | None = None


def draw(seed: str, streams: int, turn: int, limits: Limits) -> list[Call]:
    """The requests of one turn: the first half in sessions, the same in every turn; the others are new ones."""
    prose = (resources.files("atlas_jax.recall") / "texts" / "prose.txt").read_text("utf-8").split()
    calls = []
    for number in range(streams):
        has_session = number < streams // 2
        own = random.Random(f"{seed} {number}")  # what a session keeps
        rng = random.Random(f"{seed} {number} {turn}")
        secret = _word(own if has_session else rng)
        shape = {"window_size": own.choice(limits.windows), "update_frequency": own.choice((128, 256))}
        shape |= {"memory_layers": own.randint(1, 3), "polynomial_degree": own.randint(1, 3)}
        words = _length(rng, limits.words)
        start = rng.randrange(len(prose))
        said = f"The password is {secret}. "
        text = said * 2 * (turn == 0 or not has_session) + " ".join((prose * 2)[start : start + words])
        memory = {"session_id": f"{seed}-{number}"} if has_session else {}
        if has_session or rng.random() < 0.4:
            memory |= shape | _memory(rng, shape["update_frequency"])
        calls.append(_call(rng, f"{text} The password is", memory, limits, secret))
    return calls


def _call(rng: random.Random, text: str, memory: dict[str, Any], limits: Limits, secret: str) -> Call:
    body: dict[str, Any] = {"stream": True, "stream_options": {"include_usage": True}}
    body |= {"max_tokens": rng.randint(1, limits.tokens), **_sampling(rng, limits.vocab)}
    if memory:
        body["atlas"] = memory
    leaves = rng.randint(1, 8) if rng.random() < 0.1 else None
    if rng.random() < 0.5:
        body["messages"] = [{"role": "user", "content": text}]
        if rng.random() < 0.15:
            schema = {"type": "json_schema", "json_schema": {"name": "answer", "strict": True, "schema": SCHEMA}}
            body["response_format"] = rng.choice(({"type": "json_object"}, schema))
            body.pop("stop", None)
        if rng.random() < 0.2:
            body |= {"logprobs": True, "top_logprobs": rng.randint(0, 20)}
        return Call("/v1/chat/completions", body, secret, leaves)
    body["prompt"] = text
    if rng.random() < 0.2:
        body["logprobs"] = rng.randint(0, 5)
    if not memory and rng.random() < 0.2:
        body["echo"] = True
    return Call("/v1/completions", body, secret, leaves)


def _sampling(rng: random.Random, vocab: int) -> dict[str, Any]:
    """Each setting is there in some requests."""
    some: dict[str, Any] = {
        "temperature": rng.choice((0, 0.3, 0.8, 1.5)),
        "top_k": rng.choice((1, 5, 40)),
        "top_p": rng.uniform(0.5, 1),
        "min_p": rng.uniform(0, 0.2),
        "typical_p": rng.uniform(0.5, 1),
        "repeat_penalty": rng.uniform(0.9, 1.3),
        "presence_penalty": rng.uniform(-1, 1),
        "frequency_penalty": rng.uniform(-1, 1),
        "logit_bias": {str(rng.randrange(vocab)): rng.uniform(-10, 10) for _ in range(rng.randint(1, 20))},
        "seed": rng.randrange(1 << 30),
        "stop": rng.choice(_STOPS),
        "n": 2,
        "ignore_eos": True,
    }
    return {name: value for name, value in some.items() if rng.random() < 0.3}


def _memory(rng: random.Random, update: int) -> dict[str, Any]:
    some: dict[str, Any] = {
        "blend_ratio": rng.choice((0, 0.5, 0.9, 1)),
        "use_muon": rng.random() < 0.5,
        "learning_rate": rng.choice((0.001, 0.0015)),
        "warmup_tokens": rng.choice((0, 200)),
        "omega_window": rng.randint(update, 512),
        "cache_strategy": rng.choice(("lru", "lfu", "adaptive")),
        "batch_size": rng.choice((1, 4)),
        "read": rng.random() < 0.7,
        "write": rng.random() < 0.7,
    }
    return {name: value for name, value in some.items() if rng.random() < 0.4}


def _length(rng: random.Random, most: int) -> int:
    """Words: most requests are short, a few long."""
    return rng.randint(1, most if rng.random() < 0.15 else most // 10)


def _word(rng: random.Random) -> str:
    """A word that no text has in it."""
    return "".join(rng.choice("bdfgklmnprstvz") + rng.choice("aeiou") for _ in range(6))


async def ask_all(url: str, calls: Sequence[Call]) -> list[Outcome]:
    """Sends all requests at once and reads every stream to its end, or as far as its client stays."""
    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(base_url=url, timeout=httpx.Timeout(600), limits=limits) as client:
        return list(await asyncio.gather(*(_ask(client, call) for call in calls)))


async def _ask(client: httpx.AsyncClient, call: Call) -> Outcome:
    outcome = Outcome()
    events = 0
    async with client.stream("POST", call.path, json=call.body) as response:
        if response.status_code != 200:
            outcome.error = f"HTTP {response.status_code}: {(await response.aread()).decode()}"
            return outcome
        async for line in response.aiter_lines():
            if not line.startswith("data: "):
                continue
            if line == "data: [DONE]":
                outcome.ended = True
                return outcome
            _take(outcome, json.loads(line.removeprefix("data: ")))
            events += 1
            if events == call.leaves:
                return outcome
    return outcome


def _take(outcome: Outcome, chunk: dict[str, Any]) -> None:
    if "error" in chunk:
        outcome.error = f"error event: {chunk['error']}"
    for choice in chunk.get("choices", ()):
        index = choice["index"]
        text = choice["text"] if "text" in choice else choice["delta"].get("content") or ""
        outcome.texts[index] = outcome.texts.get(index, "") + text
        if choice["finish_reason"]:
            outcome.reasons[index] = choice["finish_reason"]
    outcome.usage = chunk.get("usage") or outcome.usage
    outcome.stats = chunk.get("atlas_stats") or outcome.stats


def faults(call: Call, outcome: Outcome, secrets: frozenset[str]) -> Iterator[str]:
    """What is wrong with an outcome; `secrets` are those of all requests."""
    strangers = {word for word in secrets - {call.secret} if any(word in text for text in outcome.texts.values())}
    if strangers:
        yield f"has the secret of another conversation: {strangers}"
    if outcome.error:
        yield outcome.error
        return
    if not outcome.ended:
        if call.leaves is None:
            yield "the stream broke off"
        return
    count = call.body.get("n", 1)
    if sorted(outcome.reasons) != list(range(count)):
        yield f"{len(outcome.reasons)} of {count} choices ended"
    most, written = count * call.body["max_tokens"], outcome.usage.get("completion_tokens", -1)
    if not (written == most if set(outcome.reasons.values()) == {"length"} else 0 <= written <= most):
        yield f"{written} tokens written, {most} asked for, ended by {outcome.reasons}"
    if not call.body.get("echo") and any(
        stop in text for stop in call.body.get("stop", ()) for text in outcome.texts.values()
    ):
        yield f"a stop string is in the text: {outcome.texts}"
    if "response_format" in call.body:
        for index, reason in outcome.reasons.items():
            if reason == "stop" and not isinstance(_parsed(outcome.texts[index]), dict):
                yield f"not a JSON object: {outcome.texts[index]!r}"
    if "atlas" in call.body:
        stats = outcome.stats or {}
        if (stats.get("degraded", "no statistics"), stats.get("session_id")) != (None, call.session):
            yield f"the memory did not take part: {outcome.stats}"


def _parsed(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return None


def gauge(metrics: str, name: str) -> float:
    """A figure of `/metrics`."""
    found = re.search(rf"^{name} (\S+)$", metrics, re.MULTILINE)
    assert found is not None, f"no {name} in /metrics"
    return float(found[1])


def at_rest(http: httpx.Client, patience: float = 60.0) -> str:
    """`/metrics`, once nothing runs any more: what clients that left had asked for ends at the next step."""
    end = time.monotonic() + patience
    while True:
        metrics = http.get("/metrics").text
        if not any(gauge(metrics, f"atlas_{name}") for name in ("num_requests_running", "contexts_in_use")):
            return metrics
        assert time.monotonic() < end, "something still runs although every client has its answer or has left"
        time.sleep(0.1)


@contextmanager
def watched(server: Server) -> Iterator[list[float]]:
    """Takes the server's memory ten times a second; the first entry is the most seen."""
    most, done = [server.resident], threading.Event()

    def watch() -> None:
        while not done.wait(0.1):
            most[0] = max(most[0], server.resident)

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield most
    finally:
        done.set()
        thread.join()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--streams", type=int, default=100)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path)
    args, flags = parser.parse_known_args()
    # the last of a hundred waits for its place longer than the minute that is the default; the clients take processor
    # time from the server, which would say that it was slow
    flags = ["--queue-timeout", "600", "--atlas-latency-budget-ms", "60000", *flags]
    lines = [
        "| round | streams | ended | clients that left | tokens read | written | s | compilations "
        "| MiB before | most | after |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    trouble: list[str] = []
    after: list[float] = []
    asked_with = Counter[str]()
    knew = sessions = 0
    with tempfile.TemporaryDirectory() as name:
        server = Server(args.model, Path(name), flags)
        server.wait_for(r"(Every program is compiled)")
        time.sleep(_REST_SECONDS)
        compiled = gauge(server.http.get("/metrics").text, "atlas_jit_compilations_total")
        for round_number in range(args.rounds):
            turns = [draw(f"{args.seed}-{round_number}", args.streams, turn, Limits()) for turn in range(2)]
            secrets = frozenset(call.secret for calls in turns for call in calls)
            before, started = server.resident, time.monotonic()
            pairs: list[tuple[Call, Outcome]] = []
            with watched(server) as most:
                for calls in turns:
                    pairs += zip(calls, asyncio.run(ask_all(server.url, calls)), strict=True)
            seconds = time.monotonic() - started
            at_rest(server.http)
            for number, (call, outcome) in enumerate(pairs):
                trouble += [
                    f"round {round_number}, stream {number}: {fault}" for fault in faults(call, outcome, secrets)
                ]
                asked_with.update({*call.body, *call.body.get("atlas", {})})
            second = [(call, outcome) for call, outcome in pairs[args.streams :] if call.session]
            sessions += len(second)
            knew += sum(any(call.secret in text for text in outcome.texts.values()) for call, outcome in second)
            for session in {call.session for call, _ in pairs if call.session}:
                answer = server.http.post("/v1/atlas/memory/delete", json={"context_id": session})
                if answer.status_code not in (200, 404):  # 404: its client had left before anything was kept
                    trouble.append(f"session {session} was not deleted: {answer.text}")
            if server.http.post("/v1/atlas/memory/list", json={}).json()["contexts"]:
                trouble.append("sessions are left")
            metrics = at_rest(server.http)
            time.sleep(_REST_SECONDS)
            compilations = gauge(metrics, "atlas_jit_compilations_total") - compiled
            after.append(server.resident)
            usage = Counter[str]()
            for _, outcome in pairs:
                usage.update({k: v for k, v in outcome.usage.items() if isinstance(v, int)})
            ended = sum(outcome.ended for _, outcome in pairs)
            left = sum(not outcome.ended and call.leaves is not None for call, outcome in pairs)
            row = [round_number + 1, len(pairs), ended, left, usage["prompt_tokens"], usage["completion_tokens"]]
            row += [f"{x:.0f}" for x in (seconds, compilations, before, most[0], after[-1])]
            lines.append("| " + " | ".join(map(str, row)) + " |")
            print(lines[-1], flush=True)
        server.end()
        trouble += re.findall(r"^.* (?:WARNING|ERROR|CRITICAL) .*|^Traceback.*", server.log, re.MULTILINE)
    if compilations:
        trouble.append(f"{compilations:.0f} programs were compiled after the warm-up")
    if after[-1] > _ROOM * after[0]:
        trouble.append(f"{after[-1]:.0f} MiB are in use after the last round, {after[0]:.0f} after the first")
    settings = ", ".join(f"`{name}` {count}" for name, count in sorted(asked_with.items()))
    text = "\n".join(
        [
            "# A hundred streams at once",
            "",
            f"`python -m benchmarks.load {' '.join(sys.argv[1:])}`",
            "",
            f"{args.streams} streams at once, twice a round, half of them in sessions.",
            *lines,
            "",
            f"In their second turn {knew} of {sessions} sessions said their own secret word, "
            f"{sum('secret' in fault for fault in trouble)} streams another's.",
            "",
            f"How many requests had which field: {settings}.",
            "",
            "Trouble:" if trouble else "No trouble.",
            *(f"- {fault}" for fault in trouble),
        ]
    )
    print(text)
    if args.output:
        args.output.write_text(text + "\n", "utf-8")
    raise SystemExit(1 if trouble else 0)


if __name__ == "__main__":
    main()
