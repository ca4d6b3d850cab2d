"""Models that no memory can be fitted to, and cache folders whose files or permissions are wrong: served all the same."""

from __future__ import annotations

import dataclasses
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from atlas_jax.engine import adapter_finder
from atlas_jax.engine.api import MemoryUnavailable
from atlas_jax.engine.runner import bigram_table
from atlas_jax.gguf import GGUFFile
from atlas_jax.model.loading import model_config
from atlas_jax.recall import adapter_store
from atlas_jax.recall.adapter_store import AdapterError
from atlas_jax.recall.calibration import Calibration, _fit_gate, _Samples
from tests.engine.offline import ask, memory, request

PROMPT = list(range(40, 80))


@pytest.fixture
def own(cache: Path, tmp_path: Path) -> Path:
    """A cache folder with nothing in it but the compiled programs."""
    (cache / "compiled").mkdir(parents=True, exist_ok=True)
    (tmp_path / "compiled").symlink_to(cache / "compiled")
    return tmp_path


@pytest.fixture
def fitting(
    models: dict[str, tuple[Path, Path]], monkeypatch: pytest.MonkeyPatch
) -> Callable[[Callable[[Calibration], Calibration]], list[int]]:
    """Has calibration find the tiny adapter, changed as told; returns the list it counts its runs in."""
    model, adapter = models["llama"]
    with GGUFFile.open(model) as file:
        config, found = adapter_store.decode(
            adapter.read_bytes(), file.fingerprint(), model_config(file), max_window=256
        )

    def install(change: Callable[[Calibration], Calibration]) -> list[int]:
        runs: list[int] = []

        def calibrate(*_: Any, **__: Any) -> Calibration:
            runs.append(1)
            return change(Calibration(config, found, (0.5, 0.5), (0.5, 0.5), 3.0, 2.0))

        monkeypatch.setattr(adapter_finder, "calibrate_with", calibrate)
        return runs

    return install


def broken(found: Calibration, name: str, value: float) -> Calibration:
    array = np.array(getattr(found.adapter, name), np.float32)
    array.flat[0] = value
    return dataclasses.replace(found, adapter=dataclasses.replace(found.adapter, **{name: jnp.asarray(array)}))


def out_of_memory(found: Calibration) -> Calibration:
    raise MemoryError("12345678 bytes")


FAILURES: dict[str, Callable[[Calibration], Calibration]] = {
    "no finite gate": lambda found: broken(found, "gate", float("nan")),
    "infinite means": lambda found: broken(found, "mean", float("inf")),
    "an exception": out_of_memory,
}


@pytest.mark.parametrize(
    "failure", ["no finite gate", *(pytest.param(one, marks=pytest.mark.slow) for one in list(FAILURES)[1:])]
)
def test_a_model_that_cannot_be_fitted_is_served_without_memory(
    failure: str, opened: Callable[..., Any], fitting: Any, own: Path, caplog: pytest.LogCaptureFixture
) -> None:
    fitting(FAILURES[failure])
    with caplog.at_level(logging.INFO, "atlas.engine"), opened(adapter_path=None, cache_path=own) as engine:
        assert engine.model.memory_unavailable == "No memory could be fitted to this model"
        assert (engine.model.adapter, engine.model.memory_layers) == (None, ())
        assert len(ask(engine, request(PROMPT, 4)).tokens) == 4
        with pytest.raises(MemoryUnavailable, match="No memory could be fitted"):
            ask(engine, request(PROMPT, 4, memory=memory()))
        with pytest.raises(MemoryUnavailable, match="No memory could be fitted"):
            _ = engine.sessions
    assert "No memory could be fitted" in caplog.text
    assert not list((own / "adapters").glob("*.safetensors"))


@pytest.mark.slow
def test_what_could_not_be_fitted_is_tried_again_and_what_could_is_kept(
    opened: Callable[..., Any], fitting: Any, own: Path
) -> None:
    fitting(FAILURES["no finite gate"])
    with opened(adapter_path=None, cache_path=own):
        pass
    runs = fitting(lambda found: found)
    for _ in range(2):
        with opened(adapter_path=None, cache_path=own) as engine:
            assert (engine.model.memory_unavailable, engine.model.adapter) == (None, "calibrated")
    assert len(runs) == 1


