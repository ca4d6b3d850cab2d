"""What one owner can learn of another's, or do to it."""

from __future__ import annotations

import json
from typing import Any

import httpx

from benchmarks.attack.registry import Scene, attack
from benchmarks.attack.target import ATTACKER, MEMORY, SECRET, VICTIM, key_of

_PUBLIC = {"/", "/health", "/v1/health", "/ready", "/schema", "/schema/openapi.json"}
_NO_KEY = {401, 404, 405}


@attack(
    "routes without a key",
    does="calls every route without a key, with a wrong one, and with a right one cut short",
    holds="401 everywhere but at the health checks and the description of the API",
    flags=("--failure-limit", "0"),
)
def without_key(scene: Scene) -> None:
    target = scene.target
    with target.client(ATTACKER) as http:
        document = http.get("/schema/openapi.json").json()
    keys = ("", "wrong", key_of(ATTACKER)[:-1], key_of(ATTACKER) + "x", "null", "*", "\u00e9" * 5)
    with httpx.Client(base_url=target.url, timeout=60) as http:
        for path, methods in document["paths"].items():
            for method in sorted({name.upper() for name in methods} & {"GET", "POST", "PUT", "DELETE"}):
                for key in keys:
                    headers = {b"Authorization": f"Bearer {key}".encode()} if key else {}
                    url = path.replace("{", "").replace("}", "").replace(":path", "")
                    body: dict[str, Any] = {"json": {}} if method == "POST" else {}
                    response = http.request(method, url, headers=headers, **body)
                    scene.count()
                    if path not in _PUBLIC:
                        scene.must(response.status_code in _NO_KEY, f"{method} {path}: {response.status_code}")
                        scene.must(SECRET not in response.text, f"{method} {path} shows a session")


@attack(
    "another owner's sessions",
    does="uses every route of the memory with the names of another owner's sessions and files",
    holds="nothing of theirs is seen or changed",
)
def isolation(scene: Scene) -> None:
    target = scene.target
    target.post(VICTIM, "/v1/atlas/memory/save", {"filename": "private.atlas"}).raise_for_status()
    target.post(VICTIM, "/v1/atlas/memory/save", {"context_id": "planted-a", "state": {"secret": SECRET}})
    names = [name for _, name in target.planted]
    folders = sorted({path.relative_to(target.memory).parts[0] for path in target.files()})
    files = ["private.atlas", f"{target.name}_memory.atlas", *(f"../{folder}/private.atlas" for folder in folders)]
    calls: list[tuple[str, str, Any]] = [("GET", "/v1/atlas/memory", None), ("POST", "/v1/atlas/memory/list", {})]
    for name in names:
        calls += [
            ("GET", f"/v1/atlas/memory?session_id={name}", None),
            ("POST", "/v1/atlas/memory/load", {"context_id": name}),
            ("POST", "/v1/atlas/memory/save", {"session_id": name}),
            ("POST", "/v1/atlas/memory/reset", {"session_id": name}),
            ("POST", "/v1/atlas/memory/delete", {"context_id": name}),
        ]
    calls += [("POST", "/v1/atlas/memory/load", {"filename": name}) for name in files]
    calls += [("GET", path, None) for path in ("/v1/atlas/status", "/v1/atlas/stats", "/v1/atlas/metrics", "/slots")]
    calls += [("GET", "/metrics", None), ("GET", "/props", None), ("POST", "/v1/atlas/memory/reset", {"all": True})]
    with target.client(ATTACKER) as http:
        for method, path, body in calls:
            response = http.request(method, path, json=body) if body is not None else http.request(method, path)
            scene.count()
            what = f"{method} {path} {json.dumps(body)}"
            scene.check(response, what)
            if path.startswith("/v1/atlas/memory"):
                wanted = body is not None and ("filename" in body or body.get("context_id") in names)
                if wanted:
                    scene.must(response.status_code in (400, 404), f"{what}: {response.status_code}")
            seen = [word for word in (SECRET, *names) if word in response.text and response.status_code < 400]
            scene.must(SECRET not in response.text, f"{what} shows the other's text")
            if path != "/v1/atlas/memory/save":
                scene.must(not seen or "session_id" in path or body, f"{what} shows {seen}")
        for name in names:
            prompt = "The word is"
            body = {"prompt": prompt, "max_tokens": 16, "temperature": 0, "atlas": {"session_id": name, **MEMORY}}
            answer = http.post("/v1/completions", json=body)
            scene.count()
            if scene.check(answer, "a turn in a session of the same name") and answer.status_code == 200:
                stats = answer.json()["atlas_stats"]
                scene.must(not stats["cache_hit"], f"session {name} of another owner was continued")
                scene.must(SECRET not in answer.text, f"session {name} says the other's word")
    state = target.post(VICTIM, "/v1/atlas/memory/load", {"context_id": "planted-a"})
    scene.must(state.json().get("state") == {"secret": SECRET}, f"the state is {state.text[:100]}")
