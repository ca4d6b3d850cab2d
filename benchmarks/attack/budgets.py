"""What one client can make the server keep."""

from __future__ import annotations

import json
from typing import Any

import httpx

from benchmarks.attack.registry import Scene, attack
from benchmarks.attack.target import ATTACKER, MEMORY, VICTIM, Target, prose

_STATES, _STATE_BYTES = 24, 12_300_000
_SESSIONS, _HOST, _DISK = 40, 4.4, 22.0
"""Sessions, and what the tiers hold of them; of the disk an owner may have half."""


def _state(size: int) -> list[Any]:
    """JSON of about that many bytes that is far larger as objects."""
    return [{"a": number % 10, "b": []} for number in range(size // 17)]


@attack(
    "heavy states",
    does="stores 12.3 MB of JSON in 24 contexts",
    holds="they are listed with their size, and cost about that much memory",
    growth_mib=200.0,
)
def states(scene: Scene) -> None:
    target = scene.target
    one = _state(_STATE_BYTES // _STATES)
    size = len(json.dumps(one, separators=(",", ":")))
    stored = 0
    for number in range(_STATES):
        body = {"context_id": f"state{number}", "state": one}
        response = scene.send(ATTACKER, "/v1/atlas/memory/save", body, "a state", 60.0)
        stored += response is not None and response.status_code == 200
    rows = [row for name, row in target.contexts(ATTACKER).items() if name.startswith("state")]
    light = sum(row["bytes"] < size / 2 for row in rows)
    scene.must(not light, f"{light} contexts are listed with less than half of the {size} bytes of their state")
    scene.note(f"{stored} stored")
    found = target.post(ATTACKER, "/v1/atlas/memory/load", {"context_id": "state0"})
    scene.must(not stored or found.json().get("state") == one, "the state that comes back is another")


@attack(
    "full tiers",
    does="begins 40 sessions where main memory has room for 4 and the owner's share of the disk for 11",
    holds="a refusal with Retry-After before the budgets break; others save; a stop loses nothing that was answered",
    alone=True,
)
def tiers(scene: Scene) -> None:
    size = _session_bytes(scene)
    host, disk = int(_HOST * size), int(_DISK * size)
    target = scene.start("--atlas-l2-cache-size", str(host), "--atlas-l3-cache-size", str(disk), folder="tiers")
    target.plant()
    target.rest()
    answered: dict[tuple[str, str], int] = {}
    refused = 0
    for number in range(_SESSIONS):
        name = f"fill{number}"
        scene.count()
        try:
            response = target.say(ATTACKER, name, prose(f"word{number}", 200), timeout=60)
        except httpx.HTTPError as error:
            scene.faults.append(f"no answer in session {number} ({type(error).__name__})")
            continue
        scene.check(response, f"session {number}")
        if response.status_code == 200:
            answered[ATTACKER, name] = response.json()["usage"]["prompt_tokens"]
        else:
            refused += 1
            if response.status_code == 507:
                scene.must("retry-after" in response.headers, "507 without Retry-After")
    used = sum(path.stat().st_size for path in target.files())
    scene.note(f"{len(answered)} answered, {refused} refused, {used / 1e6:.0f} MB on disk of {disk / 1e6:.0f}")
    growth = target.peak - target.base
    room = host / 2**20 + 200
    scene.must(growth <= room, f"memory grew by {growth:.0f} MiB with a tier of {host / 2**20:.0f}")
    scene.must(used <= 1.2 * disk, f"{used} bytes are on disk, {disk} allowed")
    held = _listed_in_host(target)
    scene.must(held <= 1.1 * host + size, f"{held} bytes are listed as resident in main memory, {host} allowed")
    saved = target.post(VICTIM, "/v1/atlas/memory/save", {"session_id": "planted-a"})
    scene.must(saved.status_code == 200, f"another owner cannot save: {saved.status_code} {saved.text[:100]}")
    answer = target.say(VICTIM, "planted-a", "go on")
    scene.must(answer.status_code == 200, f"another owner's session is refused: {answer.status_code}")
    with target.client(VICTIM) as http:
        status = http.get("/v1/atlas/status").json()["status"]
    scene.note(f"status {status}")
    planted = target.planted | answered
    scene.stop(target)
    target = scene.start("--atlas-l2-cache-size", str(host), "--atlas-l3-cache-size", str(disk), folder="tiers")
    scene.lost += target.lost(planted)


def _session_bytes(scene: Scene) -> int:
    target = scene.start(folder="one")
    target.say(ATTACKER, "one", prose("word1", 200)).raise_for_status()
    target.post(ATTACKER, "/v1/atlas/memory/save").raise_for_status()
    size = int(target.contexts(ATTACKER)["one"]["bytes"])
    target.kill()
    return size


def _listed_in_host(target: Target) -> int:
    rows = [*target.contexts(ATTACKER).values(), *target.contexts(VICTIM).values()]
    return sum(row["bytes"] for row in rows if row["resident"] == "host")


@attack(
    "many sessions",
    does="begins 300 sessions of a few words",
    holds="each is answered or refused, and memory stays bounded",
    growth_mib=1536.0,  # the host tier takes 1 024 of it
)
def many(scene: Scene) -> None:
    with scene.target.client(ATTACKER) as http:
        for number in range(scene.times(300)):
            scene.count()
            body = {"prompt": f"Number {number}", "max_tokens": 1, "atlas": {"session_id": f"many{number}", **MEMORY}}
            scene.check(http.post("/v1/completions", json=body), f"session {number}")
