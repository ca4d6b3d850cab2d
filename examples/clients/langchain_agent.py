"""LangChain: an agent with a tool, over a session that the server keeps.

    pip install langchain langchain-openai
    python examples/clients/langchain_agent.py [URL]

Calling tools is for larger models than the default one.
"""

import sys

from langchain.agents import create_agent
from langchain_openai import ChatOpenAI


def weather(city: str) -> str:
    """The weather of a city."""
    return f"Rain and 4 degrees in {city}"


url = sys.argv[1] if len(sys.argv) > 1 else "http://127.0.0.1:8080"
model = ChatOpenAI(
    base_url=f"{url}/v1", api_key="none", model="any", extra_body={"atlas": {"session_id": "langchain-example"}}
)
agent = create_agent(model, [weather])
found = agent.invoke({"messages": [("human", "How is the weather in Vienna?")]})
print(found["messages"][-1].text)
