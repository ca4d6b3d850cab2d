# /// script
# dependencies = ["langchain", "langchain-openai", "langchain-anthropic", "langchain-ollama"]
# ///
"""LangChain, through its packages for OpenAI, Anthropic and Ollama."""

from __future__ import annotations

from typing import Any

import openai
import pydantic
from langchain.agents import create_agent
from langchain_anthropic import ChatAnthropic
from langchain_core.messages import HumanMessage, ToolMessage
from langchain_core.tools import tool
from langchain_ollama import ChatOllama, OllamaEmbeddings
from langchain_openai import ChatOpenAI, OpenAIEmbeddings

from benchmarks.clients.flows import LONG, Client, Servers, call, example, raises

client = Client("langchain")


class River(pydantic.BaseModel):
    """A river."""

    name: str = pydantic.Field(max_length=40)  # a small model goes on for ever where it may
    length_km: int = pydantic.Field(ge=0, le=99_999)


@tool
def weather(city: str) -> str:
    """The weather of a city."""
    return f"Rain, 4 degrees in {city}"


def chat_openai(url: str, **options: Any) -> ChatOpenAI:
    return ChatOpenAI(base_url=f"{url}/v1", api_key="none", **options)


def chat_anthropic(url: str, **options: Any) -> ChatAnthropic:
    return ChatAnthropic(base_url=url, api_key="none", model="claude-haiku-4-5", **options)


def chat_ollama(url: str, **options: Any) -> ChatOllama:
    return ChatOllama(base_url=url, model="llama3.2", **options)


APIS: dict[str, Any] = {"OpenAI": chat_openai, "Anthropic": chat_anthropic, "Ollama": chat_ollama}


def flows_of(api: str, make: Any) -> None:
    """Registers what the three have in common."""

    @client.flow(f"chat: {api}")
    def chat(servers: Servers) -> None:
        answer = make(servers.url).invoke([("system", "You are brief."), ("human", "Name a river.")])
        assert answer.text
        assert answer.usage_metadata["output_tokens"] > 0

    @client.flow(f"stream: {api}")
    async def stream(servers: Servers) -> None:
        pieces = [piece async for piece in make(servers.url).astream("Name a river.")]
        assert len(pieces) > 1
        assert "".join(piece.text for piece in pieces)

    @client.flow(f"structured: {api}")
    def structured(servers: Servers) -> None:
        found = make(servers.url).with_structured_output(River).invoke("Describe the Danube.")
        assert isinstance(found, River)

    @client.flow(f"tools: {api}")
    def tools(servers: Servers) -> None:
        servers.script(call("weather", city="Vienna"), "It rains.")
        model = make(servers.scripted).bind_tools([weather])
        messages: list[Any] = [HumanMessage("How is the weather in Vienna?")]
        messages.append(model.invoke(messages))
        (made,) = messages[-1].tool_calls
        assert made["args"] == {"city": "Vienna"}
        messages.append(weather.invoke(made))
        assert isinstance(messages[-1], ToolMessage)
        assert model.invoke(messages).text == "It rains."
        assert "Rain, 4 degrees in Vienna" in servers.asked()

    @client.flow(f"tools: {api}, streamed")
    def tools_streamed(servers: Servers) -> None:
        servers.script(call("weather", city="Vienna"))
        whole: Any = None
        for piece in make(servers.scripted).bind_tools([weather]).stream("How is the weather in Vienna?"):
            whole = piece if whole is None else whole + piece
        (made,) = whole.tool_calls
        assert made["args"] == {"city": "Vienna"}

    @client.flow(f"tools: {api}, agent")
    def agent(servers: Servers) -> None:
        servers.script(call("weather", city="Vienna"), "It rains.")
        found = create_agent(make(servers.scripted), [weather]).invoke({"messages": [("human", "The weather?")]})
        assert found["messages"][-1].text == "It rains."

    @client.flow(f"cancel: {api}")
    def cancel(servers: Servers) -> None:
        pieces = make(servers.url).stream(LONG)
        for _ in range(6):
            next(pieces)
        pieces.close()
        servers.wait_idle()


for _api, _make in APIS.items():
    flows_of(_api, _make)


@client.flow("structured: function_calling")
def methods(servers: Servers) -> None:
    model = chat_openai(servers.url).with_structured_output(River, method="function_calling")
    assert isinstance(model.invoke("Describe the Danube."), River)


@client.flow("tools: a forced choice")
def forced(servers: Servers) -> None:
    answer = chat_openai(servers.url).bind_tools([weather], tool_choice="any").invoke("The weather in Vienna?")
    assert answer.tool_calls
    assert isinstance(answer.tool_calls[0]["args"]["city"], str)


@client.flow("embeddings: OpenAI")
def embeddings(servers: Servers) -> None:
    """By default texts are sent as token ids of OpenAI's vocabulary, which no other server can read."""
    model = OpenAIEmbeddings(base_url=f"{servers.url}/v1", api_key="none", check_embedding_ctx_length=False)
    first, second = model.embed_documents(["a river", "a mountain"])
    assert len(first) == len(second) > 1
    assert model.embed_query("a river") == first


@client.flow("embeddings: Ollama")
def embeddings_ollama(servers: Servers) -> None:
    model = OllamaEmbeddings(base_url=servers.url, model="llama3.2")
    first, second = model.embed_documents(["a river", "a mountain"])
    assert len(first) == len(second) > 1


@client.flow("responses")
def responses(servers: Servers) -> None:
    model = chat_openai(servers.url, use_responses_api=True)
    first = model.invoke("Name a river.")
    assert first.text
    assert model.invoke("And another?", previous_response_id=first.response_metadata["id"]).text
    assert "".join(piece.text for piece in model.stream("Name a river."))


@client.flow("responses: tools")
def responses_tools(servers: Servers) -> None:
    servers.script(call("weather", city="Vienna"), "It rains.")
    model = chat_openai(servers.scripted, use_responses_api=True)
    found = create_agent(model, [weather]).invoke({"messages": [("human", "The weather?")]})
    assert found["messages"][-1].text == "It rains."


@client.flow("sessions: a name, across a restart")
def session(servers: Servers) -> None:
    def turn(text: str) -> Any:
        model = chat_openai(servers.url, extra_body={"atlas": {"session_id": "langchain"}}, max_tokens=16)
        return model.invoke(text).usage_metadata["input_token_details"].get("cache_read", 0)

    assert turn("My name is Anna.") == 0
    servers.restart()
    assert turn("What is my name?") > 0


@client.flow("errors")
def errors(servers: Servers) -> None:
    with raises(openai.BadRequestError) as bad:
        chat_openai(servers.url, top_p=9).invoke("a")
    assert bad.value.param == "top_p"


@client.flow("example")
def the_example(servers: Servers) -> None:
    servers.script(call("weather", city="Vienna"), "It rains.")
    assert example("langchain_agent.py", servers.scripted).strip() == "It rains."


if __name__ == "__main__":
    client.main()
