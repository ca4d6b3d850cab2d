# /// script
# dependencies = ["anthropic"]
# ///
"""Anthropic's client."""

from __future__ import annotations

import json
from typing import Any

import anthropic
import pydantic

from benchmarks.clients.flows import LONG, Client, Servers, call, raises

client = Client("anthropic")
MODEL = "claude-haiku-4-5"
WEATHER: Any = {
    "name": "weather",
    "description": "The weather of a city",
    "input_schema": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
}


class River(pydantic.BaseModel):
    name: str  # the Anthropic client says no bounds
    length_km: int


def at(url: str) -> anthropic.Anthropic:
    return anthropic.Anthropic(base_url=url, api_key="none")


def ask(text: str) -> Any:
    return [{"role": "user", "content": text}]


def text_of(message: Any) -> str:
    return "".join(block.text for block in message.content if block.type == "text")


@client.flow("chat")
def chat(servers: Servers) -> None:
    answer = at(servers.url).messages.create(model=MODEL, max_tokens=300, messages=ask("Name a river."))
    assert text_of(answer)
    assert answer.stop_reason in ("end_turn", "max_tokens")
    assert answer.usage.input_tokens > 0
    assert answer.usage.output_tokens > 0


@client.flow("chat: system prompt and blocks")
def blocks(servers: Servers) -> None:
    cache: Any = {"type": "ephemeral"}
    answer = at(servers.url).messages.create(
        model=MODEL,
        max_tokens=32,
        system=[{"type": "text", "text": "You are brief.", "cache_control": cache}],
        messages=[
            {"role": "user", "content": [{"type": "text", "text": "Name a river.", "cache_control": cache}]},
            {"role": "assistant", "content": "The Danube"},
            {"role": "user", "content": "And another?"},
        ],
        metadata={"user_id": "anna"},
        stop_sequences=["\n\n\n"],
    )
    assert text_of(answer)


@client.flow("stream")
def stream(servers: Servers) -> None:
    with at(servers.url).messages.stream(model=MODEL, max_tokens=64, messages=ask("Name a river.")) as events:
        text = "".join(events.text_stream)
        final = events.get_final_message()
    assert text == text_of(final)
    assert final.usage.output_tokens > 0


@client.flow("stream: async")
async def stream_async(servers: Servers) -> None:
    async with anthropic.AsyncAnthropic(base_url=servers.url, api_key="none") as here:
        kinds = [
            event.type
            async for event in await here.messages.create(
                model=MODEL, max_tokens=16, messages=ask("Name a river."), stream=True
            )
        ]
    assert (kinds[0], kinds[-1]) == ("message_start", "message_stop")


@client.flow("structured")
def structured(servers: Servers) -> None:
    found = at(servers.url).messages.parse(
        model=MODEL, max_tokens=200, messages=ask("Describe the Danube."), output_format=River
    )
    assert isinstance(found.parsed_output, River)


@client.flow("tools")
def tools(servers: Servers) -> None:
    here = at(servers.url)
    messages = ask("How is the weather in Vienna?")
    choice: Any = {"type": "any", "disable_parallel_tool_use": True}
    first = here.messages.create(model=MODEL, max_tokens=300, messages=messages, tools=[WEATHER], tool_choice=choice)
    made = next(block for block in first.content if block.type == "tool_use")
    assert first.stop_reason == "tool_use"
    assert isinstance(made.input["city"], str)
    results: Any = [
        {"type": "tool_result", "tool_use_id": block.id, "content": "Rain, 4 degrees"}
        for block in first.content
        if block.type == "tool_use"
    ]
    messages += [{"role": "assistant", "content": first.content}, {"role": "user", "content": results}]
    second = here.messages.create(
        model=MODEL, max_tokens=64, messages=messages, tools=[WEATHER], tool_choice={"type": "none"}
    )
    assert text_of(second)


@client.flow("tools: streamed, by the model's choice")
def tools_streamed(servers: Servers) -> None:
    servers.script("Let me look." + call("weather", city="Vienna"), "It rains.")
    here = at(servers.scripted)
    messages = ask("How is the weather in Vienna?")
    with here.messages.stream(model=MODEL, max_tokens=300, messages=messages, tools=[WEATHER]) as events:
        first = events.get_final_message()
    (made,) = (block for block in first.content if block.type == "tool_use")
    assert made.input == {"city": "Vienna"}
    result: Any = {
        "type": "tool_result",
        "tool_use_id": made.id,
        "content": [{"type": "text", "text": "Rain, 4 degrees"}],
    }
    messages += [{"role": "assistant", "content": first.content}, {"role": "user", "content": [result]}]
    second = here.messages.create(model=MODEL, max_tokens=64, messages=messages, tools=[WEATHER])
    assert text_of(second) == "It rains."
    assert "Rain, 4 degrees" in servers.asked()


@client.flow("tools: runner")
def tool_runner(servers: Servers) -> None:
    servers.script(call("weather", city="Vienna"), "It rains.")

    @anthropic.beta_tool
    def weather(city: str) -> str:
        """The weather of a city.

        Args:
          city: its name.
        """
        return json.dumps({"city": city, "weather": "rain"})

    runner = at(servers.scripted).beta.messages.tool_runner(
        model=MODEL, max_tokens=300, messages=ask("How is the weather in Vienna?"), tools=[weather]
    )
    assert text_of(runner.until_done()) == "It rains."


@client.flow("sessions: a name, across a restart")
def session(servers: Servers) -> None:
    def turn(text: str) -> Any:
        return at(servers.url).messages.create(
            model=MODEL, max_tokens=16, messages=ask(text), extra_headers={"X-Session-ID": "anthropic-python"}
        )

    assert not turn("My name is Anna.").usage.cache_read_input_tokens
    servers.restart()
    assert turn("What is my name?").usage.cache_read_input_tokens > 0


@client.flow("models")
def models(servers: Servers) -> None:
    here = at(servers.url)
    (model,) = here.models.list()
    assert here.models.retrieve(model.id).id == model.id
    assert model.type == "model"
    assert model.display_name


@client.flow("tokens")
def tokens(servers: Servers) -> None:
    here = at(servers.url)
    counted = here.messages.count_tokens(model=MODEL, messages=ask("Name a river."), system="You are brief.")
    asked = here.messages.create(model=MODEL, max_tokens=1, messages=ask("Name a river."), system="You are brief.")
    assert counted.input_tokens == asked.usage.input_tokens + (asked.usage.cache_read_input_tokens or 0) > 0


@client.flow("errors")
def errors(servers: Servers) -> None:
    here = at(servers.url)
    with raises(anthropic.BadRequestError) as bad:
        here.messages.create(model=MODEL, max_tokens=16, messages=ask("a"), extra_body={"top_p": 9})
    assert "top_p" in bad.value.message
    assert bad.value.type == "invalid_request_error"
    with raises(anthropic.BadRequestError):
        here.messages.create(model=MODEL, max_tokens=16, messages=ask("river " * 60_000))
    with raises(anthropic.NotFoundError):
        here.models.retrieve("no-such-model")


@client.flow("cancel")
def cancel(servers: Servers) -> None:
    here = at(servers.url)
    with here.messages.stream(model=MODEL, max_tokens=4000, messages=ask(LONG)) as events:
        for _ in range(6):
            next(events.text_stream)
    servers.wait_idle()


if __name__ == "__main__":
    client.main()
