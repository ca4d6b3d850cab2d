"""A server whose model says what it is told to, else something that follows the request's grammar; and where it is told."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from atlas_jax.engine.api import AnswerShape, CallGrammar, GenerationRequest, Listener
from benchmarks.clients.flows import LONG
from tests.server.fake_engine import FakeEngine, Running
from tests.server.live_server import Live, make_settings

_CONTEXT = 1 << 18
"""Bytes are tokens here, and the instructions of an agent are eighty thousand of them."""


def example(schema: Any, root: Any = None) -> Any:
    """Something that follows a schema of the kind that clients make of their types."""
    root = schema if root is None else root
    if "$ref" in schema:
        found = root
        for name in schema["$ref"].removeprefix("#/").split("/"):
            found = found[name]
        return example(found, root)
    for several in ("anyOf", "oneOf", "allOf"):
        if several in schema:
            return example(schema[several][0], root)
    if "const" in schema or "enum" in schema:
        return schema.get("const", schema.get("enum", [None])[0])
    kind = schema.get("type", "object")
    if kind == "object":
        return {name: example(one, root) for name, one in schema.get("properties", {}).items()}
    if kind == "array":
        return [example(schema["items"], root)] * max(1, schema.get("minItems", 1)) if "items" in schema else []
    return {"string": "text", "integer": 7, "number": 7.5, "boolean": True, "null": None}[kind]


def obedient(grammar: CallGrammar | AnswerShape) -> str | None:
    """The shortest answer that is natural for a grammar; None where any text is."""
    if isinstance(grammar, AnswerShape):
        return None if grammar.schema is None else json.dumps(example(grammar.schema))
    if grammar.text:
        return None
    if not grammar.calls:
        return json.dumps(example(grammar.answer))
    made = grammar.calls[0]
    return f"{grammar.lead}{grammar.first}{made.begin}{json.dumps(example(made.schema))}{made.end}{grammar.after}"


class ObedientEngine(FakeEngine):
    """Says what its `script` has next, else what the grammar asks for, else a sentence."""

    def submit(self, request: GenerationRequest, listener: Listener) -> Running:
        """Begins an answer."""
        if not self.script:
            asked = bytes(token for token in request.prompt if token < 256)
            answer = None if request.grammar is None else obedient(request.grammar.schema)
            self.script.append(answer or "It flows to the sea. " * (200 if LONG.encode() in asked else 1))
        return super().submit(request, listener)


class Scripted:
    """A scripted server and the control address.

    Args:
      restart: what an order to restart the other server does.

    Attributes:
      url: of the scripted server.
      control: where it is told what to say.
    """

    def __init__(self, restart: Callable[[], None]) -> None:
        engine = self.engine = ObedientEngine(context=_CONTEXT)
        self._live = Live(make_settings(), engine)
        self.url = self._live.url

        def script(answers: Any) -> None:
            engine.script[:] = answers

        orders: dict[str, Callable[[Any], Any]] = {
            "/script": script,
            "/asked": lambda _: engine.written,
            "/restart": lambda _: restart(),
        }

        class Control(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                given = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                answer = json.dumps(orders[self.path](given)).encode()
                self.send_response(200)
                self.send_header("Content-Length", str(len(answer)))
                self.end_headers()
                self.wfile.write(answer)

            def log_message(self, *_: Any) -> None:
                pass

        self._http = ThreadingHTTPServer(("127.0.0.1", 0), Control)
        self.control = f"http://127.0.0.1:{self._http.server_port}"
        threading.Thread(target=self._http.serve_forever, daemon=True).start()

    def stop(self) -> None:
        """Ends both."""
        self._http.shutdown()
        self._http.server_close()
        self._live.stop()
