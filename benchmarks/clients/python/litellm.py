# /// script
# dependencies = ["litellm"]
# ///
"""LiteLLM, through the providers that speak to a server of one's own."""

from __future__ import annotations

import json
from typing import Any

import litellm
import pydantic

from benchmarks.clients.flows import LONG, Client, Servers, call, example, raises

client = Client("litellm")
WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "The weather of a city",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}


class River(pydantic.BaseModel):
    name: str  # the Anthropic client says no bounds
    length_km: int


def to(provider: str, url: str) -> dict[str, Any]:
    """The options of a call through a provider."""
    bases = {"openai": f"{url}/v1", "hosted_vllm": f"{url}/v1", "anthropic": url, "ollama_chat": url, "ollama": url}
    names = {"anthropic": "anthropic/claude-haiku-4-5"}
    return {"model": names.get(provider, f"{provider}/any"), "api_base": bases[provider], "api_key": "none"}


def ask(text: str) -> Any:
    return [{"role": "user", "content": text}]


PROVIDERS = ("openai", "hosted_vllm", "anthropic", "ollama_chat")


def flows_of(provider: str) -> None:
    """Registers what the providers have in common."""

    @client.flow(f"chat: {provider}")
    def chat(servers: Servers) -> None:
        answer = litellm.completion(**to(provider, servers.url), messages=ask("Name a river."))
        assert answer.choices[0].message.content
        assert answer.usage.completion_tokens > 0

    @client.flow(f"stream: {provider}")
    async def stream(servers: Servers) -> None:
        pieces = await litellm.acompletion(**to(provider, servers.url), messages=ask("Name a river."), stream=True)
        assert "".join([piece.choices[0].delta.content or "" async for piece in pieces])

    @client.flow(f"structured: {provider}")
    def structured(servers: Servers) -> None:
        answer = litellm.completion(
            **to(provider, servers.url), messages=ask("Describe the Danube."), response_format=River
        )
        River.model_validate_json(answer.choices[0].message.content)

    @client.flow(f"tools: {provider}")
    def tools(servers: Servers) -> None:
        servers.script(call("weather", city="Vienna"), "It rains.")
        messages = ask("How is the weather in Vienna?")
        message = (
            litellm.completion(**to(provider, servers.scripted), messages=messages, tools=[WEATHER]).choices[0].message
        )
        (made,) = message.tool_calls
        assert json.loads(made.function.arguments) == {"city": "Vienna"}
        messages += [message, {"role": "tool", "tool_call_id": made.id, "content": "Rain, 4 degrees"}]
        answer = litellm.completion(**to(provider, servers.scripted), messages=messages, tools=[WEATHER])
        assert answer.choices[0].message.content == "It rains."
        assert "Rain, 4 degrees" in servers.asked()


for _provider in PROVIDERS:
    flows_of(_provider)


@client.flow("chat: text completion")
def text(servers: Servers) -> None:
    found = litellm.text_completion(
        model="text-completion-openai/any", api_base=f"{servers.url}/v1", api_key="none", prompt="The river"
    )
    assert found.choices[0].text


@client.flow("embeddings")
def embeddings(servers: Servers) -> None:
    for provider in ("openai", "hosted_vllm", "ollama"):
        found = litellm.embedding(**to(provider, servers.url), input=["a river", "a mountain"])
        assert len(found.data) == 2, provider


@client.flow("responses")
def responses(servers: Servers) -> None:
    found = litellm.responses(**to("openai", servers.url), input="Name a river.")
    assert found.output[0].content[0].text


@client.flow("sessions: a name, across a restart")
def session(servers: Servers) -> None:
    def turn(said: str) -> int:
        answer = litellm.completion(
            **to("openai", servers.url),
            messages=ask(said),
            max_tokens=16,
            extra_headers={"x-litellm-session-id": "litellm"},
        )
        return answer.usage.prompt_tokens_details.cached_tokens or 0

    assert turn("My name is Anna.") == 0
    servers.restart()
    assert turn("What is my name?") > 0


@client.flow("errors")
def errors(servers: Servers) -> None:
    for provider in ("openai", "hosted_vllm"):
        with raises(litellm.ContextWindowExceededError):
            litellm.completion(**to(provider, servers.url), messages=ask("river " * 60_000))
        with raises(litellm.BadRequestError):
            litellm.completion(**to(provider, servers.url), messages=ask("a"), top_p=9)


@client.flow("cancel")
def cancel(servers: Servers) -> None:
    pieces = litellm.completion(**to("openai", servers.url), messages=ask(LONG), max_tokens=4000, stream=True)
    for _ in range(6):
        next(pieces)
    pieces.completion_stream.close()
    servers.wait_idle()


@client.flow("example")
def the_example(servers: Servers) -> None:
    assert len(example("litellm_chat.py", servers.url).strip().splitlines()) >= 4


if __name__ == "__main__":
    client.main()
