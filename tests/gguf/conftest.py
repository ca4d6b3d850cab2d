"""Fixtures of the GGUF tests: the two models, which may be absent, and what llama.cpp made of the golden strings."""

from __future__ import annotations

import gzip
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

ROOT = Path(__file__).parents[2]
GOLDEN = ROOT / "tests" / "golden" / "tokenizer"


def _model(variable: str, name: str, how: str) -> Path:
    path = Path(os.environ.get(variable) or ROOT / "data" / "models" / name)
    if not path.is_file():
        pytest.skip(f"no model at {path}: {how}, or set {variable}")
    return path


@pytest.fixture(scope="session")
def smollm_path() -> Path:
    return _model("ATLAS_TEST_MODEL", "SmolLM2-135M-Instruct.Q4_1.gguf", "run `make model`")


@pytest.fixture(scope="session")
def gemma_path() -> Path:
    return _model("ATLAS_TEST_GEMMA", "gemma-3-270m-q4_k_m.gguf", "it is optional")


@pytest.fixture(scope="session")
def qwen_path() -> Path:
    return _model("ATLAS_TEST_QWEN", "qwen2.5-coder-0.5b-instruct-q4_k_m.gguf", "run `make qwen`; it is optional")


@pytest.fixture(scope="session")
def golden() -> Callable[[str], dict[str, Any]]:
    return lambda name: json.loads(gzip.decompress((GOLDEN / f"{name}.json.gz").read_bytes()))


def _as_metadata(values: Mapping[str, Any]) -> dict[str, Any]:
    arrays = {"tokenizer.ggml.token_type": np.int32, "tokenizer.ggml.scores": np.float32}
    return {key: np.array(value, arrays[key]) if key in arrays else value for key, value in values.items()}


@pytest.fixture(scope="session")
def as_metadata() -> Callable[[Mapping[str, Any]], dict[str, Any]]:
    """Makes metadata of JSON, with numeric arrays as the reader gives them."""
    return _as_metadata


@pytest.fixture(scope="session")
def byte_level(golden: Callable[[str], dict[str, Any]]) -> dict[str, Any]:
    """Metadata of a small byte-level vocabulary, without a pre-tokenizer's name."""
    return _as_metadata(golden("pretokenizers")["metadata"])


@pytest.fixture(scope="session")
def sentencepiece(golden: Callable[[str], dict[str, Any]]) -> dict[str, Any]:
    """Metadata of a small SentencePiece vocabulary."""
    return _as_metadata(golden("sentencepiece")["metadata"])
