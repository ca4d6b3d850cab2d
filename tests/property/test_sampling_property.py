"""Drawn tokens against reference distributions, setting by setting and mixed in one batch."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from atlas_jax.engine.api import SamplingParams
from atlas_jax.engine.runner.step_inputs import sampling_state
from atlas_jax.kernels.cpu import ffi
from atlas_jax.kernels.sampling import TOP_LOGPROBS, Sample, SamplingState, allowed_words, record, sample
from tests.reference.sampling_reference import Settings, adjusted, distribution

VOCAB = 150
COPIES, KINDS = 96, 4
DRAWS = 10
seeds = st.integers(0, 2**32 - 1)


@pytest.fixture(scope="module", params=["C", "XLA"], autouse=True)
def implementation(request: pytest.FixtureRequest) -> Iterator[None]:
    """All that is said here holds for the C kernels and for XLA's programs; without a compiler both are the latter."""
    ffi.use(request.param == "C")
    compiled.cache_clear()
    yield
    ffi.use(True)


@functools.cache
def compiled() -> Any:
    return jax.jit(lambda *args: sample(*args))  # a function of its own: traces are kept by function


def draw(*args: Any) -> Sample:
    return compiled()(*args)


def unit(low: float, high: float) -> st.SearchStrategy[float]:
    return st.floats(low, high, width=32)


kinds = st.one_of(
    st.builds(Settings, temperature=unit(0.25, 2.0)),
    st.builds(Settings, top_k=st.integers(1, VOCAB + 10)),
    st.builds(Settings, top_p=unit(0.0625, 0.96875)),
    st.builds(Settings, min_p=unit(0.0078125, 0.5)),
    st.builds(Settings, typical_p=unit(0.0625, 0.96875)),
    st.builds(
        Settings,
        repeat_penalty=unit(0.5, 2.0),
        presence_penalty=unit(-2.0, 2.0),
        frequency_penalty=unit(-1.0, 1.0),
        prompt=st.lists(st.integers(0, 20), max_size=8),
        generated=st.lists(st.integers(0, 20), max_size=8),
    ),
    st.builds(Settings, bias=st.dictionaries(st.integers(0, VOCAB - 1), unit(-8.0, 8.0), max_size=12)),
    st.builds(
        Settings,
        temperature=unit(0.5, 1.5),
        top_k=st.integers(0, 60),
        top_p=unit(0.5, 1.0),
        min_p=unit(0.0, 0.125),
        typical_p=unit(0.5, 1.0),
        repeat_penalty=unit(1.0, 1.5),
        generated=st.lists(st.integers(0, 20), max_size=8),
    ),
)


def one_row(kind: Settings, seed: int, logprobs: int | None = None) -> SamplingState:
    """A row as the engine makes it, after it has generated what `kind` says."""
    params = SamplingParams(
        temperature=kind.temperature,
        top_k=kind.top_k,
        top_p=kind.top_p,
        min_p=kind.min_p,
        typical_p=kind.typical_p,
        repeat_penalty=kind.repeat_penalty,
        presence_penalty=kind.presence_penalty,
        frequency_penalty=kind.frequency_penalty,
        logit_bias=kind.bias,
        logprobs=logprobs,
    )
    state = sampling_state(params, VOCAB, seed, kind.prompt)
    for token in kind.generated:
        state.generated[0, token] += 1  # type: ignore[index]
        state.present[0, token] = 1  # type: ignore[index]
    return state


def stack(rows: list[SamplingState]) -> SamplingState:
    return jax.tree.map(lambda *leaves: np.concatenate(leaves), *rows)


def chi_square_is_plausible(counts: np.ndarray, p: np.ndarray) -> bool:
    """Cells of at least five expected draws, the rest pooled; a limit six standard deviations above the mean."""
    expected = p * counts.sum()
    large = expected >= 5
    if large.sum() < 2:
        return True
    observed = np.append(counts[large], counts[~large].sum())
    expected = np.append(expected[large], expected[~large].sum())
    keep = expected > 0
    statistic = ((observed[keep] - expected[keep]) ** 2 / expected[keep]).sum()
    freedom = keep.sum() - 1
    return bool(statistic < freedom + 6 * np.sqrt(2 * freedom) + 12)


@settings(max_examples=20, deadline=None, derandomize=True)
@given(st.lists(kinds, min_size=KINDS, max_size=KINDS), seeds)
def test_draws_follow_the_reference_distribution(chosen: list[Settings], seed: int) -> None:
    random = np.random.default_rng(seed)
    logits = (random.standard_normal((KINDS, VOCAB)) * 3).astype(np.float32)
    wanted = [distribution(x, kind) for x, kind in zip(logits, chosen, strict=True)]
    for x, kind, p in zip(logits, chosen, wanted, strict=True):
        for slack in (1e-4, -1e-4):
            assume(np.array_equal(distribution(x, kind, slack) > 0, p > 0))
    rows = [one_row(kind, int(random.integers(2**63))) for kind in chosen for _ in range(COPIES)]
    state, scores = stack(rows), np.repeat(logits, COPIES, axis=0)
    counts = np.zeros((KINDS, VOCAB))
    for position in range(DRAWS):
        found: Sample = draw(state, scores, np.full(len(rows), position, np.int32))
        for kind, tokens in enumerate(np.asarray(found.token).reshape(KINDS, COPIES)):
            counts[kind] += np.bincount(tokens, minlength=VOCAB)
    for kind in range(KINDS):
        assert counts[kind][wanted[kind] == 0].sum() == 0, "a filtered token is never drawn"
        assert chi_square_is_plausible(counts[kind], wanted[kind])


