"""A request's own state: chunks of its prompt, pages as they begin, and the account of its memory."""

from __future__ import annotations

from typing import Any

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from atlas_jax.config import PAGE
from atlas_jax.engine.runner.base import Capabilities
from atlas_jax.engine.runner.step_inputs import MemoryWrite
from atlas_jax.engine.scheduler.memory_account import MemoryAccount
from atlas_jax.engine.scheduler.metrics import Counters
from atlas_jax.engine.scheduler.request_state import Cursor, DecodeProgress, PrefillProgress, RequestState
from atlas_jax.engine.sessions.session import SessionShape
from atlas_jax.model.page_schedule import PageSchedule
from tests.engine.offline import request

CAPABILITIES = Capabilities(rewind=True, muon_passes=5)


def state(length: int, start: int = 0, limit: int = 1, memory: MemoryAccount | None = None) -> RequestState:
    """A request that goes on from `start` with `length` tokens."""
    detokenizer: Any = None
    tokens = list(range(length))
    plan = PageSchedule(None) if memory is None else memory.shape.plan
    return RequestState(
        request(tokens),
        np.asarray(tokens, np.int32),
        lambda event: None,
        seed=1,
        detokenizer=detokenizer,
        cursor=Cursor(plan, start, (start - 1) // PAGE if start else -1),
        prefill=PrefillProgress(pending_tokens=tokens),
        decode=DecodeProgress(limit),
        memory=memory,
    )


@given(st.integers(1, 5 * PAGE), st.integers(0, 3 * PAGE), st.integers(0, 2))
def test_chunks_are_the_prompt_cut_at_page_boundaries(length: int, start: int, limit: int) -> None:
    req, read = state(length, start, limit), list[int]()
    while req.left:
        if req.needs_page:
            req.begin_page(CAPABILITIES, Counters())
        tokens, following = req.chunk()
        assert 0 < len(tokens) <= PAGE
        assert following == list(range(tokens[0] + 1, min(tokens[-1] + 2, length)))
        assert req.cursor.page == req.cursor.position // PAGE
        read += tokens
        req.advance(tokens)
        assert req.cursor.position % PAGE == 0 or not req.left
    # the first decode step reads the last token; where nothing is generated there is none
    assert read == list(range(length - 1 if limit else length))
    assert req.prefill.rest == ([length - 1] if limit else [])
    assert req.cursor.position == start + len(read)


@given(
    window=st.integers(1, 4),
    update=st.integers(1, 3),
    pages=st.integers(1, 20),
    muon=st.booleans(),
    skipped=st.integers(0, 20),
)
def test_the_account_is_of_what_has_left_the_window(
    window: int, update: int, pages: int, muon: bool, skipped: int
) -> None:
    plan = PageSchedule(window, update)
    write = MemoryWrite(PAGE, "muon" if muon else "exact", 1.0, 1)
    memory, counters = MemoryAccount(SessionShape(plan, 1, 1), write), Counters()
    req = state(pages * PAGE, limit=0, memory=memory)
    writes = 0
    while req.left:
        page = req.begin_page(CAPABILITIES, counters)
        writes += page.writes
        req.advance(req.chunk()[0])
    assert memory.absorbed == memory.written == plan.left(pages - 1) * PAGE
    assert memory.updates == counters.memory_updates == writes
    assert memory.muon_iterations == counters.muon_iterations == (5 * writes if muon else 0)
    # every write is of as many tokens: those that were not taken leave the rest
    skipped = min(skipped, writes)
    memory.skip(skipped)
    assert (memory.updates, memory.written) == (writes - skipped, (writes - skipped) * update * PAGE)
    assert memory.absorbed == memory.written


@given(st.lists(st.tuples(st.integers(1, 3 * PAGE), st.sampled_from(["exact", "muon", "gradient"])), max_size=4))
def test_text_is_written_again_as_it_was_first(parts: list[tuple[int, Any]]) -> None:
    own = MemoryWrite(PAGE, "exact", 0.5, 1)
    memory = MemoryAccount(SessionShape(PageSchedule(1), 1, 1), own)
    wanted, end = list[MemoryWrite](), 0
    for length, optimizer in parts:
        write = MemoryWrite(PAGE, optimizer, 1.0, 1)
        end += length
        memory.replayed.append((end, write))
        wanted += [write] * length
    for position in range(0, end, 7):
        assert memory.write_at(position) == wanted[position]
    assert memory.write_at(end) == own


@given(st.integers(1, 30), st.lists(st.integers(1, 3), max_size=10))
def test_what_stays_read_is_all_but_the_last_token_drawn(prompt: int, drawn: list[int]) -> None:
    decode = DecodeProgress(limit=100, prompt_end=prompt - 1)
    assert decode.read == prompt - 1
    for tokens in drawn:
        decode.launch(3)
        decode.generated += [1] * tokens
        decode.verify(3, tokens)
    assert decode.read == prompt - 1 + sum(drawn)
    assert (decode.drafted, decode.accepted) == (2 * len(drawn), sum(drawn) - len(drawn))
