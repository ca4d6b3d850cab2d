"""The dimension of the memory's keys: fitted, kept and served as asked, and refused where it cannot be had."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from atlas_jax.config import PAGE, ConfigError, MemoryConfig
from atlas_jax.engine import adapter_finder
from atlas_jax.engine.api import EngineError
from atlas_jax.recall import adapter_store
from atlas_jax.recall.adapter import GATE_FEATURES, key_components, make_adapter
from atlas_jax.recall.adapter_store import AdapterError
from tests.engine.offline import ask, memory, request, words

TEXT = "The quick brown fox jumps over the lazy dog while seven wizards make toxic brew for the evil queen. "


@pytest.fixture
def own(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache folder with nothing in it but the compiled programs, and a text that is soon read."""
    (cache / "compiled").mkdir(parents=True, exist_ok=True)
    (tmp_path / "compiled").symlink_to(cache / "compiled")
    monkeypatch.setattr(adapter_store, "calibration_texts", lambda: [TEXT * 12])
    monkeypatch.setattr(adapter_store, "probe_filler", lambda: TEXT * 40)
    monkeypatch.setattr(adapter_finder, "_TOKENS", 900)
    return tmp_path


@pytest.mark.slow  # fits two memories
def test_a_memory_of_another_dimension_is_fitted_once_and_has_sessions_of_its_own(
    opened: Callable[..., Any], own: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    where: dict[str, Any] = {"adapter_path": None, "cache_path": own, "memory_path": own / "sessions"}
    found: dict[int, tuple[int, int]] = {}
    for dim, name in ((16, "a"), (24, "b")):
        with opened(memory_dim=dim, **where) as engine:
            assert (engine.model.memory_dim, engine.model.adapter) == (dim, "calibrated")
            if dim == 24:
                assert [one.name for one in engine.sessions.set_aside("owner")] == ["a"]
                with pytest.raises(EngineError, match="another memory"):
                    ask(engine, request(words(8, 8), 2, memory=memory("a")))
            stats = ask(engine, request(words(7, 5 * PAGE), 4, memory=memory(name))).end.memory
            assert stats is not None
            assert (stats.degraded, stats.tokens_absorbed > 0) == (None, True)
            found[dim] = engine.sessions.info("owner", name).memory_capacity, engine.model.state.total
            engine.sessions.save_changed()  # text that is only in a journal would be read anew, whatever the dimension
    assert (found[16][0], found[24][0]) == (16**2, 24**2)
    # the matrix and the states in the ring, both in 8 bits
    more = (24**2 - 16**2) * 256 + (256 + 2 * 512) * 8
    assert found[24][1] - found[16][1] == more
    kept = sorted(path.name.rsplit("-", 1)[1] for path in (own / "adapters").iterdir())
    assert kept == ["16.safetensors", "24.safetensors"]

    monkeypatch.setattr(adapter_finder, "calibrate_with", lambda *_, **__: pytest.fail("fitted again"))
    with opened(memory_dim=16, **where) as engine:  # the session was kept as it was
        stats = ask(engine, request(words(8, 8), 2, memory=memory("a"))).end.memory
        assert stats is not None
        assert stats.history == "appended"


def test_an_adapter_that_is_given_decides_unless_another_dimension_is_asked_for(opened: Callable[..., Any]) -> None:
    with opened() as engine:
        assert engine.model.memory_dim == 16
    with opened(memory_dim=16) as engine:
        assert engine.model.memory_dim == 16
    with (
        pytest.raises(AdapterError, match=r"memory_dim is 24, but adapter file .* was fitted with 16"),
        opened(memory_dim=24),
    ):
        pass


@pytest.mark.parametrize(
    ("dim", "message"),
    [
        (0, "memory_dim is 0: Expected `int` >= 8"),
        (20, "memory_dim is 20: Expected `int` that's a multiple of 8"),
        (136, "memory_dim is 136: Expected `int` <= 128"),
        (72, "memory_dim must be at most 64, the size of this model's states, got 72"),
    ],
)
def test_a_dimension_no_memory_of_the_model_can_have_is_refused(
    dim: int, message: str, opened: Callable[..., Any], own: Path
) -> None:
    with pytest.raises(ConfigError, match=message), opened(adapter_path=None, cache_path=own, memory_dim=dim):
        pass


def test_without_a_memory_there_is_no_dimension(opened: Callable[..., Any]) -> None:
    with opened(memory_enabled=False, memory_dim=24) as engine:
        assert engine.model.memory_dim is None


@pytest.mark.parametrize("dim", [8, 48, 96, 128])
def test_degree_two_uses_all_features_of_a_dimension(dim: int) -> None:
    config = MemoryConfig.of_dim(dim, (0,))
    assert [key_components(config, degree) for degree in (1, 2)] == [dim, dim]
    width = dim + 4
    adapter = make_adapter(
        config,
        16,
        np.zeros((1, width)),
        np.ones((1, width, dim)),
        np.ones(16),
        np.zeros(GATE_FEATURES),
        np.zeros(dim + 1),
    )
    assert (np.asarray(adapter.feature_weight)[1] > 0).all()
    for degree in (1, 2, 3):
        table = np.asarray(adapter.factors)[degree - 1][np.asarray(adapter.feature_weight)[degree - 1] > 0]
        assert len(np.unique(np.sort(table, axis=1), axis=0)) == len(table) <= dim * dim
