"""The default model, as `make serve` starts it."""

from __future__ import annotations

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
