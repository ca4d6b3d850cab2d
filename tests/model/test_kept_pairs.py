"""What is kept of a text that has left the window, and what the model makes of it, against float64 definitions."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from atlas_jax.aot import AotProgram, shape, shapes
from atlas_jax.config import PAGE, ModelConfig
from atlas_jax.gguf import GGUFFile
from atlas_jax.model.kept_division import KeptDivision
from atlas_jax.model.kept_pairs import kept_count
from atlas_jax.model.kv_cache import KVCache, first_pages, init_kv_cache
from atlas_jax.model.layer_groups import Trunk
from atlas_jax.model.loading import load_params, model_config, param_shapes
from atlas_jax.model.page_schedule import PageSchedule
from atlas_jax.model.params import ModelParams
from atlas_jax.model.transformer import SINKS
from tests import tiny_model
from tests.model.scoring import read
from tests.reference import transformer_reference
from tests.reference.kept_pairs_reference import KeptAttention

TURN = 300
"""The token that begins a turn here; no other text holds it."""
FOLLOWING = 3
"""Tokens after it that are kept with it."""
LENGTH = 7 * PAGE + 40
TEXT = np.random.default_rng(3).integers(0, TURN, LENGTH).tolist()


class Tiny:
    """A tiny model in float32, and its weights as they are in its file."""

    def __init__(self, folder: Path, shape: tiny_model.Shape, *, capped: bool = False, nulls: bool = False) -> None:
        random = np.random.default_rng(4)
        more: dict[str, np.ndarray | None] = {
            f"blk.{layer}.attn_sinks.weight": random.normal(1.0, 1.0, shape.heads).astype(np.float32)
            for layer in range(shape.layers if nulls else 0)
        }
        path = folder / f"{shape.architecture}-{shape.context}-{shape.layers}-{nulls}.gguf"
        tiny_model.write_model(path, shape, tensors=more)
        with GGUFFile.open(path) as file:
            config: ModelConfig = model_config(file)
            if capped:  # scores that have soft caps, of queries and keys in another magnitude
                (rope,) = config.ropes
                config = config.replace(attention_softcap=2.0, ropes=(replace(rope, magnitude=1.3),))
            self.config = config.replace(null_logits=nulls)
            self.params: ModelParams = load_params(file, self.config, dtype="float32")
        self.weights = transformer_reference.tensors(path)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("kept")


@pytest.mark.parametrize("update", [pytest.param(1, marks=pytest.mark.slow), 2])
@pytest.mark.parametrize(("shape", "window"), [(tiny_model.LLAMA, 1), (tiny_model.GEMMA, 2)], ids=["llama", "gemma3"])
def test_pairs_that_are_all_kept_are_full_attention(
    folder: Path, shape: tiny_model.Shape, window: int, update: int
) -> None:
    """Gemma's sliding layers keep none, and need no more than their window of 96 tokens."""
    tiny, text = Tiny(folder, shape), TEXT[: 4 * PAGE + 40]
    wanted = transformer_reference.logits(tiny.config, tiny.weights, text)
    plan = PageSchedule(window, update)
    found, cache = read(tiny.config, tiny.params, text, "float32", plan, kept=4 * PAGE)
    assert int(cache.kept[0].max()) == plan.left(4) * PAGE - SINKS > 0
    assert np.abs(found - wanted).max() < 2e-3 * wanted.std()
    without = read(tiny.config, tiny.params, text, "float32", plan)[0]
    assert np.abs(without - wanted).max() > 0.1 * wanted.std(), "what is kept is felt"
    for spec, layer in zip(tiny.config.layers, cache.kv, strict=True):
        assert (layer.choice is None) == (spec.sliding_window is not None)


def kept_positions(tiny: Tiny, cache: KVCache, rule: KeptAttention, index: int, head: int) -> set[int]:
    """The positions of the pairs that a head keeps, by their values and by their keys, where the rule has them stand."""
    wanted, pool = rule.kept[index, head], cache.pairs
    assert pool is not None
    first = first_pages(cache.kept_pages)[index]
    stretch = slice(first, first + cache.kept_pages[index])
    gone = np.asarray(sorted(wanted.left))
    places = np.asarray([wanted.left[position] for position in gone.tolist()])
    keys = rule.rotate[index](wanted.k[gone][:, None], places)[:, 0]
    if tiny.config.ropes[tiny.config.layers[index].rope].interleaved:  # which is undone when weights are loaded
        keys = np.concatenate([keys[:, ::2], keys[:, 1::2]], axis=1)
    pairs = np.concatenate([keys, wanted.v[gone]], axis=1)
    found: set[int] = set()
    count, dim = int(cache.kept[0, index]), tiny.config.head_dim
    own = [np.asarray(part)[0, stretch, head].reshape(-1, dim)[:count] for part in (pool.k, pool.v)]
    assert len(own[0]) == count
    for pair in np.concatenate(own, axis=1):
        like = gone[np.abs(pair - pairs).max(axis=1) < 1e-3 * np.abs(pairs).max()].tolist()
        free = [position for position in like if position not in found]
        assert free, (index, head, "a pair of no position, or one kept twice")
        # past the context pages stand in the same places, so equal tokens of them may be equal pairs
        found.add(max(free, key=lambda position: position in wanted.positions))
    return found


