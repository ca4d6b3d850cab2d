"""What lies in `examples/`: every request of it works, and the configuration is what it says it is."""

from __future__ import annotations

import json
from typing import Any

import pytest

from server.config.settings import Settings
from server.config.sources import load, options
from tests.server.example_shapes import ROOT, differences, examples, run
from tests.server.live_server import Live, Start
from tools import write_settings

# What the project's two documents show as requests, word for word.
DOCUMENTED: list[dict[str, Any]] = [
    {
        "model": "your-model",
        "messages": [{"role": "user", "content": "Hello!"}],
        "atlas": {"memory_layers": 3, "cache_strategy": "adaptive", "session_id": "user123"},
    },
    {
        "model": "your-model",
        "messages": [
            {"role": "system", "content": "You are a helpful assistant."},
            {"role": "user", "content": "Hello, how are you?"},
        ],
        "temperature": 0.7,
        "max_tokens": 150,
        "atlas": {
            "memory_layers": 3,
            "cache_strategy": "adaptive",
            "session_id": "unique-session-id",
            "batch_size": 8,
        },
    },
    {
        "model": "your-model",
        "prompt": "The capital of France is",
        "max_tokens": 50,
        "temperature": 0.7,
        "atlas": {"memory_layers": 2, "session_id": "completion-session"},
    },
    {
        "prompt": "Your text here...",
        "max_tokens": 2048,
        "temperature": 0.7,
        "atlas": {
            "enabled": True,
            "window_size": 512,
            "blend_ratio": 0.5,
            "learning_rate": 0.001,
            "polynomial_degree": 3,
            "use_muon": True,
            "warmup_tokens": 128,
        },
    },
    {"context_id": "user123_conversation"},
    {},
]


def test_every_example_is_answered_as_it_shows(start: Start) -> None:
    live = start(atlas={"metrics_interval": 50})
    wrong = {example["name"]: found for example in examples() if (found := run(live.http, example))}
    assert wrong == {}


def test_differences_are_noticed() -> None:
    shown = {"a": 1, "b": [{"c": "x"}], "d": None}
    assert differences(shown, {"a": 2.5, "b": [], "d": "text"}) == []
    assert differences(shown, {"a": 1, "b": [{"c": "x"}, {}]}) == ["$.d", "$.b[].c"]
    assert len(differences(shown, {"a": "1", "b": [{"c": 1}], "d": 0, "e": 0})) == 3


def test_the_examples_cover_every_endpoint_and_field(live: Live) -> None:
    shown = {(example["method"].lower(), example["path"].partition("?")[0]) for example in examples()}
    document = live.http.get("/schema/openapi.json").json()
    served = {(method, path) for path, item in document["paths"].items() for method in item}
    # The same under another name, and what is not JSON or no part of the API.
    aliases = {("post", "/completions"), ("post", "/chat/completions"), ("get", "/models"), ("get", "/v1/health")}
    others = {("get", "/"), ("get", "/metrics"), ("get", "/schema"), ("get", "/schema/openapi.json")}
    aliases |= {("post", path) for path in ("/responses", "/responses/input_tokens", "/conversations")}
    aliases |= {("post", path) for path in ("/rerank", "/reranking", "/v1/reranking")}
    named = {one for one in served if "{" in one[1]}  # of a model or a response, whose name is made up anew
    assert shown == served - aliases - others - named
    bodies = [body for example in examples() if isinstance(body := example.get("request"), dict)]
    fields = {name for body in bodies for name in body.get("atlas", {})}
    assert fields == set(document["components"]["schemas"]["AtlasOptions"]["properties"])


@pytest.mark.parametrize("request_", DOCUMENTED, ids=lambda body: json.dumps(body)[:40])
def test_the_documents_requests_are_among_the_examples(request_: dict[str, Any]) -> None:
    assert request_ in [example.get("request") for example in examples()]


def test_the_configuration_is_every_setting_at_its_default() -> None:
    path = ROOT / "examples" / "atlas-config.json"
    settings = load(config=str(path), environ={})
    assert settings.server.model == "data/models/SmolLM2-135M-Instruct.Q4_1.gguf"
    assert load(config=str(path), environ={}, flags={"server.model": "null"}) == Settings()
    tree = json.loads(path.read_text("utf-8"))
    for option in options():
        place = tree
        for name in option.path:
            place = place[name]


def test_the_configuration_is_up_to_date() -> None:
    folder = ROOT / "examples"
    for name, text in (("json", write_settings.configuration()), ("md", write_settings.reference())):
        same = (folder / f"atlas-config.{name}").read_text("utf-8") == text
        assert same, f"examples/atlas-config.{name} is not what the settings say: run `make config` and commit the file"
