"""A model three of four of whose layers keep a state: what is true of other models is true of it, without going back."""

from __future__ import annotations

import itertools
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from atlas_jax.config import PAGE
from atlas_jax.engine import Engine
from atlas_jax.engine.api import ChatFrame, Finished, SessionKey
from atlas_jax.engine.scheduler.decode_batch import DecodeBatch
from atlas_jax.engine.scheduler.prefill import PrefillQueue
from atlas_jax.engine.scheduler.request_state import RequestState
from atlas_jax.kernels.gated_delta import DeltaState
from tests.engine.offline import Answer, ask, ask_all, memory, request, words
from tests.engine.test_invariants import assert_same, copied
from tests.patience import PATIENCE

pytestmark = pytest.mark.slow  # an engine of its own: 18 s of processor time to open
names = (f"hybrid-{number}" for number in itertools.count())
HOW = {"name": "hybrid", "max_concurrent": 2}
LONG, NEXT = words(31, 3 * PAGE + 37), words(32, 20)


@pytest.fixture(scope="module")
def hybrid(engines: Callable[[str], Engine]) -> Engine:
    return engines("hybrid")


def test_answers_depend_on_nothing_but_the_text(hybrid: Engine) -> None:
    """Neither on neighbours, nor on a memory inside the window; nor on drafts and prefixes, which there are none of."""
    asked = [request(copied(1, PAGE + 30), 12), request(words(2, 40), 9, temperature=0.8, seed=3)]
    alone = [ask(hybrid, one) for one in asked]
    for one, other in zip(ask_all(hybrid, asked), alone, strict=True):
        assert_same(one, other)
    with_memory = ask(hybrid, request(copied(1, PAGE + 30), 12, memory=memory(window_size=2 * PAGE)))
    assert_same(with_memory, alone[0])
    again = ask(hybrid, asked[0])
    assert_same(again, alone[0])
    assert (again.end.drafted_tokens, again.end.cached_tokens) == (0, 0)


@pytest.mark.parametrize("cut", [1, 40, PAGE, PAGE + 1, 2 * PAGE + 70])
def test_how_a_text_is_cut_into_turns_changes_little(engines: Callable[[str], Engine], cut: int) -> None:
    engine = engines("hybrid float32")
    whole = ask(engine, request(LONG, 8, memory=memory(next(names))))
    name = next(names)
    ask(engine, request(LONG[:cut], 0, memory=memory(name)))
    parts = ask(engine, request(LONG[cut:], 8, memory=memory(name)))
    assert parts.tokens == whole.tokens
    np.testing.assert_allclose([i.logprob for i in parts.infos], [i.logprob for i in whole.infos], atol=2e-2)
    assert parts.end.memory is not None
    assert parts.end.memory.cache_hit


def test_a_turn_asked_again_is_answered_as_the_first_time(hybrid: Engine) -> None:
    """Edits go back to the end of a turn before them, or to the beginning, and leave nothing of what is gone."""
    name = next(names)
    first = ask(hybrid, request(LONG, 12, memory=memory(name)))
    second = ask(hybrid, request(NEXT, 12, memory=memory(name)))
    said = [*LONG, *first.tokens, *NEXT, *second.tokens]
    for keep in (len(said) - 6, len(LONG) + 4):
        edited = [*said[:keep], *words(keep, 30)]
        other = ask(hybrid, request(edited, 5, memory=memory(name), chat=ChatFrame(answers=True)))
        assert other.end.memory is not None
        assert other.end.memory.history == "rolled_back"
    again = ask(hybrid, request(LONG, 12, memory=memory(name, regenerate=True)))
    assert again.end.memory is not None
    assert again.end.memory.history == "rolled_back"
    assert_same(again, first)
    assert_same(ask(hybrid, request(NEXT, 12, memory=memory(name))), second)


