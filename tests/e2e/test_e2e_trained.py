"""From a text to a conversation: a model with a memory of its own, trained and served as docs/training.md says."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from atlas_jax.model.lm.__main__ import main
from tests.e2e.real_server import STOP_SECONDS, RealServer, content, conversation

TEXT = "What is read at test time is learned at test time. " * 40
FLAGS = ("--max-concurrent", "2", "--atlas-latency-budget-ms", "60000")
Serve = Callable[[], RealServer]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trained")
    (folder / "text.txt").write_text(TEXT)
    sizes = {"embed": 32, "heads": 2, "window": 32, "length": 48, "batch": 2, "steps": 3}
    flags = [text for name, size in sizes.items() for text in (f"--{name}", str(size))]
    main([str(folder / "text.txt"), str(folder / "model.gguf"), "--pattern", "MS", "--rule", "deltanet", *flags])
    return folder / "model.gguf"


@pytest.fixture
def serve(model: Path, cache: Path, tmp_path: Path) -> Iterator[Serve]:
    running: list[RealServer] = []

    def start() -> RealServer:
        running.append(RealServer(model, *FLAGS, cache=cache, folder=tmp_path))
        return running[-1]

    yield start
    for server in running:
        server.kill()


def test_a_trained_model_is_served_with_sessions_that_survive(serve: Serve) -> None:
    def ask(server: RealServer, text: str, *, known: bool) -> str:
        answer = server.openai.chat.completions.create(
            model=server.name,
            messages=conversation(text),
            max_tokens=12,
            temperature=0,
            extra_body={"ignore_eos": True, "atlas": {"session_id": "kept"}},
        )
        stats = answer.model_extra["atlas_stats"]
        assert stats["tokens_absorbed"] > 0
        assert stats["cache_hit"] == known
        return content(answer)

    before = serve()
    status = before.http.get("/v1/atlas/status").json()["data"]
    assert (status["memory_layers"], status["adapter"]) == ([0], None)
    assert ask(before, "Hello", known=False)
    stored = before.contexts()["kept"]
    refused = before.post("/v1/chat/completions", {"messages": conversation("x"), "atlas": {"window_size": 256}})
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "atlas.window_size")
    before.wait_warm()  # a program that is just being compiled cannot be given up
    code, seconds = before.end()
    assert code == -signal.SIGTERM
    assert seconds < STOP_SECONDS
    after = serve()
    assert after.contexts()["kept"]["tokens"] == stored["tokens"]
    assert ask(after, "And you?", known=True)
    assert after.contexts()["kept"]["tokens"] > stored["tokens"]
    assert before.trouble == after.trouble == []
