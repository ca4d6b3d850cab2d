# /// script
# dependencies = ["dspy"]
# ///
"""DSPy."""

from __future__ import annotations

import dspy

from benchmarks.clients.flows import Client, Servers

client = Client("dspy")


def at(url: str) -> dspy.LM:
    return dspy.LM("openai/any", api_base=f"{url}/v1", api_key="none", cache=False)


@client.flow("chat")
def chat(servers: Servers) -> None:
    (answer,) = at(servers.url)("Name a river.")
    assert answer


@client.flow("structured")
def structured(servers: Servers) -> None:
    servers.script('{"length_km": 2850, "country": "Austria"}')  # no grammar is asked for
    with dspy.context(lm=at(servers.scripted), adapter=dspy.JSONAdapter()):
        found = dspy.Predict("river -> length_km: int, country: str")(river="Danube")
    assert found.length_km == 2850


@client.flow("tools")
def tools(servers: Servers) -> None:
    def weather(city: str) -> str:
        """The weather of a city."""
        return f"Rain, 4 degrees in {city}"

    servers.script(
        "[[ ## next_thought ## ]]\nLook.\n\n[[ ## next_tool_name ## ]]\nweather\n\n[[ ## next_tool_args ## ]]\n"
        '{"city": "Vienna"}\n\n[[ ## completed ## ]]',
        "[[ ## next_thought ## ]]\nDone.\n\n[[ ## next_tool_name ## ]]\nfinish\n\n[[ ## next_tool_args ## ]]\n{}\n\n"
        "[[ ## completed ## ]]",
        "[[ ## reasoning ## ]]\nIt said so.\n\n[[ ## answer ## ]]\nIt rains.\n\n[[ ## completed ## ]]",
    )
    with dspy.context(lm=at(servers.scripted), adapter=dspy.ChatAdapter()):
        found = dspy.ReAct("question -> answer", tools=[weather])(question="The weather in Vienna?")
    assert found.answer == "It rains."


if __name__ == "__main__":
    client.main()
