"""Models by pattern: causality, gradients, configuration, GGUF, and the engine's view of an exported Llama."""

from __future__ import annotations

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from atlas_jax.config import ConfigError
from atlas_jax.gguf import BYTE_VOCAB, GGUFError, GGUFFile, Tokenizer, byte_vocabulary, write_gguf
from atlas_jax.memory import Features, MemoryRule, presets
from atlas_jax.model import transformer
from atlas_jax.model.kv_cache import init_kv_cache, ring_view
from atlas_jax.model.lm import (
    LMConfig,
    create,
    cross_entropy,
    export_gguf,
    import_gguf,
    init_params,
    matrix_axes,
    parameter_count,
    split,
)
from atlas_jax.model.loading import load_params, model_config
from atlas_jax.optim import muon

LINEAR = presets.linear_attention(4, 4, remat=False)
RULE = MemoryRule(d_k=4, d_v=4, window=2, chunk=4, remat=False)
SMALL = LMConfig(
    vocab=19,
    embed=16,
    ff=24,
    heads=4,
    kv_heads=2,
    pattern="ASMCGLD",
    window=4,
    segment=4,
    persistent=2,
    rule=LINEAR,
    memory_heads=2,
    dot_window=2,
    dot_hidden=4,
)
TOKENS = jnp.asarray(np.random.default_rng(0).integers(0, 19, (2, 11)), jnp.int32)


@pytest.mark.slow
def test_every_kind_is_causal() -> None:
    """One model with a layer of every kind: nothing looks ahead, and everything is seen."""
    apply, params = split(create(SMALL, 0))
    run = jax.jit(apply)
    logits = run(params, TOKENS)
    assert logits.shape == (2, 11, 19)
    assert jnp.isfinite(logits).all()
    changed = run(params, TOKENS.at[:, 6].set((TOKENS[:, 6] + 1) % 19))
    np.testing.assert_allclose(changed[:, :6], logits[:, :6], atol=1e-5)
    assert (jnp.abs(changed - logits)[:, 6:].max(axis=(0, 2)) > 1e-5).all()


@pytest.mark.slow  # compiles the gradients of every kind of layer
def test_every_parameter_trains() -> None:
    """Through segments, memory, attention with persistent tokens, and the deep memory."""
    apply, params = split(create(SMALL.replace(pattern="CD", rule=LINEAR), 0))
    gradient = jax.jit(jax.grad(lambda p: cross_entropy(apply(p, TOKENS[:, :-1]), TOKENS[:, 1:])[0]))(params)
    for path, leaf in jax.tree_util.tree_flatten_with_path(gradient)[0]:
        name = jax.tree_util.keystr(path)
        assert jnp.isfinite(leaf).all(), name
        # gates start constant: their first map has no gradient until the second has moved; a matrix starts at zero
        assert jnp.any(leaf != 0) or "['gates']['down']" in name, name


def test_muon_trains_the_matrices_of_the_blocks() -> None:
    model = create(SMALL, 0)
    axes = matrix_axes(model)
    params = split(model)[1]
    state = muon(0.1, axes).init(params)
    banks = state.inner_states["matrix"].inner_state[0].momentum
    trained = sum(x.size for x in jax.tree.leaves(banks))
    assert 0.5 * parameter_count(params) < trained < parameter_count(params)
    assert axes["embed"] is None


@pytest.mark.parametrize(
    "change",
    [
        {"pattern": "X"},
        {"pattern": ""},
        {"rule": None},
        {"heads": 3},
        {"embed": 18},
        {"vocab": 0},
        {"combine": "mix"},
        {"window": 0},
    ],
)
def test_bad_configurations_are_refused(change: dict[str, object]) -> None:
    with pytest.raises(ConfigError):
        SMALL.replace(**change)


def test_configuration_survives_json() -> None:
    config = SMALL.replace(rule=MemoryRule(d_k=4, d_v=4, features=Features(kind="polynomial", degree=2)))
    assert LMConfig.from_json(config.to_json()) == config
    for text in ("", "[]", "{}", config.to_json().replace('"window": 4', '"window": 0'), '{"rule": 3}'):
        with pytest.raises(ConfigError):
            LMConfig.from_json(text)


