"""LoRA adapters over HTTP: scales of one request, and of all that say nothing."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from atlas_jax.engine.api import LoraInfo
from atlas_jax.engine.config import lora_files
from server.config.sources import load
from tests.server.fake_engine import FakeEngine
from tests.server.live_server import Live, Start

ADAPTERS = (
    LoraInfo(name="poems.gguf", digest="aa", scale=1.0, task_name="poems"),
    LoraInfo(name="law.gguf", digest="bb", scale=0.5),
)
CHAT = {"messages": [{"role": "user", "content": "hi"}]}
ENDPOINTS: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": CHAT,
    "/v1/completions": {"prompt": "hi"},
    "/completion": {"prompt": "hi"},
    "/v1/responses": {"input": "hi", "store": False},
}


@pytest.fixture
def adapted(live: Live) -> Iterator[Live]:
    live.engine.lora = ADAPTERS
    yield live
    live.engine.lora = ()


def scales(live: Live) -> list[float]:
    return [one["scale"] for one in live.http.get("/lora-adapters").json()]


@pytest.mark.parametrize("path", ENDPOINTS)
@pytest.mark.parametrize(
    ("given", "wanted"),
    [
        (None, None),
        ([], (0.0, 0.0)),
        ([{"id": 1, "scale": -0.5}], (0.0, -0.5)),
        ([{"id": 1, "scale": 2}, {"id": 0, "scale": 0.25}], (0.25, 2.0)),
    ],
)
def test_a_request_has_scales_of_its_own(adapted: Live, path: str, given: Any, wanted: Any) -> None:
    answer = adapted.post(path, {**ENDPOINTS[path], "lora": given})
    assert answer.status_code == 200, answer.text
    assert adapted.engine.requests[-1].lora == wanted


@pytest.mark.parametrize(
    ("given", "param", "said"),
    [
        ([{"id": 2, "scale": 1.0}], "lora[0].id", "there is no LoRA adapter 2: ids are 0 to 1"),
        ([{"id": 0, "scale": 1.0}, {"id": 0, "scale": 1.0}], "lora[1].id", "named twice"),
        ([{"id": -1, "scale": 1.0}], "lora[0].id", "must be between"),
        ([{"id": 0}], "lora[0].scale", "missing"),
        ([{"id": 0, "scale": 1e9}], "lora[0].scale", "between -1000 and 1000"),
        ([{"id": 0, "scale": "1"}], "lora[0].scale", "expected number"),
        ([0.5], "lora[0]", "expected object"),
        ({"id": 0, "scale": 1.0}, "lora", "expected array"),
    ],
)
def test_scales_that_cannot_be_are_refused_by_name(adapted: Live, given: Any, param: str, said: str) -> None:
    for path, body in (("/v1/chat/completions", {**CHAT, "lora": given}), ("/lora-adapters", given)):
        answer = adapted.post(path, body)
        assert answer.status_code == 400
        assert answer.json()["error"]["param"] == param
        assert said in answer.json()["error"]["message"]
    assert not adapted.engine.requests
    assert scales(adapted) == [1.0, 0.5]


def test_a_server_without_adapters_has_none_to_scale(live: Live) -> None:
    assert live.http.get("/lora-adapters").json() == []
    assert live.post("/v1/chat/completions", {**CHAT, "lora": []}).status_code == 200
    refused = live.post("/v1/chat/completions", {**CHAT, "lora": [{"id": 0, "scale": 1.0}]})
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "lora[0].id")
    assert "this server has none" in refused.json()["error"]["message"]


def test_the_scales_of_all_can_be_seen_and_changed(adapted: Live) -> None:
    assert adapted.http.get("/lora-adapters").json() == [
        {"id": 0, "path": "poems.gguf", "scale": 1.0, "task_name": "poems", "prompt_prefix": ""},
        {"id": 1, "path": "law.gguf", "scale": 0.5, "task_name": "", "prompt_prefix": ""},
    ]
    changed = adapted.post("/lora-adapters", [{"id": 1, "scale": 0.8}])
    assert (changed.status_code, changed.json()) == (200, {"success": True})
    assert scales(adapted) == [0.0, 0.8]
    assert adapted.http.post("/lora-adapters", json=[]).json() == {"success": True}
    assert scales(adapted) == [0.0, 0.0]


def test_only_admins_change_them(start: Start, tmp_path: Path) -> None:
    keys = tmp_path / "keys"
    keys.write_text("user-key:team\nroot-key:ops:admin\n")
    engine = FakeEngine()
    engine.lora = ADAPTERS
    live = start(engine, server={"api_keys_file": str(keys)})
    for key, status in (("user-key", 403), ("root-key", 200)):
        bearer = {"authorization": f"Bearer {key}"}
        assert live.http.get("/lora-adapters", headers=bearer).status_code == 200
        assert live.http.post("/lora-adapters", json=[], headers=bearer).status_code == status


def test_adapters_are_named_by_flag_environment_and_file(tmp_path: Path) -> None:
    given = ["a.gguf=0.5,b.gguf", "c=d.gguf=-2"]
    by_flag = load(environ={}, flags={"server.lora": given}).server.lora
    assert by_flag == ("a.gguf=0.5", "b.gguf", "c=d.gguf=-2")
    assert lora_files((*by_flag, "c=d.gguf")) == [
        (Path("a.gguf"), 0.5),
        (Path("b.gguf"), 1.0),
        (Path("c=d.gguf"), -2.0),
        (Path("c=d.gguf"), 1.0),
    ]
    assert load(environ={"ATLAS_LORA": "a.gguf=0.5,b.gguf"}).server.lora == ("a.gguf=0.5", "b.gguf")
    config = tmp_path / "config.json"
    config.write_text(json.dumps({"server": {"lora": ["a.gguf=0.5"]}}))
    assert load(config=str(config), environ={}).server.lora == ("a.gguf=0.5",)
