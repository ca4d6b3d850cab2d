"""How layers come to share kept pairs: what a model attends of a whole text, and the division that follows from it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from atlas_jax.config import PAGE, ModelConfig
from atlas_jax.gguf import GGUFFile
from atlas_jax.model.kept_division import KeptDivision
from atlas_jax.model.loading import load_params, model_config
from atlas_jax.model.transformer import SINKS
from atlas_jax.progress import Progress
from atlas_jax.recall import kept_weights
from atlas_jax.sharding import ONE_DEVICE
from tests.reference import transformer_reference

PAGES = 20
STRETCH = 4
"""Every fourth query counts."""


@pytest.fixture(scope="module")
def model(models: dict[str, tuple[Path, Path]]) -> tuple[ModelConfig, Any]:
    """Gemma's, of whose six layers only the last keeps pairs."""
    with GGUFFile.open(models["gemma"][0]) as file:
        config = model_config(file)
        return config, load_params(file, config, dtype="float32")


def weights_of(model: tuple[ModelConfig, Any], texts: Sequence[Sequence[int]]) -> tuple[float, ...]:
    return kept_weights.kept_weights(kept_weights.FullReader(*model, ONE_DEVICE), texts, Progress())


def test_attention_is_measured_as_it_is_defined(
    model: tuple[ModelConfig, Any], models: dict[str, tuple[Path, Path]]
) -> None:
    config, params = model
    text = np.random.default_rng(0).integers(0, 300, 5 * PAGE).tolist()
    wanted: dict[int, np.ndarray] = {}

    def attend(
        config: ModelConfig, index: int, q: np.ndarray, k: np.ndarray, v: np.ndarray, rotate: Callable[..., np.ndarray]
    ) -> np.ndarray:
        where = np.arange(len(q))
        seen = where <= where[:, None]
        window = config.layers[index].sliding_window
        if window is not None:
            seen &= where > where[:, None] - window
        out, found = np.empty_like(q), np.zeros((len(q), config.kv_heads, len(q)))
        for head in range(config.heads):
            group = head // config.groups
            keys = rotate(k[:, group, None], where)[:, 0]
            score = np.where(seen, rotate(q[:, head, None], where)[:, 0] @ keys.T * config.scale, -np.inf)
            weight = np.exp(score - score.max(axis=1, keepdims=True))
            weight /= weight.sum(axis=1, keepdims=True)
            out[:, head] = weight @ v[:, group]
            found[:, group] += weight
        wanted[index] = found
        return out

    transformer_reference.logits(config, transformer_reference.tensors(models["gemma"][0]), text, attend)
    reader = kept_weights.FullReader(config, params, ONE_DEVICE)
    assert reader.layers == [index for index, layer in enumerate(config.layers) if layer.sliding_window is None]
    pages = list(reader.read(text, Progress()))
    assert len(pages) == 5
    for page, received in enumerate(pages):
        for index, found in zip(reader.layers, received, strict=True):
            asked = slice(page * PAGE + STRETCH - 1, (page + 1) * PAGE, STRETCH)
            sums = wanted[index][asked].sum(axis=0)
            flat = found.swapaxes(0, 1).reshape(config.kv_heads, -1)
            np.testing.assert_allclose(flat[:, : len(text)], sums, atol=0.03 * sums.max())
            assert not flat[:, len(text) :].any()


def test_layers_that_attend_more_of_what_has_left_keep_more(
    model: tuple[ModelConfig, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """And spread wider: what a few pairs hold needs no more of them."""
    spread = {
        0: (0.3, PAGES),
        1: (0.3, 1),
        2: (0.02, PAGES),
        3: (0.02, 1),
    }  # share of what has left, and of how many pages

    class Reader:
        def __init__(self, config: ModelConfig, *rest: Any) -> None:
            self.layers, self.depth = list(spread), len(config.layers)

        def read(self, text: Sequence[int], progress: Progress) -> list[np.ndarray]:
            assert len(text) >= PAGES * PAGE
            place = np.random.default_rng(0).permutation(np.arange(SINKS, PAGES * PAGE))
            found = []
            for page in range(PAGES):
                mass = np.zeros((len(spread), PAGES * PAGE, 2))
                for index, (share, pages) in spread.items():
                    mine = place[: pages * PAGE]
                    mass[index, mine[mine < (page + 1) * PAGE]] = share / pages
                found.append(mass.reshape(len(spread), PAGES, PAGE, 2).swapaxes(2, 3))
            return found

    monkeypatch.setattr(kept_weights, "FullReader", Reader)
    found = weights_of(model, [range(PAGES * PAGE)])
    assert found[4:] == (1.0, 1.0), "layers that keep none"
    wide, narrow, faint, least = found[:4]
    assert sum(found[:4]) == 6 * 4
    assert wide > faint > narrow == least == 2
    assert KeptDivision((*found[:4], 0, 0)).pages(6) == (wide, narrow, faint, least, 0, 0)


def test_texts_too_short_to_tell_divide_equally(model: tuple[ModelConfig, Any]) -> None:
    assert weights_of(model, [range(10 * PAGE)]) == ()
