# /// script
# dependencies = ["llm"]
# ///
"""The command line tool `llm`, with the server in its extra-openai-models.yaml."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from benchmarks.clients.flows import ADDRESS, EXAMPLES, Client, Servers, call

client = Client("llm")
MODELS = EXAMPLES / "extra-openai-models.yaml"
WEATHER = '''
def weather(city: str) -> str:
    """The weather of a city."""
    return f"Rain, 4 degrees in {city}"
'''


def run(url: str, *arguments: str, folder: Path | None = None) -> str:
    """What the tool prints."""
    with tempfile.TemporaryDirectory() as made:
        place = folder or Path(made)
        (place / MODELS.name).write_text(MODELS.read_text("utf-8").replace(ADDRESS, url))
        environ = {**os.environ, "LLM_USER_PATH": str(place)}
        command = [sys.executable, "-m", "llm", *arguments]
        done = subprocess.run(command, env=environ, input="", capture_output=True, text=True)
        assert done.returncode == 0, done.stderr.strip().splitlines()[-1]
        return done.stdout


@client.flow("chat")
def chat(servers: Servers) -> None:
    assert run(servers.url, "-m", "atlas", "--no-stream", "-s", "You are brief.", "Name a river.").strip()
    assert run(servers.url, "-m", "atlas-text", "The river", "-o", "max_tokens", "16").strip()


@client.flow("stream")
def stream(servers: Servers) -> None:
    with tempfile.TemporaryDirectory() as folder:
        assert run(servers.url, "-m", "atlas", "Name a river.", folder=Path(folder)).strip()
        assert run(servers.url, "-c", "And another?", folder=Path(folder)).strip()  # goes on with what was said


@client.flow("structured")
def structured(servers: Servers) -> None:
    found = json.loads(run(servers.url, "-m", "atlas", "--schema", "name, length_km int", "Describe the Danube."))
    assert isinstance(found["length_km"], int)


@client.flow("tools")
def tools(servers: Servers) -> None:
    servers.script(call("weather", city="Vienna"), "It rains.")
    assert run(servers.scripted, "-m", "atlas", "--functions", WEATHER, "The weather in Vienna?").strip() == "It rains."
    assert "Rain, 4 degrees in Vienna" in servers.asked()


if __name__ == "__main__":
    client.main()
