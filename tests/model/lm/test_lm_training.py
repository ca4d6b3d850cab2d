"""Training: interrupted runs, checkpoints, and a model that learns."""

from __future__ import annotations

import csv
import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from atlas_jax.config import ConfigError
from atlas_jax.memory import MemoryRule
from atlas_jax.model.lm import IGNORE, Batch, CSVMetrics, LMConfig, create, generate, pack, split, text_batches
from atlas_jax.model.lm.checkpoints import CheckpointError
from atlas_jax.model.lm.training import NonFiniteLoss, TrainConfig, held_out, in_bfloat16, train

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


LLAMA = MODEL.replace(pattern="A", rule=None)
ADAM = TrainConfig(steps=4, warmup=1, optimizer="adamw", learning_rate=1e-2, checkpoint_every=2)


class Bigrams(nnx.Module):
    """A module that is no `LanguageModel`."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        self.table = nnx.Param(0.1 * jax.random.normal(rngs.params(), (256, 256)))

    def __call__(self, tokens: jax.Array) -> jax.Array:
        return self.table[...][tokens]


def test_a_run_goes_on_with_its_own_settings_only(tmp_path: Path) -> None:
    """Any module is trained; what differs is named; how often something is kept or evaluated may differ."""
    model, source = Bigrams(nnx.Rngs(0)), text_batches(TEXT, batch=2, length=24, seed=1)
    whole = train(model, ADAM, source)
    train(model, ADAM, source, directory=tmp_path, stop_after=2)
    with pytest.raises(CheckpointError, match=r"other settings: learning_rate is 0\.01 there and 0\.5 here"):
        train(model, dataclasses.replace(ADAM, learning_rate=0.5), source, directory=tmp_path)
    with pytest.raises(CheckpointError, match="another model: "):
        train(LLAMA, ADAM, source, directory=tmp_path)
    rest = train(model, dataclasses.replace(ADAM, checkpoint_every=1), source, directory=tmp_path)
    assert rest.first_step == 2
    jax.tree.map(np.testing.assert_array_equal, rest.params, whole.params)


def test_an_iterator_is_a_source_and_is_taken_up_where_it_was(tmp_path: Path) -> None:
    model, source = Bigrams(nnx.Rngs(0)), text_batches(TEXT, batch=2, length=24, seed=1)

    def arrays() -> Iterator[np.ndarray]:
        for step in range(4):
            batch = source(step)
            yield np.concatenate([batch.tokens, batch.targets[:, -1:]], axis=1)

    whole = train(model, ADAM, source)
    train(model, ADAM, arrays(), directory=tmp_path, stop_after=3)
    rest = train(model, ADAM, arrays(), directory=tmp_path)
    assert rest.losses == whole.losses[3:]
    with pytest.raises(ValueError, match="ended before step 3"):
        train(model, ADAM, [source(0), source(1), source(2)])
    with pytest.raises(ValueError, match="step 0: batches are"):
        train(model, ADAM, [np.zeros(4)])


def test_metrics_and_evaluations_are_told_and_written(tmp_path: Path) -> None:
    model, source = Bigrams(nnx.Rngs(0)), text_batches(TEXT, batch=2, length=24, seed=1)
    path, config = tmp_path / "run.csv", dataclasses.replace(ADAM, evaluate_every=2)
    evaluate = held_out(model, [source(90), source(91)])
    for _ in range(2):  # a second run writes the same steps again
        trained = train(model, config, source, metrics=CSVMetrics(path), evaluate=evaluate)
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    losses = [float(row["value"]) for row in rows if row["name"] == "loss"]
    np.testing.assert_allclose(losses, trained.losses, rtol=1e-6)
    found = {int(row["step"]): float(row["value"]) for row in rows if row["name"] == "held_out_loss"}
    assert found.keys() == {2, 4}
    assert found[4] == pytest.approx(evaluate(trained.params, 4)["held_out_loss"], rel=1e-6)
    assert found[4] < found[2]


def test_a_loss_that_is_not_finite_stops_the_run_before_it_is_kept(tmp_path: Path) -> None:
    model, source = Bigrams(nnx.Rngs(0)), text_batches(TEXT, batch=2, length=24, seed=1)
    config = dataclasses.replace(ADAM, learning_rate=1e38, checkpoint_every=1, clip=1e38)
    with pytest.raises(NonFiniteLoss, match=r"the loss of step [123] is"):
        train(model, config, source, directory=tmp_path)
    kept = max(int(folder.name) for folder in tmp_path.iterdir() if folder.name.isdigit())
    assert kept <= 3

    class Edge(Bigrams):
        """Its loss is finite and its gradient is not."""

        def __call__(self, tokens: jax.Array) -> jax.Array:
            return super().__call__(tokens) + jnp.sqrt(0.0 * self.table[...][0, 0])

    often = dataclasses.replace(ADAM, checkpoint_every=1)
    with pytest.raises(NonFiniteLoss, match="parameters after step 0 are not finite"):
        train(Edge(nnx.Rngs(0)), often, source, directory=tmp_path / "edge")
    assert not any(folder.name.isdigit() for folder in (tmp_path / "edge").iterdir())


def test_a_batch_in_parts_is_the_whole_batch() -> None:
    """Also where parts have different numbers of targets: each target counts alike."""
    source = text_batches(TEXT, batch=4, length=24, seed=1)

    def ragged(step: int) -> Batch:
        batch = source(step)
        targets = np.where(np.arange(24) < np.asarray([24, 3, 11, 7])[:, None], batch.targets, IGNORE)
        return Batch(batch.tokens, targets)

    whole, parts = (train(Bigrams(nnx.Rngs(0)), dataclasses.replace(ADAM, accumulate=n), ragged) for n in (1, 2))
    np.testing.assert_allclose(parts.losses, whole.losses, rtol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), parts.params, whole.params)


def test_bfloat16_multiplies_in_it_and_keeps_float32() -> None:
    model = MODEL.replace(pattern="G")
    source = text_batches(TEXT, batch=2, length=16, seed=1)
    apply, params = split(create(model, 0))
    batch = source(0)
    full = jax.jit(apply)(params, batch.tokens)
    half = jax.jit(apply)(in_bfloat16(params), batch.tokens)
    assert half.dtype == jnp.float32
    assert float(jnp.linalg.norm(half - full)) < 0.03 * float(jnp.linalg.norm(full))
    assert float(jnp.abs(half - full).max()) > 0
    text = str(jax.make_jaxpr(apply)(in_bfloat16(params), batch.tokens))
    dots = [line for line in text.splitlines() if "dot_general[" in line]
    assert sum(":bf16[" in line.partition("=")[0] for line in dots) >= 8  # projections and MLPs
    trained = train(Bigrams(nnx.Rngs(0)), dataclasses.replace(ADAM, precision="bfloat16"), source)
    assert {x.dtype for x in jax.tree.leaves(trained.params)} == {np.dtype(np.float32)}
    assert trained.losses[-1] < trained.losses[0]


def test_packing_keeps_every_token_and_begins_where_it_may() -> None:
    documents = [np.arange(2, 2 + n) for n in (5, 9, 2, 14)]
    batches = list(pack(documents, batch=1, length=8, step=4))
    tokens, targets, starts = (
        np.concatenate([np.asarray(getattr(b, name))[0] for b in batches]) for name in ("tokens", "targets", "starts")
    )
    places = np.flatnonzero(starts)
    assert places.tolist() == [0, 4, 12, 16]
    for document, place in zip(documents, places, strict=True):
        held = min(len(document) - 1, len(tokens) - place)
        np.testing.assert_array_equal(tokens[place : place + held], document[:held])
        np.testing.assert_array_equal(targets[place : place + held], document[1 : held + 1])
    asked = np.zeros(len(tokens), bool)
    for document, place in zip(documents, places, strict=True):
        asked[place : place + len(document) - 1] = True
    assert (targets[~asked] == IGNORE).all()
    with pytest.raises(ValueError, match="multiple of 4"):
        next(pack(documents, batch=1, length=6, step=4))
    with pytest.raises(ValueError, match="document 1"):
        next(pack([np.arange(3), np.arange(1)], batch=1, length=8, step=4))


@pytest.mark.parametrize("pattern", ["ML", pytest.param("SAGC", marks=pytest.mark.slow)])
def test_documents_in_a_row_are_as_if_alone(pattern: str) -> None:
    model = MODEL.replace(pattern=pattern, segment=8, window=6, persistent=2)
    assert model.document_step == 16
    apply, params = split(create(model, 0))
    params = jax.tree.map(lambda x: x + 0.05 * jnp.sin(jnp.arange(x.size).reshape(x.shape)), params)
    tokens = np.random.default_rng(0).integers(0, 256, (1, 48))
    starts = np.zeros((1, 48), bool)
    starts[0, [0, 32]] = True
    run = jax.jit(apply)
    row = run(params, tokens, starts)
    alone = np.concatenate([run(params, tokens[:, a:b], starts[:, a:b]) for a, b in ((0, 32), (32, 48))], axis=1)
    np.testing.assert_allclose(row, alone, atol=2e-5)
    assert np.abs(row - run(params, tokens, starts & False))[0, 32:].max() > 1e-3


@pytest.mark.slow  # the guide's models are generated from, too
def test_generation_is_what_the_training_form_would_write() -> None:
    model = MODEL.replace(pattern="MS", window=4)
    apply, params = split(create(model, 3))
    run, text = jax.jit(apply), list(TEXT[:9])
    for _ in range(4):
        text.append(int(np.argmax(run(params, np.asarray([text + [0] * (16 - len(text))]))[0, len(text) - 1])))
    prompt = list(TEXT[:9])
    assert list(generate(model, params, prompt, max_tokens=4, temperature=0.0)) == text[9:]
    assert list(generate(model, params, prompt, max_tokens=4, top_k=1, seed=7)) == text[9:]
    assert list(generate(model, params, prompt, max_tokens=4, temperature=0.0, stop=text[9])) == []
    drawn = [list(generate(model, params, prompt, max_tokens=4, seed=seed)) for seed in (1, 1, 2)]
    assert drawn[0] == drawn[1] != drawn[2]
    for wrong in ({"prompt": []}, {"prompt": [256]}, {"prompt": [1], "temperature": -1.0}):
        arguments: dict[str, Any] = {"max_tokens": 1, **wrong}
        with pytest.raises(ValueError, match=r"prompt|temperature"):
            generate(model, params, **arguments)
