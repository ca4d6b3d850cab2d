"""The recall memory against float64 least squares, and what must hold whatever it has read."""

from __future__ import annotations

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from atlas_jax.config import PAGE, MemoryConfig
from atlas_jax.kernels.monomials import gather_monomials
from atlas_jax.recall import recall_memory, recall_state
from atlas_jax.recall.adapter import GATE_FEATURES, Adapter, key_components, make_adapter, token_weights
from atlas_jax.recall.recall_state import Answer, RecallSettings, RecallState, WriteSettings
from atlas_jax.recall.solvers import OPTIMIZERS, Optimizer
from tests.reference import recall_reference

VOCAB, EMBED, ROWS = 60, 20, 2
CONFIG = MemoryConfig(
    layers=(1, 0),
    components=8,
    features=288,
    code_dim=64,
    max_window=PAGE,
    max_omega_window=2 * PAGE,
    correction=1.0,  # the rule to the letter, of which there is a definition
)

NOTHING_TOLD = np.zeros((ROWS, PAGE, CONFIG.code_dim // 8), np.uint8)
seeds = st.integers(0, 2**32 - 1)
degrees = st.integers(1, 3)
optimizers = st.sampled_from(OPTIMIZERS)
windows = st.sampled_from([8, 32, PAGE, 2 * PAGE])


@functools.cache
def adapter() -> Adapter:
    random = np.random.default_rng((0, 1))  # no test's own seed: a mean equal to a test's state has no direction
    count = len(CONFIG.layers)
    mean = random.standard_normal((count, EMBED)).astype(np.float32)
    projection = random.standard_normal((count, EMBED, CONFIG.components)).astype(np.float32)
    return make_adapter(
        CONFIG,
        VOCAB,
        mean,
        projection,
        random.uniform(0, 1, VOCAB).astype(np.float32),
        np.asarray([-1.0, 2.0, 1.0, 0.2], np.float32),
        random.standard_normal(CONFIG.components + 1).astype(np.float32),
    )


@functools.cache
def compiled() -> dict[str, object]:
    return {
        "remember": jax.jit(recall_memory.remember),
        "scores": jax.jit(recall_memory.scores),
        "read_out": jax.jit(recall_memory._read_out),
        "blend": jax.jit(recall_memory.blend),
        "read": jax.jit(recall_memory.read),
        "keys": jax.jit(recall_memory.keys),
        "observe": jax.jit(recall_memory.observe),
    }


def unit_keys(random: np.random.Generator, count: int) -> np.ndarray:
    keys = random.standard_normal((count, 2, CONFIG.components)).astype(np.float32)
    return (keys / np.linalg.norm(keys, axis=2, keepdims=True)).reshape(count, CONFIG.key_size)


def text_states(random: np.random.Generator, count: int) -> np.ndarray:
    return random.standard_normal((count, CONFIG.components)).astype(np.float32)


def in_8_bits(states: np.ndarray) -> np.ndarray:
    peak = np.maximum(np.abs(states).max(axis=-1, keepdims=True), 1e-30)
    return np.asarray(np.rint(states * (127 / peak)), np.int8)


def keys_of(states: np.ndarray, tokens: np.ndarray) -> np.ndarray:
    """The keys of a text, its states as they are after they have been kept in 8 bits."""
    codes, weight = (np.asarray(part, np.float64) for part in (adapter().codes.values, adapter().token_weight))
    context = recall_reference.context(tokens, codes, weight, CONFIG.components)
    return np.concatenate([recall_reference.unit(in_8_bits(states).astype(np.float64)), context], axis=1)


@functools.cache
def compiled_write(optimizer: Optimizer) -> object:
    return jax.jit(functools.partial(recall_memory.write, CONFIG, optimizer))


def write(
    state: RecallState,
    row: int,
    end: int,
    window: int,
    optimizer: Optimizer = "exact",
    degree: int = 2,
    step: float = 1.0,
) -> RecallState:
    how = WriteSettings(np.int32(end), np.int32(window), np.float32(step), np.int32(degree - 1))  # type: ignore[arg-type]
    return compiled_write(optimizer)(adapter(), state, np.int32(row), how)


def reading(degree: int = 2, read: bool = True, read_from: int = 0, log_odds: float = 0.0) -> RecallSettings:
    def row(value: float, dtype: type) -> np.ndarray:
        return np.full(ROWS, value, dtype)

    return RecallSettings(  # type: ignore[arg-type]
        layers=row(0, np.int32),
        degree=row(degree - 1, np.int32),
        read=row(read, bool),
        read_from=row(read_from, np.int32),
        log_odds=row(log_odds, np.float32),
    )


def read_text(state: RecallState, row: int, states: np.ndarray, tokens: np.ndarray, start: int = 0) -> RecallState:
    """Lets one row read whole pages; the other rows sit out."""
    for page in range(0, len(tokens), PAGE):
        part = slice(page, page + PAGE)
        z = np.zeros((ROWS, PAGE, CONFIG.components), np.float32)
        token = np.zeros((ROWS, PAGE), np.int32)
        z[row], token[row] = states[part], tokens[part]
        valid = np.zeros((ROWS, PAGE), bool)
        valid[row] = True
        positions = np.broadcast_to(start + page + np.arange(PAGE), (ROWS, PAGE)).astype(np.int32)
        state = compiled()["remember"](state, in_8_bits(z), NOTHING_TOLD, token, positions, valid)
    return state


def pairs(states: np.ndarray, tokens: np.ndarray, end: int, window: int) -> tuple[np.ndarray, np.ndarray]:
    """What a write is about: the keys before the last `window` tokens before `end`, and those tokens' value codes."""
    first = max(1, end - window)
    codes = np.asarray(adapter().codes.values, np.float64)[tokens[first:end]] / np.sqrt(CONFIG.code_dim)
    return keys_of(states, tokens)[first - 1 : end - 1], codes


def weights_of(state: RecallState, row: int, degree: int) -> np.ndarray:
    count = recall_reference.features(np.zeros((1, CONFIG.key_size)), degree).shape[1]
    return (np.asarray(state.weights, np.float64)[row] * np.asarray(state.scale, np.float64)[row][:, None])[:, :count].T


@settings(max_examples=20, deadline=None, derandomize=True)
@given(seeds, degrees, st.sampled_from([20, 60, 288]))
def test_features_are_those_of_the_kernel(seed: int, degree: int, features: int) -> None:
    """Also where a memory has room for some of a key's components only."""
    config = dataclasses.replace(CONFIG, features=features)
    found = make_adapter(
        config,
        VOCAB,
        np.zeros((2, EMBED)),
        np.zeros((2, EMBED, 8)),
        np.ones(VOCAB),
        np.zeros(GATE_FEATURES),
        np.zeros(9),
    )
    size = key_components(config, degree)
    keys = np.random.default_rng(seed).standard_normal((2, 5, CONFIG.key_size)).astype(np.float32)
    phi = gather_monomials(keys, found.factors[degree - 1], found.feature_weight[degree - 1])
    assert phi.shape[-1] == features
    cut = keys.reshape(2, 5, 2, -1)[..., :size].reshape(2, 5, -1)
    wanted = [recall_reference.features(part.astype(np.float64), degree) for part in cut]
    np.testing.assert_allclose(phi[0] @ phi[1].T, wanted[0] @ wanted[1].T, rtol=1e-4, atol=1e-4)
    kernel = recall_memory.kernel(cut[0], cut[1], jnp.int32(degree - 1))
    np.testing.assert_allclose(kernel, wanted[0] @ wanted[1].T, rtol=1e-4, atol=1e-4)


@settings(max_examples=15, deadline=None, derandomize=True)
@given(seeds, degrees, windows)
def test_an_exact_write_is_the_least_squares_solution(seed: int, degree: int, window: int) -> None:
    random = np.random.default_rng(seed)
    states, tokens = text_states(random, 2 * PAGE), random.integers(0, VOCAB, 2 * PAGE)
    state = read_text(recall_state.init_state(CONFIG, ROWS, VOCAB), 1, states, tokens)
    for end in (PAGE, 2 * PAGE):
        key, values = pairs(states, tokens, end, window)
        phi, before = recall_reference.features(key, degree), weights_of(state, 1, degree)
        state = write(state, 1, end, window, "exact", degree)
        found, wanted = weights_of(state, 1, degree), recall_reference.exact_write(before, phi, values, CONFIG.ridge)
        reached, least = (recall_reference.ridge_loss(m, before, phi, values, CONFIG.ridge) for m in (found, wanted))
        assert reached < 1.02 * least, "its big products are in bfloat16"
        assert np.linalg.norm(found - wanted) < 0.25 * np.linalg.norm(wanted)
        left = recall_reference.omega_loss(found, phi, values)
        assert abs(float(state.loss[1]) - left) < 0.02 + 0.1 * left, "the loss reported is the loss that is left"
    assert state.written.tolist() == [False, True]


@settings(max_examples=15, deadline=None, derandomize=True)
@given(seeds, st.integers(2, 3))
def test_what_was_written_is_found_again(seed: int, degree: int) -> None:
    random = np.random.default_rng(seed)
    states, tokens = text_states(random, PAGE), random.integers(0, VOCAB, PAGE)
    state = read_text(recall_state.init_state(CONFIG, ROWS, VOCAB), 0, states, tokens)
    state = write(state, 0, PAGE, 6, "exact", degree)
    asked = np.zeros((ROWS, 5, CONFIG.key_size), np.float32)
    asked[0] = keys_of(states, tokens)[-6:-1]
    found = np.asarray(compiled()["scores"](adapter(), state, reading(degree), asked))[0]
    right = found.argmax(axis=1) == tokens[-5:]
    assert right.sum() >= 4, "neighbours have nearly the same context, and states of eight numbers are not orthogonal"
    assert (found.max(axis=1)[right] > 0.1).all()


@settings(max_examples=30, deadline=None, derandomize=True)
@given(seeds, degrees, windows, st.sampled_from(["gradient", "muon"]), st.sampled_from([0.1, 0.5, 1.0, 1.5]))
def test_gradient_and_muon_writes_descend(
    seed: int, degree: int, window: int, optimizer: Optimizer, step: float
) -> None:
    random = np.random.default_rng(seed)
    states, tokens = text_states(random, 2 * PAGE), random.integers(0, VOCAB, 2 * PAGE)
    state = read_text(recall_state.init_state(CONFIG, ROWS, VOCAB), 0, states, tokens)
    left: list[float] = []
    for end in (PAGE, 2 * PAGE):
        key, values = pairs(states, tokens, end, window)
        phi = recall_reference.features(key, degree)
        before = recall_reference.omega_loss(weights_of(state, 0, degree), phi, values)
        state = write(state, 0, end, window, optimizer, degree, step)
        after = recall_reference.omega_loss(weights_of(state, 0, degree), phi, values)
        assert after < before
        assert abs(float(state.loss[0]) - after) < 0.02 + 0.1 * after
        left.append(float(state.loss[0]))
    assert float(state.losses[0]) == pytest.approx(sum(left), rel=1e-5)
    assert not np.asarray(state.skipped).any()


@settings(max_examples=20, deadline=None, derandomize=True)
@given(seeds, degrees, st.sampled_from(["gradient", "muon"]), st.sampled_from([30.0, 1e4, 1e20, 1e38]), st.booleans())
def test_a_step_that_diverges_is_not_taken(
    seed: int, degree: int, optimizer: Optimizer, step: float, same: bool
) -> None:
    """Weights, momentum and loss stay what a snapshot may hold, whatever the learning rate."""
    random = np.random.default_rng(seed)
    states, tokens = text_states(random, 6 * PAGE), random.integers(0, VOCAB, 6 * PAGE)
    if same:
        states[:] = states[0]
    state = read_text(recall_state.init_state(CONFIG, ROWS, VOCAB), 0, states[: 2 * PAGE], tokens[: 2 * PAGE])
    state = write(state, 0, PAGE, PAGE, "exact", degree)
    for _ in range(5):
        before, skipped, losses = (np.asarray(part[0]) for part in (state.weights, state.skipped, state.losses))
        state = write(state, 0, 2 * PAGE, PAGE, optimizer, degree, step)
        after = np.asarray(state.weights[0])
        for leaf in (after, state.momentum[0], state.loss[0], state.scale[0]):
            assert np.isfinite(leaf).all()
        assert float(state.loss[0]) <= 100.0
        if step > 1e10:
            assert np.array_equal(before, after)
        if np.array_equal(before, after):
            assert (int(state.skipped[0]), float(state.losses[0])) == (int(skipped) + 1, float(losses))


@settings(max_examples=30, deadline=None, derandomize=True)
@given(seeds, st.integers(1, 3), windows, optimizers)
def test_a_memory_speaks_only_of_tokens_it_was_given(seed: int, pages: int, window: int, optimizer: Optimizer) -> None:
    """Also when the window is one page: the token after the last that left has not been read when it is written."""
    random = np.random.default_rng(seed)
    length = pages * PAGE
    states, tokens = text_states(random, length), random.integers(1, VOCAB // 2, length)
    state = read_text(recall_state.init_state(CONFIG, ROWS, VOCAB), 0, states, tokens)
    state = write(state, 0, length, window, optimizer)
    given_tokens = set(tokens[max(1, length - window) :].tolist())
    assert set(np.flatnonzero(np.asarray(state.seen[0])).tolist()) == given_tokens
    asked = np.stack([keys_of(states, tokens)[:PAGE], unit_keys(random, PAGE)]).astype(np.float32)
    found = np.asarray(compiled()["scores"](adapter(), state, reading(), asked))
    share = np.asarray(recall_memory.memory_distribution(found))
    others = [token for token in range(VOCAB) if token not in given_tokens]
    assert (share[0][:, others] == 0).all()
    assert (found[1] == -2.0).all(), "an empty memory scores nothing"
    logits = (random.standard_normal((ROWS, PAGE, VOCAB)) * 3).astype(np.float32)
    everywhere = np.ones((ROWS, PAGE), bool)
    mixed, gate = compiled()["blend"](adapter(), np.full((ROWS, PAGE), 2.0, np.float32), logits, found, everywhere)
    model = np.exp(logits[0] - logits[0].max(axis=1, keepdims=True))
    model /= model.sum(axis=1, keepdims=True)
    after = np.exp(np.asarray(mixed[0], np.float64))
    active = np.asarray(gate[0]) > 0
    wanted = (1 - np.asarray(gate[0]))[active, None] * model[active][:, others]
    np.testing.assert_allclose(after[active][:, others], wanted, rtol=1e-4, atol=1e-9)
    assert np.array_equal(mixed[1], logits[1]), "no memory, no change"


@settings(max_examples=30, deadline=None, derandomize=True)
@given(seeds, st.floats(-5, 5, width=32), st.sampled_from(["off", "nothing to say", "on"]))
def test_the_mixture_is_exact_and_absent_means_untouched(seed: int, log_odds: float, case: str) -> None:
    random = np.random.default_rng(seed)
    logits = (random.standard_normal((ROWS, PAGE, VOCAB)) * 4).astype(np.float32)
    scores = (random.standard_normal((ROWS, PAGE, VOCAB)) * 0.3).astype(np.float32)
    if case == "nothing to say":
        scores = -np.abs(scores) - 1e-6
    odds, active = np.full((ROWS, PAGE), log_odds, np.float32), np.full((ROWS, PAGE), case != "off")
    mixed, gate = compiled()["blend"](adapter(), odds, logits, scores.astype(np.float32), active)
    if case != "on":
        assert np.array_equal(np.asarray(mixed), logits)
        assert not np.asarray(gate).any()
        return
    x, s = logits.astype(np.float64), scores.astype(np.float64)
    p = np.exp(x - x.max(axis=-1, keepdims=True))
    p /= p.sum(axis=-1, keepdims=True)
    entropy = -(p * np.log(p)).sum(axis=-1)
    ordered = np.sort(s, axis=-1)
    inputs = np.stack([np.ones_like(entropy), ordered[..., -1], ordered[..., -1] - ordered[..., -2], entropy], axis=-1)
    wanted = 1 / (1 + np.exp(-(inputs @ np.asarray(adapter().gate, np.float64) + log_odds)))
    assert inputs.shape[-1] == GATE_FEATURES
    np.testing.assert_allclose(gate, wanted, atol=1e-4)
    for row in range(ROWS):
        for token in range(0, PAGE, 17):
            exact = recall_reference.mixture(x[row, token], s[row, token], float(gate[row, token]))
            found = np.exp(np.asarray(mixed[row, token], np.float64))
            np.testing.assert_allclose(found, exact, rtol=2e-4, atol=1e-8)
            assert abs(found.sum() - 1) < 1e-4


@settings(max_examples=20, deadline=None, derandomize=True)
@given(seeds, degrees, st.sampled_from(["off", "early", "not written", "not fed", "on"]))
def test_reading_is_the_mixture_where_the_memory_takes_part(seed: int, degree: int, case: str) -> None:
    random = np.random.default_rng(seed)
    states, tokens = text_states(random, 2 * PAGE), random.integers(1, VOCAB // 2, 2 * PAGE)
    state = read_text(recall_state.init_state(CONFIG, ROWS, VOCAB), 0, states, tokens)
    if case != "not written":
        state = write(state, 0, 2 * PAGE, PAGE, degree=degree)
    how = reading(degree, read=case != "off", read_from=9 * PAGE if case == "early" else 0, log_odds=1.0)
    asked = np.stack([keys_of(states, tokens)[-4:], unit_keys(random, 4)]).astype(np.float32)
    logits = (random.standard_normal((ROWS, 4, VOCAB)) * 3).astype(np.float32)
    positions = np.broadcast_to(2 * PAGE + np.arange(4, dtype=np.int32), (ROWS, 4))
    fed = np.full((ROWS, 4), case != "not fed")
    cues = random.standard_normal((ROWS, 4, CONFIG.components + 1)).astype(np.float32) / 4
    answer = Answer(compiled()["read_out"](adapter(), state, how, asked), cues)  # type: ignore[arg-type]
    mixed, gate = compiled()["read"](adapter(), state, how, answer, logits, positions, fed)
    assert np.array_equal(mixed[1], logits[1]), "this row has written nothing"
    if case != "on":
        assert np.array_equal(mixed, logits)
        assert not np.asarray(gate).any()
        return
    score = compiled()["scores"](adapter(), state, how, asked)
    odds = (how.log_odds[:, None] + cues @ np.asarray(adapter().cue)).astype(np.float32)
    wanted, wanted_gate = compiled()["blend"](adapter(), odds, logits, score, fed)
    assert np.asarray(gate)[0].all()
    np.testing.assert_allclose(gate, wanted_gate, atol=2e-6)
    np.testing.assert_allclose(mixed, wanted, rtol=2e-5, atol=2e-5)


@settings(max_examples=15, deadline=None, derandomize=True)
@given(seeds, degrees, st.lists(st.integers(1, PAGE - 1), max_size=4), st.booleans())
def test_a_memory_knows_how_far_it_has_been_right(seed: int, degree: int, cuts: list[int], repeats: bool) -> None:
    """However the text is cut, and whatever was read and taken back."""
    random = np.random.default_rng(seed)
    streams = random.standard_normal((2, ROWS, 3 * PAGE, EMBED)).astype(np.float32)
    tokens = random.integers(0, VOCAB, (ROWS, 3 * PAGE)).astype(np.int32)
    if repeats:
        streams[:, :, 2 * PAGE :], tokens[:, 2 * PAGE :] = streams[:, :, :PAGE], tokens[:, :PAGE]
    how, observe = reading(degree), compiled()["observe"]

    def fed(state: RecallState, first: int, last: int, ahead: int = 0) -> tuple[RecallState, Answer]:
        part = slice(first, first + PAGE)
        padded = [np.concatenate([x, np.zeros_like(x)], axis=axis) for x, axis in ((streams, 2), (tokens, 1))]
        positions = np.broadcast_to(np.arange(first, first + PAGE, dtype=np.int32), (ROWS, PAGE))
        valid = np.broadcast_to(np.arange(PAGE) < last - first + ahead, (ROWS, PAGE))
        return observe(adapter(), state, how, tuple(padded[0][:, :, part]), padded[1][:, part], positions, valid)

    state = recall_state.init_state(CONFIG, ROWS, VOCAB)
    for page in range(2):
        state, _ = fed(state, page * PAGE, (page + 1) * PAGE)
    state = write(state, 0, 2 * PAGE, 2 * PAGE, degree=degree)
    _, whole = fed(state, 2 * PAGE, 3 * PAGE)
    agreed = np.asarray(whole.cues)[..., -1]
    assert not agreed[1].any(), "a memory that was never written was never right"

    said = np.asarray(whole.found)[0]
    code = np.asarray(adapter().codes.values)[tokens[0, 2 * PAGE :]]
    right = np.concatenate([[0.0], (np.where(said[:-1] > 0, 1, -1) * code[1:]).mean(axis=1)])
    for t in range(0, PAGE, 9):
        wanted = sum(0.25 * 0.75**back * right[t - back] for back in range(min(16, t + 1)))
        assert agreed[0, t] == pytest.approx(wanted, abs=1e-5)
    if repeats and degree > 1:
        assert agreed[0, 40:].mean() > 0.3

    pieces = []
    for first, last in itertools.pairwise(sorted({0, PAGE, *cuts})):
        state, _ = fed(state, 2 * PAGE + first, 2 * PAGE + last, ahead=1 if last < PAGE else 0)  # then taken back
        state, answer = fed(state, 2 * PAGE + first, 2 * PAGE + last)
        pieces.append(np.asarray(answer.cues)[0, : last - first, -1])
    np.testing.assert_allclose(np.concatenate(pieces), agreed[0], atol=1e-5)


@settings(max_examples=20, deadline=None, derandomize=True)
@given(seeds, optimizers, degrees, st.integers(0, ROWS - 1))
def test_rows_of_a_batch_never_meet(seed: int, optimizer: Optimizer, degree: int, row: int) -> None:
    random = np.random.default_rng(seed)
    other = 1 - row
    state = recall_state.init_state(CONFIG, ROWS, VOCAB)
    for who in (row, other):
        state = read_text(state, who, text_states(random, PAGE), random.integers(0, VOCAB, PAGE))
        state = write(state, who, PAGE, PAGE, "exact", degree)
    asked = np.stack([unit_keys(random, PAGE)] * ROWS)
    before = compiled()["scores"](adapter(), state, reading(degree), asked)
    after = read_text(state, row, text_states(random, PAGE), random.integers(0, VOCAB, PAGE), start=PAGE)
    after = write(after, row, 2 * PAGE, PAGE, optimizer, degree)
    for new, old in zip(jax.tree.leaves(after), jax.tree.leaves(state), strict=True):
        assert np.array_equal(new[other], old[other])
    assert not np.array_equal(after.weights[row], state.weights[row])
    found = compiled()["scores"](adapter(), after, reading(degree), asked)
    assert np.array_equal(found[other], before[other])


@pytest.mark.parametrize("degree", [1, 2, 3])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("text", ["one key for ever", "no key", "two opposite keys", "near copies"])
def test_repetitive_text_leaves_finite_numbers(text: str, optimizer: Optimizer, degree: int) -> None:
    random = np.random.default_rng(0)
    states = np.repeat(text_states(random, 1), 6 * PAGE, axis=0)
    if text == "no key":
        states *= 0
    elif text == "two opposite keys":
        states[::2] *= -1
    elif text == "near copies":
        states += 1e-6 * random.standard_normal(states.shape).astype(np.float32)
    tokens = random.integers(0, 3, 6 * PAGE)
    state = recall_state.init_state(CONFIG, ROWS, VOCAB)
    for page in range(6):
        part = slice(page * PAGE, (page + 1) * PAGE)
        state = read_text(state, 0, states[part], tokens[part], start=page * PAGE)
        state = write(state, 0, (page + 1) * PAGE, 2 * PAGE, optimizer, degree, step=1.9)
    assert all(np.isfinite(np.asarray(leaf, np.float64)).all() for leaf in jax.tree.leaves(state))
    assert np.abs(weights_of(state, 0, degree)).max() < 1e3
    found = compiled()["scores"](
        adapter(), state, reading(degree), np.stack([keys_of(states, tokens)[:PAGE].astype(np.float32)] * ROWS)
    )
    assert np.isfinite(np.asarray(found)).all()


@settings(max_examples=20, deadline=None, derandomize=True)
@given(seeds, st.lists(st.integers(1, PAGE - 1), max_size=4), st.integers(0, 3))
def test_keys_do_not_depend_on_how_a_text_is_cut(seed: int, cuts: list[int], ahead: int) -> None:
    """Nor on tokens that were read and then taken back."""
    random = np.random.default_rng(seed)
    streams = random.standard_normal((2, ROWS, PAGE, EMBED)).astype(np.float32)
    tokens = random.integers(0, VOCAB, (ROWS, PAGE)).astype(np.int32)
    how = reading(2)
    positions = np.broadcast_to(np.arange(PAGE, dtype=np.int32), (ROWS, PAGE))
    fresh = recall_state.init_state(CONFIG, ROWS, VOCAB)
    whole, _ = compiled()["keys"](adapter(), fresh, how, tuple(streams), tokens, positions)
    state, pieces = fresh, []
    edges = sorted({0, PAGE, *cuts})
    for first, last in itertools.pairwise(edges):
        here = [np.roll(array, -first, axis=axis) for array, axis in ((streams, 2), (tokens, 1))]
        where = positions + np.int32(first)
        further = np.broadcast_to(np.arange(PAGE) < min(last - first + ahead, PAGE - first), (ROWS, PAGE))
        later, _ = compiled()["observe"](adapter(), state, how, tuple(here[0]), here[1], where, further)
        key, _ = compiled()["keys"](adapter(), state, how, tuple(here[0]), here[1], where)
        pieces.append(np.asarray(key)[:, : last - first])
        state = later
    np.testing.assert_allclose(np.concatenate(pieces, axis=1), whole, atol=1e-6)


@settings(max_examples=20, deadline=None, derandomize=True)
@given(seeds, st.integers(1, 2), degrees, st.sampled_from([0.0, 1e-4, 1.0, 1e4]))
def test_keys_are_a_state_of_the_layers_in_use_and_a_context(seed: int, layers: int, degree: int, size: float) -> None:
    random = np.random.default_rng(seed)
    streams = (random.standard_normal((2, ROWS, PAGE, EMBED)) * size).astype(np.float32)
    tokens = random.integers(0, VOCAB, (ROWS, PAGE)).astype(np.int32)
    how = dataclasses.replace(reading(degree), layers=np.full(ROWS, layers - 1, np.int32))  # type: ignore[arg-type]
    state = recall_state.init_state(CONFIG, ROWS, VOCAB)
    positions = np.broadcast_to(np.arange(PAGE, dtype=np.int32), (ROWS, PAGE))
    found = np.asarray(compiled()["keys"](adapter(), state, how, tuple(streams), tokens, positions)[0])
    own, context = np.split(found, 2, axis=-1)
    used_of_half = key_components(CONFIG, degree)
    mean, projection = np.asarray(adapter().mean, np.float64), np.asarray(adapter().projection, np.float64)
    parts = [(streams[i] - mean[i]) @ projection[i] for i in range(layers)]
    shares = [used_of_half // layers + (i < used_of_half % layers) for i in range(layers)]
    wanted = np.concatenate([part[..., :share] for part, share in zip(parts, shares, strict=True)], axis=-1)
    error = "states are kept in 8 bits"
    np.testing.assert_allclose(own[..., :used_of_half], recall_reference.unit(wanted), atol=0.01, err_msg=error)
    codes, weight = (np.asarray(part, np.float64) for part in (adapter().codes.values, adapter().token_weight))
    for row in range(ROWS):
        sketch = recall_reference.context(tokens[row], codes, weight, used_of_half)
        np.testing.assert_allclose(context[row, :, :used_of_half], sketch, atol=1e-5)
    for half in (own, context):
        assert not half[..., used_of_half:].any()
        np.testing.assert_allclose(np.linalg.norm(half[:, 1:], axis=-1), 1.0, atol=1e-5)
    assert not context[:, 0].any(), "nothing comes before the first token"
    changed = streams.copy()
    changed[layers:] += 1
    again = compiled()["keys"](adapter(), state, how, tuple(jnp.asarray(changed)), tokens, positions)[0]
    assert np.array_equal(again, found), "layers not in use change nothing"


def test_words_that_are_everywhere_weigh_little_and_markup_nothing() -> None:
    text = [1] * 500 + [2] * 50 + [3, 4] * 2
    weight = token_weights(VOCAB, [text[:300], text[300:]], markup=[4, 50])
    assert weight[1] < 0.01 < weight[2] < weight[3] < weight[5] == 1.0
    assert weight[4] == weight[50] == 0.0
    assert weight.dtype == np.float32


def test_a_memory_that_corrects_less_keeps_what_is_old() -> None:
    """After three times as many tokens as it has features."""
    random = np.random.default_rng(5)
    pages, size = 14, 24
    config = dataclasses.replace(CONFIG, components=size, features=size**2, code_dim=256)
    small = make_adapter(
        config, VOCAB, np.zeros((2, EMBED)), np.zeros((2, EMBED, size)), np.ones(VOCAB), np.zeros(4), np.zeros(size + 1)
    )
    states = in_8_bits(random.standard_normal((pages * PAGE, size)))
    tokens = random.integers(0, VOCAB, pages * PAGE).astype(np.int32)
    found = {}
    for correction in (1.0, MemoryConfig.correction):
        absorb = jax.jit(
            functools.partial(recall_memory.write, dataclasses.replace(config, correction=correction), "exact")
        )
        state = recall_state.init_state(config, 1, VOCAB)
        for page in range(pages):
            part, end = slice(page * PAGE, (page + 1) * PAGE), (page + 1) * PAGE
            positions = np.arange(part.start, end, dtype=np.int32)[None]
            told, valid = np.zeros((1, PAGE, config.code_dim // 8), np.uint8), np.ones((1, PAGE), bool)
            state = compiled()["remember"](state, states[None, part], told, tokens[None, part], positions, valid)
            state = absorb(
                small, state, np.int32(0), WriteSettings(*map(np.asarray, (end, 2 * PAGE, np.float32(1), 1)))
            )
        context = recall_reference.context(tokens[:PAGE], np.asarray(small.codes.values), np.ones(VOCAB), size)
        asked = np.concatenate([recall_reference.unit(states[:PAGE].astype(np.float64)), context], axis=1)
        how = recall_state.init_settings(1)
        score = np.asarray(compiled()["scores"](small, state, how, asked[None].astype(np.float32)))[0, :-1]
        found[correction] = (score.argmax(axis=1) == tokens[1:PAGE]).mean()
    assert found[MemoryConfig.correction] > 2 * found[1.0] + 0.1, found
