"""Drafts: the jitted lookup in a ring against its definition on the plain text."""

from __future__ import annotations

import jax
import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from atlas_jax.kernels.lookup import NONE, drafts, ref_drafts

RING = 32
COUNT = 3
_drafts = jax.jit(drafts, static_argnums=2)


def ring_of(text: list[int]) -> np.ndarray:
    ring = np.full((RING,), NONE, np.int32)
    for position, token in enumerate(text):
        ring[position % RING] = token
    return ring


texts = st.lists(st.integers(0, 3) | st.integers(0, 50), min_size=1, max_size=3 * RING)


@settings(deadline=None, max_examples=200)
@given(st.lists(texts, min_size=2, max_size=2))
def test_drafts_are_what_followed_the_latest_longest_match(rows: list[list[int]]) -> None:
    rings = np.stack([ring_of(text) for text in rows])
    last = np.asarray([len(text) - 1 for text in rows], np.int32)
    found = np.asarray(_drafts(rings, last, COUNT))
    for text, row in zip(rows, found, strict=True):
        assert row.tolist() == ref_drafts(np.asarray(text[-RING:]), COUNT)


def test_a_repeated_text_is_continued_as_a_period() -> None:
    text = [5, 6, 7, 5, 6]
    assert np.asarray(_drafts(ring_of(text)[None], np.asarray([4], np.int32), COUNT)).tolist() == [[7, 5, 6]]
    assert np.asarray(_drafts(ring_of([9, 9])[None], np.asarray([1], np.int32), COUNT)).tolist() == [[9, 9, 9]]


def test_a_new_token_has_no_drafts() -> None:
    assert np.asarray(_drafts(ring_of([1, 2, 3])[None], np.asarray([2], np.int32), COUNT)).tolist() == [[NONE] * COUNT]
