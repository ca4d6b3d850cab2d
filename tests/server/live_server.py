"""A real uvicorn in a thread, with the fake engine behind it."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable
from typing import Any

import httpx
import openai

from server.app import EngineSource
from server.config.settings import AtlasSection, ServerSection, Settings
from server.lifecycle import Lifecycle
from server.serve import build
from tests.patience import PATIENCE

QUIET = {"auto_load_memory": False, "auto_save_memory": False}


class Live:
    """A running server."""

    def __init__(self, settings: Settings, engine: EngineSource, *, port: int = 0) -> None:
        self.settings = settings
        self.engine: Any = engine
        self.server = build(settings, engine)
        self.socket = socket.socket()
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self.socket.bind(("127.0.0.1", port))
        self.port: int = self.socket.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self._thread = threading.Thread(target=self.server.run, args=([self.socket],), daemon=True)
        self._thread.start()
        self.http = httpx.Client(base_url=self.url, timeout=PATIENCE)
        while not self.server.started:
            assert self._thread.is_alive()
            time.sleep(0.005)

    @property
    def lifecycle(self) -> Lifecycle:
        return self.server.lifecycle

    @property
    def admission(self) -> Any:
        return self.lifecycle._admission

    def post(self, path: str, body: Any = None, **headers: str) -> httpx.Response:
        names = {name.replace("_", "-"): value for name, value in headers.items()}
        return self.http.post(path, json={} if body is None else body, headers=names)

    def raw(self, data: bytes, *, timeout: float = 5.0) -> bytes:
        """Sends bytes and returns everything until the server closes or falls silent."""
        out = b""
        with socket.create_connection(("127.0.0.1", self.port), timeout=timeout) as connection:
            connection.sendall(data)
            connection.settimeout(timeout)
            try:
                while chunk := connection.recv(65_536):
                    out += chunk
            except (TimeoutError, ConnectionResetError):
                pass
        return out

    def connect(self, *, source: str = "127.0.0.1") -> socket.socket:
        return socket.create_connection(("127.0.0.1", self.port), timeout=PATIENCE, source_address=(source, 0))

    def openai(self, **options: Any) -> openai.OpenAI:
        options = {"api_key": "unused", "max_retries": 0, **options}
        return openai.OpenAI(base_url=f"{self.url}/v1", **options)

    def stop(self) -> None:
        self.http.close()
        self.server.should_exit = True
        self._thread.join(12)
        assert not self._thread.is_alive()


def wait_for(condition: Callable[[], object], seconds: float = PATIENCE) -> None:
    """Waits until something is true; fails after `seconds`."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.005)


def make_settings(*, server: dict[str, Any] | None = None, atlas: dict[str, Any] | None = None) -> Settings:
    return Settings(
        server=ServerSection(**{"shutdown_grace": 1, **(server or {})}),
        atlas=AtlasSection(**{**QUIET, **(atlas or {})}),
    )


Start = Callable[..., Live]
