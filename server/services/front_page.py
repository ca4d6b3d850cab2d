"""What a newcomer is told: the first page, and the line in the log that says where to go."""

from __future__ import annotations

import shlex

from atlas_jax import __version__
from server.errors import ServerError
from server.schemas.root import Root
from server.services.engine_supervisor import EngineSupervisor

_ENDPOINTS = {
    "chat": "/v1/chat/completions",
    "completions": "/v1/completions",
    "models": "/v1/models",
    "sessions": "/v1/atlas/memory",
    "status": "/v1/atlas/status",
    "metrics": "/metrics",
    "schema": "/schema/openapi.json",
}
_BODY = '{"messages": [{"role": "user", "content": "Name three rivers."}]}'


class FrontPage:
    """Introduces the server.

    Args:
      keys: whether requests need a key; strangers are then not told what is served.
      memory: whether the memory is on.
    """

    def __init__(self, supervisor: EngineSupervisor, *, keys: bool, memory: bool) -> None:
        self._supervisor, self._keys, self._memory = supervisor, keys, memory

    def root(self) -> Root:
        """What `GET /` answers."""
        shown = not self._keys
        try:
            model: str | None = self._supervisor.engine.model.name
        except ServerError:
            model = None
        return Root(
            name="atlas-jax",
            version=__version__,
            status="failed" if self._supervisor.dead else self._supervisor.state,
            model=model if shown else None,
            memory=self._memory if shown and model is not None else None,
            endpoints=_ENDPOINTS,
        )

    def example(self, address: str) -> str:
        """A first request for the command line; `address` is host and port."""
        key = " -H 'Authorization: Bearer YOUR_KEY'" if self._keys else ""
        url = shlex.quote(f"http://{address}{_ENDPOINTS['chat']}")
        return f"curl {url}{key} -H 'Content-Type: application/json' -d '{_BODY}'"

    def ready(self, address: str) -> str:
        """The line in the log once requests are answered."""
        engine = self._supervisor.engine
        memory = "being fitted" if engine.fitting() is not None else "on" if self._memory else "off"
        model = engine.model.name
        return f"Ready: http://{address} (model {model}, memory {memory}). Try: {self.example(address)}"
