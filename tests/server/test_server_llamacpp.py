"""Completions, gaps and ranking as llama.cpp's clients ask for them."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import pytest

from tests.server.fake_engine import END, EOS, START, FakeEngine
from tests.server.live_server import Live, Start

PATH = "/completion"


def pieces(live: Live, **fields: Any) -> list[dict[str, Any]]:
    text = live.post(PATH, {"prompt": "one\ntwo", **fields, "stream": True}).text
    return [json.loads(block.removeprefix("data: ")) for block in text.strip().split("\n\n")]


@pytest.mark.parametrize(
    ("fields", "text", "kind", "word"),
    [
        ({}, "one\ntwo", "eos", ""),
        ({"n_predict": 2}, "on", "limit", ""),
        ({"stop": ["tw"]}, "one\n", "word", "tw"),
        ({"prompt": list(b"ids")}, "ids", "eos", ""),
    ],
)
def test_a_completion_whole_and_in_pieces(live: Live, fields: dict[str, Any], text: str, kind: str, word: str) -> None:
    whole = live.post(PATH, {"prompt": "one\ntwo", **fields}).json()
    assert (whole["content"], whole["stop"], whole["stop_type"], whole["stopping_word"]) == (text, True, kind, word)
    assert whole["tokens_evaluated"] == len(live.engine.requests[-1].prompt)
    assert whole["has_new_line"] == ("\n" in text)
    *before, last = pieces(live, **fields)
    assert not any(piece["stop"] for piece in before)
    assert "".join(piece["content"] for piece in before) == text
    assert last["content"] == ""
    for name in ("stop", "stop_type", "stopping_word", "tokens_predicted", "tokens_evaluated", "has_new_line", "model"):
        assert last[name] == whole[name]


def test_tokens_likelihoods_and_settings_are_told(live: Live) -> None:
    fields = {"n_probs": 2, "return_tokens": True, "seed": 7, "n_predict": 2, "grammar": "root ::= [a-z]+"}
    biases = [[111, 1.5], [112, False]]
    whole = live.post(PATH, {"prompt": "one\ntwo", **fields, "logit_bias": biases}).json()
    assert live.engine.requests[-1].sampling.logit_bias == {111: 1.5, 112: -100}
    assert (whole["tokens"], whole["prompt"]) == ([*whole["content"].encode()], "one\ntwo")
    for token, told in zip(whole["tokens"], whole["completion_probabilities"], strict=True):
        assert (told["id"], told["bytes"], told["logprob"]) == (token, [token], -0.5)
        assert [one["logprob"] for one in told["top_logprobs"]] == [-0.5, -1.5]
    settings = whole["generation_settings"]
    assert {name: settings[name] for name in ("n_predict", "seed", "n_probs", "grammar", "stream")} == {
        **{name: fields[name] for name in ("n_predict", "seed", "n_probs", "grammar")},
        "stream": False,
    }
    found = pieces(live, **fields)
    assert [token for piece in found for token in piece["tokens"]] == whole["tokens"]
    assert len([one for piece in found for one in piece.get("completion_probabilities", ())]) == len(whole["tokens"])


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"prompt": ["a", "b"]}, "prompt"),
        ({"prompt": ""}, "prompt"),
        ({"prompt": "x" * 5000}, "prompt"),
        ({"n": 2}, "n"),
        ({"n_probs": 21}, "n_probs"),
        ({"n_cmpl": 2}, "n_cmpl"),
        ({"logit_bias": [["word", -1]]}, "logit_bias[0]"),
        ({"logit_bias": [[1, "x"]]}, "logit_bias"),
        ({"image_data": [{"id": 1}]}, "image_data"),
        ({"never_heard_of": 1}, "never_heard_of"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_what_would_change_the_answer_is_refused_by_name(live: Live, fields: dict[str, Any], param: str) -> None:
    answer = live.post(PATH, {"prompt": "x", **fields})
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, param)


def test_a_gap_is_filled_by_models_that_know_how(start: Start, live: Live) -> None:
    body = {"input_prefix": "def <s>", "input_suffix": "end", "prompt": "f(", "n_predict": 3}
    refused = live.post("/infill", body)
    assert (refused.status_code, refused.json()["error"]["code"]) == (501, "not_supported")
    engine = FakeEngine()
    engine.model = dataclasses.replace(engine.model, infill=((START,), (END,), (EOS,)))
    answer = start(engine).post("/infill", body).json()
    assert engine.requests[-1].prompt == [START, *b"def <s>", END, *b"end", EOS, *b"f("]
    assert (answer["content"], answer["stop_type"]) == ("def", "limit")


def test_ranking_is_refused_by_name(live: Live) -> None:
    for path in ("/v1/rerank", "/rerank", "/reranking"):
        answer = live.post(path, {"query": "q", "documents": ["a"], "model": "m"})
        assert (answer.status_code, answer.json()["error"]["code"]) == (501, "not_supported")
    assert live.post("/v1/rerank", {"query": "q"}).json()["error"]["param"] == "documents"
