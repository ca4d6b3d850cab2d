"""What must not change which pairs a session keeps: drafts, neighbours, rewinding, and requests that leave nothing."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from atlas_jax.config import PAGE
from atlas_jax.engine import Engine
from atlas_jax.engine.api import MemoryParams, SessionKey
from atlas_jax.engine.runner import pretrained
from tests.engine.offline import ask, ask_all, memory, request, words
from tests.engine.test_invariants import assert_same, copied
from tests.patience import PATIENCE

KEPT, BY_LAYER = 200, [272, 128]
"""Pairs on average, and of each layer: some fill their pages and some do not."""
names = (f"pairs-{number}" for number in itertools.count())


def keeping(name: str | None, **more: Any) -> MemoryParams:
    """A session whose pairs compete for fewer places than there are."""
    return memory(name, **{"kept_pairs": KEPT, **more})


def kept(engine: Engine, name: str) -> dict[str, np.ndarray]:
    """A session's kept pairs, and what chooses the next, as a snapshot has them."""
    entry = engine.sessions._index.get(SessionKey("owner", name))
    assert entry is not None
    assert entry.session is not None
    (*_, last), shape = entry.session.checkpoints, entry.session.shape
    arrays = engine.sessions._layout.arrays(shape, last)
    noted = last.position % PAGE // 4  # what is further on is written again before it counts
    return {
        key: array[:noted] if "quer" in key else array
        for key, array in arrays.items()
        if key.startswith("pairs") or ".choice" in key
    } | {"count": arrays["kept"]}


def assert_equal(found: dict[str, np.ndarray], wanted: dict[str, np.ndarray]) -> None:
    assert found.keys() == wanted.keys()
    assert len(wanted) > 1
    for name, array in wanted.items():
        np.testing.assert_array_equal(found[name], array, name)


@pytest.mark.usefixtures("always_drafting")
def test_drafts_that_are_rejected_choose_no_pair(engines: Callable[[str], Engine]) -> None:
    """Also where a page ends between them, and others leave."""
    states, turns = [], []
    for engine in (engines("int8"), engines("int8 undrafted")):
        name = next(names)
        turns.append(ask(engine, request(copied(5, 300), 300, memory=keeping(name), repeat_penalty=0.7)))
        states.append(kept(engine, name))
    drafted, accepted = turns[0].end.drafted_tokens, turns[0].end.accepted_tokens
    assert drafted - 20 > accepted > 20
    assert_equal(*states)
    assert states[0]["count"][0].tolist() == BY_LAYER


def test_sessions_of_any_settings_keep_in_a_batch_what_they_keep_alone(engine: Engine, compiled: list[str]) -> None:
    """And nothing is compiled for them."""
    assert engine.warm_up(PATIENCE)
    before = len(compiled)
    settings: list[dict[str, Any]] = [
        {"cache_strategy": "lru"},
        {"kept_pairs": 300, "window_size": 256, "cache_strategy": "lfu", "omega_window": 256},
        {"kept_pairs": 77, "update_frequency": 256, "omega_window": 256},
        {"kept_pairs": 0},
    ]

    def asked(several: list[str]) -> list[Any]:
        lengths = (5 * PAGE - 20, 4 * PAGE + 50, 5 * PAGE - 3, 3 * PAGE)
        return [
            request(words(60 + i, length), 40, memory=keeping(name, **how))
            for i, (name, how, length) in enumerate(zip(several, settings, lengths, strict=True))
        ]

    together = [next(names) for _ in settings]
    answers = ask_all(engine, asked(together))
    for i in range(len(settings)):
        alone = next(names)
        assert_same(ask(engine, asked([alone] * len(settings))[i]), answers[i])
        if settings[i].get("kept_pairs") != 0:
            assert_equal(kept(engine, alone), kept(engine, together[i]))
    assert not kept(engine, together[3])["count"].any()
    assert compiled[before:] == []


