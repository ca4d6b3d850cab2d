"""Requests as the manuals of llama.cpp, vLLM, OpenAI, Anthropic and Ollama show them, and the shapes of answers there."""

from __future__ import annotations

from typing import Any

import pytest

from tests.server.live_server import Live
from tests.server.test_server_tools import HERMES, told

ASK: list[Any] = [{"role": "user", "content": "Which is it?"}]
CITY: dict[str, Any] = {
    "type": "object",
    "properties": {"city": {"type": "string"}, "unit": {"type": "string", "enum": ["celsius", "fahrenheit"]}},
    "required": ["city"],
}
CALL = '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Paris"}}\n</tool_call>'
USAGE = {"prompt_tokens": int, "completion_tokens": int, "total_tokens": int}
TIMINGS = {
    **dict.fromkeys(("cache_n", "prompt_n", "predicted_n"), int),
    **dict.fromkeys(("prompt_ms", "prompt_per_token_ms", "prompt_per_second"), (int, float)),
    **dict.fromkeys(("predicted_ms", "predicted_per_token_ms", "predicted_per_second"), (int, float)),
}
LLAMA = {
    "content": str,
    "tokens": [int],
    "stop": bool,
    "model": str,
    "prompt": str,
    "stop_type": str,
    "stopping_word": str,
    "tokens_cached": int,
    "tokens_evaluated": int,
    "truncated": bool,
    "timings": TIMINGS,
    "generation_settings": {"n_predict": int, "seed": int, "temperature": (int, float), "top_k": int, "stop": [str]},
}
CHAT = {
    "id": str,
    "object": str,
    "created": int,
    "model": str,
    "usage": USAGE,
    "choices": [{"index": int, "message": {"role": str, "content": (str, type(None))}, "finish_reason": str}],
}
TOKEN = {"id": int, "token": str, "bytes": [int], "logprob": (int, float)}
CALLED = [{"id": str, "type": str, "function": {"name": str, "arguments": str}}]
OLLAMA = {
    "model": str,
    "created_at": str,
    "done": bool,
    "done_reason": str,
    **dict.fromkeys(("total_duration", "load_duration", "prompt_eval_count", "prompt_eval_duration"), int),
    **dict.fromkeys(("eval_count", "eval_duration"), int),
}
WEATHER = {"name": "get_weather", "description": "The weather in a city", "parameters": CITY}

