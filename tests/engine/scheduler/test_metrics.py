"""What an engine says of its memories: each figure is of what it claims to be."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from atlas_jax.config import PAGE
from atlas_jax.engine import Engine
from atlas_jax.engine.api import InvalidRequest
from atlas_jax.engine.runner import pretrained
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
    for figure in ("window_size", "window_fill", "memory_capacity", "memory_used", "total_updates"):
        assert getattr(both, figure) == getattr(one, figure) + getattr(other, figure), figure
    assert both.window_fill <= both.window_size


@pytest.mark.parametrize("layers", [1, 2])
def test_a_memory_of_one_matrix_is_listed_once(engine: Engine, layers: int) -> None:
    name = f"layers-{layers}"
    ask(engine, request(words(7, 3 * PAGE), 2, memory=memory(name, memory_layers=layers)))
    (info,) = engine.sessions.info("owner", name).layers
    assert info.taps == engine.model.memory_layers[:layers]
    assert info.layer == info.taps[0]
    assert info.norm > 0
