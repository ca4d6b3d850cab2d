# /// script
# dependencies = ["smolagents[openai]"]
# ///
"""smolagents, through its model for OpenAI's API."""

from __future__ import annotations

from smolagents import CodeAgent, OpenAIServerModel, ToolCallingAgent, tool

from benchmarks.clients.flows import Client, Servers, call

client = Client("smolagents")


@tool
def weather(city: str) -> str:
    """The weather of a city.

    Args:
        city: its name.
    """
    return f"Rain, 4 degrees in {city}"


def at(url: str) -> OpenAIServerModel:
    return OpenAIServerModel("any", api_base=f"{url}/v1", api_key="none")


@client.flow("chat")
def chat(servers: Servers) -> None:
    messages = [{"role": "user", "content": [{"type": "text", "text": "Name a river."}]}]
    assert at(servers.url)(messages).content


@client.flow("stream")
def stream(servers: Servers) -> None:
    messages = [{"role": "user", "content": [{"type": "text", "text": "Name a river."}]}]
    assert "".join(piece.content or "" for piece in at(servers.url).generate_stream(messages))


@client.flow("tools")
def tools(servers: Servers) -> None:
    servers.script(call("weather", city="Vienna"), call("final_answer", answer="It rains."))
    agent = ToolCallingAgent(tools=[weather], model=at(servers.scripted), verbosity_level=0)
    assert agent.run("How is the weather in Vienna?") == "It rains."
    assert "Rain, 4 degrees in Vienna" in servers.asked()


@client.flow("tools: as code")
def code(servers: Servers) -> None:
    servers.script('Thought: I look.\n<code>\nfinal_answer(weather("Vienna"))\n</code>')
    agent = CodeAgent(tools=[weather], model=at(servers.scripted), verbosity_level=0)
    assert agent.run("How is the weather in Vienna?") == "Rain, 4 degrees in Vienna"


if __name__ == "__main__":
    client.main()
