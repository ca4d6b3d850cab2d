"""Training: interrupted runs, checkpoints, and a model that learns."""

from __future__ import annotations

from pathlib import Path

import jax
import numpy as np
import pytest

from atlas_jax.config import ConfigError
from atlas_jax.memory import MemoryRule
from atlas_jax.model.lm import LMConfig, text_batches
from atlas_jax.model.lm.checkpoints import CheckpointError
from atlas_jax.model.lm.training import TrainConfig, train

TEXT = b"the quick brown fox jumps over the lazy dog. " * 40
RULE = MemoryRule(d_k=4, d_v=4, window=2, chunk=4, remat=False)
MODEL = LMConfig(vocab=256, embed=16, ff=24, heads=2, pattern="M", rule=RULE, memory_heads=1)


@pytest.mark.slow  # a killed run is tested below
def test_interrupted_run_is_the_uninterrupted_one(tmp_path: Path) -> None:
    source = text_batches(TEXT, batch=2, length=24, seed=1)
    config = TrainConfig(steps=7, checkpoint_every=3, warmup=2)
    whole = train(MODEL, config, source)
    assert len(whole.losses) == 7

    first = train(MODEL, config, source, directory=tmp_path, stop_after=4)
    rest = train(MODEL, config, source, directory=tmp_path)
    assert rest.first_step == 4
    assert first.losses + rest.losses == whole.losses
    jax.tree.map(np.testing.assert_array_equal, rest.params, whole.params)

    again = train(MODEL, config, source, directory=tmp_path)
    assert again.losses == ()
    jax.tree.map(np.testing.assert_array_equal, again.params, whole.params)

    with pytest.raises(CheckpointError, match="another model"):
        train(MODEL.replace(ff=32), config, source, directory=tmp_path)


def test_killed_run_goes_on_from_its_last_checkpoint(tmp_path: Path) -> None:
    source = text_batches(TEXT, batch=2, length=24, seed=1)
    model = MODEL.replace(pattern="A", rule=None)
    config = TrainConfig(steps=5, checkpoint_every=2, warmup=2, optimizer="adamw", learning_rate=1e-2)

    def failing(step: int) -> object:
        if step == 3:
            raise KeyboardInterrupt
        return source(step)

    with pytest.raises(KeyboardInterrupt):
        train(model, config, failing, directory=tmp_path)  # type: ignore[arg-type]
    rest = train(model, config, source, directory=tmp_path)
    assert rest.first_step == 2
    jax.tree.map(np.testing.assert_array_equal, rest.params, train(model, config, source).params)


def test_learns() -> None:
    source = text_batches(TEXT, batch=4, length=32, seed=0)
    trained = train(
        MODEL.replace(pattern="A", rule=None),
        TrainConfig(steps=60, warmup=5, learning_rate=0.05, adam_learning_rate=0.05),
        source,
        show=True,
    )
    assert trained.losses[0] > 5.0
    assert np.mean(trained.losses[-5:]) < 1.5


def test_batches_depend_on_seed_and_step_only() -> None:
    one, same, other = (text_batches(TEXT, batch=2, length=8, seed=s) for s in (3, 3, 4))
    np.testing.assert_array_equal(one(5).tokens, same(5).tokens)
    assert (one(5).tokens != one(6).tokens).any()
    assert (one(5).tokens != other(5).tokens).any()
    np.testing.assert_array_equal(one(5).tokens[:, 1:], one(5).targets[:, :-1])


def test_short_text_is_refused() -> None:
    with pytest.raises(ValueError, match="3 bytes"):
        text_batches(b"abc", batch=1, length=8, seed=0)


@pytest.mark.parametrize("field", ["steps", "learning_rate", "checkpoint_every"])
def test_bad_settings_are_refused(field: str) -> None:
    with pytest.raises(ConfigError, match=field):
        TrainConfig(**{"steps": 1, field: 0})