DOCUMENTED: dict[str, tuple[str, Any, Any]] = {
    "llama.cpp: a completion": (
        "/completion",
        {"prompt": "Building a website can be done in 10 simple steps:", "n_predict": 12},
        LLAMA,
    ),
    "llama.cpp: probabilities and tokens": (
        "/completion",
        {
            "prompt": "a",
            "n_predict": 2,
            "n_probs": 3,
            "return_tokens": True,
            "cache_prompt": True,
            "id_slot": -1,
            "stop": ["\n"],
            "dynatemp_range": 0.0,
            "mirostat": 0,
            "logit_bias": [[15, 1.0], [16, False]],
        },
        {**LLAMA, "completion_probabilities": [{**TOKEN, "top_logprobs": [TOKEN]}]},
    ),
    "llama.cpp: a grammar": ("/completion", {"prompt": "a", "n_predict": 2, "grammar": 'root ::= "a"+'}, LLAMA),
    "llama.cpp: a schema": (
        "/completion",
        {"prompt": "a", "n_predict": 2, "json_schema": {"items": {"type": "string"}, "minItems": 1}},
        LLAMA,
    ),
    "llama.cpp: a chat with a schema": (
        "/v1/chat/completions",
        {"messages": ASK, "max_tokens": 2, "response_format": {"type": "json_object", "schema": CITY}},
        {**CHAT, "timings": TIMINGS},
    ),
    "llama.cpp: tokens": ("/tokenize", {"content": "a b"}, {"tokens": [int]}),
    "llama.cpp: tokens with pieces": (
        "/tokenize",
        {"content": "á", "with_pieces": True},
        {"tokens": [{"id": int, "piece": (str, list)}]},
    ),
    "llama.cpp: text": ("/detokenize", {"tokens": [97, 98]}, {"content": str}),
    "llama.cpp: the template": ("/apply-template", {"messages": ASK}, {"prompt": str}),
    "llama.cpp: an embedding": ("/embedding", {"content": "a"}, [{"index": int, "embedding": [[float]]}]),
    "vLLM: choices": (
        "/v1/chat/completions",
        {"model": "m", "messages": ASK, "max_tokens": 2, "structured_outputs": {"choice": ["positive", "negative"]}},
        CHAT,
    ),
    "vLLM: choices in the older form": (
        "/v1/chat/completions",
        {"model": "m", "messages": ASK, "max_tokens": 2, "guided_choice": ["positive", "negative"]},
        CHAT,
    ),
    "vLLM: an expression": (
        "/v1/completions",
        {
            "model": "m",
            "prompt": "a",
            "max_tokens": 2,
            "structured_outputs": {"regex": r"\w+@\w+\.com\n"},
            "stop": ["\n"],
        },
        {
            "id": str,
            "object": str,
            "created": int,
            "model": str,
            "choices": [{"index": int, "text": str, "logprobs": type(None), "finish_reason": str}],
            "usage": USAGE,
        },
    ),
    "vLLM: a named function": (
        "/v1/chat/completions",
        {
            "model": "m",
            "messages": ASK,
            "tools": [{"type": "function", "function": WEATHER}],
            "tool_choice": {"type": "function", "function": {"name": "get_weather"}},
        },
        {**CHAT, "choices": [{"message": {"tool_calls": CALLED}, "finish_reason": str}]},
    ),
    "OpenAI: a function in a response": (
        "/v1/responses",
        {
            "model": "m",
            "input": "What is the weather in Paris today?",
            "tools": [{"type": "function", **WEATHER, "strict": True}],
            "tool_choice": "required",
        },
        {
            "id": str,
            "object": str,
            "created_at": (int, float),
            "status": str,
            "error": type(None),
            "incomplete_details": type(None),
            "instructions": type(None),
            "model": str,
            "output": [{"type": str, "id": str, "call_id": str, "name": str, "arguments": str, "status": str}],
            "parallel_tool_calls": bool,
            "previous_response_id": type(None),
            "reasoning": {"effort": type(None), "summary": type(None)},
            "store": bool,
            "text": {"format": {"type": str}},
            "tool_choice": str,
            "tools": [{"type": str, "name": str, "description": str, "parameters": dict, "strict": bool}],
            "usage": {
                "input_tokens": int,
                "input_tokens_details": {"cached_tokens": int},
                "output_tokens": int,
                "output_tokens_details": {"reasoning_tokens": int},
                "total_tokens": int,
            },
            "metadata": dict,
        },
    ),
    "Anthropic: the use of a tool": (
        "/v1/messages",
        {
            "model": "m",
            "max_tokens": 1024,
            "tools": [{"name": "get_weather", "description": "The weather", "input_schema": CITY}],
            "tool_choice": {"type": "any"},
            "messages": ASK,
        },
        {
            "id": str,
            "type": str,
            "role": str,
            "model": str,
            "stop_reason": str,
            "stop_sequence": type(None),
            "content": [{"type": str, "id": str, "name": str, "input": {"city": str}}],
            "usage": {"input_tokens": int, "output_tokens": int},
        },
    ),
    "Ollama: a chat with tools": (
        "/api/chat",
        {"model": "m", "messages": ASK, "stream": False, "tools": [{"type": "function", "function": WEATHER}]},
        {
            **OLLAMA,
            "message": {
                "role": str,
                "content": str,
                "tool_calls": [{"function": {"name": str, "arguments": {"city": str}}}],
            },
        },
    ),
    "Ollama: a structured answer": (
        "/api/generate",
        {"model": "m", "prompt": "a", "stream": False, "format": CITY, "options": {"num_predict": 2, "num_ctx": 1024}},
        {**OLLAMA, "response": str},
    ),
}


def missing(shape: Any, found: Any, at: str = "$") -> list[str]:
    """What an answer lacks of a shape, or has in another type."""
    if isinstance(shape, dict):
        if not isinstance(found, dict):
            return [f"{at} is no object"]
        return [
            one
            for name, part in shape.items()
            for one in (missing(part, found[name], f"{at}.{name}") if name in found else [f"{at}.{name} is not there"])
        ]
    if isinstance(shape, list):
        if not isinstance(found, list):
            return [f"{at} is no list"]
        return [one for item in found for one in missing(shape[0], item, f"{at}[]")]
    right = isinstance(found, shape) and (shape is bool or not isinstance(found, bool))
    return [] if right else [f"{at} is {type(found).__name__}"]


@pytest.mark.parametrize(("path", "body", "shape"), DOCUMENTED.values(), ids=DOCUMENTED)
def test_a_documented_request_gets_the_documented_answer(live: Live, path: str, body: Any, shape: Any) -> None:
    if "tools" in body:
        told(live, HERMES, CALL)
    answer = live.post(path, body)
    assert answer.status_code == 200, answer.text
    assert missing(shape, answer.json()) == []


def test_a_ranking_is_refused_as_a_server_without_it_does(live: Live) -> None:
    body = {"model": "m", "query": "What is panda?", "top_n": 3, "documents": ["hi", "it is a bear"]}
    for path in ("/rerank", "/v1/rerank", "/v1/reranking", "/reranking"):
        answer = live.post(path, body)
        assert (answer.status_code, answer.json()["error"]["type"]) == (501, "not_supported_error")
