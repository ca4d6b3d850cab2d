# /// script
# dependencies = ["pydantic-ai-slim[openai,anthropic]"]
# ///
"""pydantic-ai, through its models for OpenAI's and Anthropic's APIs."""

from __future__ import annotations

from typing import Any

import pydantic
from pydantic_ai import Agent, ModelHTTPError, NativeOutput, RunContext
from pydantic_ai.models.anthropic import AnthropicModel
from pydantic_ai.models.openai import OpenAIChatModel, OpenAIResponsesModel
from pydantic_ai.providers.anthropic import AnthropicProvider
from pydantic_ai.providers.openai import OpenAIProvider

from benchmarks.clients.flows import Client, Servers, call, example, raises

client = Client("pydantic-ai-slim")


class River(pydantic.BaseModel):
    """A river."""

    name: str = pydantic.Field(max_length=40)  # a small model goes on for ever where it may
    length_km: int = pydantic.Field(ge=0, le=99_999)


def chat_model(url: str) -> Any:
    return OpenAIChatModel("any", provider=OpenAIProvider(base_url=f"{url}/v1", api_key="none"))


def responses_model(url: str) -> Any:
    return OpenAIResponsesModel("any", provider=OpenAIProvider(base_url=f"{url}/v1", api_key="none"))


def anthropic_model(url: str) -> Any:
    return AnthropicModel("claude-haiku-4-5", provider=AnthropicProvider(base_url=url, api_key="none"))


def with_weather(model: Any, **options: Any) -> Any:
    agent: Any = Agent(model, **options)

    @agent.tool
    def weather(context: RunContext[None], city: str) -> str:
        """The weather of a city."""
        return f"Rain, 4 degrees in {city}"

    return agent


MODELS: dict[str, Any] = {"chat": chat_model, "responses": responses_model, "messages": anthropic_model}


def flows_of(name: str, make: Any) -> None:
    kind = "responses" if name == "responses" else "chat"

    @client.flow(f"{kind}: {name}")
    async def chat(servers: Servers) -> None:
        found = await Agent(make(servers.url), instructions="You are brief.").run("Name a river.")
        assert found.output
        assert found.usage.output_tokens > 0

    @client.flow(f"stream: {name}")
    async def stream(servers: Servers) -> None:
        async with Agent(make(servers.url)).run_stream("Name a river.") as answer:
            assert "".join([piece async for piece in answer.stream_text(delta=True)])

    @client.flow(f"structured: {name}")
    async def structured(servers: Servers) -> None:
        found = await Agent(make(servers.url), output_type=River, retries=3).run("Describe the Danube.")
        assert isinstance(found.output, River)

    @client.flow(f"tools: {name}")
    async def tools(servers: Servers) -> None:
        servers.script(call("weather", city="Vienna"), "It rains.")
        found = await with_weather(make(servers.scripted)).run("How is the weather in Vienna?")
        assert found.output == "It rains."
        assert "Rain, 4 degrees in Vienna" in servers.asked()

    @client.flow(f"tools: {name}, then structured, streamed")
    async def both(servers: Servers) -> None:
        servers.script(call("weather", city="Vienna"), call("final_result", name="Danube", length_km=2850))
        agent = with_weather(make(servers.scripted), output_type=River)
        async with agent.run_stream("Describe the Danube.") as answer:
            assert await answer.get_output() == River(name="Danube", length_km=2850)


for _name, _make in MODELS.items():
    flows_of(_name, _make)


@client.flow("structured: native")
async def native(servers: Servers) -> None:
    found = await Agent(chat_model(servers.url), output_type=NativeOutput(River)).run("Describe the Danube.")
    assert isinstance(found.output, River)


@client.flow("sessions: a name, across a restart")
async def session(servers: Servers) -> None:
    async def turn(text: str) -> int:
        settings: Any = {"extra_body": {"atlas": {"session_id": "pydantic-ai"}}, "max_tokens": 16}
        found = await Agent(chat_model(servers.url), model_settings=settings).run(text)
        return int(found.usage.cache_read_tokens)

    assert await turn("My name is Anna.") == 0
    servers.restart()
    assert await turn("What is my name?") > 0


@client.flow("errors")
async def errors(servers: Servers) -> None:
    for make in MODELS.values():
        with raises(ModelHTTPError) as bad:
            await Agent(make(servers.url)).run("river " * 60_000)
        assert bad.value.status_code == 400


@client.flow("example")
def the_example(servers: Servers) -> None:
    assert "length_km=" in example("pydantic_ai_agent.py", servers.url)


if __name__ == "__main__":
    client.main()
