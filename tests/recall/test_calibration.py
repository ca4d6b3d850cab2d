"""What calibration finds for a model whose states are ordinary, and for one whose states are far beyond float16."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from atlas_jax.config import PAGE, MemoryConfig
from atlas_jax.gguf import GGUFFile, Tokenizer
from atlas_jax.kernels.linear import QuantArray
from atlas_jax.model.loading import load_params, model_config
from atlas_jax.model.transformer import logits
from atlas_jax.recall import adapter_store, collect_states
from atlas_jax.recall.calibration import EFFORTS, _affordable, _leading, calibrate
from atlas_jax.recall.conversation import Conversation
from atlas_jax.recall.fit import _conversations
from atlas_jax.recall.probe import Probe, make_probe

PHRASE = "The quick brown fox jumps over the lazy dog while seven wizards make toxic brew for the evil queen. "


@pytest.mark.parametrize("gain", [1.0, 3e7])
def test_a_memory_that_was_fitted_helps_and_survives_its_file(
    models: dict[str, tuple[Path, Path]], gain: float
) -> None:
    with GGUFFile.open(models["llama"][0]) as file:
        tokenizer, config, fingerprint = Tokenizer.from_metadata(file.metadata), model_config(file), file.fingerprint()
        params = load_params(file, config, dtype="int8")
    assert isinstance(params.embed, QuantArray)
    params = dataclasses.replace(params, embed=dataclasses.replace(params.embed, scale=params.embed.scale * gain))

    def encode(text: str) -> list[int]:
        return tokenizer.encode(text, add_special=False, parse_special=False)

    small = MemoryConfig(layers=(0, 1), components=8, features=64, code_dim=64)
    probe, conversations = make_probe(PHRASE * 14, encode, between=128), _conversations(tokenizer, None, encode)
    texts = [encode(PHRASE * 12)[:900]]
    found = calibrate(config, params, texts, probe, small, conversations=conversations, markup=[3])
    assert np.isfinite(found.adapter.gate).all()
    assert np.isfinite(found.adapter.cue).all()
    assert np.asarray(found.adapter.cue).any()
    assert float(found.adapter.token_weight[3]) == 0.0
    assert found.loss_memory < found.loss_window  # the text repeats itself; a model with random weights does not know
    read, adapter = adapter_store.decode(
        adapter_store.encode(fingerprint, found.config, found.adapter),
        fingerprint,
        config,
        max_window=512,
    )
    assert read.layers == found.config.layers
    for kept, wanted in zip(adapter.projection, found.adapter.projection, strict=True):
        np.testing.assert_allclose(kept, wanted, atol=float(jnp.abs(wanted).max()) * 2**-11)
    for name in ("mean", "gate", "cue"):
        np.testing.assert_array_equal(getattr(adapter, name), getattr(found.adapter, name))
    np.testing.assert_allclose(adapter.token_weight, found.adapter.token_weight, atol=2**-11)


@pytest.mark.parametrize("name", ["llama", "gemma"])
def test_a_vocabulary_in_blocks_says_what_it_says_whole(
    models: dict[str, tuple[Path, Path]], name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with GGUFFile.open(models[name][0]) as file:
        config = model_config(file)
        params = load_params(file, config, dtype="int8")
    monkeypatch.setattr(collect_states, "_BLOCK", 96)
    assert config.vocab > 2 * 96
    random = np.random.default_rng(0)
    hidden = jnp.asarray(random.standard_normal((40, config.embed)), jnp.float32)
    target = random.integers(0, config.vocab, 40)
    chance, entropy = collect_states.Judge(config, params)(hidden, target)
    scores = np.asarray(logits(config, params, hidden), np.float64)
    p = np.exp(scores - scores.max(axis=1, keepdims=True))
    p /= p.sum(axis=1, keepdims=True)
    np.testing.assert_allclose(chance, p[np.arange(40), target], rtol=1e-4)
    np.testing.assert_allclose(entropy, -(p * np.log(p)).sum(axis=1), rtol=1e-4)


@pytest.mark.parametrize(("page_seconds", "effort"), [(0.1, 0), (0.35, 1), (0.6, 2), (0.9, 3), (1.2, 4), (60.0, 4)])
def test_a_slow_model_reads_less(page_seconds: float, effort: int) -> None:
    texts = [range(40 * PAGE), range(33 * PAGE)]
    probe, conversations = Probe(list(range(15 * PAGE)), []), [Conversation(list(range(22 * PAGE)), [])] * 2
    chosen = _affordable(60.0, page_seconds, texts, probe, conversations)
    assert chosen == EFFORTS[effort]
    pages = chosen.pages_read([40, 33], 15, [22, 22])
    if chosen != EFFORTS[-1]:
        assert pages * page_seconds <= 60.0


def test_what_reading_takes_in_all() -> None:
    """A billion parameters read a page of 128 tokens in about half a second on two cores, eight billion in four."""
    assert [effort.pages_read([40, 33], 15, [22, 22]) for effort in EFFORTS] == [187, 135, 94, 57, 49]


def test_the_largest_components_are_those_of_all() -> None:
    rng = np.random.default_rng(0)
    states = rng.standard_normal((3000, 1200)) * (1 / np.arange(1, 1201)) ** 0.5
    covariance = states.T @ states / len(states)
    values, vectors = _leading(covariance, 24)
    every, basis = np.linalg.eigh(covariance)
    np.testing.assert_allclose(np.sort(values), every[-24:], rtol=1e-9)
    np.testing.assert_allclose(abs(vectors.T @ basis[:, -24:]).max(axis=0), 1.0, atol=1e-6)
