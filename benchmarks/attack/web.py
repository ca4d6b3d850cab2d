"""What a web page in the user's own browser can do to a server that has no keys."""

from __future__ import annotations

from benchmarks.attack.registry import Scene, attack
from benchmarks.attack.target import VICTIM

_PATHS = ("reset", "delete", "save", "load")
_BROWSERS: tuple[dict[str, str], ...] = (
    {"Origin": "https://evil.example"},
    {"Origin": "https://evil.example", "Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "no-cors"},
    {"Origin": "null"},
    {"Sec-Fetch-Site": "cross-site"},
    {"Sec-Fetch-Site": "same-site", "Origin": "http://127.0.0.1:1"},
    {"Origin": "http://localhost.evil.example"},
    {"Origin": "http://127.0.0.1.evil.example"},
)
_BODIES: tuple[tuple[bytes | None, str | None], ...] = (
    (None, None),
    (b"", "text/plain"),
    (b"", "application/json"),
    (b"{}", "application/json"),
    (b'{"session_id": null}', "application/json"),
    (b'{"context_id": "planted-a"}', "application/json"),
    (b'{"session_id": "planted-a"}', "text/plain"),
    (b"session_id=planted-a", "application/x-www-form-urlencoded"),
)


@attack(
    "foreign origin",
    does="sends every change of state with the headers of a page of another origin, with and without a body",
    holds="403, 415 or 400, and the sessions are there",
    keys=False,
)
def foreign_origin(scene: Scene) -> None:
    with scene.target.client(VICTIM) as http:
        for path in _PATHS:
            for headers in _BROWSERS:
                for body, kind in _BODIES:
                    typed = {} if kind is None else {"Content-Type": kind}
                    response = http.post(f"/v1/atlas/memory/{path}", content=body, headers={**headers, **typed})
                    scene.count()
                    scene.check(response, f"{path} of another origin")
                    scene.must(
                        response.status_code in (400, 403, 415),
                        f"{path} with {headers} and the body {body!r} as {kind}: {response.status_code}",
                    )
        for headers in _BROWSERS:
            config = http.post("/v1/atlas/config", json={"blend_ratio": 0.1}, headers=headers)
            scene.count()
            scene.must(config.status_code == 403, f"config with {headers}: {config.status_code}")
            turn = {"prompt": "Hello", "max_tokens": 1, "atlas": {"session_id": "planted-a"}}
            chat = http.post("/v1/completions", json=turn, headers=headers)
            scene.count()
            scene.must(chat.status_code == 403, f"a completion in a session with {headers}: {chat.status_code}")


@attack(
    "empty reset",
    does="resets with nothing in the request",
    holds="400: nothing never means everything",
    keys=False,
)
def empty_reset(scene: Scene) -> None:
    with scene.target.client(VICTIM) as http:
        for body, kind in ((None, None), (b"{}", "application/json"), (b"null", "application/json")):
            typed = {} if kind is None else {"Content-Type": kind}
            response = http.post("/v1/atlas/memory/reset", content=body, headers=typed)
            scene.count()
            scene.must(response.status_code == 400, f"reset with the body {body!r}: {response.status_code}")


@attack(
    "own origin",
    does="uses the API as the server's own page, and as a program without an origin, do",
    holds="both are served",
    keys=False,
)
def own_origin(scene: Scene) -> None:
    target = scene.target
    mine = {"Origin": target.url, "Sec-Fetch-Site": "same-origin"}
    with target.client(VICTIM) as http:
        for headers in ({}, mine, {"Sec-Fetch-Site": "none"}):
            response = http.post("/v1/atlas/memory/list", json={}, headers=headers)
            scene.count()
            scene.must(response.status_code == 200, f"list with {headers}: {response.status_code}")
