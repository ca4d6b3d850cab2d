"""A hundred clients who do everything at once, well and badly."""

from __future__ import annotations

import random
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx

from benchmarks.attack.bodies import draw
from benchmarks.attack.registry import Scene, attack
from benchmarks.attack.target import ATTACKER, COMPANION, MEMORY, NEIGHBOUR, SECRET, prose

_CLIENTS = 100


@attack(
    "a crowd",
    does="lets 100 clients chat, stream, leave, save, list, delete and send nonsense for 180 s (--seconds)",
    holds="no 5xx but refusals with Retry-After, nobody sees another's words, all ends",
    flags=("--queue-timeout", "20"),
    growth_mib=5632.0,  # a decode batch of 32 rows of 8 192 tokens takes 3 000 MiB, the host tier of sessions 1 024
)
def crowd(scene: Scene) -> None:
    end = time.monotonic() + scene.seconds
    statuses = Counter[str]()

    def client(number: int) -> None:
        rng = random.Random(f"{number}")
        owner = (ATTACKER, NEIGHBOUR, COMPANION)[number % 3]
        with scene.target.client(owner, 120.0) as http:
            while time.monotonic() < end and scene.target.alive:
                try:
                    statuses[_act(scene, http, rng, number)] += 1
                except httpx.HTTPError as error:
                    if scene.target.alive:
                        scene.faults.append(f"client {number}: {type(error).__name__}")
                    time.sleep(0.2)
                scene.count()

    with ThreadPoolExecutor(_CLIENTS) as pool:
        list(pool.map(client, range(_CLIENTS)))
    scene.note(", ".join(f"{name} {count}" for name, count in sorted(statuses.items())))


def _act(scene: Scene, http: httpx.Client, rng: random.Random, number: int) -> str:
    way = rng.choice(("chat", "chat", "session", "session", "stream", "leave", "memory", "nonsense"))
    body: dict[str, Any] = {"max_tokens": rng.randrange(1, 24), "temperature": rng.choice((0, 0.8))}
    text = prose(f"c{number}", rng.randrange(2, 200))
    if way == "nonsense":
        path, raw = draw(rng)
        response = http.post(path, content=raw, headers={"Content-Type": "application/json"})
        scene.must(response.status_code < 500 or response.status_code in (503, 507), f"{path}: {response.text[:100]}")
        return "nonsense"
    if way == "memory":
        path = rng.choice(("save", "list", "delete", "reset"))
        names = {"save": "session_id", "delete": "context_id", "reset": "session_id"}
        content = {names[path]: f"crowd{number}"} if path in names else {}
        response = http.post(f"/v1/atlas/memory/{path}", json=content)
    elif way in ("stream", "leave"):
        with http.stream("POST", "/v1/completions", json={**body, "prompt": text, "stream": True}) as response:
            for count, _ in enumerate(response.iter_lines()):
                if way == "leave" and count > 3:
                    return "left"
            return _judge(scene, response.status_code, dict(response.headers), "", number)
    else:
        memory = {"atlas": {"session_id": f"crowd{number}", **MEMORY}} if way == "session" else {}
        body |= {"messages": [{"role": "user", "content": text}], **memory}
        response = http.post("/v1/chat/completions", json=body)
    return _judge(scene, response.status_code, dict(response.headers), response.text, number)


def _judge(scene: Scene, status: int, headers: dict[str, str], text: str, number: int) -> str:
    scene.must(status < 500 or status in (503, 507), f"client {number}: {status} {text[:100]}")
    if status in (429, 503):
        scene.must("retry-after" in headers, f"{status} without Retry-After")
    scene.must(SECRET not in text, f"client {number} sees another owner's words")
    return str(status)
