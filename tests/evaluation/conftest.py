"""A tiny model, texts of words it has tokens for, and evaluations of both."""

from __future__ import annotations

import os
import random
from collections.abc import Callable
from pathlib import Path

import pytest

from atlas_jax.evaluation import command
from tests import tiny_model

WORDS = ("the", "and", "that", "session", "token", "page", "memory", "window", "reads", "never", "again")
DOCUMENTS, PERPLEXITY = 3, 2


def prose(seed: int, characters: int = 24_000) -> str:
    """Paragraphs of sentences; words the tiny model has a token for, so that its texts are no longer than a real model's."""
    rng = random.Random(seed)
    paragraphs: list[str] = []
    while sum(map(len, paragraphs)) < characters:
        sentences = (" ".join(rng.choices(WORDS, k=rng.randrange(6, 14))).capitalize() + "." for _ in range(6))
        paragraphs.append(" ".join(sentences))
    return "\n\n".join(paragraphs) + "\n"


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Model and adapter."""
    folder = tmp_path_factory.mktemp("model")
    path = tiny_model.write_model(folder / "tiny.gguf")
    return path, tiny_model.write_adapter(folder / "tiny.safetensors", path)


@pytest.fixture(scope="session")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of texts as `corpora` writes it."""
    folder = tmp_path_factory.mktemp("texts")
    for group, count in (("documents", DOCUMENTS), ("perplexity", PERPLEXITY)):
        (folder / group).mkdir()
        for index in range(count):
            (folder / group / f"text{index}.txt").write_text(prose(hash_free(group) + index))
    return folder


def hash_free(name: str) -> int:
    """A number of a name that is the same in every process."""
    return sum(name.encode())


@pytest.fixture(scope="session")
def evaluate(model: tuple[Path, Path], texts: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., int]:
    """The command with the tiny model, quick; returns its exit code."""
    cache = Path(os.environ.get("JAX_COMPILATION_CACHE_DIR") or tmp_path_factory.mktemp("cache"))

    def run(out: Path, *arguments: str) -> int:
        path, adapter = model
        given = [str(path), "--adapter", str(adapter), "--texts", str(texts), "--cache", str(cache), "--out", str(out)]
        return command.main([*given, "--quick", *arguments])

    return run
