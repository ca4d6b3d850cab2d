"""OpenAI's client: an answer as it comes, a type filled in, and a conversation that the server remembers.

pip install openai
python examples/clients/openai_client.py [URL]
"""

import sys

import pydantic
from openai import OpenAI


class River(pydantic.BaseModel):
    name: str
    length_km: int


url = sys.argv[1] if len(sys.argv) > 1 else "http://127.0.0.1:8080"
client = OpenAI(base_url=f"{url}/v1", api_key="none")  # a key, where the server has a keys file
model = client.models.list().data[0].id

for chunk in client.chat.completions.create(
    model=model, messages=[{"role": "user", "content": "Name three rivers."}], stream=True
):
    print(chunk.choices[0].delta.content or "", end="", flush=True)
print()

answer = client.chat.completions.parse(
    model=model, messages=[{"role": "user", "content": "Describe the Danube."}], response_format=River
)
print(answer.choices[0].message.parsed)

for text in ("My name is Anna.", "What is my name?"):  # only what is new is sent
    remembered = client.chat.completions.create(
        model=model,
        messages=[{"role": "user", "content": text}],
        extra_body={"atlas": {"session_id": "openai-example"}},
    )
    print(remembered.choices[0].message.content)
