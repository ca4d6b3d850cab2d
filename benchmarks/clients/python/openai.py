# /// script
# dependencies = ["openai"]
# ///
"""OpenAI's client."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import openai
import pydantic

from benchmarks.clients.flows import LONG, Client, Servers, call, example, raises

client = Client("openai")
MODEL = "gpt-4o-mini"
WEATHER: Any = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "The weather of a city",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}
FLAT: Any = {"type": "function", **WEATHER["function"], "strict": False}


class River(pydantic.BaseModel):
    name: str = pydantic.Field(max_length=40)  # a small model goes on for ever where it may
    length_km: int = pydantic.Field(ge=0, le=99_999)


def at(url: str) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{url}/v1", api_key="none")


def ask(text: str) -> Any:
    return [{"role": "user", "content": text}]


@client.flow("chat")
def chat(servers: Servers) -> None:
    answer = at(servers.url).chat.completions.create(model=MODEL, messages=ask("Name a river."))
    assert answer.choices[0].message.content
    assert answer.choices[0].finish_reason == "stop"
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens > 0


@client.flow("stream")
def stream(servers: Servers) -> None:
    options: Any = {"include_usage": True}
    chunks = list(
        at(servers.url).chat.completions.create(
            model=MODEL, messages=ask("Name a river."), stream=True, stream_options=options
        )
    )
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert chunks[-1].usage.completion_tokens > 0


@client.flow("stream: helper")
def helper(servers: Servers) -> None:
    with at(servers.url).chat.completions.stream(model=MODEL, messages=ask("Name a river.")) as events:
        kinds = {event.type for event in events}
        final = events.get_final_completion()
    assert {"chunk", "content.delta", "content.done"} <= kinds
    assert final.choices[0].message.content


@client.flow("stream: async, eight at once")
async def many(servers: Servers) -> None:
    async with openai.AsyncOpenAI(base_url=f"{servers.url}/v1", api_key="none") as at_once:

        async def one() -> str:
            found = await at_once.chat.completions.create(
                model=MODEL, messages=ask("Name a river."), max_tokens=16, stream=True
            )
            return "".join([chunk.choices[0].delta.content or "" async for chunk in found])

        assert all(await asyncio.gather(*(one() for _ in range(8))))


@client.flow("structured")
def structured(servers: Servers) -> None:
    found = at(servers.url).chat.completions.parse(
        model=MODEL, messages=ask("Describe the Danube."), response_format=River
    )
    assert isinstance(found.choices[0].message.parsed, River)


@client.flow("structured: json_object")
def json_object(servers: Servers) -> None:
    found = at(servers.url).chat.completions.create(
        model=MODEL, messages=ask("A river as JSON."), response_format={"type": "json_object"}, max_tokens=200
    )
    cut = found.choices[0].finish_reason == "length"  # a small model may write on and on
    assert cut or isinstance(json.loads(found.choices[0].message.content), dict)


@client.flow("tools")
def tools(servers: Servers) -> None:
    messages = ask("How is the weather in Vienna?")
    found = at(servers.url).chat.completions.create(
        model=MODEL, messages=messages, tools=[WEATHER], tool_choice="required", parallel_tool_calls=False
    )
    message = found.choices[0].message
    (made,) = message.tool_calls
    assert made.function.name == "weather"
    assert isinstance(json.loads(made.function.arguments)["city"], str)
    messages += [message, {"role": "tool", "tool_call_id": made.id, "content": "Rain, 4 degrees"}]
    answer = at(servers.url).chat.completions.create(
        model=MODEL, messages=messages, tools=[WEATHER], tool_choice="none"
    )
    assert answer.choices[0].message.content


@client.flow("tools: streamed, by the model's choice")
def tools_streamed(servers: Servers) -> None:
    servers.script(call("weather", city="Vienna"), "It rains.")
    here = at(servers.scripted)
    messages = ask("How is the weather in Vienna?")
    with here.chat.completions.stream(model=MODEL, messages=messages, tools=[WEATHER]) as events:
        message = events.get_final_completion().choices[0].message
    (made,) = message.tool_calls
    assert json.loads(made.function.arguments) == {"city": "Vienna"}
    messages += [message, {"role": "tool", "tool_call_id": made.id, "content": "Rain, 4 degrees"}]
    answer = here.chat.completions.create(model=MODEL, messages=messages, tools=[WEATHER])
    assert answer.choices[0].message.content == "It rains."
    assert "Rain, 4 degrees" in servers.asked()


@client.flow("embeddings")
def embeddings(servers: Servers) -> None:
    found = at(servers.url).embeddings.create(model="text-embedding-3-small", input=["a river", "a mountain"])
    first, second = (one.embedding for one in found.data)
    assert len(first) == len(second) > 1
    assert abs(sum(x * x for x in first) - 1) < 1e-3
    assert first != second


@client.flow("responses")
def responses(servers: Servers) -> None:
    here = at(servers.url)
    first = here.responses.create(model=MODEL, input="Name a river.")
    assert first.output_text
    second = here.responses.create(model=MODEL, input="And another?", previous_response_id=first.id)
    assert second.output_text
    third = here.responses.create(model=MODEL, input="And another?", previous_response_id=second.id)
    assert servers.made_up or third.usage.input_tokens_details.cached_tokens > 0  # a second response begins a session
    assert here.responses.retrieve(first.id).output_text == first.output_text
    assert here.responses.input_items.list(second.id).data
    here.responses.delete(first.id)


@client.flow("responses: streamed")
def responses_streamed(servers: Servers) -> None:
    with at(servers.url).responses.stream(model=MODEL, input="Name a river.") as events:
        kinds = {event.type for event in events}
        final = events.get_final_response()
    assert {"response.created", "response.output_text.delta", "response.completed"} <= kinds
    assert final.output_text


@client.flow("responses: structured")
def responses_structured(servers: Servers) -> None:
    found = at(servers.url).responses.parse(model=MODEL, input="Describe the Danube.", text_format=River)
    assert isinstance(found.output_parsed, River)


@client.flow("responses: tools")
def responses_tools(servers: Servers) -> None:
    servers.script(call("weather", city="Vienna"), "It rains.")
    here = at(servers.scripted)
    first = here.responses.create(model=MODEL, input="How is the weather in Vienna?", tools=[FLAT])
    (made,) = (item for item in first.output if item.type == "function_call")
    assert json.loads(made.arguments) == {"city": "Vienna"}
    result: Any = {"type": "function_call_output", "call_id": made.call_id, "output": "Rain, 4 degrees"}
    second = here.responses.create(model=MODEL, input=[result], previous_response_id=first.id, tools=[FLAT])
    assert second.output_text == "It rains."
    assert "Rain, 4 degrees" in servers.asked()


@client.flow("sessions: a name, across a restart")
def session(servers: Servers) -> None:
    def turn(text: str) -> Any:
        return at(servers.url).chat.completions.create(
            model=MODEL, messages=ask(text), max_tokens=16, extra_body={"atlas": {"session_id": "openai-python"}}
        )

    assert turn("My name is Anna.").atlas_stats["history"] == "new"
    servers.restart()
    again = turn("What is my name?")
    assert again.atlas_stats["history"] != "new"
    assert again.usage.prompt_tokens_details.cached_tokens > 0


@client.flow("sessions: responses across a restart")
def response_session(servers: Servers) -> None:
    def create(text: str, before: Any = None) -> Any:
        previous = {} if before is None else {"previous_response_id": before.id}
        return at(servers.url).responses.create(model=MODEL, input=text, max_output_tokens=16, **previous)

    first = create("My name is Anna.")
    second = create("I come from Vienna.", first)
    servers.restart()
    third = create("What is my name?", second)
    assert servers.made_up or third.usage.input_tokens_details.cached_tokens > 0
    assert at(servers.url).responses.retrieve(first.id).output_text == first.output_text


@client.flow("models")
def models(servers: Servers) -> None:
    here = at(servers.url)
    (model,) = here.models.list().data
    assert here.models.retrieve(model.id).id == model.id


@client.flow("tokens")
def tokens(servers: Servers) -> None:
    here = at(servers.url)
    counted = here.responses.input_tokens.count(model=MODEL, input="Name a river.")
    asked = here.responses.create(model=MODEL, input="Name a river.", max_output_tokens=1)
    assert counted.input_tokens == asked.usage.input_tokens > 0


@client.flow("errors")
def errors(servers: Servers) -> None:
    here = at(servers.url)
    with raises(openai.BadRequestError) as bad:
        here.chat.completions.create(model=MODEL, messages=ask("a"), top_p=9)
    assert bad.value.param == "top_p"
    with raises(openai.NotFoundError):
        here.models.retrieve("no-such-model")
    with raises(openai.BadRequestError) as long:
        here.chat.completions.create(model=MODEL, messages=ask("river " * 60_000))
    assert long.value.code == "context_length_exceeded"
    with raises(openai.NotFoundError):
        here.responses.retrieve("resp_none")


@client.flow("cancel")
def cancel(servers: Servers) -> None:
    for make in (
        lambda: at(servers.url).chat.completions.create(
            model=MODEL, messages=ask(LONG), stream=True, extra_body={"ignore_eos": True}, max_tokens=4000
        ),
        lambda: at(servers.url).responses.create(
            model=MODEL, input=LONG, stream=True, extra_body={"ignore_eos": True}, max_output_tokens=4000
        ),
    ):
        events = make()
        for _ in range(6):
            next(events)
        events.close()
        servers.wait_idle()


@client.flow("example")
def the_example(servers: Servers) -> None:
    assert "length_km=" in example("openai_client.py", servers.url)


if __name__ == "__main__":
    client.main()
