"""Every token of a text is in exactly one place at every moment: still to be read, in the window, or absorbed."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from atlas_jax.config import PAGE, MemoryConfig
from atlas_jax.model.page_schedule import PageSchedule, bucket

plans = st.builds(PageSchedule, st.integers(1, 16), st.integers(1, 4))
lengths = st.integers(1, 60 * PAGE)


@settings(max_examples=150, deadline=None, derandomize=True)
@given(plans, lengths)
def test_a_token_is_in_the_window_or_absorbed_and_never_both(plan: PageSchedule, length: int) -> None:
    assert plan.window is not None
    ring: dict[int, int] = {}  # slot → page
    absorbed = 0  # every position before it has been given to the memory
    sinks_taken = 0
    for page in range(-(-length // PAGE)):
        turn = plan.next_page(page)
        if turn.absorb_end is not None:
            assert turn.absorb_end > absorbed, "a write has something new to write"
            assert turn.absorb_end - absorbed == plan.update * PAGE, "and a whole update of it"
            # the pages that leave now are still in the ring, complete, for whoever reads them to write the memory
            for leaving in range(absorbed // PAGE, turn.absorb_end // PAGE):
                assert ring[plan.slot(leaving)] == leaving
                assert leaving < page
            absorbed = turn.absorb_end
        if turn.sink_slot >= 0:
            assert ring[turn.sink_slot] == 0, "the sinks are copied while their page is still there"
            sinks_taken += 1
        assert turn.page == page
        assert turn.slot < plan.ring((page + 1) * PAGE)
        gone = ring.get(turn.slot)
        assert gone is None or gone < turn.first_page, "a page is overwritten only after it has left"
        ring[turn.slot] = page
        in_window = {held for held in ring.values() if held >= turn.first_page}
        assert in_window == set(range(absorbed // PAGE, page + 1)), "window and memory meet without a gap or overlap"
        assert min(page + 1, plan.window) <= len(in_window) <= plan.window + plan.update - 1
        assert sinks_taken == (absorbed > 0), "the sinks stand in for the ring from the moment page 0 leaves"


@settings(max_examples=150, deadline=None, derandomize=True)
@given(plans, lengths)
def test_what_has_left_follows_from_the_position_alone(plan: PageSchedule, length: int) -> None:
    page = (length - 1) // PAGE
    ends = [end for p in range(page + 1) if (end := plan.next_page(p).absorb_end) is not None]
    assert ends == sorted(set(ends))
    assert (ends[-1] if ends else 0) == plan.left(page) * PAGE == plan.next_page(page).first_page * PAGE


@settings(max_examples=100, deadline=None, derandomize=True)
@given(plans, st.integers(1, 4), lengths)
def test_a_write_reaches_back_to_the_last_and_its_keys_are_still_kept(
    plan: PageSchedule, omega: int, length: int
) -> None:
    """The ring of keys is as long as `MemoryConfig.ring` says: window, pages waiting to leave, and the Omega window."""
    assert plan.window is not None
    omega = max(omega, plan.update) * PAGE
    largest = MemoryConfig(layers=(0,), max_window=plan.window * PAGE, max_omega_window=4 * PAGE)
    before = 0
    for page in range(-(-length // PAGE)):
        end = plan.next_page(page).absorb_end
        if end is None:
            continue
        assert end - omega <= before, "no token leaves without having been in an objective"
        assert page * PAGE - (end - omega - 1) <= largest.ring, "the oldest key of the objective is still there"
        before = end


@given(lengths)
def test_the_plain_model_loses_nothing(length: int) -> None:
    plan = PageSchedule(window=None)
    pages = -(-length // PAGE)
    assert plan.ring(length) == pages
    for page in range(pages):
        turn = plan.next_page(page)
        assert (turn.slot, turn.first_page, turn.sink_slot, turn.absorb_end) == (page, 0, -1, None)


@given(st.lists(st.integers(1, 100), min_size=1, unique=True).map(sorted), st.integers(1, 120))
def test_a_bucket_is_the_smallest_size_that_holds_a_value(sizes: list[int], value: int) -> None:
    if value > sizes[-1]:
        with pytest.raises(ValueError, match="exceeds"):
            bucket(value, tuple(sizes))
        return
    found = bucket(value, tuple(sizes))
    assert found in sizes
    assert found >= value
    assert not [size for size in sizes if value <= size < found]
