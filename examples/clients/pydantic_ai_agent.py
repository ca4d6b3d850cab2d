"""pydantic-ai: an agent whose answer is a type, held to it while the model writes.

pip install 'pydantic-ai-slim[openai]'
python examples/clients/pydantic_ai_agent.py [URL]
"""

import sys

from pydantic import BaseModel
from pydantic_ai import Agent, NativeOutput
from pydantic_ai.models.openai import OpenAIChatModel
from pydantic_ai.providers.openai import OpenAIProvider


class River(BaseModel):
    name: str
    length_km: int


url = sys.argv[1] if len(sys.argv) > 1 else "http://127.0.0.1:8080"
model = OpenAIChatModel("any", provider=OpenAIProvider(base_url=f"{url}/v1", api_key="none"))
agent = Agent(model, output_type=NativeOutput(River))  # a schema, where the default would have the model call a tool
print(agent.run_sync("Describe the Danube.").output)