@pytest.mark.parametrize(
    "content", [b"not an adapter", *(pytest.param(content, marks=pytest.mark.slow) for content in (b"", None))]
)
def test_a_kept_adapter_that_is_damaged_is_set_aside_and_made_anew(
    content: bytes | None,
    opened: Callable[..., Any],
    fitting: Any,
    models: dict[str, tuple[Path, Path]],
    own: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    runs = fitting(lambda found: found)
    model, adapter = models["llama"]
    with GGUFFile.open(model) as file:
        kept = adapter_store.cached(own / "adapters", file.fingerprint(), 96)
    kept.parent.mkdir()
    kept.write_bytes(adapter.read_bytes()[:-8] if content is None else content)
    with opened(adapter_path=None, cache_path=own) as engine:
        assert engine.model.adapter == "calibrated"
    assert len(runs) == 1
    assert sorted(path.suffix for path in kept.parent.iterdir()) == [".safetensors", ".unusable"]
    assert str(kept) in caplog.text


def test_a_kept_successor_table_that_is_damaged_is_set_aside(
    models: dict[str, tuple[Path, Path]], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    kept = bigram_table.cached_path(tmp_path, "f" * 64)
    kept.parent.mkdir()
    kept.write_bytes(b"no table")
    assert (bigram_table.find(tmp_path, "f" * 64, 8) == -1).all()
    assert "bigram table" in caplog.text
    caplog.clear()
    assert (bigram_table.find(tmp_path, "f" * 64, 8) == -1).all()
    assert not caplog.text


def test_an_adapter_that_was_asked_for_must_be_good(opened: Callable[..., Any], tmp_path: Path) -> None:
    bad = tmp_path / "bad.safetensors"
    bad.write_bytes(b"no adapter")
    with pytest.raises(AdapterError, match="damaged"), opened(adapter_path=bad):
        pass
    assert bad.is_file()
    with pytest.raises(AdapterError, match="cannot be read: No such file"), opened(adapter_path=tmp_path / "none"):
        pass


@pytest.mark.parametrize("place", ["file", "/proc/atlas-jax"])
def test_without_a_cache_folder_everything_is_served(
    place: str, opened: Callable[..., Any], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("a file where the folder should be")
    with opened(cache_path=tmp_path / place) as engine:
        assert len(ask(engine, request(PROMPT, 4, memory=memory("s"))).tokens) == 4
    warnings = [record for record in caplog.records if record.levelno >= logging.WARNING]
    assert [record.getMessage() for record in warnings if "cache folder" in record.getMessage()] == [
        record.getMessage() for record in warnings
    ]
    assert len(warnings) == 1


@pytest.mark.slow
def test_a_fit_that_cannot_be_kept_is_used(
    opened: Callable[..., Any], fitting: Any, own: Path, caplog: pytest.LogCaptureFixture
) -> None:
    fitting(lambda found: found)
    (own / "adapters").write_text("a file where the folder should be")
    with opened(adapter_path=None, cache_path=own) as engine:
        assert len(ask(engine, request(PROMPT, 4, memory=memory("s"))).tokens) == 4
    assert "could not be kept" in caplog.text


@pytest.mark.slow
def test_damaged_programs_are_compiled_anew(opened: Callable[..., Any], cache: Path, tmp_path: Path) -> None:
    with opened(max_concurrent=1) as engine:
        wanted = ask(engine, request(PROMPT, 4)).infos
    shutil.copytree(cache / "compiled", tmp_path / "compiled")
    for program in (tmp_path / "compiled").iterdir():
        program.write_bytes(program.read_bytes()[:100])
    with opened(max_concurrent=1, cache_path=tmp_path) as engine:
        assert ask(engine, request(PROMPT, 4)).infos == wanted


probabilities = st.sampled_from([0.0, 1e-300, 1e-30, 1e-9, 0.3, 1.0])


@settings(max_examples=30, deadline=None)
@given(
    st.lists(st.tuples(probabilities, probabilities, st.sampled_from([0.0, 1.0, 40.0, 1e4])), min_size=1, max_size=20)
)
def test_a_gate_is_finite_whatever_the_model_is_sure_of(samples: list[tuple[float, float, float]]) -> None:
    p_model, p_memory, score = map(np.asarray, zip(*samples, strict=True))
    features = np.stack([np.ones_like(score), score, score / 2, np.ones_like(score)], axis=1)
    given = _Samples(np.arange(len(samples)), features, np.maximum(p_model, 1e-30), p_memory, np.ones(len(samples)))
    assert np.isfinite(_fit_gate(given)).all()
