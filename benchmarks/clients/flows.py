"""What the scripts of the clients share: the servers they speak to, and flows that end in a line of JSON each.

Runs in the virtual environment of every client, so it needs no package.
"""

from __future__ import annotations

import asyncio
import importlib.metadata
import inspect
import json
import os
import subprocess
import sys
import time
import traceback
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

KINDS = (
    *("chat", "stream", "structured", "tools", "embeddings", "responses", "sessions", "models", "tokens", "errors"),
    *("cancel", "example"),
)
"""What clients are used for; the columns of the table."""
LONG = "Write a very long story of a river, with everything that lives in it."
"""What a model answers at length."""
EXAMPLES = Path(__file__).parents[2] / "examples" / "clients"
ADDRESS = "http://127.0.0.1:8080"
"""The server's in the examples."""
_PATIENCE = 60.0


@dataclass(frozen=True)
class Servers:
    """The servers of a run.

    Attributes:
      url: one with a model.
      scripted: one whose model says what `script` has been given, whatever it is asked.
      control: where both are looked after.
    """

    url: str
    scripted: str
    control: str

    @property
    def made_up(self) -> bool:
        """Whether no server has a real model, so that nothing but the forms of answers can be looked at."""
        return self.url == self.scripted

    @classmethod
    def of_environment(cls) -> Servers:
        """Those that the runner names."""
        return cls(*(os.environ[f"CLIENTS_{name}"] for name in ("URL", "SCRIPTED", "CONTROL")))

    def script(self, *answers: str) -> None:
        """Says what the scripted server's next requests are answered, one text each."""
        self._control("/script", list(answers))

    def asked(self) -> str:
        """The last conversation that the scripted model was shown, as JSON."""
        return json.dumps(self._control("/asked"))

    def post(self, path: str) -> Any:
        """Asks the server with the model for something that no client has a function for."""
        return _json(self.url + path, {})

    def restart(self) -> None:
        """Stops the server that has a model, and starts it again at the same address."""
        self._control("/restart")

    def wait_idle(self) -> None:
        """Waits until the server with the model generates nothing for anybody."""
        end = time.monotonic() + _PATIENCE
        while any(slot["is_processing"] for slot in _json(f"{self.url}/slots")):
            assert time.monotonic() < end, "the server went on after the client had left"
            time.sleep(0.05)

    def _control(self, path: str, body: Any = None) -> Any:
        return _json(self.control + path, {} if body is None else body)


def _json(url: str, body: Any = None) -> Any:
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url, data, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=600) as answer:
        return json.load(answer)


def example(name: str, url: str) -> str:
    """What an example of the repository prints, with a server at another address."""
    command = [sys.executable, "-P", str(EXAMPLES / name), url]
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr.strip().splitlines()[-1]
    return done.stdout


def call(name: str, /, **arguments: Any) -> str:
    """A call of a function, as the scripted model has to write it."""
    return f"<tool_call>\n{json.dumps({'name': name, 'arguments': arguments})}\n</tool_call>"


class Client:
    """A client and its flows.

    Args:
      package: its distribution's name.
    """

    def __init__(self, package: str) -> None:
        self.package = package
        self.flows: dict[str, Callable[[Servers], Any]] = {}

    def flow(self, name: str) -> Callable[[Callable[[Servers], Any]], Callable[[Servers], Any]]:
        """Registers a flow; its name is one of `KINDS`, or begins with one and says more after a colon."""
        assert name.partition(":")[0] in KINDS, name

        def register(function: Callable[[Servers], Any]) -> Callable[[Servers], Any]:
            assert name not in self.flows, name
            self.flows[name] = function
            return function

        return register

    def main(self) -> None:
        """Runs the flows that the command line names, or all."""
        servers = Servers.of_environment()
        version = importlib.metadata.version(self.package)
        for name, function in self.flows.items():
            if sys.argv[1:] and not any(name.startswith(wanted) for wanted in sys.argv[1:]):
                continue
            servers.script()  # what a flow before has not used
            started, why = time.monotonic(), None
            try:
                run(function, servers)
            except Exception as error:
                traceback.print_exc()
                why = f"{type(error).__name__}: {error}".strip().splitlines()[0][:300]
            row = {"version": version, "flow": name, "ok": why is None, "why": why}
            print(json.dumps(row | {"seconds": round(time.monotonic() - started, 2)}), flush=True)


def run(function: Callable[[Servers], Any], servers: Servers) -> None:
    """Runs a flow, whichever way it is written."""
    result = function(servers)
    if inspect.isawaitable(result):
        asyncio.run(_awaited(result))


async def _awaited(result: Any) -> None:
    await result


class raises:
    """A block that must raise an error of this type; `value` is the error."""

    def __init__(self, expected: type[BaseException]) -> None:
        self.expected = expected
        self.value: Any = None

    def __enter__(self) -> raises:
        return self

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> bool:
        assert error is not None, f"no {self.expected.__name__}"
        self.value = error
        return isinstance(error, self.expected)
