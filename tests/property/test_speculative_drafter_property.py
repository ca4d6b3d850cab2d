"""Drafts: the jitted lookup in a ring against its definition on the plain text."""

from __future__ import annotations

import jax
import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from atlas_jax.kernels.speculative_drafter import NONE, draft_tokens, ref_draft_tokens

RING = 32
COUNT = 3
VOCAB = 51
UNKNOWN = np.full((VOCAB,), NONE, np.int32)
_drafts = jax.jit(draft_tokens, static_argnums=3)


def ring_of(text: list[int]) -> np.ndarray:
    ring = np.full((RING,), NONE, np.int32)
    for position, token in enumerate(text):
        ring[position % RING] = token
    return ring


successors = st.lists(st.integers(NONE, VOCAB - 1), min_size=VOCAB, max_size=VOCAB)
texts = st.lists(st.integers(0, 3) | st.integers(0, 50), min_size=1, max_size=3 * RING)


@settings(deadline=None, max_examples=200)
@given(st.lists(texts, min_size=2, max_size=2), successors)
def test_drafts_are_those_of_the_definition(rows: list[list[int]], following: list[int]) -> None:
    rings = np.stack([ring_of(text) for text in rows])
    last = np.asarray([len(text) - 1 for text in rows], np.int32)
    successor = np.asarray(following, np.int32)
    found = np.asarray(_drafts(rings, last, successor, COUNT))
    for text, row in zip(rows, found, strict=True):
        assert row.tolist() == ref_draft_tokens(np.asarray(text[-RING:]), successor, COUNT)


def test_a_repeated_text_is_continued_as_a_period() -> None:
    text = [5, 6, 7, 5, 6]
    assert np.asarray(_drafts(ring_of(text)[None], np.asarray([4], np.int32), UNKNOWN, COUNT)).tolist() == [[7, 5, 6]]
    assert np.asarray(_drafts(ring_of([9, 9])[None], np.asarray([1], np.int32), UNKNOWN, COUNT)).tolist() == [[9, 9, 9]]


def test_a_new_token_is_followed_by_the_chain_of_successors() -> None:
    successor = UNKNOWN.copy()
    successor[[3, 4, 1]] = 4, 1, 3
    text, last = ring_of([1, 2, 3])[None], np.asarray([2], np.int32)
    assert np.asarray(_drafts(text, last, successor, COUNT)).tolist() == [[4, 1, 3]]
    successor[4] = NONE
    assert np.asarray(_drafts(text, last, successor, COUNT)).tolist() == [[4, NONE, NONE]]


def test_a_new_token_without_a_successor_has_no_drafts() -> None:
    assert np.asarray(_drafts(ring_of([1, 2, 3])[None], np.asarray([2], np.int32), UNKNOWN, COUNT)).tolist() == [
        [NONE] * COUNT
    ]
