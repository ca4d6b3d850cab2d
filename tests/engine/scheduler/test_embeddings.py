"""Embeddings: what they are of a text, that they disturb nobody, and that nothing compiles for them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from atlas_jax.config import PAGE
from atlas_jax.engine import Engine
from atlas_jax.engine.api import Embedded, GenerationRequest, InvalidRequest, Pooling
from atlas_jax.gguf import GGUFFile
from atlas_jax.model.loading import model_config
from tests import tiny_model
from tests.engine.offline import Answer, ask, ask_all, memory, request, words
from tests.reference import transformer_reference

TEXTS = [words(31, 1), words(32, 7), words(33, 32), words(34, PAGE), words(35, PAGE + 33)]


def embedding_request(prompt: list[int], pooling: Pooling = "mean", **more: Any) -> GenerationRequest:
    return GenerationRequest(prompt=prompt, max_tokens=0, pooling=pooling, **more)


def vector(answer: Answer) -> np.ndarray:
    (found,) = [event.vector for event in answer.events if isinstance(event, Embedded)]
    assert found.dtype == np.float32
    return found


def states(model: Path, text: list[int]) -> np.ndarray:
    """What the head reads, by the reference: its scores with a head that copies."""
    with GGUFFile.open(model) as file:
        config = model_config(file)
    weights = transformer_reference.tensors(model)
    return transformer_reference.logits(config, weights | {"output.weight": np.eye(config.embed)}, text)


@pytest.mark.parametrize("pooling", ["mean", "last"])
def test_an_embedding_is_the_pooled_states_at_length_one(
    engines: Callable[[str], Engine], models: dict[str, tuple[Path, Path]], pooling: Pooling
) -> None:
    answers = ask_all(engines("float32"), [embedding_request(text, pooling) for text in TEXTS])
    for text, answer in zip(TEXTS, answers, strict=True):
        own = states(models["llama"][0], text)
        wanted = own.mean(axis=0) if pooling == "mean" else own[-1]
        np.testing.assert_allclose(vector(answer), wanted / np.linalg.norm(wanted), atol=2e-4)
        assert (answer.end.prompt_tokens, answer.end.completion_tokens) == (len(text), 0)


def test_embeddings_beside_answers_change_neither(engine: Engine) -> None:
    prompt = words(36, 60)
    alone, own = ask(engine, request(prompt, 40)), [vector(ask(engine, embedding_request(text))) for text in TEXTS]
    answer, *others = ask_all(engine, [request(prompt, 40), *(embedding_request(text) for text in TEXTS)])
    assert answer.infos == alone.infos
    for found, wanted in zip(others, own, strict=True):
        np.testing.assert_array_equal(vector(found), wanted)
    assert not any(slot.busy for slot in engine.slots())


def test_every_token_counts_although_its_pages_are_cached(engine: Engine) -> None:
    text = words(37, 2 * PAGE + 5)
    first = vector(ask(engine, embedding_request(text)))
    ask(engine, request(text, 1))
    again = ask(engine, embedding_request(text))
    np.testing.assert_array_equal(vector(again), first)
    assert again.end.cached_tokens == 0


def test_an_embedding_has_no_answer_and_no_memory(engine: Engine) -> None:
    for wrong in (
        GenerationRequest(prompt=[1], max_tokens=1, pooling="mean"),
        embedding_request([1], memory=memory()),
    ):
        with pytest.raises(InvalidRequest):
            engine.submit(wrong, lambda _: None)
    with pytest.raises(InvalidRequest, match="context"):
        engine.submit(embedding_request([1] * 1025), lambda _: None)


@pytest.mark.parametrize(
    ("kind", "flag", "wanted"),
    [
        (None, None, "mean"),
        (0, None, "mean"),
        (1, None, "mean"),
        (3, None, "last"),
        (3, "mean", "mean"),
        (2, None, None),
    ],
)
def test_the_file_says_which_pooling_unless_the_operator_does(
    tmp_path: Path, kind: int | None, flag: Pooling | None, wanted: Pooling | None
) -> None:
    from atlas_jax.engine.config import EngineConfig
    from atlas_jax.engine.loader import _pooling

    model = tiny_model.write_model(tmp_path / "m.gguf", metadata={} if kind is None else {"llama.pooling_type": kind})
    with GGUFFile.open(model) as file:
        assert _pooling(file, EngineConfig(model_path=model, pooling=flag)) == wanted
