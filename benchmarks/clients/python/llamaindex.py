# /// script
# dependencies = ["llama-index-core", "llama-index-llms-openai-like", "llama-index-embeddings-openai-like"]
# ///
"""LlamaIndex, through OpenAILike."""

from __future__ import annotations

from typing import Any

import openai
import pydantic
from llama_index.core import Document, VectorStoreIndex
from llama_index.core.agent.workflow import FunctionAgent
from llama_index.core.llms import ChatMessage
from llama_index.core.tools import FunctionTool
from llama_index.embeddings.openai_like import OpenAILikeEmbedding
from llama_index.llms.openai_like import OpenAILike

from benchmarks.clients.flows import LONG, Client, Servers, call, example, raises

client = Client("llama-index-core")
ASKED = [ChatMessage(role="user", content="Name a river.")]


class River(pydantic.BaseModel):
    """A river."""

    name: str = pydantic.Field(max_length=40)  # a small model goes on for ever where it may
    length_km: int = pydantic.Field(ge=0, le=99_999)


def weather(city: str) -> str:
    """The weather of a city."""
    return f"Rain, 4 degrees in {city}"


def at(url: str, **options: Any) -> OpenAILike:
    options = {"is_chat_model": True, "is_function_calling_model": True, **options}
    return OpenAILike(model="any", api_base=f"{url}/v1", api_key="none", **options)


def embedding(url: str) -> OpenAILikeEmbedding:
    return OpenAILikeEmbedding(model_name="any", api_base=f"{url}/v1", api_key="none")


@client.flow("chat")
def chat(servers: Servers) -> None:
    assert at(servers.url).chat(ASKED).message.content
    assert OpenAILike(model="any", api_base=f"{servers.url}/v1", api_key="none").complete("The river").text


@client.flow("stream")
async def stream(servers: Servers) -> None:
    assert "".join([piece.delta or "" async for piece in await at(servers.url).astream_chat(ASKED)])
    plain = OpenAILike(model="any", api_base=f"{servers.url}/v1", api_key="none")
    assert "".join(piece.delta for piece in plain.stream_complete("The river"))


@client.flow("structured")
def structured(servers: Servers) -> None:
    found = at(servers.url).as_structured_llm(River).complete("Describe the Danube.")
    assert isinstance(found.raw, River)


@client.flow("structured: should_use_structured_outputs")
def structured_outputs(servers: Servers) -> None:
    found = at(servers.url, should_use_structured_outputs=True).as_structured_llm(River).complete("The Danube.")
    assert isinstance(found.raw, River)


@client.flow("tools")
async def tools(servers: Servers) -> None:
    servers.script(call("weather", city="Vienna"), "It rains.")
    agent = FunctionAgent(tools=[weather], llm=at(servers.scripted))
    assert str(await agent.run("How is the weather in Vienna?")) == "It rains."
    assert "Rain, 4 degrees in Vienna" in servers.asked()


@client.flow("tools: predict_and_call")
def predict(servers: Servers) -> None:
    servers.script(call("weather", city="Vienna"))
    found = at(servers.scripted).predict_and_call([FunctionTool.from_defaults(weather)], "The weather in Vienna?")
    assert str(found) == "Rain, 4 degrees in Vienna"


@client.flow("embeddings")
def embeddings(servers: Servers) -> None:
    documents = [Document(text="The Danube is a river."), Document(text="Rust is a language.")]
    index = VectorStoreIndex.from_documents(documents, embed_model=embedding(servers.url))
    assert len(index.as_retriever(similarity_top_k=2).retrieve("a river")) == 2


@client.flow("sessions: a name, across a restart")
def session(servers: Servers) -> None:
    def turn(text: str) -> Any:
        model = at(servers.url, default_headers={"X-Session-ID": "llamaindex"}, max_tokens=16)
        return model.chat([ChatMessage(role="user", content=text)]).raw.atlas_stats["history"]

    assert turn("My name is Anna.") == "new"
    servers.restart()
    assert turn("What is my name?") != "new"


@client.flow("errors")
def errors(servers: Servers) -> None:
    with raises(openai.BadRequestError) as long:
        at(servers.url).chat([ChatMessage(role="user", content="river " * 60_000)])
    assert long.value.code == "context_length_exceeded"


@client.flow("cancel")
def cancel(servers: Servers) -> None:
    pieces = at(servers.url, max_tokens=4000).stream_chat([ChatMessage(role="user", content=LONG)])
    for _ in range(6):
        next(pieces)
    pieces.close()
    servers.wait_idle()


@client.flow("example")
def the_example(servers: Servers) -> None:
    assert example("llamaindex_search.py", servers.url).strip()


if __name__ == "__main__":
    client.main()
