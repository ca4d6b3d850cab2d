# /// script
# dependencies = ["haystack-ai"]
# ///
"""Haystack, through its components for OpenAI's API."""

from __future__ import annotations

from typing import Any

from haystack.components.agents import Agent
from haystack.components.embedders import OpenAIDocumentEmbedder, OpenAITextEmbedder
from haystack.components.generators.chat import OpenAIChatGenerator
from haystack.dataclasses import ChatMessage, Document
from haystack.tools import tool
from haystack.utils import Secret

from benchmarks.clients.flows import Client, Servers, call

client = Client("haystack-ai")
KEY = Secret.from_token("none")
ASKED = [ChatMessage.from_user("Name a river.")]


@tool
def weather(city: Annotated[str, "its name"]) -> str:
    """The weather of a city."""
    return f"Rain, 4 degrees in {city}"


def at(url: str, **options: Any) -> OpenAIChatGenerator:
    return OpenAIChatGenerator(api_key=KEY, api_base_url=f"{url}/v1", **options)


@client.flow("chat")
def chat(servers: Servers) -> None:
    assert at(servers.url).run(ASKED)["replies"][0].text


@client.flow("stream")
def stream(servers: Servers) -> None:
    pieces: list[str] = []
    at(servers.url, streaming_callback=lambda piece: pieces.append(piece.content)).run(ASKED)
    assert "".join(pieces)


@client.flow("tools")
def tools(servers: Servers) -> None:
    servers.script(call("weather", city="Vienna"), "It rains.")
    agent = Agent(chat_generator=at(servers.scripted), tools=[weather])
    assert agent.run([ChatMessage.from_user("The weather in Vienna?")])["messages"][-1].text == "It rains."
    assert "Rain, 4 degrees in Vienna" in servers.asked()


@client.flow("embeddings")
def embeddings(servers: Servers) -> None:
    options: Any = {"api_key": KEY, "api_base_url": f"{servers.url}/v1"}
    assert len(OpenAITextEmbedder(**options).run("a river")["embedding"]) > 1
    documents = [Document(content="a river"), Document(content="a mountain")]
    found = OpenAIDocumentEmbedder(**options).run(documents)["documents"]
    assert all(len(one.embedding) > 1 for one in found)


if __name__ == "__main__":
    client.main()
