"""What a session has read is recognised again, for any text and any cut of it."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from atlas_jax.config import PAGE
from atlas_jax.engine.sessions.history import History

_TAIL = 64 * PAGE


def text(seed: int, length: int) -> list[int]:
    """Tokens that no two seeds share at the same place."""
    return [(seed * 7919 + position * 31 + position // 97) % 50_000 for position in range(length)]


def shared(one: Sequence[int], other: Sequence[int]) -> int:
    for position, (a, b) in enumerate(zip(one, other, strict=False)):
        if a != b:
            return position
    return min(len(one), len(other))


def history_of(tokens: Sequence[int], pieces: Sequence[int] = (), reply: tuple[int, int] | None = None) -> History:
    history = History()
    if reply is not None:
        history.answered(*reply)
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
    assert history.tokens(history.tail_start, length) == tokens[history.tail_start :]


@settings(max_examples=120, deadline=None, derandomize=True)
@given(lengths, shares, st.integers(0, 2 * PAGE))
def test_truncating_is_never_having_read_the_rest(length: int, share: float, more: int) -> None:
    tokens = text(1, length)
    reply = length // 2, length // 2 + 9
    history = history_of(tokens, reply=reply)
    lowest = history.tail_start
    at = lowest + int((length - lowest) * share)
    copy = history.copy()
    copy.truncate(at)
    assert (copy.length, copy.digests) == (at, history_of(tokens[:at]).digests)
    assert copy.tail == tokens[copy.tail_start : at]
    if at < length:
        assert (copy.first_reply is None) == (at < reply[0])
        inside = [] if at < reply[0] or reply[1] <= lowest else [(reply[0], min(at, reply[1]))]
        assert copy.replies == inside
    copy.extend(text(2, more))
    whole = tokens[:at] + text(2, more)
    fresh = history_of(whole)
    assert (copy.length, copy.digests) == (fresh.length, fresh.digests)
    assert copy.common_prefix([*whole, 1]) == len(whole)
    assert history == history_of(tokens, reply=reply), "a copy is independent"
    if lowest:
        with pytest.raises(ValueError, match="cannot truncate"):
            history.truncate(lowest - 1)


def test_answers_are_known_as_long_as_their_text_is() -> None:
    history = History()
    for turn in range(60):
        history.extend(text(turn, 300))
        history.answered(history.length - 100, history.length)
    assert history.first_reply == 200
    ends = [end for end in range(300, 60 * 300 + 1, 300) if end > history.tail_start]
    assert history.replies == [(end - 100, end) for end in ends]
    other = history.copy()
    other.truncate(history.length - 350)
    again = History(first_reply=other.first_reply)
    again.adopt_turns(history, history.length - 350)
    assert again.replies == other.replies
    assert again.replies[-1] == (history.length - 400, history.length - 350), "an answer that is cut stays one"
