"""Requests that keep the event loop or the engine's thread from everybody else."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import httpx

from benchmarks.attack.registry import Scene, attack
from benchmarks.attack.target import ATTACKER, MEMORY, headers_of

_EMPTY_LISTS = 1_300_000
_ENDLESS_PROMPT_TOKENS = 176_000


def _bodies() -> dict[str, Callable[[], tuple[str, bytes]]]:
    lists = b"[" + b",".join([b"[]"] * _EMPTY_LISTS) + b"]"
    objects = b"[" + b",".join([b"{}"] * _EMPTY_LISTS) + b"]"
    empty = [{"role": "user", "content": ""}] * 8192

    def chat(**fields: Any) -> tuple[str, bytes]:
        return "/v1/chat/completions", json.dumps({"max_tokens": 1, **fields}).encode()

    keys = {f"k{number}": number for number in range(150_000)}
    return {
        "a prompt of 1.3 million empty lists": lambda: ("/v1/completions", b'{"prompt":' + lists + b"}"),
        "messages of 1.3 million empty objects": lambda: ("/v1/chat/completions", b'{"messages":' + objects + b"}"),
        "a state of 1.3 million empty lists": lambda: (
            "/v1/atlas/memory/save",
            b'{"context_id":"heavy","state":' + lists + b"}",
        ),
        "8 192 empty messages": lambda: chat(messages=empty),
        "8 192 messages of many parts": lambda: chat(
            messages=[{"role": "user", "content": [{"type": "text", "text": "a"}] * 12}] * 8000
        ),
        "a stop of a megabyte": lambda: chat(messages=empty[:1], stop="a" * (1 << 20)),
        "150 000 unknown fields": lambda: chat(messages=[{"role": "user", "content": "x"}], **keys),
        "1 000 000 numbers to detokenize": lambda: (
            "/detokenize", b'{"tokens":[' + b",".join([b"7"] * 1_000_000) + b"]}"
        ),
        "3 megabytes to tokenize": lambda: ("/tokenize", json.dumps({"content": "ab " * 1_000_000}).encode()),
        "3 megabytes without a space to tokenize": lambda: (
            "/tokenize", json.dumps({"content": "a" * 3_000_000, "with_pieces": True}).encode()
        ),
        "a number of a million digits": lambda: ("/v1/completions", b'{"prompt":"x","seed":' + b"9" * 1_000_000 + b"}"),
        "100 000 open brackets": lambda: ("/v1/completions", b'{"prompt":' + b"[" * 100_000),
        "500 000 escapes": lambda: (
            "/v1/completions", b'{"max_tokens":1,"prompt":"x","user":"' + b"\\u0041" * 500_000 + b'"}'
        ),
    }  # fmt: skip


def _register(name: str) -> None:
    @attack(
        f"body: {name}",
        does=f"sends {name}",
        holds="the event loop answers, a neighbour keeps its pace, no 5xx",
    )
    def run(scene: Scene) -> None:
        path, raw = _bodies()[name]()

        def send() -> None:
            scene.count()
            try:
                response = http.post(path, content=raw, headers={"Content-Type": "application/json"})
                scene.check(response, name)
            except httpx.HTTPError as error:
                scene.faults.append(f"{name}: {type(error).__name__}")

        with scene.target.client(ATTACKER, 60) as http, scene.pace() as meter:
            meter.repeat(send, 1.0 if scene.quick else 3.0, 20)


for _name in _bodies():
    _register(_name)


@attack(
    "a prompt of 176 000 tokens",
    does="sends one long prompt into a session",
    holds="a neighbour keeps its pace; the request is answered or refused",
    flags=("--queue-timeout", "600"),
    growth_mib=1024.0,
)
def long_prompt(scene: Scene) -> None:
    words = _ENDLESS_PROMPT_TOKENS // (20 if scene.quick else 1)
    text = " ".join(f"page{number % 97}" for number in range(words // 3))
    body = {"prompt": text, "max_tokens": 4, "atlas": {"session_id": "endless", **MEMORY}}
    with scene.pace() as meter, meter.span():
        response = scene.send(ATTACKER, "/v1/completions", body, "the long prompt", 900.0)
    if response is not None and response.status_code == 200:
        scene.note(f"{response.json()['usage']['prompt_tokens']} tokens")


@attack(
    "a plain prompt as long as the context",
    does="sends prompts of the model's whole context, without a memory",
    holds="a neighbour keeps its pace",
    growth_mib=1024.0,
)
def plain_prompt(scene: Scene) -> None:
    context = scene.target.http.get("/props", headers=headers_of(ATTACKER)).json()["default_generation_settings"][
        "n_ctx"
    ]
    words = min(context, 8192) // 4
    count = [0]

    def send() -> None:
        count[0] += 1
        text = " ".join(f"page{(number + count[0]) % 97}" for number in range(words))
        scene.send(ATTACKER, "/v1/completions", {"prompt": text, "max_tokens": 1}, "the plain prompt", 120.0)

    with scene.pace() as meter:
        meter.repeat(send, 3.0, 5)
