"""`atlas-jax inspect`: what it says of models that are served, refused, damaged and hostile."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from server.cli import main
from tests import tiny_lora, tiny_model


@pytest.fixture(autouse=True)
def caches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache of adapters; that of the C kernels is the user's."""
    monkeypatch.setattr("atlas_jax.engine.config.default_cache", lambda: tmp_path / "cache")
    return tmp_path / "cache"


def looked(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, dict[str, Any]]:
    code = main(["inspect", *arguments, "--json"])
    return code, json.loads(capsys.readouterr().out)


def test_a_model_that_would_be_served(tmp_path: Path, capsys: pytest.CaptureFixture[str], caches: Path) -> None:
    model = tiny_model.write_model(tmp_path / "tiny.gguf", tiny_model.NIBBLES)
    code, found = looked(capsys, str(model))
    assert (code, found["served"], found["refusal"]) == (0, True, None)
    assert (found["architecture"], found["layers"], found["heads"], found["context_length"]) == (
        "llama",
        2,
        [4, 2],
        4096,
    )
    assert {one["name"]: one["tensors"] for one in found["types"]} == {"Q4_1": 16, "F32": 5}
    assert found["memory"]["adapter"] == "to be fitted"
    state = found["memory"]["state"]
    assert state["window"] + state["kept"] + state["memory"] <= state["budget"]
    assert found["template"]["own"]
    fitted = caches / "adapters"
    fitted.mkdir(parents=True)
    from atlas_jax.recall import adapter_store
    from atlas_jax.recall.calibration import DEFAULT_DIM

    tiny_model.write_adapter(adapter_store.cached(fitted, found["fingerprint"], DEFAULT_DIM), model)
    assert looked(capsys, str(model))[1]["memory"]["adapter"] == "cached"
    assert main(["inspect", str(model), "--metadata", "--tensors"]) == 0
    shown = capsys.readouterr().out
    for text in ("would be served", "general.architecture", "blk.1.ffn_down.weight", "Omega memory"):
        assert text in shown


@pytest.mark.parametrize(
    ("metadata", "tensors", "said"),
    [
        ({"llama.rope.scaling.type": "spiral"}, {}, "llama.rope.scaling.type"),
        ({}, {"blk.0.extra.weight": np.zeros((4, 4), np.float32)}, "tensor 'blk.0.extra.weight' is not understood"),
        ({}, {"blk.1.ffn_up.weight": None}, "tensor 'blk.1.ffn_up.weight' is missing"),
        ({}, {"blk.1.ffn_up.weight": np.zeros((5, 64), np.float32)}, "tensor 'blk.1.ffn_up.weight' has shape (5, 64)"),
        ({"tokenizer.ggml.model": "runes"}, {}, "runes"),
    ],
)
def test_a_model_that_would_be_refused_says_by_what(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    metadata: dict[str, Any],
    tensors: dict[str, Any],
    said: str,
) -> None:
    model = tiny_model.write_model(tmp_path / "odd.gguf", metadata=metadata, tensors=tensors)
    code, found = looked(capsys, str(model))
    assert (code, found["served"], found["weights"]) == (1, False, [] if "runes" not in said else found["weights"])
    assert said in found["refusal"]
    assert main(["inspect", str(model)]) == 1
    assert "would be refused" in capsys.readouterr().out


def test_an_architecture_that_nobody_knows_is_shown_all_the_same(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = tiny_model.write_model(tmp_path / "odd.gguf", metadata={"general.architecture": "mamba9"})
    code, found = looked(capsys, str(model))
    assert code == 1
    assert "mamba9" in found["refusal"]
    assert found["tokenizer"]["tokens"] > 256


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"GGUF",
        b"not a model at all",
        struct.pack("<4sIQQ", b"GGUF", 3, 1 << 60, 1 << 60),
        struct.pack("<4sIQQ", b"GGUF", 3, 0, 1) + struct.pack("<Q", 1 << 62),
        struct.pack("<4sIQQ", b"GGUF", 99, 0, 0),
    ],
)
def test_a_hostile_file_is_one_clear_line(content: bytes, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "x.gguf"
    path.write_bytes(content)
    assert main(["inspect", str(path)]) == 1
    shown = capsys.readouterr()
    assert shown.out == ""
    assert len(shown.err.splitlines()) == 1
    assert shown.err.startswith(f"atlas-jax inspect: error: {path}: ")
    assert "Traceback" not in shown.err


def test_what_is_no_file_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(tmp_path / "none")]) == 1
    assert capsys.readouterr().err == f"atlas-jax inspect: error: {tmp_path}/none: No such file or directory\n"
    assert main(["inspect", str(tmp_path)]) == 1
    assert "without a config.json" in capsys.readouterr().err


def test_names_cannot_command_the_terminal(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    evil = "\x1b]0;owned\x07\x1b[2J"
    model = tiny_model.write_model(tmp_path / "evil.gguf", metadata={"general.description": evil})
    main(["inspect", str(model), "--metadata"])
    shown = capsys.readouterr().out
    assert "\x1b" not in shown
    assert "owned" in shown


def test_a_budget_is_divided_as_it_would_be(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = tiny_model.write_model(tmp_path / "tiny.gguf")
    least, most = (looked(capsys, str(model), "--memory-budget", str(count))[1]["memory"] for count in (0, 1 << 30))
    assert (least["kept_pairs"], most["kept_pairs"]) == (0, 8192)
    assert main(["inspect", str(model), "--memory-budget", "-4"]) == 2


def test_a_lora_adapter(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = tiny_model.write_model(tmp_path / "tiny.gguf", tiny_model.LLAMA)
    other = tiny_model.write_model(tmp_path / "other.gguf", dataclasses.replace(tiny_model.LLAMA, ff=320))
    words = {"adapter.lora.task_name": "poems\x1b"}
    adapter = tiny_lora.write_lora(tmp_path / "poems.gguf", model, metadata=words)
    code, found = looked(capsys, str(adapter), "--model", str(model))
    assert (code, found["kind"], found["refusal"], found["ranks"], found["layers"]) == (0, "lora", None, [4, 4], 2)
    assert (found["architecture"], found["alpha"], found["task_name"]) == ("llama", 6.0, "poems\x1b")
    assert found["weights"]["attn_q.weight"] == 2
    assert found["digest"] == hashlib.sha256(adapter.read_bytes()).hexdigest()
    code, found = looked(capsys, str(adapter), "--model", str(other))
    assert code == 1
    assert "blk.0.ffn_gate.weight.lora_b" in found["refusal"]
    assert main(["inspect", str(adapter), "--tensors"]) == 0
    shown = capsys.readouterr().out
    for text in ("LoRA adapter", "rank", "poems\\x1b", "blk.1.attn_q.weight.lora_b"):
        assert text in shown
    assert main(["inspect", str(model), "--model", str(model)]) == 2
    broken = tmp_path / "broken.gguf"
    tiny_lora.write_lora(broken, model, change=lambda tensors: tensors.pop("blk.0.attn_q.weight.lora_b"))
    assert main(["inspect", str(broken)]) == 1
    assert "blk.0.attn_q.weight.lora_b" in capsys.readouterr().err