@pytest.mark.parametrize("config", [SMALL, SMALL.replace(pattern="AA"), SMALL.replace(pattern="A", tied_head=False)])
def test_gguf_round_trip_is_exact(config: LMConfig, tmp_path: Path) -> None:
    config = config.replace(vocab=BYTE_VOCAB, rule=RULE if "M" in config.pattern else None)
    params = init_params(config, 3)
    path = tmp_path / "model.gguf"
    export_gguf(path, config, params, byte_vocabulary())
    found, read = import_gguf(path)
    jax.tree.map(np.testing.assert_array_equal, read, params)
    assert found.pattern == config.pattern
    if "M" in config.pattern:
        assert found == config
    with GGUFFile.open(path) as file:
        assert file.require("general.architecture", str) == ("atlas" if "M" in config.pattern else "llama")
        tokenizer = Tokenizer.from_metadata(file.metadata)
        text = "né\0\0  \n✓ <|endoftext|>"
        ids = tokenizer.encode(text, add_special=False, parse_special=False)
        assert bytes(ids) == text.encode()
        assert tokenizer.decode(ids) == text
        assert tokenizer.eos_id == 256


def test_exported_llama_is_what_the_engine_computes(tmp_path: Path) -> None:
    config = SMALL.replace(pattern="AA", vocab=BYTE_VOCAB, rule=None)
    apply, params = split(create(config, 1))
    path = tmp_path / "model.gguf"
    export_gguf(path, config, params, byte_vocabulary())
    with GGUFFile.open(path) as file:
        model = model_config(file)
        weights = load_params(file, model, dtype="float32")
    tokens = jnp.asarray(np.random.default_rng(2).integers(0, 256, (1, 20)), jnp.int32)

    @jax.jit
    def served(tokens: jax.Array) -> jax.Array:
        context = init_kv_cache(model, 1, 2, "float32")
        view = transformer.step_view(
            model, weights.ropes, ring_view(_first_page(context), tokens.shape[1], jnp.asarray([tokens.shape[1]]))
        )
        x = transformer.embed(model, weights.embed, tokens)
        states, _ = transformer.run_layers(model, model.layers, weights.layers, context.kv, x, view)
        return transformer.logits(model, weights, states[-1])

    np.testing.assert_allclose(served(tokens), apply(params, tokens), atol=2e-4)


def test_foreign_parameters_and_files_are_refused(tmp_path: Path) -> None:
    config = SMALL.replace(pattern="A", vocab=BYTE_VOCAB, rule=None)
    params = init_params(config, 0)
    path = tmp_path / "model.gguf"
    with pytest.raises(ValueError, match="mlp"):
        export_gguf(path, config.replace(ff=32), params, byte_vocabulary())
    assert not list(tmp_path.iterdir())
    with pytest.raises(GGUFError, match=r"general\.architecture"):
        write_gguf(path, {}, {})
    with pytest.raises(GGUFError, match="float64"):
        write_gguf(path, {"general.architecture": "x"}, {"a": np.zeros(3)})
    write_gguf(path, {"general.architecture": "mamba"}, {"a": np.zeros(3, np.float32)})
    with pytest.raises(GGUFError, match="mamba"):
        import_gguf(path)
    write_gguf(path, {"general.architecture": "atlas", "atlas.config": "{}"}, {"a": np.zeros(3, np.float32)})
    with pytest.raises(GGUFError, match="not the configuration"):
        import_gguf(path)
    one = {"a": np.zeros(3, np.float32)}
    write_gguf(path, {"general.architecture": "atlas", "atlas.config": config.to_json()}, one)
    with pytest.raises(GGUFError, match="no part of the model"):
        import_gguf(path)
    assert [file.name for file in tmp_path.iterdir()] == ["model.gguf"]


def _first_page(context: object) -> object:
    """A context whose one row is in page 0."""
    import dataclasses

    return dataclasses.replace(context, page=context.page.at[0, 0].set(0))  # type: ignore[attr-defined, type-var]
