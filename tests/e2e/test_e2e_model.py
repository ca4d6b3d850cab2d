"""The default model, as `make serve` starts it."""

from __future__ import annotations

import contextlib
import io
import os
import re
import subprocess
from pathlib import Path

import pydantic
import pytest

from tests.e2e.real_server import ROOT, RealServer, content

MODEL = ROOT / "data" / "models" / "SmolLM2-135M-Instruct.Q4_1.gguf"
QUESTION = "What is the capital of France?"


class Country(pydantic.BaseModel):
    """What the official client turns into a strict schema."""

    capital: str
    inhabitants: int


@pytest.mark.model
@pytest.mark.timeout(900)
@pytest.mark.skipif(not MODEL.exists(), reason=f"{MODEL.name} is not there: run `make model`")
def test_the_default_model_answers_a_question(cache: Path, tmp_path: Path) -> None:
    server = RealServer(MODEL, cache=cache, folder=tmp_path)
    try:
        plain = server.openai.chat.completions.create(
            model=server.name, messages=[{"role": "user", "content": QUESTION}], max_tokens=24, temperature=0
        )
        assert "Paris" in content(plain)
        assert "�" not in content(plain)
        asked = server.chat(QUESTION, session="trip", max_tokens=24)
        assert "Paris" in content(asked)
        assert asked.atlas_stats["degraded"] is None
        parsed = server.openai.chat.completions.parse(
            model=server.name,
            messages=[{"role": "user", "content": "Describe France: its capital, and how many people live there."}],
            response_format=Country,
            max_tokens=80,
            temperature=0,
        )
        country = parsed.choices[0].message.parsed
        assert country is not None
        assert country.capital
    finally:
        server.kill()


def blocks(language: str) -> list[str]:
    """The README's examples in a language, those of its conversations, in the order they are printed."""
    text = (ROOT / "README.md").read_text("utf-8")
    part = text[text.index("## A first conversation") : text.index("### The `atlas` object")]
    every = re.findall(r"^```(\w*)\n(.*?)^```$", part, re.MULTILINE | re.DOTALL)
    return [code for name, code in every if name == language]


@pytest.mark.model
@pytest.mark.timeout(900)
@pytest.mark.skipif(not MODEL.exists(), reason=f"{MODEL.name} is not there: run `make model`")
def test_the_readmes_conversations_work_as_printed(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = RealServer(MODEL, cache=cache, folder=tmp_path)
    monkeypatch.chdir(ROOT)
    address = str(server.http.base_url).rstrip("/")
    try:
        first, remembered = (block.replace("http://127.0.0.1:8080", address) for block in blocks("python"))
        names: dict[str, object] = {}

        def run(code: str) -> str:
            with contextlib.redirect_stdout(io.StringIO()) as printed:
                exec(compile(code, "README.md", "exec"), names)
            return printed.getvalue()

        assert run(first).strip()
        found = 0
        for _ in range(4):  # drawn at random: 18 of 20 found the number when the example was written
            found += "40713" in run(remembered).splitlines()[0]
            server.post("/v1/atlas/memory/delete", {"context_id": "notes"})
        assert found
        run(remembered)
        for command in "".join(blocks("")).replace("\\\n", "").replace("http://127.0.0.1:8080", address).splitlines():
            ended = subprocess.run(
                ["sh", "-c", command.replace("curl ", "curl -sS --fail-with-body ", 1)],
                capture_output=True,
                text=True,
                timeout=120,
                env={**os.environ, "NO_PROXY": "*"},
            )
            assert ended.returncode == 0, (command, ended.stdout, ended.stderr)
    finally:
        server.kill()
