# /// script
# dependencies = ["instructor", "openai"]
# ///
"""instructor, over OpenAI's client."""

from __future__ import annotations

from typing import Any

import instructor
import openai
import pydantic

from benchmarks.clients.flows import Client, Servers, call

client = Client("instructor")
ASKED: Any = [{"role": "user", "content": "Describe the Danube."}]


class River(pydantic.BaseModel):
    """A river."""

    name: str = pydantic.Field(max_length=40)  # a small model goes on for ever where it may
    length_km: int = pydantic.Field(ge=0, le=99_999)


def at(url: str, **options: Any) -> Any:
    return instructor.from_openai(openai.OpenAI(base_url=f"{url}/v1", api_key="none"), **options)


@client.flow("structured")
def structured(servers: Servers) -> None:
    found = at(servers.url).chat.completions.create(model="any", messages=ASKED, response_model=River)
    assert isinstance(found, River)


@client.flow("structured: by schema, by the message")
def modes(servers: Servers) -> None:
    for mode in (instructor.Mode.JSON_SCHEMA, instructor.Mode.TOOLS_STRICT):
        found = at(servers.url, mode=mode).chat.completions.create(model="any", messages=ASKED, response_model=River)
        assert isinstance(found, River), mode


@client.flow("structured: asked again")
def again(servers: Servers) -> None:
    servers.script(call("River", name="Danube"), call("River", name="Danube", length_km=2850))
    found = at(servers.scripted).chat.completions.create(model="any", messages=ASKED, response_model=River)
    assert found.model_dump() == {"name": "Danube", "length_km": 2850}, found


@client.flow("structured: a list")
def listed(servers: Servers) -> None:
    found = at(servers.scripted).chat.completions.create(model="any", messages=ASKED, response_model=list[River])
    assert all(isinstance(one, River) for one in found)


@client.flow("stream")
def partial(servers: Servers) -> None:
    found = list(at(servers.url).chat.completions.create_partial(model="any", messages=ASKED, response_model=River))
    assert len(found) > 1
    assert isinstance(found[-1].length_km, int)


@client.flow("responses")
def responses(servers: Servers) -> None:
    here = instructor.from_openai(
        openai.OpenAI(base_url=f"{servers.url}/v1", api_key="none"), mode=instructor.Mode.RESPONSES_TOOLS
    )
    found = here.responses.create(model="any", input="Describe the Danube.", response_model=River)
    assert isinstance(found, River)


if __name__ == "__main__":
    client.main()
