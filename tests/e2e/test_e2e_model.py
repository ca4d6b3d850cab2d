"""The default model, as `make serve` starts it."""

from __future__ import annotations

from pathlib import Path

import pytest
from real_server import ROOT, RealServer, content

MODEL = ROOT / "data" / "models" / "SmolLM2-135M-Instruct.Q4_1.gguf"
QUESTION = "What is the capital of France?"


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
    finally:
        server.kill()
