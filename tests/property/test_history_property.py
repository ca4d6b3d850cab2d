"""A prompt is recognised as continuing, repeating or following a session, for any edit of any text."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from atlas_jax.config import PAGE
from atlas_jax.engine.history import Continuation, History, continuation

_TAIL = 64 * PAGE


def text(seed: int, length: int) -> list[int]:
    """Tokens that no two seeds share at the same place."""
    return [(seed * 7919 + position * 31 + position // 97) % 50_000 for position in range(length)]


def shared(one: Sequence[int], other: Sequence[int]) -> int:
    for position, (a, b) in enumerate(zip(one, other, strict=False)):
        if a != b:
            return position
    return min(len(one), len(other))


def history_of(tokens: Sequence[int], pieces: Sequence[int] = (), first_reply: int | None = None) -> History:
    history = History(first_reply=first_reply)
    start = 0
    for piece in pieces:
        history.extend(tokens[start : start + piece])
        start += piece
    history.extend(tokens[start:])
    return history


lengths = st.integers(0, 3 * PAGE) | st.integers(_TAIL - 2 * PAGE, _TAIL + 5 * PAGE)
shares = st.floats(0, 1)


@settings(max_examples=120, deadline=None, derandomize=True)
@given(lengths, st.lists(st.integers(0, 300), max_size=8))
def test_how_a_text_arrives_leaves_no_trace(length: int, pieces: list[int]) -> None:
    tokens = text(1, length)
    assert history_of(tokens, pieces) == history_of(tokens)


@settings(max_examples=120, deadline=None, derandomize=True)
@given(lengths, shares, st.integers(0, 2 * PAGE))
def test_a_prompts_shared_beginning_is_found(length: int, share: float, more: int) -> None:
    tokens = text(1, length)
    history = history_of(tokens)
    at = int(length * share)
    prompt = tokens[:at] + text(2, more)
    wanted = shared(tokens, prompt)
    found = history.common_prefix(prompt)
    assert found <= wanted, "never more than is shared"
    if wanted >= history.tail_start:
        assert found == wanted
    else:
        assert found == wanted // PAGE * PAGE
    assert history.tail_start % PAGE == 0
    assert length - history.tail_start <= _TAIL + PAGE, "what a session keeps of its text is bounded"


@settings(max_examples=120, deadline=None, derandomize=True)
@given(lengths, shares, st.integers(0, 2 * PAGE))
def test_truncating_is_never_having_read_the_rest(length: int, share: float, more: int) -> None:
    tokens = text(1, length)
    history = history_of(tokens, first_reply=length // 2)
    lowest = history.tail_start
    at = lowest + int((length - lowest) * share)
    copy = history.copy()
    copy.truncate(at)
    assert (copy.length, copy.digests) == (at, history_of(tokens[:at]).digests)
    assert copy.tail == tokens[copy.tail_start : at]
    assert (copy.first_reply is None) == (at == 0 or length // 2 >= at)
    copy.extend(text(2, more))
    whole = tokens[:at] + text(2, more)
    fresh = history_of(whole)
    assert (copy.length, copy.digests) == (fresh.length, fresh.digests)
    assert copy.common_prefix([*whole, 1]) == len(whole)
    assert history == history_of(tokens, first_reply=length // 2), "a copy is independent"
    if lowest:
        with pytest.raises(ValueError, match="cannot truncate"):
            history.truncate(lowest - 1)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(st.integers(1, 3 * PAGE), shares, shares, st.integers(0, PAGE))
def test_continued_edited_and_new_text_are_told_apart(length: int, reply: float, share: float, more: int) -> None:
    tokens = text(1, length)
    first_reply = 1 + int((length - 1) * reply) if reply < 0.9 else None
    history = history_of(tokens, first_reply=first_reply)
    at = int(length * share)
    prompt = tokens[:at] + text(2, more)
    if not prompt:
        return
    common = shared(tokens, prompt)
    found = continuation(history, prompt)
    assert 0 <= found.keep <= length
    if common == length and len(prompt) > length:  # goes on
        assert found == Continuation(keep=length, append=False)
    elif common == len(prompt):  # a beginning of it, asked again
        assert found == Continuation(keep=len(prompt) - 1, append=False)
    elif first_reply is not None and common >= first_reply:  # a turn after the first reply was edited
        assert found == Continuation(keep=common, append=False)
    else:
        assert found == Continuation(keep=length, append=True)
    if not found.append:
        assert found.keep < len(prompt), "at least one token is left to read"
        assert tokens[: found.keep] == prompt[: found.keep], "what is kept is the prompt's own"
