"""Engines over files as people have them: padded vocabularies, several parts, other parts, templates of no use."""

from __future__ import annotations

import logging
import math
from pathlib import Path

import numpy as np
import pytest

from atlas_jax.engine import Engine
from atlas_jax.engine.api import InvalidRequest
from tests import tiny_model
from tests.engine.offline import ask, request, words
from tests.patience import PATIENCE

TOKENS = len(tiny_model.byte_level_vocabulary()[0])
MESSAGES = [{"role": "user", "content": "Hi"}]


def test_a_padded_model_in_parts_whose_template_is_of_no_use(
    tmp_path: Path, cache: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tiny_model.write_model(
        tmp_path / "parts.gguf",
        padding=64,
        split=7,
        metadata={"tokenizer.chat_template": "{{ messages | from_another_world }}"},
        tensors={"v.blk.0.attn_k.weight": np.ones((4, 4), np.float32), "mm.projection": np.ones(4, np.float32)},
    )
    with caplog.at_level(logging.INFO, "atlas"):
        engine = Engine.open(
            model_path=path, cache_path=cache, memory_enabled=False, max_concurrent=1, max_context=512, speculate=False
        )
    try:
        assert (engine.model.name, engine.model.vocab_size) == ("parts", TOKENS)
        assert engine.model.size_bytes == sum(part.stat().st_size for part in tmp_path.glob("parts-*.gguf"))
        answer = ask(engine, request(words(5, 40), 60, temperature=100.0, logprobs=20))
        assert max(answer.tokens) < TOKENS
        for info in answer.infos:
            assert len(info.top) == 20
            assert sum(math.exp(value) for *_, value in info.top) <= 1 + 1e-5
            assert all(token < TOKENS for token, *_ in info.top)
        for ask_for_chat in (engine.render_chat, engine.apply_template):
            with pytest.raises(InvalidRequest, match=r"cannot be used .*'from_another_world'.*/v1/completions"):
                ask_for_chat(MESSAGES)
    finally:
        engine.close(timeout=PATIENCE)
    said = [record.getMessage() for record in caplog.records]
    assert any("2 tensors" in one and "(mm.*, v.*)" in one for one in said)
    assert any("from_another_world" in one and "only plain completions" in one for one in said)
