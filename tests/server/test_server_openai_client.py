"""Conformance: the official `openai` client against a real server."""

from __future__ import annotations

import asyncio

import openai
import pytest

from tests.server.fake_engine import CONTEXT
from tests.server.live_server import Live

MODEL = "fake-7b"


def ask(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


def test_chat(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(model=MODEL, messages=ask("hi"))
    assert answer.object == "chat.completion"
    assert answer.id.startswith("chatcmpl-")
    assert answer.model == MODEL
    assert answer.system_fingerprint == "fp_0123456789ab"
    choice = answer.choices[0]
    assert (choice.index, choice.finish_reason, choice.message.role) == (0, "stop", "assistant")
    assert choice.message.content == "user\nhi"
    assert choice.message.refusal is None
    assert choice.logprobs is None
    # <|im_start|> and <|im_end|> round "user\nhi".
    assert answer.usage.prompt_tokens == 9
    assert answer.usage.completion_tokens == 7
    assert answer.usage.total_tokens == 16
    assert answer.usage.prompt_tokens_details.cached_tokens == 0


def test_chat_stream_has_role_text_reason_and_usage(client: openai.OpenAI) -> None:
    chunks = list(
        client.chat.completions.create(
            model=MODEL, messages=ask("hé"), stream=True, stream_options={"include_usage": True}
        )
    )
    assert len({chunk.id for chunk in chunks}) == 1
    assert {chunk.object for chunk in chunks} == {"chat.completion.chunk"}
    assert chunks[0].choices[0].delta.role == "assistant"
    assert chunks[0].choices[0].delta.content == ""
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks[:-1]) == "user\nhé"
    assert [chunk.choices[0].finish_reason for chunk in chunks[:-1]] == [None] * (len(chunks) - 2) + ["stop"]
    assert chunks[-1].choices == []
    assert chunks[-1].usage.completion_tokens == 8  # é is two bytes, and two tokens
    assert all(chunk.usage is None for chunk in chunks[:-1])


def test_completion(client: openai.OpenAI) -> None:
    answer = client.completions.create(model=MODEL, prompt="abc")
    assert answer.object == "text_completion"
    assert answer.id.startswith("cmpl-")
    assert answer.choices[0].text == "abcabcabcabcabca"  # 16 tokens are OpenAI's default
    assert answer.choices[0].finish_reason == "length"
    assert answer.usage.completion_tokens == 16


def test_completion_stream(client: openai.OpenAI) -> None:
    chunks = list(client.completions.create(model=MODEL, prompt="abc", max_tokens=5, stream=True))
    assert "".join(chunk.choices[0].text for chunk in chunks) == "abcab"
    assert chunks[-1].choices[0].finish_reason == "length"
    assert {chunk.object for chunk in chunks} == {"text_completion"}


@pytest.mark.parametrize("stream", [False, True])
def test_stop(client: openai.OpenAI, stream: bool) -> None:
    options = {"model": MODEL, "prompt": "one two three", "max_tokens": 40, "stop": ["three", "wo"]}
    if stream:
        text = "".join(chunk.choices[0].text for chunk in client.completions.create(**options, stream=True))
    else:
        text = client.completions.create(**options).choices[0].text
    assert text == "one t"


def test_stop_is_literal_and_empty_ones_are_dropped(live: Live, client: openai.OpenAI) -> None:
    answer = client.completions.create(model=MODEL, prompt="a+(b)$", max_tokens=6, stop=["", "(b)$"])
    assert answer.choices[0].text == "a+"
    client.completions.create(model=MODEL, prompt="x", stop="")
    assert live.engine.requests[-1].stop == ()


def test_seed_repeats_and_differs(client: openai.OpenAI) -> None:
    def text(seed: int | None) -> str:
        return client.completions.create(model=MODEL, prompt="abcdef", max_tokens=3, seed=seed).choices[0].text

    assert text(2) == text(2) == "cde"
    assert text(3) == "def"


def test_greedy_ignores_the_seed(client: openai.OpenAI) -> None:
    answer = client.completions.create(model=MODEL, prompt="abcdef", max_tokens=3, seed=2, temperature=0)
    assert answer.choices[0].text == "abc"


def test_n_choices_differ_and_count_the_prompt_once(live: Live, client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(model=MODEL, messages=ask("hi"), n=3, seed=1, max_tokens=2)
    assert [choice.index for choice in answer.choices] == [0, 1, 2]
    assert [choice.message.content for choice in answer.choices] == ["se", "er", "r\n"]
    assert answer.usage.prompt_tokens == 9
    assert answer.usage.completion_tokens == 6
    assert [request.choice for request in live.engine.requests] == [0, 1, 2]
    assert [request.sampling.seed for request in live.engine.requests] == [1, 2, 3]


def test_n_choices_stream(client: openai.OpenAI) -> None:
    texts = {0: "", 1: "", 2: ""}
    reasons = []
    for chunk in client.chat.completions.create(
        model=MODEL, messages=ask("hi"), n=3, seed=1, max_tokens=2, stream=True
    ):
        choice = chunk.choices[0]
        texts[choice.index] += choice.delta.content or ""
        if choice.finish_reason:
            reasons.append((choice.index, choice.finish_reason, hasattr(chunk, "timings")))
    assert texts == {0: "se", 1: "er", 2: "r\n"}
    assert sorted(reason[0] for reason in reasons) == [0, 1, 2]
    # Timings ride on the very last chunk with a finish reason, and only there.
    assert [reason[2] for reason in reasons] == [False, False, True]


def test_prompt_lists_and_token_ids(client: openai.OpenAI) -> None:
    answer = client.completions.create(model=MODEL, prompt=["ab", "xyz"], max_tokens=3, n=2, temperature=0)
    assert [choice.text for choice in answer.choices] == ["aba", "aba", "xyz", "xyz"]
    assert answer.usage.prompt_tokens == 5
    answer = client.completions.create(model=MODEL, prompt=[104, 105], max_tokens=2)
    assert answer.choices[0].text == "hi"
    answer = client.completions.create(model=MODEL, prompt=[[104], [105, 106]], max_tokens=1)
    assert [choice.text for choice in answer.choices] == ["h", "i"]


def test_chat_logprobs(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(
        model=MODEL, messages=ask("é"), max_tokens=7, logprobs=True, top_logprobs=2, temperature=0
    )
    content = answer.choices[0].logprobs.content
    assert len(content) == 7
    assert (content[0].token, content[0].logprob, content[0].bytes) == ("u", -0.5, [117])
    assert [(one.token, one.logprob) for one in content[0].top_logprobs] == [("u", -0.5), ("v", -1.5)]
    # The two bytes of é are two tokens, neither of which is text on its own.
    assert [one.bytes for one in content[5:]] == [[0xC3], [0xA9]]


def test_chat_logprobs_without_alternatives_and_in_a_stream(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(model=MODEL, messages=ask("a"), max_tokens=2, logprobs=True)
    assert answer.choices[0].logprobs.content[0].top_logprobs == []
    chunks = list(
        client.chat.completions.create(model=MODEL, messages=ask("a"), max_tokens=2, logprobs=True, stream=True)
    )
    tokens = [one.token for chunk in chunks if chunk.choices[0].logprobs for one in chunk.choices[0].logprobs.content]
    assert tokens == ["u", "s"]


def test_completion_logprobs(client: openai.OpenAI) -> None:
    logprobs = (
        client.completions.create(model=MODEL, prompt="aé", max_tokens=4, logprobs=1, temperature=0).choices[0].logprobs
    )
    assert logprobs.tokens == ["a", "bytes:\\xc3", "bytes:\\xa9", "a"]
    assert logprobs.text_offset == [0, 1, 1, 2]
    assert logprobs.token_logprobs == [-0.5] * 4
    assert logprobs.top_logprobs[0] == {"a": -0.5}


def test_echo_scores_the_prompt(client: openai.OpenAI) -> None:
    answer = client.completions.create(model=MODEL, prompt="abc", max_tokens=0, echo=True, logprobs=2)
    choice = answer.choices[0]
    assert choice.text == "abc"
    assert choice.logprobs.tokens == ["a", "b", "c"]
    assert choice.logprobs.token_logprobs == [None, -0.5, -0.5]
    assert choice.logprobs.text_offset == [0, 1, 2]
    assert choice.logprobs.top_logprobs == [None, {"b": -0.5, "c": -1.5}, {"c": -0.5, "d": -1.5}]
    assert answer.usage.completion_tokens == 0


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("logprobs", [None, 1])
def test_echo_puts_the_prompt_before_the_answer(client: openai.OpenAI, stream: bool, logprobs: int | None) -> None:
    options = {
        "model": MODEL,
        "prompt": [[97, 98, 99], [120, 121]],
        "max_tokens": 2,
        "echo": True,
        "logprobs": logprobs,
    }
    texts, offsets = {0: "", 1: ""}, {0: [], 1: []}
    answers = client.completions.create(**options, stream=True) if stream else [client.completions.create(**options)]
    for answer in answers:
        for choice in answer.choices:
            texts[choice.index] += choice.text
            offsets[choice.index] += choice.logprobs.text_offset if choice.logprobs else []
    assert texts == {0: "abcab", 1: "xyxy"}
    assert offsets == ({0: [0, 1, 2, 3, 4], 1: [0, 1, 2, 3]} if logprobs else {0: [], 1: []})


def test_a_beginning_of_text_token_takes_no_room_in_the_echo(client: openai.OpenAI) -> None:
    answer = client.completions.create(model=MODEL, prompt="<s>ab", max_tokens=0, echo=True, logprobs=0)
    assert answer.choices[0].logprobs.text_offset == [0, 3, 4]


def test_sampling_reaches_the_engine(live: Live, client: openai.OpenAI) -> None:
    client.chat.completions.create(
        model=MODEL,
        messages=ask("a"),
        temperature=0.5,
        top_p=0.9,
        presence_penalty=0.25,
        frequency_penalty=-0.5,
        logit_bias={"97": -100, "98": 5},
        max_completion_tokens=3,
        extra_body={"top_k": 7, "min_p": 0.1, "typical_p": 0.8, "repeat_penalty": 1.1, "ignore_eos": True},
    )
    request = live.engine.requests[-1]
    sampling = request.sampling
    assert (sampling.temperature, sampling.top_p, sampling.top_k) == (0.5, 0.9, 7)
    assert (sampling.min_p, sampling.typical_p, sampling.repeat_penalty) == (0.1, 0.8, 1.1)
    assert (sampling.presence_penalty, sampling.frequency_penalty) == (0.25, -0.5)
    assert sampling.logit_bias == {97: -100.0, 98: 5.0}
    assert request.max_tokens == 3
    assert request.ignore_eos
    assert request.owner == "local"
    assert request.memory is None


def test_explicit_nulls_and_hints_are_accepted(live: Live, client: openai.OpenAI) -> None:
    fields = [
        "frequency_penalty", "function_call", "functions", "logit_bias", "logprobs", "max_tokens",
        "max_completion_tokens", "metadata", "n", "parallel_tool_calls", "presence_penalty", "reasoning_effort",
        "response_format", "seed", "service_tier", "stop", "store", "stream", "stream_options", "temperature",
        "tool_choice", "tools", "top_logprobs", "top_p", "user", "verbosity", "audio", "modalities", "prediction",
        "top_k", "min_p", "typical_p", "repeat_penalty", "ignore_eos", "n_predict", "cache_prompt", "atlas", "suffix",
    ]  # fmt: skip
    answer = client.chat.completions.create(
        model=MODEL, messages=ask("a"), extra_body=dict.fromkeys(fields), store=True, user="u", metadata={"a": "b"}
    )
    assert answer.choices[0].message.content == "user\na"
    assert live.engine.requests[-1].max_tokens == live.settings.server.max_answer_tokens


def test_content_parts_and_roles(live: Live, client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(
        model=MODEL,
        messages=[
            {"role": "developer", "content": "d"},
            {"role": "user", "content": [{"type": "text", "text": "x"}, {"type": "text", "text": "y"}]},
            {"role": "assistant", "content": None, "tool_calls": []},
        ],
    )
    assert answer.choices[0].message.content == "system\nduser\nx\nyassistant\n"


def test_special_tokens_in_content_stay_text(live: Live, client: openai.OpenAI) -> None:
    client.chat.completions.create(model=MODEL, messages=ask("<|im_end|>"), max_tokens=1)
    prompt = live.engine.requests[-1].prompt
    assert [token for token in prompt if token > 255] == [258, 259]  # the template's own


def test_timings(client: openai.OpenAI) -> None:
    timings = client.completions.create(model=MODEL, prompt="abc", max_tokens=4).timings
    assert (timings["prompt_n"], timings["predicted_n"], timings["cache_n"]) == (3, 4, 0)
    assert timings["predicted_per_second"] == 1000.0


def test_unlimited_tokens(live: Live, client: openai.OpenAI) -> None:
    answer = client.completions.create(model=MODEL, prompt="abc", max_tokens=-1)
    assert (answer.choices[0].text, answer.choices[0].finish_reason) == ("abc", "stop")
    client.completions.create(model=MODEL, prompt="abc", extra_body={"n_predict": 2})
    assert live.engine.requests[-1].max_tokens == 2


def test_models(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == [MODEL]
    model = client.models.retrieve(MODEL)
    assert (model.id, model.object, model.created, model.owned_by) == (MODEL, "model", 1_700_000_000, "atlas-jax")


def test_model_errors(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError) as caught:
        client.models.retrieve("other/model")
    assert caught.value.code == "model_not_found"
    assert client.chat.completions.create(model="gpt-4", messages=ask("a")).model == MODEL


def test_a_prompt_over_the_context_is_refused_with_both_lengths(live: Live, client: openai.OpenAI) -> None:
    for stream in (False, True):
        with pytest.raises(openai.BadRequestError) as caught:
            client.completions.create(model=MODEL, prompt="a" * (CONTEXT + 1), stream=stream)
        assert caught.value.code == "context_length_exceeded"
        assert caught.value.body["n_prompt_tokens"] == CONTEXT + 1
        assert caught.value.body["n_ctx"] == CONTEXT


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"modalities": ["text", "audio"]}, "modalities"),
        ({"audio": {"voice": "alloy", "format": "wav"}}, "audio"),
        ({"extra_body": {"structural_tag": "x"}}, "structural_tag"),
        ({"extra_body": {"mirostat": 2}}, "mirostat"),
        ({"extra_body": {"chat_template": "{{ x }}"}}, "chat_template"),
        ({"extra_body": {"chat_template_kwargs": {"tokenize": True}}}, "chat_template_kwargs.tokenize"),
        ({"extra_body": {"add_generation_prompt": False}}, "add_generation_prompt"),
    ],
)
def test_unsupported_fields_are_named(client: openai.OpenAI, fields: dict, param: str) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(model=MODEL, messages=ask("a"), **fields)
    assert (caught.value.param, caught.value.code) == (param, "unsupported_parameter")


def test_fields_that_change_nothing_are_accepted(client: openai.OpenAI) -> None:
    client.chat.completions.create(
        model=MODEL,
        messages=ask("a"),
        tools=[{"type": "function", "function": {"name": "f"}}],
        tool_choice="none",
        response_format={"type": "text"},
        modalities=["text"],
        extra_body={
            "mirostat": 0,
            "grammar": "",
            "xtc_probability": 0.0,
            "samplers": [],
            "chat_template_kwargs": {"enable_thinking": False},
        },
    )


def test_image_parts_are_refused_and_never_fetched(client: openai.OpenAI) -> None:
    for url in ("http://169.254.169.254/", "file:///etc/passwd", "data:image/png;base64,AAAA"):
        with pytest.raises(openai.BadRequestError) as caught:
            client.chat.completions.create(
                model=MODEL,
                messages=[{"role": "user", "content": [{"type": "image_url", "image_url": {"url": url}}]}],
            )
        assert caught.value.code == "unsupported_content_part"
        assert caught.value.param == "messages[0].content[0].type"


def test_an_error_in_a_stream_is_raised_by_the_client(live: Live, client: openai.OpenAI) -> None:
    live.engine.fail_after = 3
    stream = client.chat.completions.create(model=MODEL, messages=ask("abcdef"), stream=True)
    pieces = []
    with pytest.raises(openai.APIError) as caught:
        pieces.extend(chunk.choices[0].delta.content for chunk in stream)
    assert "".join(pieces) == "use"
    assert (caught.value.message, caught.value.code) == ("The engine broke", "engine_error")


def test_an_error_before_the_first_token_has_a_status(live: Live, client: openai.OpenAI) -> None:
    live.engine.fail_after = 0
    with pytest.raises(openai.InternalServerError) as caught:
        client.chat.completions.create(model=MODEL, messages=ask("a"), stream=True)
    assert caught.value.status_code == 500


def test_request_id_round_trip(client: openai.OpenAI) -> None:
    response = client.chat.completions.with_raw_response.create(
        model=MODEL, messages=ask("a"), extra_headers={"X-Request-Id": "my-id.1"}
    )
    assert response.headers["x-request-id"] == "my-id.1"


def test_atlas_stats_and_session_over_two_turns(client: openai.OpenAI) -> None:
    first = client.chat.completions.create(
        model=MODEL, messages=ask("a"), extra_body={"atlas": {"session_id": "s", "use_muon": True}}
    )
    assert first.atlas_stats["session_id"] == "s"
    assert first.atlas_stats["cache_hit"] is False
    assert first.atlas_stats["muon_iterations"] == 4
    again = client.chat.completions.with_raw_response.create(
        model=MODEL, messages=ask("ab"), extra_headers={"X-Session-ID": "s"}
    )
    assert again.headers["x-session-id"] == "s"
    answer = again.parse()
    assert answer.usage.prompt_tokens_details.cached_tokens == 7  # <|im_start|>user\na
    assert answer.atlas_stats["cache_hit"] is True
    assert (first.atlas_stats["history"], answer.atlas_stats["history"]) == ("new", "continued")
    assert (first.atlas_stats["tokens_reused"], answer.atlas_stats["tokens_reused"]) == (0, 7)


def test_many_async_clients(live: Live) -> None:
    async def run() -> list[str]:
        async with openai.AsyncOpenAI(base_url=f"{live.url}/v1", api_key="x", max_retries=0) as many:

            async def one(number: int) -> str:
                text = ""
                stream = await many.completions.create(
                    model=MODEL, prompt=f"client {number} ", max_tokens=20, temperature=0, stream=True
                )
                async for chunk in stream:
                    text += chunk.choices[0].text
                return text

            return await asyncio.gather(*(one(number) for number in range(40)))

    texts = asyncio.run(run())
    assert texts == [(f"client {number} " * 3)[:20] for number in range(40)]
