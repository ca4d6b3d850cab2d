"""The OpenAPI document, the endpoints of llama.cpp's server, and Prometheus."""

from __future__ import annotations

import re

import msgspec
from prometheus_client.parser import text_string_to_metric_families

from tests.server.live_server import Live, Start


def test_openapi_document(live: Live) -> None:
    response = live.http.get("/schema/openapi.json")
    document = response.json()
    assert document["openapi"].startswith("3.1")
    assert live.http.get("/schema").json() == document
    assert {
        "/v1/completions",
        "/completions",
        "/v1/chat/completions",
        "/v1/models",
        "/v1/models/{model_id}",
        "/v1/atlas/status",
        "/v1/atlas/memory",
        "/v1/atlas/memory/save",
        "/v1/atlas/memory/load",
        "/v1/atlas/memory/list",
        "/v1/atlas/memory/delete",
        "/v1/atlas/memory/reset",
        "/v1/atlas/memory/fork",
        "/v1/atlas/stats",
        "/v1/atlas/metrics",
        "/v1/atlas/metrics/stream",
        "/v1/atlas/config",
        "/health",
        "/ready",
        "/tokenize",
        "/detokenize",
        "/apply-template",
        "/props",
        "/slots",
        "/metrics",
    } <= set(document["paths"])
    schemas = document["components"]["schemas"]
    layers = schemas["AtlasOptions"]["properties"]["memory_layers"]["anyOf"][0]
    assert (layers["minimum"], layers["maximum"]) == (1, 10)
    temperature = schemas["ChatRequest"]["properties"]["temperature"]["anyOf"][0]
    assert (temperature["minimum"], temperature["maximum"]) == (0, 100)
    assert schemas["AtlasOptions"]["additionalProperties"] is False
    references = set(re.findall(r'"\$ref":\s*"#/components/schemas/([^"]+)"', response.text))
    assert references <= set(schemas)
    identifiers = [
        operation["operationId"]
        for path in document["paths"].values()
        for method, operation in path.items()
        if method in ("get", "post")
    ]
    assert len(identifiers) == len(set(identifiers))
    chat = document["paths"]["/v1/chat/completions"]["post"]
    assert chat["requestBody"]["content"]["application/json"]["schema"]["$ref"].endswith("/ChatRequest")
    content = chat["responses"]["200"]["content"]
    assert content["application/json"]["schema"]["$ref"].endswith("/ChatCompletion")
    assert content["text/event-stream"]["schema"]["$ref"].endswith("/ChatChunk")
    assert "http" not in re.sub(r"https?://json-schema\.org\S*", "", response.text).replace('"type":"http"', "")


def test_tokenize_and_back(live: Live) -> None:
    tokens = live.post("/tokenize", {"content": "hé<|im_end|>"}).json()["tokens"]
    assert tokens == [104, 0xC3, 0xA9, 259]
    assert live.post("/tokenize", {"content": "<s>", "parse_special": False}).json()["tokens"] == [60, 115, 62]
    pieces = live.post("/tokenize", {"content": "hé", "with_pieces": True}).json()["tokens"]
    assert pieces == [{"id": 104, "piece": "h"}, {"id": 0xC3, "piece": [0xC3]}, {"id": 0xA9, "piece": [0xA9]}]
    assert live.post("/detokenize", {"tokens": tokens}).json() == {"content": "hé<|im_end|>"}
    assert live.post("/detokenize", {"tokens": []}).json() == {"content": ""}


def test_long_texts_are_tokenized_in_a_thread(live: Live) -> None:
    assert len(live.post("/tokenize", {"content": "x" * 100_000}).json()["tokens"]) == 100_000


def test_apply_template(live: Live) -> None:
    messages = [{"role": "user", "content": [{"type": "text", "text": "hi"}]}]
    assert live.post("/apply-template", {"messages": messages}).json() == {"prompt": "<|im_start|>user\nhi<|im_end|>"}


def test_props_and_slots(live: Live) -> None:
    props = live.http.get("/props").json()
    assert (props["total_slots"], props["model_alias"], props["model_path"]) == (4, "fake-7b", "fake-7b")
    assert props["default_generation_settings"]["n_ctx"] == 4096
    slots = live.http.get("/slots").json()
    assert [slot["id"] for slot in slots] == [0, 1, 2, 3]
    assert not any(slot["is_processing"] for slot in slots)


def test_prometheus(live: Live) -> None:
    live.post("/v1/completions", {"prompt": "x", "max_tokens": 3})
    live.post("/v1/completions", {"prompt": "x", "temperature": -1})
    response = live.http.get("/metrics")
    assert response.headers["content-type"].startswith("text/plain; version=0.0.4")
    families = {family.name: family for family in text_string_to_metric_families(response.text)}
    for name in (
        "atlas_num_requests_running",
        "atlas_num_requests_waiting",
        "atlas_time_to_first_token_seconds",
        "atlas_inter_token_latency_seconds",
        "atlas_e2e_request_latency_seconds",
        "atlas_request_queue_time_seconds",
        "atlas_prompt_tokens",
        "atlas_generation_tokens",
        "atlas_request_success",
        "atlas_http_requests",
        "atlas_rate_limited",
        "atlas_memory_sessions_resident",
        "atlas_memory_sessions_stored",
        "atlas_memory_updates",
        "atlas_snapshot_save_seconds",
        "atlas_snapshot_load_seconds",
        "atlas_snapshot_failures",
        "atlas_session_conflicts",
        "atlas_snapshot_oldest_dirty_seconds",
        "atlas_jit_compilations",
        "atlas_engine_step_seconds",
    ):
        assert name in families, name
    assert 'atlas_request_success_total{finished_reason="length"}' in response.text
    labels = {label for family in families.values() for sample in family.samples for label in sample.labels}
    assert labels <= {"part", "route", "method", "status", "le", "finished_reason", "reason", "outcome", "tier"}


def test_two_servers_in_one_process_do_not_share_metrics(live: Live, start: Start) -> None:
    other = start()
    other.post("/v1/completions", {"prompt": "x", "max_tokens": 1})
    assert 'atlas_requests_total{outcome="completed"} 1.0' in other.http.get("/metrics").text


def test_responses_are_what_the_document_says(live: Live) -> None:
    from server.schemas import atlas, chat, completions, llamacpp, models, runtime_config

    messages = [{"role": "user", "content": "x"}]
    for kind, response in (
        (completions.Completion, live.post("/v1/completions", {"prompt": "x", "logprobs": 1, "atlas": {}})),
        (chat.ChatCompletion, live.post("/v1/chat/completions", {"messages": messages, "logprobs": True})),
        (models.ModelList, live.http.get("/v1/models")),
        (atlas.StatusResponse, live.http.get("/v1/atlas/status")),
        (atlas.StatsResponse, live.http.get("/v1/atlas/stats")),
        (atlas.MetricsResponse, live.http.get("/v1/atlas/metrics")),
        (runtime_config.ConfigResponse, live.http.get("/v1/atlas/config")),
        (atlas.MemoryResponse, live.http.get("/v1/atlas/memory")),
        (atlas.SaveResponse, live.post("/v1/atlas/memory/save")),
        (atlas.ListResponse, live.post("/v1/atlas/memory/list")),
        (llamacpp.Props, live.http.get("/props")),
    ):
        assert response.status_code == 200
        msgspec.json.decode(response.content, type=kind)