@settings(max_examples=25, deadline=None, derandomize=True)
@given(kinds, seeds, st.integers(0, 2**63 - 1), st.integers(0, 2**20))
def test_a_seed_repeats_whatever_the_neighbours_do(kind: Settings, seed: int, row_seed: int, position: int) -> None:
    random = np.random.default_rng(seed)
    logits = (random.standard_normal((4, VOCAB)) * 3).astype(np.float32)
    positions = np.asarray([position, 3, 9, 100], np.int32)
    mine = one_row(kind, row_seed, logprobs=1)
    plain = [one_row(Settings(temperature=0.0), 0) for _ in range(3)]
    busy = [
        one_row(Settings(top_k=3, bias={1: 5.0}), 1, logprobs=5),
        one_row(Settings(typical_p=0.5, top_p=0.9), 2),
        one_row(Settings(min_p=0.1, repeat_penalty=1.3, prompt=(1, 2)), 3),
    ]
    quiet = draw(stack([mine, *plain]), logits, positions)
    loud = draw(stack([mine, *busy]), logits, positions)
    order = [2, 0, 3, 1]
    moved = draw(stack([[mine, *busy][i] for i in order]), logits[order], positions[order])
    for one, other, third in zip(*(jax.tree.leaves(found) for found in (quiet, loud, moved)), strict=True):
        assert np.array_equal(one[0], other[0])
        assert np.array_equal(one[0], third[1])


@settings(max_examples=25, deadline=None, derandomize=True)
@given(kinds, seeds)
def test_greedy_is_the_best_adjusted_token_and_logprobs_are_the_models_own(kind: Settings, seed: int) -> None:
    random = np.random.default_rng(seed)
    logits = (random.standard_normal((4, VOCAB)) * 3).astype(np.float32)
    greedy = dataclasses.replace(kind, temperature=0.0)
    state = stack([one_row(greedy, 0, logprobs=5) for _ in range(4)])
    found = draw(state, logits, np.zeros(4, np.int32))
    exact = logits.astype(np.float64)
    logprobs = exact - np.log(np.exp(exact).sum(axis=1, keepdims=True))
    for row in range(4):
        token = int(found.token[row])
        best = adjusted(logits[row], greedy)
        assert best[token] >= best.max() - 1e-5
        assert abs(float(found.logprob[row]) - logprobs[row, token]) < 1e-5
        order = np.argsort(-logprobs[row], kind="stable")[:TOP_LOGPROBS]
        assert np.array_equal(found.top_token[row], order)
        np.testing.assert_allclose(found.top_logprob[row], logprobs[row, order], atol=1e-5)
    shifted = draw(state, logits + np.float32(64.0), np.zeros(4, np.int32))
    if kind.repeat_penalty == 1:  # that penalty alone looks at the sign of a logit
        assert np.array_equal(shifted.token, found.token)


def test_ties_go_to_the_lowest_token_and_stay_together_in_top_k() -> None:
    logits = np.full((4, VOCAB), -5.0, np.float32)
    logits[:, [7, 140, 41]] = 2.0
    greedy = draw(stack([one_row(Settings(temperature=0.0), 0)] * 4), logits, np.zeros(4, np.int32))
    assert (np.asarray(greedy.token) == 7).all()
    rows = [one_row(Settings(top_k=2), seed) for seed in range(64)]
    tokens = draw(stack(rows), np.repeat(logits[:1], 64, axis=0), np.zeros(64, np.int32)).token
    assert set(np.asarray(tokens).tolist()) == {7, 41, 140}


@pytest.mark.parametrize("temperature", [1e-30, 1e-6, 1.0, 100.0])
@pytest.mark.parametrize("spread", [0.0, 1.0, 1e4])
def test_a_draw_is_a_token_with_weight_whatever_the_numbers(temperature: float, spread: float) -> None:
    logits = (np.random.default_rng(0).standard_normal((4, VOCAB)) * spread).astype(np.float32)
    kind = Settings(temperature=temperature, top_k=5, top_p=0.9, typical_p=0.9, min_p=0.01)
    for position in range(4):
        found = draw(stack([one_row(kind, seed) for seed in range(4)]), logits, np.full(4, position, np.int32))
        for row, token in enumerate(np.asarray(found.token)):
            assert 0 <= token < VOCAB
            if spread and temperature <= 1e-6:  # every other token's weight is 0
                assert token == logits[row].argmax()
        assert np.isfinite(found.logprob).all()