def test_no_row_sees_the_pairs_of_the_one_before_it(engine: Engine) -> None:
    """A plain request after a session, one that goes on from a shared prefix, and a session after both."""
    text = words(71, 3 * PAGE + 30)
    first = ask(engine, request(text, 12, reuse=False))
    one, other = next(names), next(names)
    session = ask(engine, request(words(72, 4 * PAGE), 12, memory=keeping(one)))
    assert_same(ask(engine, request(text, 12, reuse=False)), first)
    ask(engine, request(text, 1))
    shared = ask(engine, request(text, 12))
    assert shared.end.cached_tokens == 3 * PAGE
    assert_same(shared, first)
    assert_same(ask(engine, request(words(72, 4 * PAGE), 12, memory=keeping(other))), session)
    assert_equal(kept(engine, other), kept(engine, one))
    assert_same(ask(engine, request(text, 12)), first)


def test_a_request_that_does_not_write_leaves_the_pairs_as_they_were(engine: Engine) -> None:
    one, other = next(names), next(names)
    for name in (one, other):
        ask(engine, request(words(73, 4 * PAGE), 12, memory=keeping(name)))
    before = kept(engine, one)
    ask(engine, request(words(74, 3 * PAGE), 12, memory=keeping(one, write=False)))
    assert_equal(kept(engine, one), before)
    turns = [ask(engine, request(words(75, 2 * PAGE), 12, memory=keeping(name))) for name in (one, other)]
    assert_same(*turns)
    assert_equal(kept(engine, one), kept(engine, other))


def test_whether_the_memory_is_read_or_written_chooses_no_pair(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """Writes of the recall memory that diverge are not taken; the pages have left, and their pairs are kept all the same."""
    monkeypatch.setattr(pretrained, "MAX_LEARNING_RATE", 10.0)
    text, states = words(76, 5 * PAGE - 20), []
    for how in ({}, {"read": False}, {"use_muon": False, "learning_rate": 1.0}):
        name = next(names)
        done = ask(engine, request(text, 1, memory=keeping(name, **how))).end.memory
        assert done is not None
        assert done.writes_skipped == (4 if how.get("learning_rate") else 0)
        states.append(kept(engine, name))
    assert_equal(states[1], states[0])
    assert_equal(states[2], states[0])


def test_a_turn_taken_back_and_read_again_leaves_the_same_pairs(engine: Engine) -> None:
    name = next(names)
    first = ask(engine, request(words(77, 3 * PAGE + 60), 90, memory=keeping(name)))
    wanted = kept(engine, name)
    again = ask(engine, request(words(77, 3 * PAGE + 60), 90, memory=keeping(name, regenerate=True)))
    assert again.end.memory is not None
    assert again.end.memory.history == "rolled_back"
    assert_same(again, first)
    assert_equal(kept(engine, name), wanted)


def test_text_read_token_by_token_keeps_the_pairs_of_text_read_in_chunks(engines: Callable[[str], Engine]) -> None:
    """But for those of equal score up to rounding."""
    engine, said, read = engines("float32"), next(names), next(names)
    prompt = words(78, PAGE + 20)
    answer = ask(engine, request(prompt, 3 * PAGE, memory=keeping(said)))
    ask(engine, request([*prompt, *answer.tokens[:-1]], 0, memory=keeping(read)))
    spoken, written = kept(engine, said), kept(engine, read)
    assert spoken["count"][0].tolist() == written["count"][0].tolist() == BY_LAYER
    for pages, count in zip((slice(3), slice(3, 4)), BY_LAYER, strict=True):
        both = (state["pairs.k"][pages].swapaxes(0, 1) for state in (spoken, written))
        one, other = (keys.reshape(2, -1, 16)[:, :count] for keys in both)
        distance = np.abs(one[:, :, None] - other[:, None]).max(axis=-1)
        assert (distance.min(axis=-1) < 1e-2).mean() > 0.97