def test_a_session_goes_on_after_a_restart_as_if_there_had_been_none(
    opened: Callable[..., Any], hybrid: Engine, tmp_path: Path
) -> None:
    """From its snapshot bit for bit; from its journal alone, it is read again."""
    name = next(names)
    first = ask(hybrid, request(LONG, 12, memory=memory(name)))
    straight = ask(hybrid, request(NEXT, 12, memory=memory(name)))
    with opened(memory_path=tmp_path / "one", **HOW) as before:
        assert_same(ask(before, request(LONG, 12, memory=memory("s"))), first)
        shutil.copytree(tmp_path / "one", tmp_path / "killed")
        (tmp_path / "killed" / ".lock").unlink()
        assert before.sessions.save_changed() == 0
        saved = before.sessions.save_all("owner", None)
        (file,) = (tmp_path / "one").rglob(saved.filename)
        copy = tmp_path / "other" / file.relative_to(tmp_path / "one")
        copy.parent.mkdir(parents=True)
        shutil.copy(file, copy)
    for folder, exported in (("one", 0), ("other", 1)):
        with opened(memory_path=tmp_path / folder, **HOW) as after:
            assert not exported or after.sessions.load_default("owner") == exported
            assert_same(ask(after, request(NEXT, 12, memory=memory("s"))), straight)
    with opened(memory_path=tmp_path / "killed", **HOW) as replayed:
        answer = ask(replayed, request(NEXT, 12, memory=memory("s")))
    assert answer.end.memory is not None
    assert (answer.end.memory.history, answer.end.memory.tokens_reused) == ("appended", 0)
    likely = {token for token, *_ in straight.infos[0].top}
    assert answer.infos[0].top[0][0] in likely


@pytest.mark.parametrize("steps", [1, 2, 3, 4, 5, 6])
def test_a_prompt_left_half_read_leaves_the_session_in_order(
    hybrid: Engine, monkeypatch: pytest.MonkeyPatch, steps: int
) -> None:
    """A client leaves between two groups of layers, the first of which have read on: so the others do."""
    wanted = ask(hybrid, request(LONG, 6, memory=memory(next(names))))
    step, done, name, over = PrefillQueue.step, 0, next(names), threading.Event()

    def count(self: PrefillQueue, req: RequestState) -> None:
        nonlocal done
        step(self, req)
        done += 1
        if done == steps:
            req.cancelled.set()

    monkeypatch.setattr(PrefillQueue, "step", count)
    left = Answer()

    def listen(event: Any) -> None:
        left.events.append(event)
        if isinstance(event, Finished):
            over.set()

    hybrid.submit(request(LONG, 6, memory=memory(name)), listen)
    assert over.wait(PATIENCE)
    assert left.end.reason == "cancelled"
    monkeypatch.setattr(PrefillQueue, "step", step)
    assert_same(ask(hybrid, request(LONG, 6, memory=memory(name))), wanted)


def test_a_step_waits_for_the_one_before_where_a_session_keeps_what_is_read(
    hybrid: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And only there; a neighbour whose row nobody keeps changes nothing of it."""
    waits, synchronise = 0, DecodeBatch.synchronise

    def count(self: DecodeBatch) -> list[Any]:
        nonlocal waits
        waits += 1
        return synchronise(self)

    monkeypatch.setattr(DecodeBatch, "synchronise", count)
    plain, first, then = words(3, 20), words(4, 40), words(5, 10)
    ask(hybrid, request(plain, 30))
    assert waits < 10
    alone, beside = next(names), next(names)
    turn = ask(hybrid, request(first, 30, memory=memory(alone)))
    assert waits >= 30
    other, _ = ask_all(hybrid, [request(first, 30, memory=memory(beside)), request(plain, 12)])
    assert_same(other, turn)
    assert_same(*(ask(hybrid, request(then, 12, memory=memory(name))) for name in (alone, beside)))


def test_a_session_has_one_size(hybrid: Engine) -> None:
    """However long its text; the states are part of the bytes that a session is said to take."""
    name = next(names)
    sizes = []
    for turn in range(4):
        answer = ask(hybrid, request(words(40 + turn, 4 * PAGE), 4, memory=memory(name)))
        entry = hybrid.sessions._index.get(SessionKey("owner", name))
        assert entry is not None
        assert entry.session is not None
        sizes.append(entry.session.checkpoints[-1].bytes)
    assert sizes[2] == sizes[3]
    assert answer.end.memory is not None
    row = entry.session.checkpoints[-1].row
    states = [layer for layer in row.cache.kv if isinstance(layer, DeltaState)]
    assert len(states) == 6
    assert answer.end.memory.state.memory == sum(leaf.nbytes for leaf in jax.tree.leaves((row.memory, states)))


def test_nothing_compiles_once_warm(opened: Callable[..., Any], compiled: list[str]) -> None:
    with opened(warm=True, **HOW) as engine:
        assert engine.warm_up(timeout=PATIENCE)
        before = len(compiled)
        name = next(names)
        for turn in range(2):
            asked = [request(words(50 + turn, 300), 20, memory=memory(name)), request(words(60, 3), 5)]
            ask_all(engine, asked)
        ask(engine, request(words(61, 300), 0, logprobs=None, pooling="mean"))
        ask(engine, request(words(62, 200), 0, prompt_logprobs=2))
        assert not compiled[before:]