def assert_kept(tiny: Tiny, cache: KVCache, rule: KeptAttention, length: int) -> None:
    """The cache holds, for every head that keeps pairs, those of the rule."""
    left = PageSchedule(rule.window, rule.update).left((length - 1) // PAGE)
    for (index, head), wanted in rule.kept.items():
        if cache.kv[index].choice is None:
            assert not wanted.pairs
            continue
        assert int(cache.kept[0, index]) == kept_count(left, rule.most(index))
        found = kept_positions(tiny, cache, rule, index, head)
        assert min(found) >= SINKS, "sinks are kept as such"
        assert found ^ wanted.positions <= wanted.close, (index, head)


WITHIN = tiny_model.LLAMA
BEYOND = replace(tiny_model.LLAMA, context=300)
GEMMA_BEYOND = replace(tiny_model.GEMMA, context=300)


@pytest.mark.parametrize(
    ("shape", "window", "update", "capacity", "decay", "weights", "scores"),
    [
        (WITHIN, 1, 1, 100, 0.9, (), {}),
        pytest.param(WITHIN, 1, 1, 100, 0.9, (), {"nulls": True}, marks=pytest.mark.slow),
        (WITHIN, 2, 2, 200, 1.0, (), {}),
        (replace(WITHIN, layers=3), 1, 1, 3 * PAGE + 40, 0.9, (3.0, 0.5, 8.0), {}),
        (BEYOND, 1, 1, 100, 0.9, (), {"capped": True}),
        (BEYOND, 1, 2, 200, 0.5, (3.0, 1.0), {}),
        (replace(GEMMA_BEYOND, layers=12), 2, 1, 2 * PAGE, 0.9, (1.0,) * 11 + (3.0,), {}),
    ],
    ids=[
        "one page",
        "one page, null logits",
        "two pages",
        "unequal",
        "past the context, soft-capped",
        "two pages past the context, unequal",
        "gemma3, unequal",
    ],
)
def test_the_pairs_kept_are_those_of_the_rule(
    folder: Path,
    shape: tiny_model.Shape,
    window: int,
    update: int,
    capacity: int,
    decay: float,
    weights: tuple[float, ...],
    scores: dict[str, bool],
) -> None:
    """Also of a text of more than three times the context that the model was trained with: no key is met further away."""
    tiny = Tiny(folder, shape, **scores)
    capacities = KeptDivision.of(tiny.config, weights).capacities(capacity)
    assert len({most for most in capacities if most}) == (len(set(weights)) or 1)
    rule = KeptAttention(window, update, capacities, decay)
    wanted = transformer_reference.logits(tiny.config, tiny.weights, TEXT, rule)
    plan = PageSchedule(window, update)
    more = {"kept": capacity, "decay": decay, "turn_tokens": (TURN,), "weights": weights}
    found, cache = read(tiny.config, tiny.params, TEXT, "float32", plan, **more)  # type: ignore[arg-type]
    assert np.isfinite(found).all()
    assert_kept(tiny, cache, rule, LENGTH)
    assert np.abs(found - wanted).max() < 0.05 * wanted.std()
    context = tiny.config.context_length
    for kept in rule.kept.values():
        if kept.pairs:
            assert len({pair.position // PAGE for pair in kept.pairs}) > 1, "pairs of several pages compete"
        for position, place in kept.left.items():
            assert 0 <= place < context
            assert place == position or position + (window + update) * PAGE > context, "left inside the context"


@pytest.mark.parametrize("starts", [6, 60])
def test_turn_starts_stay_where_better_attended_pairs_compete(folder: Path, starts: int) -> None:
    """Those at a page's edge too; where there are more than is kept, as many of them as are kept."""
    tiny, text, capacity = Tiny(folder, WITHIN), list(TEXT), 100
    random = np.random.default_rng(starts)
    begins = {2, 3 * PAGE - 2, 5 * PAGE - 1, *random.integers(0, 6 * PAGE, starts - 3).tolist()}
    for position in begins:
        text[position] = TURN
    protected = {position + more for position in begins for more in range(FOLLOWING + 1)}
    rule = KeptAttention(1, 1, capacity, 1.0, protected)
    transformer_reference.logits(tiny.config, tiny.weights, text, rule)
    more = {"kept": capacity, "turn_tokens": (TURN,)}
    cache = read(tiny.config, tiny.params, text, "float32", PageSchedule(1), **more)[1]  # type: ignore[arg-type]
    assert (np.asarray(cache.kept[0]) == capacity).all()
    if starts == 6:
        assert_kept(tiny, cache, rule, LENGTH)
    left = {position for position in protected if SINKS <= position < 7 * PAGE}
    for head in range(tiny.config.kv_heads):
        found = kept_positions(tiny, cache, rule, 0, head)  # the first layer's pairs do not depend on what is kept
        assert found >= left if starts == 6 else found <= left


def test_layers_that_keep_different_numbers_share_one_program(folder: Path) -> None:
    """So a start compiles no more than of layers that keep as many: a step's programs get the same shapes of every group."""
    config = Tiny(folder, WITHIN).config
    config = config.replace(layers=config.layers[:1] * 10)
    division = KeptDivision.of(config, range(1, 11))
    cache = jax.eval_shape(lambda: init_kv_cache(config, 2, 4, "int8", division.pages(5)))
    assert len(set(cache.kept_pages)) > 2
    given: dict[int, list[Any]] = {}

    def call(program: AotProgram, key: object, *args: Any) -> Any:
        given.setdefault(id(program), []).append(shapes(args))
        return jax.eval_shape(program._function, *args)

    tokens, count = shape((2, 3), np.int32), shape((2,), np.int32)
    trunk = Trunk(config)
    *_, (after, _, states) = trunk.parts(call, (), param_shapes(config, "int8"), cache, tokens, count)
    assert len(states) == 10
    assert after.pairs is cache.pairs, "a step only reads what is kept"
    enter, layers = given.values()
    assert (len(enter), len(layers)) == (1, trunk.programs) == (1, 2)
    assert jax.tree.structure(layers[0]) == jax.tree.structure(layers[1])
    assert jax.tree.leaves(layers[0]) == jax.tree.leaves(layers[1])
