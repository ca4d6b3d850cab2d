"""The same answer of the engine is the same reasoning, text and calls in every API, however it was cut."""

from __future__ import annotations

import json
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import msgspec
from hypothesis import given, settings
from hypothesis import strategies as st
from openai.types.responses import ResponseStreamEvent
from pydantic import TypeAdapter

from atlas_jax.engine.api import Delta, Finished
from server.schemas.responses import ResponsesRequest
from server.services.chat_response import ChatResponseBuilder
from server.services.messages_api import MessageBuilder
from server.services.ollama_api import OllamaBuilder
from server.services.response_builder import Ending, Identification, Outcome, timings_of, usage_of
from server.services.responses_builder import ResponsesBuilder, begun
from server.tool_calls.answer import AnswerReader
from server.tool_calls.hermes import HERMES
from server.tool_calls.reader import CallReader
from server.tool_calls.reasoning import ReasoningReader

EVENTS: TypeAdapter[Any] = TypeAdapter(ResponseStreamEvent)
Said = tuple[str, str, list[tuple[str, Any]]]
NAMES = ("get_weather", "get_time")


def reader() -> AnswerReader:
    ids = iter(range(100))
    calls = CallReader(HERMES, NAMES, exact=False, most=None, new_id=lambda: f"call_{next(ids)}")
    return AnswerReader(ReasoningReader("<think>", "</think>", begun=False), calls)


def encoded(chunk: msgspec.Struct) -> Any:
    return json.loads(msgspec.json.encode(chunk))


def chat(run: Callable[[Any], list[Any]]) -> Said:
    builder = ChatResponseBuilder(
        Identification.new("c", model="m", fingerprint="f" * 12), logprobs=False, with_usage=False, reader=reader
    )
    reasoning, text, calls = "", "", list[list[str]]()
    for chunk in run(builder):
        delta = chunk["choices"][0]["delta"]
        reasoning += delta.get("reasoning_content", "")
        text += delta.get("content", "")
        for call in delta.get("tool_calls", ()):
            if "id" in call:
                calls.append([call["function"]["name"], ""])
            calls[call["index"]][1] += call["function"]["arguments"]
    return reasoning, text, [(name, json.loads(arguments)) for name, arguments in calls]


def of_responses(output: list[Any]) -> Said:
    reasoning = "".join(part["text"] for one in output if one["type"] == "reasoning" for part in one["content"])
    text = "".join(part["text"] for one in output if one["type"] == "message" for part in one["content"])
    calls = [(one["name"], json.loads(one["arguments"])) for one in output if one["type"] == "function_call"]
    return reasoning, text, calls


def responses(run: Callable[[Any], list[Any]]) -> Said:
    body = ResponsesRequest(input="x")
    response = begun(body, response_id="resp_1", model="m", temperature=0.0, top_p=1.0, store=False)
    builder = ResponsesBuilder(response, logprobs=False, reader=reader)
    events = [*map(encoded, builder.opening()), *run(builder)]
    for number, event in enumerate(events):
        EVENTS.validate_python(event, strict=True)
        assert event["sequence_number"] == number
    parts: dict[int, str] = {}
    for event in events:
        if event["type"].endswith(".delta"):
            parts[event["output_index"]] = parts.get(event["output_index"], "") + event["delta"]
    output = events[-1]["response"]["output"]
    done = [event["item"] for event in events if event["type"] == "response.output_item.done"]
    assert done == output
    for index, item in enumerate(output):
        said = item["arguments"] if item["type"] == "function_call" else item["content"][0]["text"]
        assert parts.get(index, "") == said
    return of_responses(output)


