"""The prefix cache against a plain list of what was kept, and its budget."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax.numpy as jnp
from hypothesis import given, settings
from hypothesis import strategies as st

from atlas_jax.config import PAGE
from atlas_jax.engine.runner.decode_state import Sequences
from atlas_jax.engine.scheduler.prefix_cache import PrefixCache
from atlas_jax.model.kv_cache import KVCache

SIZE = 64


def state(number: int) -> Sequences:
    """A state of SIZE bytes that can be told apart."""
    empty = jnp.zeros((0,), jnp.int32)
    cache = KVCache(
        kv=(),
        page=jnp.full((1, SIZE // 4), number, jnp.int32),
        slot=empty,
        first_page=empty,
        position=empty,
        kept=empty,
    )
    return Sequences(cache, None)


def text(pages: list[int], more: int) -> list[int]:
    """Pages by their first token, and the beginning of another page."""
    return [token for page in pages for token in [page] * PAGE] + [9] * more


texts = st.builds(text, st.lists(st.integers(0, 2), max_size=4), st.integers(0, PAGE - 1))
steps = st.lists(st.tuples(st.booleans(), st.sampled_from(["a", "b"]), texts), max_size=30)


def common_pages(one: list[int], other: list[int]) -> int:
    count = 0
    while (count + 1) * PAGE <= min(len(one), len(other)) and one[: (count + 1) * PAGE] == other[: (count + 1) * PAGE]:
        count += 1
    return count


@settings(deadline=None)
@given(steps)
def test_the_longest_beginning_of_the_owner_is_found(actions: list[tuple[bool, str, list[int]]]) -> None:
    cache = PrefixCache(1 << 30)
    kept: dict[int, tuple[str, list[int]]] = {}
    for keeps, owner, tokens in actions:
        if keeps:
            kept[len(kept)] = owner, tokens
            cache.keep(owner, tokens, state(len(kept) - 1))
            continue
        best = max((common_pages(tokens, other) for who, other in kept.values() if who == owner), default=0)
        found = cache.find(owner, tokens)
        if best == 0:
            assert found is None
            continue
        assert found is not None
        read, length = found
        assert length == best * PAGE
        who, source = kept[int(read.cache.page[0, 0])]
        assert who == owner
        assert source[:length] == tokens[:length]


@settings(deadline=None)
@given(steps, st.integers(0, 4))
def test_the_budget_holds_and_the_latest_use_stays(actions: list[tuple[bool, str, list[int]]], room: int) -> None:
    cache = PrefixCache(room * SIZE)
    for keeps, owner, tokens in actions:
        if keeps:
            cache.keep(owner, tokens, state(0))
            found: Any = cache.find(owner, tokens)
            assert (found is not None) == (room > 0 and len(tokens) >= PAGE)
        else:
            cache.find(owner, tokens)
        assert cache.size <= room * SIZE


def test_a_prompt_takes_the_place_of_its_beginning() -> None:
    cache = PrefixCache(1 << 30)
    for pages in ([1], [1, 2], [1, 2, 3], [1, 2]):
        cache.keep("a", text(pages, 3), dataclasses.replace(state(0)))
    assert cache.size == SIZE