def test_history_counts_what_active_rows_generated() -> None:
    rows = [one_row(Settings(prompt=(5,), repeat_penalty=1.1), 0) for _ in range(3)]
    state = jax.tree.map(jnp.asarray, stack(rows))
    token = jnp.asarray([5, 9, 9], jnp.int32)
    for active in ([True, True, False], [False, True, False]):
        state = record(state, token[:, None], jnp.asarray(active)[:, None])
    generated, present = np.asarray(state.generated), np.asarray(state.present)
    assert generated[0, 5] == 1
    assert generated[1, 9] == 2
    assert generated.sum() == 3
    assert present[:, 5].all()
    assert present[1, 9] == 1
    assert present[2, 9] == 0


@settings(deadline=None, max_examples=30)
@given(kind=kinds, seed=seeds, allowed=st.sets(st.integers(0, VOCAB - 1), min_size=1, max_size=VOCAB))
def test_only_what_is_allowed_is_drawn(kind: Settings, seed: int, allowed: set[int]) -> None:
    state = jax.tree.map(jnp.asarray, stack([one_row(kind, seed), one_row(kind, seed)]))
    scores = np.random.default_rng(seed).normal(0, 3, (2, VOCAB)).astype(np.float32)
    mask = np.full((2, allowed_words(VOCAB)), -1, np.int32)
    bits = np.zeros(mask.shape[1] * 32, np.uint8)
    bits[list(allowed)] = 1
    mask[0] = np.packbits(bits, bitorder="little").view(np.int32)
    found = draw(state, jnp.asarray(scores), jnp.asarray([3, 3]), jnp.asarray(mask))
    free = draw(state, jnp.asarray(scores), jnp.asarray([3, 3]))
    assert int(found.token[0]) in allowed
    assert int(found.token[1]) == int(free.token[1])
    if len(allowed) == VOCAB:
        assert int(found.token[0]) == int(free.token[0])


ENDS: dict[str, list[dict[str, Any]]] = {
    "temperature": [{"temperature": value} for value in (1e-45, 1e-38, 1e-4, 100.0)],
    "top_k": [{"top_k": value} for value in (1, VOCAB - 1, VOCAB, 2**31)],
    "top_p": [{"top_p": value} for value in (0.0, 1e-38, 1e-7, 1 - 2**-24, 1 - 2**-20, 1.0)],
    "min_p": [{"min_p": value} for value in (0.0, 1e-38, 1 - 2**-24, 1.0)],
    "typical_p": [{"typical_p": value} for value in (0.0, 1e-38, 1e-7, 1 - 2**-24, 1.0)],
    "all closed": [{"top_k": 1, "top_p": 0.0, "min_p": 1.0, "typical_p": 0.0, "temperature": 100.0}],
    "penalties": [
        {"repeat_penalty": repeat, "presence_penalty": sign * 2.0, "frequency_penalty": sign * 2.0}
        for repeat in (1e-300, 1e-30, 1.0, 10.0)
        for sign in (-1, 1)
    ],
    "bias": [
        {"bias": dict.fromkeys(range(1, count), value), "temperature": temperature}
        for value in (-100.0, 100.0)
        for count in (2, VOCAB)
        for temperature in (0.5, 100.0)
    ],
}


@pytest.mark.parametrize("name", ENDS)
@pytest.mark.parametrize("spread", [0.01, 3.0, 40.0])
def test_the_ends_of_every_setting_mean_their_limits(name: str, spread: float) -> None:
    """Token 0 is the unlikeliest, so it is drawn by accident only."""
    random = np.random.default_rng(7)
    for ends in ENDS[name]:
        kind = Settings(**{"prompt": (3, 5), "generated": (5, 9), **ends})
        logits = (random.standard_normal((1, VOCAB)) * spread).astype(np.float32)
        logits[:, 0] = logits.min() - 30 * max(spread, kind.temperature)
        state = stack([one_row(kind, seed) for seed in range(200)])
        found = draw(state, np.repeat(logits, 200, axis=0), np.zeros(200, np.int32))
        tokens = np.asarray(found.token)
        assert (tokens > 0).all() or name == "bias", ends
        if kind.temperature < 1e-30:
            assert (tokens == logits[0].argmax()).all()
            continue
        settled = dataclasses.replace(kind, repeat_penalty=max(kind.repeat_penalty, 1e-6))
        wanted = distribution(logits[0], settled, slack=1e-6)
        assert (wanted[tokens] > 0).all(), ends
        if name == "bias":
            forced = max(kind.bias.values()) > 0
            allowed = np.array([(token in kind.bias) == forced for token in range(VOCAB)])
            assert allowed[tokens].all(), ends


def test_a_count_does_not_turn_round() -> None:
    state = jax.tree.map(jnp.asarray, one_row(Settings(frequency_penalty=1.0), 0))
    full = dataclasses.replace(state, generated=state.generated.at[0, 9].set(2**15 - 2))
    for _ in range(3):
        full = record(full, jnp.asarray([[9, 9]], jnp.int32), jnp.asarray([[True, True]]))
    assert int(full.generated[0, 9]) == 2**15 - 1
    assert int(full.generated.sum()) == 2**15 - 1
