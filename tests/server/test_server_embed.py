"""The server inside another ASGI application, and by itself in a plain uvicorn."""

from __future__ import annotations

import asyncio
import sys
import threading
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import httpx
import openai
import pytest
import uvicorn

from server import embed
from server.config.settings import Settings, SettingsError
from server.embed import AtlasServer
from tests.server.fake_engine import FakeEngine
from tests.server.live_server import make_settings
from tools import readme_check

ROOT = Path(__file__).parents[2]
BODY = {"messages": [{"role": "user", "content": "hello"}], "atlas": {"session_id": "s"}}


@contextmanager
def running(app: Any) -> Iterator[str]:
    """A plain uvicorn with an application, and its address; it ends as on a signal."""
    server = uvicorn.Server(uvicorn.Config(app, port=0, lifespan="on", log_config=None))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        assert thread.is_alive(), "the server did not start"
        time.sleep(0.005)
    try:
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(12)
        assert not thread.is_alive()


def the_readmes_code() -> str:
    found = readme_check.blocks((ROOT / "README.md").read_text("utf-8"))
    (code,) = (block.code for block in found if block.language == "python" and block.is_application)
    return code


def test_the_readmes_code_serves_under_a_path(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = FakeEngine()
    asked: list[Settings] = []

    def factory(settings: Settings) -> Callable[[], FakeEngine]:
        asked.append(settings)
        return lambda: engine

    monkeypatch.setattr(embed, "engine_factory", factory)
    module = ModuleType("readme")
    monkeypatch.setitem(sys.modules, "readme", module)  # where Litestar looks for the types of the handler
    exec(compile(the_readmes_code(), "README.md", "exec"), vars(module))
    assert (asked[0].atlas.context_pool_size, asked[0].atlas.memory_path) == (16, "atlas_memory")
    with running(module.app) as address:
        client = openai.OpenAI(base_url=f"{address}/llm/v1", api_key="none", max_retries=0)
        chat = client.chat.completions.create(
            model="any", messages=BODY["messages"], extra_body={"atlas": BODY["atlas"]}
        )  # type: ignore[call-overload]
        assert chat.choices[0].message.content == "user\nhello"
        assert chat.atlas_stats["session_id"] == "s"
        stream = client.chat.completions.create(model="any", messages=BODY["messages"], stream=True)  # type: ignore[call-overload]
        assert "".join(chunk.choices[0].delta.content or "" for chunk in stream) == "user\nhello"
        status = httpx.get(f"{address}/llm/v1/atlas/status").json()
        assert status["data"]["context_pool_size"] == 16
        assert httpx.get(f"{address}/v1/models").status_code == 404  # the outer application's own answer
        missing = httpx.get(f"{address}/llm/v1/atlas/nothing")
        assert (missing.status_code, missing.json()["error"]["code"]) == (404, 404)
        assert httpx.get(f"{address}/llm/health").json() == {"status": "ok"}
        assert not engine.closed
    assert engine.closed


Asgi = Callable[[Any, Any, Any], Awaitable[None]]


def mounted(inner: AtlasServer, *, path: str, strip: bool) -> Asgi:
    """An application that mounts another at a path: with the path left in front_page, as ASGI has it, or taken off."""

    async def app(scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "lifespan":
            assert (await receive())["type"] == "lifespan.startup"
            async with inner:
                await send({"type": "lifespan.startup.complete"})
                await receive()
            await send({"type": "lifespan.shutdown.complete"})
            return
        assert scope["path"].startswith(path)
        shown = scope["path"].removeprefix(path) if strip else scope["path"]
        await inner({**scope, "path": shown, "root_path": path}, receive, send)

    return app


@pytest.mark.parametrize("strip", [False, True])
@pytest.mark.parametrize("path", ["/llm", "/v1", "/a/b"])
def test_it_answers_under_any_path(path: str, strip: bool) -> None:
    engine = FakeEngine()
    with running(mounted(AtlasServer(make_settings(), engine), path=path, strip=strip)) as address:
        base = address + path
        assert httpx.get(f"{base}/v1/models").json()["data"][0]["id"] == "fake-7b"
        assert httpx.post(f"{base}/v1/chat/completions", json=BODY).status_code == 200
        assert httpx.get(f"{base}/metrics").status_code == 200
        assert httpx.get(base).json()["name"] == "atlas-jax"
    assert engine.closed


def test_by_itself_it_starts_and_ends_with_the_server_that_runs_it() -> None:
    engine = FakeEngine()
    with running(AtlasServer(make_settings(atlas={"auto_save_memory": True}), engine)) as address:
        assert httpx.post(f"{address}/v1/chat/completions", json=BODY).status_code == 200
    assert engine.closed
    assert ("local", "fake-7b_memory.atlas") in engine.sessions.files_of


def test_keys_hold_under_a_path_too(tmp_path: Path) -> None:
    keys = tmp_path / "keys"
    keys.write_text("secret-key-of-some-length:ann\n")
    keys.chmod(0o600)
    atlas = AtlasServer(make_settings(server={"api_keys_file": str(keys)}), FakeEngine())
    with running(mounted(atlas, path="/llm", strip=False)) as address:
        assert httpx.get(f"{address}/llm/health").status_code == 200
        assert httpx.get(f"{address}/llm/v1/models").status_code == 401
        allowed = {"authorization": "Bearer secret-key-of-some-length"}
        assert httpx.get(f"{address}/llm/v1/models", headers=allowed).status_code == 200


def test_entering_waits_for_the_engine_and_raises_what_stands_in_its_way() -> None:
    async def use() -> None:
        engine = FakeEngine()

        def slow() -> FakeEngine:
            time.sleep(0.1)
            return engine

        async with AtlasServer(make_settings(), slow) as atlas:
            assert atlas.lifecycle.supervisor.ready
        assert engine.closed
        with pytest.raises(RuntimeError, match="once"):
            await atlas.__aenter__()

        def broken() -> FakeEngine:
            raise ValueError("this file is no model")

        with pytest.raises(ValueError, match="this file is no model"):
            async with AtlasServer(make_settings(), broken):
                pass
        with pytest.raises(SettingsError, match="no model"):
            AtlasServer(Settings())

    asyncio.run(use())


def test_an_error_inside_still_saves_and_closes() -> None:
    @asynccontextmanager
    async def outer(engine: FakeEngine) -> Any:
        async with AtlasServer(make_settings(), engine):
            yield

    async def use(engine: FakeEngine) -> None:
        async with outer(engine):
            raise KeyError("of the outer program")

    engine = FakeEngine()
    with pytest.raises(KeyError, match="outer"):
        asyncio.run(use(engine))
    assert engine.closed
