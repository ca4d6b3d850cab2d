"""States a session keeps: of its own text and no other, none that another stands for, and nothing for what is zero."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from atlas_jax.config import PAGE
from atlas_jax.engine import Engine
from atlas_jax.engine.api import SessionKey
from atlas_jax.engine.sessions.host_arrays import held_bytes, shared_zeros
from atlas_jax.engine.sessions.session import Checkpoint, Session, SessionShape
from atlas_jax.model.page_schedule import PageSchedule
from tests.engine.offline import ask, memory, request, words

names = (f"states-{number}" for number in itertools.count())
edits = st.lists(
    st.tuples(st.floats(0.0, 1.0), st.booleans(), st.integers(1, 3 * PAGE)), min_size=1, max_size=8
)  # where the text is edited, whether it is, and how much follows


def at(text: list[int], plan: PageSchedule) -> Checkpoint:
    """The state after a text; in the place of arrays, the text itself."""
    page = (len(text) - 1) // PAGE
    return Checkpoint(len(text), page, tuple(text), plan.left(page) * PAGE)  # type: ignore[arg-type]


def best(checkpoints: list[Checkpoint], shape: SessionShape, keep: int) -> int:
    """The latest position that one of some states has, or can be rolled back to, after `keep` tokens at most."""
    found = [0]
    for one in checkpoints:
        found += [one.position] * (one.position <= keep) + [keep] * (one.reachable(shape) <= keep < one.position)
    return max(found)


@settings(max_examples=150, deadline=None, derandomize=True)
@given(edits, st.integers(1, 4), st.integers(1, 3), st.booleans())
@example([(0.0, False, 1), *[(0.0, False, PAGE)] * 3, (0.5, True, 1)], 1, 1, True)
@example([(0.0, False, 1), (0.0, False, PAGE + 1), (0.984375, True, PAGE + 1), (0.0, False, PAGE)], 1, 1, True)
def test_every_state_is_of_the_sessions_text_and_none_is_missed(
    several: list[tuple[float, bool, int]], window: int, update: int, rewinds: bool
) -> None:
    """Of a session that keeps as many states and drops none, no turn would go on from a later one."""
    plan = PageSchedule(window, update)
    shape = SessionShape(plan, 1, 2, rewinds=rewinds)
    session = Session(SessionKey("owner", "s"), shape)
    text: list[int] = []
    everything: list[Checkpoint] = []  # at the ends of all turns of this text
    tokens = itertools.count()
    for place, edited, length in several:
        keep = round(place * len(text)) if edited else len(text)
        checkpoint, position = session.resume(keep)
        assert position >= best(everything[-3:], shape, keep)
        if checkpoint is not None:
            assert rewinds or position == checkpoint.position, "what a model keeps a state of is not taken back"
            assert list(checkpoint.row[:position]) == text[:position]  # type: ignore[index]
            session.roll_back(checkpoint, position)
            session.history.truncate(position)
        else:
            session.checkpoints, session.history = [], type(session.history)()
        everything = [one for one in everything[-3:] if one.position <= position]  # older ones have been dropped
        if checkpoint is not None and checkpoint.position > position > 0:
            everything.append(checkpoint.at(position))
        text = text[:keep] + [next(tokens) for _ in range(length)]
        session.history.extend(text[position:])
        everything.append(at(text, plan))
        session.advance(everything[-1])
        for one in session.checkpoints:
            assert list(one.row[: one.position]) == text[: one.position]  # type: ignore[index]
        for one in everything[-3:]:
            state = session.state_at(one.position)
            assert state is not None
            assert list(state.row[: one.position]) == text[: one.position]  # type: ignore[index]


def bytes_of(engine: Engine, name: str) -> int:
    rows = engine.sessions.list("owner", after=None, limit=1000)[0]
    return next(row.bytes for row in rows if row.session_id == name)


def test_a_short_session_takes_one_state_and_no_matrices(engine: Engine) -> None:
    """Three turns inside the window: one state for all of them; its memory and its kept pairs take no room yet."""
    name = next(names)
    ask(engine, request(words(1, 20), 4, memory=memory(name)))
    first = bytes_of(engine, name)
    for turn in range(2):
        ask(engine, request(words(2 + turn, 20), 4, memory=memory(name)))
    assert bytes_of(engine, name) == first
    lease = engine.sessions.tiers.acquire(SessionKey("owner", name), time.monotonic())
    assert lease is not None
    assert lease.session is not None
    (state,) = lease.session.checkpoints
    held = state.row.memory
    assert held is not None
    matrices = held.weights.nbytes + held.momentum.nbytes
    cache = state.row.cache
    scores = [layer.choice.ring_score for layer in cache.kv if layer.choice is not None]
    room = sum(leaf.nbytes for leaf in jax.tree.leaves((cache.pairs, scores)))
    assert sum(leaf.nbytes for leaf in jax.tree.leaves(state.row)) - state.bytes == matrices + room
    engine.sessions.tiers.release(lease, None, "lru")
    ask(engine, request(words(5, 3 * PAGE), 4, memory=memory(name)))
    assert bytes_of(engine, name) > matrices, "now it has been written"


def test_a_short_session_that_is_read_from_disk_takes_no_matrices_either(
    opened: Callable[..., Any], tmp_path: Path
) -> None:
    with opened(memory_path=tmp_path) as before:
        ask(before, request(words(1, 20), 4, memory=memory("s")))
        before.sessions.save_changed()
        wanted = bytes_of(before, "s")
    with opened(memory_path=tmp_path) as after:
        answer = ask(after, request(words(2, 20), 4, memory=memory("s", write=False)))
        assert answer.end.memory is not None
        assert answer.end.memory.history == "appended"
        assert bytes_of(after, "s") <= wanted


@pytest.mark.parametrize(("shape", "dtype"), [((1, 3, 5), "f4"), ((7,), "i1"), ((0, 2), "f4"), ((), "i4")])
def test_shared_zeros_are_zeros_that_nobody_can_write(shape: tuple[int, ...], dtype: str) -> None:
    zeros = shared_zeros(shape, dtype)
    assert np.array_equal(zeros, np.zeros(shape, dtype))
    assert zeros.dtype == dtype
    assert shared_zeros(shape, np.dtype(dtype)) is zeros
    assert held_bytes((zeros, np.zeros(3))) == 24  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="read-only"):
        zeros[...] = 1
