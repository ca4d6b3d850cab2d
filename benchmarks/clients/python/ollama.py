# /// script
# dependencies = ["ollama"]
# ///
"""Ollama's client."""

from __future__ import annotations

from typing import Any

import ollama
import pydantic

from benchmarks.clients.flows import LONG, Client, Servers, call, raises

client = Client("ollama")
MODEL = "llama3.2"


class River(pydantic.BaseModel):
    name: str = pydantic.Field(max_length=40)  # a small model goes on for ever where it may
    length_km: int = pydantic.Field(ge=0, le=99_999)


def at(url: str) -> ollama.Client:
    return ollama.Client(host=url)


def ask(text: str) -> Any:
    return [{"role": "user", "content": text}]


def weather(city: str) -> str:
    """The weather of a city.

    Args:
      city: its name.
    """
    return f"Rain, 4 degrees in {city}"


@client.flow("chat")
def chat(servers: Servers) -> None:
    answer = at(servers.url).chat(model=MODEL, messages=ask("Name a river."))
    assert answer.message.content
    assert answer.done_reason == "stop"
    assert answer.eval_count > 0
    assert answer.total_duration > 0


@client.flow("chat: generate, with options")
def generate(servers: Servers) -> None:
    here = at(servers.url)
    options = {
        "num_predict": 16,
        "num_ctx": 2048,
        "temperature": 0,
        "seed": 1,
        "stop": ["\n\n\n"],
        "repeat_penalty": 1.1,
    }
    answer = here.generate(
        model=MODEL, prompt="Name a river.", system="You are brief.", options=options, keep_alive="5m"
    )
    assert answer.response
    assert here.generate(model=MODEL).done  # how models are loaded


@client.flow("stream")
def stream(servers: Servers) -> None:
    parts = list(at(servers.url).chat(model=MODEL, messages=ask("Name a river."), stream=True))
    assert "".join(part.message.content for part in parts)
    assert parts[-1].done


@client.flow("stream: async")
async def stream_async(servers: Servers) -> None:
    here = ollama.AsyncClient(host=servers.url)
    parts = [part async for part in await here.generate(model=MODEL, prompt="Name a river.", stream=True)]
    assert "".join(part.response for part in parts)


@client.flow("structured")
def structured(servers: Servers) -> None:
    answer = at(servers.url).chat(model=MODEL, messages=ask("Describe the Danube."), format=River.model_json_schema())
    River.model_validate_json(answer.message.content)


@client.flow("tools")
def tools(servers: Servers) -> None:
    servers.script(call("weather", city="Vienna"), "It rains.")
    here = at(servers.scripted)
    messages = ask("How is the weather in Vienna?")
    first = here.chat(model=MODEL, messages=messages, tools=[weather])
    (made,) = first.message.tool_calls
    result = weather(**made.function.arguments)
    messages += [first.message, {"role": "tool", "tool_name": made.function.name, "content": result}]
    assert here.chat(model=MODEL, messages=messages, tools=[weather]).message.content == "It rains."
    assert "Rain, 4 degrees" in servers.asked()


@client.flow("tools: streamed")
def tools_streamed(servers: Servers) -> None:
    servers.script(call("weather", city="Vienna"))
    parts = list(at(servers.scripted).chat(model=MODEL, messages=ask("The weather?"), tools=[weather], stream=True))
    (made,) = [one for part in parts for one in part.message.tool_calls or ()]
    assert made.function.arguments == {"city": "Vienna"}


@client.flow("embeddings")
def embeddings(servers: Servers) -> None:
    first, second = at(servers.url).embed(model=MODEL, input=["a river", "a mountain"]).embeddings
    assert len(first) == len(second) > 1
    assert first != second


@client.flow("embeddings: the older form")
def older_embeddings(servers: Servers) -> None:
    assert len(at(servers.url).embeddings(model=MODEL, prompt="a river").embedding) > 1


@client.flow("models")
def models(servers: Servers) -> None:
    here = at(servers.url)
    (model,) = here.list().models
    assert model.model
    assert model.size > 0
    assert here.show(model.model).details.family
    assert [one.model for one in here.ps().models] == [model.model]


@client.flow("sessions: a name, across a restart")
def session(servers: Servers) -> None:
    def turn(text: str) -> Any:
        here = ollama.Client(host=servers.url, headers={"X-Session-ID": "ollama-python"})
        return here.chat(model=MODEL, messages=ask(text), options={"num_predict": 16})

    turn("My name is Anna.")
    servers.restart()
    assert turn("What is my name?").message.content  # the client drops what it does not know
    listed = servers.post("/v1/atlas/memory/list")["contexts"]
    assert "ollama-python" in [one["context_id"] for one in listed]


@client.flow("errors")
def errors(servers: Servers) -> None:
    here = at(servers.url)
    with raises(ollama.ResponseError) as bad:
        here.chat(model=MODEL, messages=ask("a"), options={"temperature": -1})
    assert bad.value.status_code == 400
    assert "temperature" in bad.value.error
    with raises(ollama.ResponseError) as long:
        here.chat(model=MODEL, messages=ask("river " * 60_000))
    assert long.value.status_code == 400


@client.flow("cancel")
def cancel(servers: Servers) -> None:
    parts = at(servers.url).chat(model=MODEL, messages=ask(LONG), stream=True, options={"num_predict": 4000})
    for _ in range(6):
        next(parts)
    parts.close()
    servers.wait_idle()


if __name__ == "__main__":
    client.main()
