# /// script
# dependencies = ["openai-agents"]
# ///
"""OpenAI's agents, over responses (their default) and over chat completions."""

from __future__ import annotations

from typing import Any

import pydantic
from agents import Agent, OpenAIChatCompletionsModel, OpenAIResponsesModel, Runner, function_tool, set_tracing_disabled
from openai import AsyncOpenAI

from benchmarks.clients.flows import Client, Servers, call

client = Client("openai-agents")
set_tracing_disabled(True)


class River(pydantic.BaseModel):
    name: str = pydantic.Field(max_length=40)  # a small model goes on for ever where it may
    length_km: int = pydantic.Field(ge=0, le=99_999)


@function_tool
def weather(city: str) -> str:
    """The weather of a city."""
    return f"Rain, 4 degrees in {city}"


def model(kind: Any, url: str) -> Any:
    return kind("any", AsyncOpenAI(base_url=f"{url}/v1", api_key="none"))


def flows_of(name: str, kind: Any) -> None:
    @client.flow(f"{name}: the first answer")
    async def chat(servers: Servers) -> None:
        agent = Agent(name="Guide", instructions="You are brief.", model=model(kind, servers.url))
        assert (await Runner.run(agent, "Name a river.")).final_output

    @client.flow(f"stream: {name}")
    async def stream(servers: Servers) -> None:
        found = Runner.run_streamed(Agent(name="Guide", model=model(kind, servers.url)), "Name a river.")
        kinds = [event.type async for event in found.stream_events()]
        assert "raw_response_event" in kinds
        assert found.final_output

    @client.flow(f"structured: {name}")
    async def structured(servers: Servers) -> None:
        agent = Agent(name="Guide", model=model(kind, servers.url), output_type=River)
        assert isinstance((await Runner.run(agent, "Describe the Danube.")).final_output, River)

    @client.flow(f"tools: {name}")
    async def tools(servers: Servers) -> None:
        servers.script(call("weather", city="Vienna"), "It rains.")
        agent = Agent(name="Guide", model=model(kind, servers.scripted), tools=[weather])
        assert (await Runner.run(agent, "How is the weather in Vienna?")).final_output == "It rains."
        assert "Rain, 4 degrees in Vienna" in servers.asked()

    @client.flow(f"tools: {name}, handed over, streamed")
    async def handoff(servers: Servers) -> None:
        servers.script(call("transfer_to_poet"), "A poem.")
        poet = Agent(name="Poet", model=model(kind, servers.scripted))
        agent = Agent(name="Guide", model=model(kind, servers.scripted), handoffs=[poet])
        found = Runner.run_streamed(agent, "A poem, please.")
        async for _ in found.stream_events():
            pass
        assert found.final_output == "A poem."
        assert found.last_agent.name == "Poet"


flows_of("responses", OpenAIResponsesModel)
flows_of("chat", OpenAIChatCompletionsModel)


if __name__ == "__main__":
    client.main()
