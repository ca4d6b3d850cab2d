"""What an engine says of its memories: each figure is of what it claims to be."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from atlas_jax.config import PAGE, ConfigError
from atlas_jax.engine import Engine
from atlas_jax.engine.api import InvalidRequest
from atlas_jax.engine.runner import pretrained
from atlas_jax.model.transformer import QUERY_SAMPLES, SINKS
from tests.engine.offline import ask, memory, request, words


@pytest.mark.parametrize("rate", [0.0, 0.002, 0.005, 1.0, float("nan")])
def test_a_learning_rate_that_cannot_learn_is_refused(engine: Engine, rate: float) -> None:
    with pytest.raises(InvalidRequest, match=r"greater than 0 and less than 0\.002") as caught:
        ask(engine, request([1], memory=memory(learning_rate=rate)))
    assert caught.value.param == "atlas.learning_rate"


@pytest.mark.parametrize("muon", [True, False])
@pytest.mark.parametrize("rate", [1e-5, 0.001, 0.0019])
def test_every_learning_rate_that_is_allowed_writes(engine: Engine, muon: bool, rate: float) -> None:
    done = ask(engine, request(words(1, 5 * PAGE - 20), memory=memory(use_muon=muon, learning_rate=rate))).end.memory
    assert done is not None
    assert (done.writes_skipped, done.degraded, done.tokens_absorbed) == (0, None, 4 * PAGE)
    assert done.omega_loss > 0
    assert done.blend_ratio_actual > 0


def test_writes_that_were_not_taken_are_counted_and_said(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pretrained, "MAX_LEARNING_RATE", 10.0)
    before = engine.stats()
    text, diverging = words(2, 5 * PAGE - 20), {"use_muon": False, "learning_rate": 1.0}
    done = ask(engine, request(text, memory=memory("skipped", **diverging))).end.memory
    assert done is not None
    assert (done.writes_skipped, done.tokens_absorbed, done.memory_utilization) == (4, 0, 0.0)
    assert done.degraded == "4 memory writes diverged and were not taken"
    assert engine.stats().writes_skipped_total - before.writes_skipped_total == 4
    assert engine.stats().omega_loss_total == before.omega_loss_total
    info = engine.sessions.info("owner", "skipped")
    assert (info.total_updates, info.memory_used) == (0, 0)

    after = ask(engine, request(words(3, PAGE), memory=memory("skipped"))).end.memory
    assert after is not None
    assert (after.writes_skipped, after.degraded, after.tokens_absorbed) == (0, None, PAGE)  # of this request alone
    assert engine.sessions.info("owner", "skipped").memory_used == PAGE


def test_the_total_loss_is_that_of_every_write_and_the_current_one_the_last(engines: Callable[[str], Engine]) -> None:
    engine, text = engines("float32"), words(4, 6 * PAGE)
    losses, start = [], engine.stats().omega_loss_total
    for page in range(6):
        part = text[: (page + 1) * PAGE]  # one more page each time, so one write each from the second on
        done = ask(engine, request(part, 1, memory=memory(f"prefix-{page}"))).end.memory
        assert done is not None
        losses.append(done.omega_loss)
        assert engine.stats().omega_loss == pytest.approx(done.omega_loss if page else engine.stats().omega_loss)
    # The last request wrote five times: what its writes left is what the ends of the shorter texts left.
    before = engine.stats().omega_loss_total
    ask(engine, request(text, 1, memory=memory()))
    assert engine.stats().omega_loss_total - before == pytest.approx(sum(losses), rel=2e-3)
    assert engine.stats().omega_loss == pytest.approx(losses[-1], rel=2e-3)
    assert before > start


def test_a_window_never_holds_more_than_its_size(engine: Engine) -> None:
    wide = {"window_size": 2 * PAGE, "update_frequency": 2 * PAGE, "omega_window": 2 * PAGE}
    for length in (PAGE // 2, 2 * PAGE, 3 * PAGE - 20, 4 * PAGE - 20, 5 * PAGE):
        name = f"fill-{length}"
        done = ask(engine, request(words(5, length), 2, memory=memory(name, owner="filler", **wide))).end.memory
        assert done is not None
        info = engine.sessions.info("filler", name)
        assert info.window_size == 2 * PAGE
        # the last token drawn has not been read; of those that have, what is not absorbed is held
        assert info.window_fill == min(info.window_size, length + 1 - done.tokens_absorbed)
        engine.sessions.delete("filler", name)


def test_totals_are_totals_of_every_figure(engine: Engine) -> None:
    for name, length in (("a", 100), ("b", 3 * PAGE)):
        ask(engine, request(words(6, length), 2, memory=memory(name, owner="two")))
    one, other, both = (engine.sessions.info("two", name) for name in ("a", "b", None))
    for figure in (
        "window_size",
        "window_fill",
        "kept_pairs",
        "kept_pairs_capacity",
        "memory_capacity",
        "memory_used",
        "total_updates",
    ):
        assert getattr(both, figure) == getattr(one, figure) + getattr(other, figure), figure
    assert both.window_fill <= both.window_size
    assert both.state == one.state + other.state


@pytest.mark.parametrize("layers", [1, 2])
def test_a_memory_of_one_matrix_is_listed_once(engine: Engine, layers: int) -> None:
    name = f"layers-{layers}"
    ask(engine, request(words(7, 3 * PAGE), 2, memory=memory(name, memory_layers=layers)))
    (info,) = engine.sessions.info("owner", name).layers
    assert info.taps == engine.model.memory_layers[:layers]
    assert info.layer == info.taps[0]
    assert info.norm > 0


@pytest.mark.parametrize("pages", [1, 3])
def test_the_parts_of_a_state_are_what_the_row_has_read(engine: Engine, pages: int) -> None:
    """Of a session, of the answer, of the listing and of the counters alike."""
    name, length = f"parts-{pages}", pages * PAGE + 20
    how = memory(name, owner="parts", kept_pairs=PAGE)
    done = ask(engine, request(words(8, length), 2, memory=how)).end.memory
    assert done is not None
    # all but the sinks of what has left the window competes for places
    kept = min(pages * PAGE - SINKS, PAGE)
    info, stats = engine.sessions.info("parts", name), engine.stats()
    (row,) = engine.sessions.list("parts", after=None, limit=9)[0]
    for found in (done, info, row, stats):
        assert (found.kept_pairs, found.kept_pairs_capacity) == (kept, PAGE)
        assert found.state == done.state
    assert (row.window_size, row.window_fill) == (info.window_size, info.window_fill)
    assert done.state.budget == engine.model.state.budget
    total = engine.sessions.info("parts", None)
    assert (total.kept_pairs, total.state) == (info.kept_pairs, info.state)
    engine.sessions.delete("parts", name)


def test_a_states_bytes_are_those_of_its_arrays(engine: Engine) -> None:
    """Counted from the model's sizes by hand: two layers, two KV heads and four query heads of 16 numbers."""
    kept, window = 3 * PAGE, 2 * PAGE
    how = memory(window_size=window, kept_pairs=kept, memory_budget=engine.model.state.budget)
    done = ask(engine, request(words(9, 20), 1, memory=how)).end.memory
    assert done is not None
    per_layer = 2 * 2 * 16 * SINKS * 4  # sinks, keys and values in 32 bits
    per_layer += 2 * window * 2 * (16 + 4)
    assert done.state.window == 2 * per_layer
    # keys in 4 bits and values in 2, each with steps, offsets and a scale; scores
    page = 2 * PAGE * (16 // 2 + 16 // 4 + 2 * (2 * (1 + 1) + 2) + 2)
    choice = 2 * window * 4 + QUERY_SAMPLES * 4 * (16 + 4)
    assert done.state.kept == 2 * (kept // PAGE * page + choice)
    assert done.state.total <= done.state.budget


def test_the_default_state_is_within_its_budget_and_fills_it(engine: Engine) -> None:
    model = engine.model
    assert model.state.total <= model.state.budget
    how = memory(window_size=256, kept_pairs=None)
    done = ask(engine, request(words(10, 20), 1, memory=how)).end.memory
    assert done is not None
    assert (done.kept_pairs_capacity, done.state) == (model.kept_pairs_capacity, model.state)


@pytest.mark.parametrize(
    ("given", "param", "message"),
    [
        ({"memory_budget": 1 << 39}, "memory_budget", "at most {budget}, this server's"),
        ({"memory_budget": 1000}, "memory_budget", "which this window and the recall memory take"),
        ({"kept_pairs": 1 << 19}, "kept_pairs", "between 0 and {kept}"),
    ],
)
def test_what_no_budget_has_room_for_is_refused(
    engine: Engine, given: dict[str, int], param: str, message: str
) -> None:
    model = engine.model
    with pytest.raises(InvalidRequest) as caught:
        ask(engine, request([1], memory=memory(**given)))
    assert caught.value.param == f"atlas.{param}"
    assert message.format(budget=model.state.budget, kept=model.kept_pairs_capacity) in str(caught.value)


def test_a_smaller_budget_keeps_as_many_pairs_as_fit_beside_the_window(engine: Engine) -> None:
    """The least that is taken keeps none; one page of pairs more than that keeps a page, and no more may be asked for."""
    none = ask(engine, request(words(11, 20), 1, memory=memory(kept_pairs=0))).end.memory
    page = ask(engine, request(words(11, 20), 1, memory=memory(kept_pairs=PAGE))).end.memory
    assert none is not None
    assert page is not None
    for budget, pairs in ((none.state.total, 0), (page.state.total - 1, 0), (page.state.total, PAGE)):
        done = ask(engine, request(words(11, 20), 1, memory=memory(memory_budget=budget, kept_pairs=None))).end.memory
        assert done is not None
        assert (done.kept_pairs_capacity, done.state.budget) == (pairs, budget)
        with pytest.raises(InvalidRequest, match=rf"kept_pairs': value must be between 0 and {pairs}"):
            ask(engine, request([1], memory=memory(memory_budget=budget, kept_pairs=pairs + 1)))
    with pytest.raises(InvalidRequest, match=f"at least {none.state.total}"):
        ask(engine, request([1], memory=memory(memory_budget=none.state.total - 1)))


def test_a_session_keeps_the_budget_it_was_begun_with(engine: Engine) -> None:
    budget = engine.model.state.budget // 2
    begun = {"memory_budget": budget, "kept_pairs": PAGE}
    ask(engine, request(words(12, 40), 2, memory=memory("budget", **begun)))
    for name, other in (("memory_budget", budget + 1), ("kept_pairs", 2 * PAGE)):
        how = memory("budget", **{**begun, name: other}, given=frozenset({name}))
        with pytest.raises(InvalidRequest, match=f"begun with {begun[name]} and keeps it") as caught:
            ask(engine, request(words(13, 10), 2, memory=how))
        assert caught.value.param == f"atlas.{name}"
    for how in (memory("budget", kept_pairs=None), memory("budget", **begun, given=frozenset(begun))):
        done = ask(engine, request(words(13, 10), 2, memory=how)).end.memory
        assert done is not None
        assert (done.kept_pairs_capacity, done.state.budget) == (PAGE, budget)


def test_a_server_without_room_for_pairs_keeps_none(opened: Callable[..., Any]) -> None:
    with opened(memory_budget=0) as engine:
        assert (engine.model.kept_pairs_capacity, engine.model.state.kept, engine.model.state.budget) == (0, 0, 0)
        done = ask(engine, request(words(14, 4 * PAGE - 20), 4, memory=memory("s", kept_pairs=None))).end.memory
        assert done is not None
        assert (done.kept_pairs, done.kept_pairs_capacity, done.state.kept) == (0, 0, 0)
        assert done.tokens_absorbed == 3 * PAGE
        for given in ({"kept_pairs": 1}, {"memory_budget": 1 << 20}):
            with pytest.raises(InvalidRequest, match=next(iter(given))):
                ask(engine, request([1], memory=memory(**given)))


def test_a_budget_that_not_even_the_window_fits_into_stops_the_start(opened: Callable[..., Any]) -> None:
    with pytest.raises(ConfigError, match=r"memory_budget is 1000: a window of 256 tokens and the recall memory"):
        opened(memory_budget=1000).__enter__()
