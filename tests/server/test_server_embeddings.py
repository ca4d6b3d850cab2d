"""Embeddings: OpenAI's endpoint through the official client, llama.cpp's, and what is refused by which name."""

from __future__ import annotations

import base64
import dataclasses
from typing import Any

import numpy as np
import openai
import pytest

from server.services import embeddings
from tests.server.fake_engine import FakeEngine, embedding_of
from tests.server.live_server import Live, Start

PATH = "/v1/embeddings"
TEXTS = ["alpha", "beta and more", "é"]


def vectors(response: openai.types.CreateEmbeddingResponse) -> np.ndarray:
    return np.array([one.embedding for one in response.data], np.float32)


@pytest.mark.parametrize(
    "given", [TEXTS, [list(text.encode()) for text in TEXTS], TEXTS[0], list(TEXTS[0].encode())], ids=str
)
def test_the_official_client_gets_a_vector_for_every_text(client: openai.OpenAI, given: Any) -> None:
    texts = TEXTS if len(given) == len(TEXTS) else TEXTS[:1]
    wanted = np.array([embedding_of(text.encode()) for text in texts])
    for how in ({}, {"encoding_format": "float"}, {"encoding_format": "base64"}):  # without, the client asks for base64
        response = client.embeddings.create(model="any", input=given, **how)
        if how.get("encoding_format") == "base64":
            raw = [base64.b64decode(str(one.embedding)) for one in response.data]
            np.testing.assert_array_equal(np.array([np.frombuffer(one, "<f4") for one in raw]), wanted)
        else:
            np.testing.assert_array_equal(vectors(response), wanted)
        assert [one.index for one in response.data] == [*range(len(texts))]
        count = sum(len(text.encode()) for text in texts)
        assert (response.usage.prompt_tokens, response.usage.total_tokens) == (count, count)
        assert response.model == "fake-7b"


def test_fewer_dimensions_are_the_first_at_length_one(client: openai.OpenAI) -> None:
    response = client.embeddings.create(model="any", input=TEXTS, dimensions=2)
    wanted = np.array([embedding_of(text.encode())[:2] for text in TEXTS])
    lengths = np.linalg.norm(wanted, axis=1, keepdims=True)
    np.testing.assert_allclose(vectors(response), wanted / np.maximum(lengths, 1e-30), atol=1e-6)


def test_llama_cpp_clients_get_their_own_shape(live: Live) -> None:
    for body in ({"content": TEXTS[0]}, {"input": [TEXTS[0]]}, {"content": TEXTS[0], "embd_normalize": 2}):
        for path in ("/embedding", "/embeddings"):
            (one,) = live.post(path, body).json()
            assert one["index"] == 0
            np.testing.assert_allclose(one["embedding"], [embedding_of(TEXTS[0].encode())], rtol=1e-6)


def test_control_tokens_in_texts_are_text(live: Live) -> None:
    live.post(PATH, {"input": "<s>"})
    assert live.engine.requests[-1].prompt == [*b"<s>"]
    assert live.engine.requests[-1].pooling == "mean"


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({}, "input"),
        ({"input": ""}, "input"),
        ({"input": []}, "input"),
        ({"input": ["a", ""]}, "input[1]"),
        ({"input": ["a", 1]}, "input"),
        ({"input": [[1], [260]]}, "input[1]"),
        ({"input": [["a"]]}, "input[0][0]"),
        ({"input": None}, "input"),
        ({"input": {"text": "a"}}, "input"),
        ({"input": ["x"] * (embeddings.MAX_TEXTS + 1)}, "input"),
        ({"input": ["x" * 4000] * 76}, "input"),
        ({"input": ["x", "x" * 4097, "y"]}, "input[1]"),
        ({"input": "x" * 4097}, "input"),
        ({"input": "x", "dimensions": 5}, "dimensions"),
        ({"input": "x", "dimensions": 0}, "dimensions"),
        ({"input": "x", "encoding_format": "int8"}, "encoding_format"),
        ({"input": "x", "truncate_prompt_tokens": 3}, "truncate_prompt_tokens"),
        ({"input": "x", "never_heard_of": 3}, "never_heard_of"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_errors_name_the_field(live: Live, body: dict[str, Any], param: str) -> None:
    response = live.post(PATH, body)
    assert response.status_code == 400, response.text[:300]
    assert response.json()["error"]["param"] == param, response.text[:300]


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({}, "content"),
        ({"content": "a", "input": "b"}, "content"),
        ({"content": "a", "embd_normalize": -1}, "embd_normalize"),
    ],
)
def test_errors_name_llama_cpps_fields(live: Live, body: dict[str, Any], param: str) -> None:
    response = live.post("/embedding", body)
    assert (response.status_code, response.json()["error"]["param"]) == (400, param)


def test_many_texts_run_in_free_places_and_keep_their_order(start: Start) -> None:
    live = start(server={"max_concurrent": 3})
    texts = [f"text {index} " + "x" * index for index in range(200)]
    response = live.post(PATH, {"input": texts}).json()
    wanted = np.array([embedding_of(text.encode()) for text in texts])
    np.testing.assert_allclose([one["embedding"] for one in response["data"]], wanted, rtol=1e-6)
    assert live.admission.running == 0
    assert 'atlas_requests_total{outcome="completed"} 1.0' in live.http.get("/metrics").text


def test_a_model_that_asks_for_another_pooling_says_so(start: Start) -> None:
    engine = FakeEngine()
    engine.model = dataclasses.replace(engine.model, pooling=None)
    response = start(engine).post(PATH, {"input": "x"})
    assert (response.status_code, response.json()["error"]["code"]) == (501, "not_supported")
    assert "--pooling" in response.json()["error"]["message"]
