"""How kept pairs are divided over layers: what any division must be, and what the weights say."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from atlas_jax.config import PAGE, LayerConfig, ModelConfig, RopeConfig
from atlas_jax.model.kept_division import KeptDivision
from atlas_jax.model.kv_cache import first_pages

MODEL = ModelConfig(
    family="llama",
    vocab=50,
    embed=8,
    heads=2,
    kv_heads=1,
    head_dim=4,
    ff=8,
    layers=(LayerConfig(), LayerConfig(sliding_window=64), LayerConfig(), LayerConfig()),
    ropes=(RopeConfig(base=10_000.0, dims=4),),
    context_length=4096,
    norm_eps=1e-5,
)
weights = st.lists(st.floats(0.01, 100), min_size=4, max_size=4)
numbers = st.integers(0, 40 * PAGE)


@settings(deadline=None)
@given(weights, numbers, numbers)
def test_as_many_pairs_are_kept_in_all_as_if_every_layer_kept_as_many(given: list[float], one: int, other: int) -> None:
    division = KeptDivision.of(MODEL, given)
    fewer, more = (np.asarray(division.capacities(kept)) for kept in sorted((one, other)))
    assert fewer.sum() == min(one, other) * division.layers == min(one, other) * 3
    assert fewer[1] == 0, "a layer with a window of its own keeps nothing"
    assert (fewer <= more).all(), "what a session keeps has room in that of one that keeps more"
    assert (more[[0, 2, 3]] >= min(max(one, other), PAGE)).all()
    pages = division.pages(-(-max(one, other) // PAGE))
    assert (more <= PAGE * np.asarray(pages)).all()
    assert sum(pages) == 3 * -(-max(one, other) // PAGE)


@settings(deadline=None)
@given(st.floats(0.01, 100), numbers)
def test_equal_weights_divide_equally(weight: float, kept: int) -> None:
    assert KeptDivision.of(MODEL, (weight,) * 4).capacities(kept) == (kept, 0, kept, kept)
    assert KeptDivision.of(MODEL).capacities(kept) == (kept, 0, kept, kept)


@settings(deadline=None)
@given(st.lists(st.integers(1, 14), min_size=1, max_size=30), st.integers(1, 3))
def test_weights_that_are_a_division_are_that_division(pages: list[int], times: int) -> None:
    """Of as many pages, and of a multiple of them."""
    pages[0] += -sum(pages) % len(pages)
    model = replace(MODEL, layers=(LayerConfig(),) * len(pages))
    wanted = tuple(times * count for count in pages)
    assert KeptDivision.of(model, pages).pages(sum(wanted) // len(pages)) == wanted


@settings(deadline=None)
@given(st.lists(st.integers(0, 14), min_size=1, max_size=30))
def test_stretches_of_the_pool_do_not_overlap_and_the_largest_has_room_from_each(pages: list[int]) -> None:
    first = first_pages(pages)
    taken = [place for start, count in zip(first, pages, strict=True) for place in range(start, start + count)]
    assert sorted(taken) == list(range(sum(pages)))
    assert all(start + max(pages) <= sum(pages) for start, count in zip(first, pages, strict=True) if count)