def messages(run: Callable[[Any], list[Any]]) -> Said:
    builder = MessageBuilder("msg_1", model="m", prompt_tokens=1, reader=reader)
    blocks: list[Any] = []
    for event in run(builder):
        if event["type"] == "content_block_start":
            assert event["index"] == len(blocks)
            blocks.append([event["content_block"], ""])
        if event["type"] == "content_block_delta":
            assert event["index"] == len(blocks) - 1
            delta = event["delta"]
            kinds = {"text": "text_delta", "thinking": "thinking_delta", "tool_use": "input_json_delta"}
            assert delta["type"] == kinds[blocks[-1][0]["type"]]
            blocks[-1][1] += delta.get("text", "") + delta.get("thinking", "") + delta.get("partial_json", "")
    told = {kind: [(block, said) for block, said in blocks if block["type"] == kind] for kind in kinds_of(blocks)}
    return (
        "".join(said for _, said in told.get("thinking", ())),
        "".join(said for _, said in told.get("text", ())),
        [(block["name"], json.loads(said)) for block, said in told.get("tool_use", ())],
    )


def kinds_of(blocks: list[Any]) -> set[str]:
    return {block["type"] for block, _ in blocks}


def ollama(run: Callable[[Any], list[Any]]) -> Said:
    reasoning, text, calls = "", "", list[Any]()
    for line in run(OllamaBuilder("chat", "m", reader=reader)):
        message = line["message"]
        reasoning += message.get("thinking", "")
        text += message["content"]
        calls += [(one["function"]["name"], one["function"]["arguments"]) for one in message.get("tool_calls", ())]
    return reasoning, text, calls


def whole(builder: Any, outcome: Outcome, ending: Ending) -> Any:
    return encoded(builder.whole([outcome], ending.usage, ending))


words = st.text(st.sampled_from('ab {}<>é☃"\n'), max_size=12)
arguments = st.dictionaries(
    words, st.one_of(words, st.integers(-9, 9), st.lists(st.booleans(), max_size=2)), max_size=2
)
calls = st.tuples(st.sampled_from(NAMES), arguments).map(lambda call: HERMES.write(call[0], json.dumps(call[1])))
answers = st.tuples(
    st.one_of(st.just(""), words.map(lambda text: f"<think>{text}</think>")),
    st.lists(st.one_of(words, calls), max_size=4).map("\n".join),
).map("".join)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(answer=answers, cuts=st.lists(st.integers(0, 200), max_size=6), cut=st.booleans())
def test_every_api_tells_the_same_parts(answer: str, cuts: list[int], cut: bool) -> None:
    at = sorted({0, len(answer), *(min(one, len(answer)) for one in cuts)})
    deltas = [Delta(answer[begin:end]) for begin, end in pairwise(at)]
    ended = Finished(reason="length" if cut else "stop", prompt_tokens=1, completion_tokens=1, cached_tokens=0, seed=0)
    ending = Ending(timings=timings_of([ended]), usage=usage_of({0: ended}, 1))

    def run(builder: Any) -> list[Any]:
        chunks = [chunk for delta in deltas for chunk in builder.chunks(0, delta)]
        return [encoded(one) for one in (*chunks, *builder.end(0, "length" if cut else "stop", ending))]

    expected = chat(run)
    assert responses(run) == expected
    assert messages(run) == expected
    assert ollama(run) == expected
    # and not streamed
    outcome = Outcome(deltas=deltas, finished=ended)
    response = begun(ResponsesRequest(input="x"), response_id="r", model="m", temperature=0.0, top_p=1.0, store=False)
    found = whole(ResponsesBuilder(response, logprobs=False, reader=reader), outcome, ending)
    assert of_responses(found["output"]) == expected
    found = whole(MessageBuilder("m", model="m", prompt_tokens=1, reader=reader), outcome, ending)
    assert [(one["name"], one["input"]) for one in found["content"] if one["type"] == "tool_use"] == expected[2]
    assert (found["stop_reason"] == "tool_use") == (bool(expected[2]) and not cut)
    found = whole(OllamaBuilder("chat", "m", reader=reader), outcome, ending)["message"]
    assert (found.get("thinking", ""), found["content"]) == expected[:2]
    assert [(one["function"]["name"], one["function"]["arguments"]) for one in found.get("tool_calls", ())] == expected[
        2
    ]
