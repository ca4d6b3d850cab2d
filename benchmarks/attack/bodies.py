"""Request bodies drawn at random: right ones, changed in one or a few places."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx

from benchmarks.attack.registry import Scene, attack
from benchmarks.attack.target import ATTACKER, MEMORY

_SAMPLING = {
    "max_tokens": 2, "temperature": 0.5, "top_p": 0.9, "top_k": 5, "min_p": 0.1, "typical_p": 0.9,
    "repeat_penalty": 1.1,
    "presence_penalty": 0.5, "frequency_penalty": 0.5, "logit_bias": {"5": 1.5}, "seed": 3, "stop": ["x"], "n": 1,
    "stream": False, "stream_options": None, "ignore_eos": False, "cache_prompt": True, "user": "me", "model": None,
}  # fmt: skip
_ATLAS = {
    "enabled": True, "session_id": "drawn", "memory_layers": 1, "blend_ratio": 0.5, "learning_rate": 0.01,
    "use_muon": None,
    "polynomial_degree": 2, "warmup_tokens": 0, "cache_strategy": "lru", "batch_size": 1, "read": True,
    "write": True, **MEMORY,
}  # fmt: skip
_MESSAGES = [
    {"role": "system", "content": "be brief"},
    {"role": "user", "content": [{"type": "text", "text": "hello"}]},
]
_SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
_FORMAT = {"type": "json_schema", "json_schema": {"name": "x", "schema": _SCHEMA, "strict": True}}
TEMPLATES: dict[str, dict[str, Any]] = {
    "/v1/completions": {"prompt": "hello", "echo": False, "logprobs": 2, "suffix": None, "best_of": 1} | _SAMPLING,
    "/v1/chat/completions": {"messages": _MESSAGES, "logprobs": True, "top_logprobs": 2, "tools": None} | _SAMPLING,
    "/chat/completions": {"messages": _MESSAGES, "response_format": _FORMAT, "max_tokens": 2},
    "/completions": {"prompt": [5, 6, 7], "max_tokens": 1, "atlas": _ATLAS},
    "/tokenize": {"content": "hello", "add_special": True, "parse_special": True, "with_pieces": True},
    "/detokenize": {"tokens": [1, 2, 3]},
    "/apply-template": {"messages": _MESSAGES, "chat_template_kwargs": {"enable_thinking": True}},
    "/v1/atlas/config": {"blend_ratio": 0.5, "window_size": 128, "metrics_interval": 1000},
    "/v1/atlas/memory/save": {"context_id": "drawn", "state": {"a": [1, 2]}},
    "/v1/atlas/memory/load": {"context_id": "drawn"},
    "/v1/atlas/memory/list": {"limit": 5, "after": "a"},
    "/v1/atlas/memory/delete": {"context_id": "drawn"},
    "/v1/atlas/memory/reset": {"session_id": "drawn"},
}
_LENGTHS = ("max_tokens", "n_predict", "max_completion_tokens")
"""Fields a large value of which is right and takes long."""


def _hostile(rng: random.Random) -> Any:
    deep: Any = []
    for _ in range(rng.choice((3, 60, 400))):
        deep = [deep]
    return rng.choice(
        (
            None, True, False, 0, -1, 1, 2**31, 2**31 - 1, 2**32, 2**63, -(2**63), 2**64, 10**400, 0.0, -0.0, 1e308,
            1e-320, 0.1, 1.0,
            "", " ", "a" * 5000, "5", "null", "\x00", "\ud800", "\uffff", "\U0010ffff", "../../etc/passwd", "CON",
            "<|im_end|>", "é" * 200,
            [], [[]], [None], [1, "a"], [-1], [10**9], [""], ["x"] * 300, {}, {"": {}}, {"a": 1}, {"type": "text"},
            {"$ref": "#"},
            {str(n): n for n in range(400)}, deep, float("nan"), float("inf"), "%s%n%x", "{{ 7 * 7 }}", [[1], "a"],
            [[1, 2], [3]],
        )
    )  # fmt: skip


def _places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    yield path
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        yield from _places(inner, (*path, key))


def draw(rng: random.Random) -> tuple[str, bytes]:
    """A route and a body for it."""
    path = rng.choice(sorted(TEMPLATES))
    body: Any = json.loads(json.dumps(TEMPLATES[path]))
    for name in list(body):
        if len(body) > 1 and rng.random() < 0.3:
            del body[name]
    if "atlas" not in body and "completions" in path and rng.random() < 0.3:
        body["atlas"] = {name: value for name, value in _ATLAS.items() if rng.random() < 0.5}
    for _ in range(rng.choice((0, 1, 1, 1, 2, 3))):
        place = rng.choice([*_places(body)])
        value = _hostile(rng)
        if not place:
            body = value if rng.random() < 0.2 else body
            continue
        holder = body
        for key in place[:-1]:
            holder = holder[key]
        way = rng.random()
        if way < 0.75:
            holder[place[-1]] = value
        elif way < 0.85:
            del holder[place[-1]]
        elif isinstance(holder, dict):
            holder[rng.choice(("unknown", "Max_Tokens", "", "__class__", "prompt", "messages", "model", "n"))] = value
    if isinstance(body, dict):
        for name in _LENGTHS:
            if isinstance(body.get(name), int | float) and not (isinstance(body[name], int) and 0 <= body[name] < 50):
                body[name] = rng.choice((0.5, "2", [], 2**70, -5))
    raw = json.dumps(body, ensure_ascii=rng.random() < 0.7).encode("utf-8", "surrogatepass")
    if rng.random() < 0.12 and raw:
        at = rng.randrange(len(raw))
        damage = rng.choice(("cut", "flip", "double", "bom"))
        changed = {"cut": raw[:at], "double": raw + raw, "bom": b"\xef\xbb\xbf" + raw}
        raw = changed.get(damage) or raw[:at] + bytes([raw[at] ^ 1 << rng.randrange(8)]) + raw[at + 1 :]
    if any(name.encode() in raw for name in _LENGTHS) is False and "completions" in path and raw.startswith(b'{"'):
        raw = b'{"max_tokens": 2, ' + raw[1:]
    return path, raw


@attack(
    "request bodies",
    does="sends bodies that are right but for a place or a few",
    holds="an answer or a refusal that says nothing of our insides, never a 5xx",
    growth_mib=2800.0,  # a drawn max_tokens and n may fill a decode batch: 32 rows of 8 192 tokens take 3 000 MiB of KV cache
)
def bodies(scene: Scene) -> None:
    cases = [draw(scene.rng) for _ in range(scene.times(3323))]

    def send(case: tuple[str, bytes]) -> None:
        path, raw = case
        scene.count()
        shown = f"{path} {raw[:110].decode('utf-8', 'replace')}"
        try:
            response = http.post(path, content=raw, headers={"Content-Type": "application/json"})
        except httpx.HTTPError as error:
            scene.faults.append(f"{shown}: {type(error).__name__}")
            return
        if b'"stream": true' not in raw:
            scene.check(response, shown)
        else:
            scene.must(response.status_code < 500 or response.status_code == 503, f"{shown}: {response.status_code}")

    with scene.target.client(ATTACKER, 60.0) as http, ThreadPoolExecutor(8) as pool:
        list(pool.map(send, cases))
