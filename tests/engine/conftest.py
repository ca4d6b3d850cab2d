"""Engines over tiny models, opened once; JAX_COMPILATION_CACHE_DIR names a folder for their programs between runs."""

from __future__ import annotations

import dataclasses
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from atlas_jax.engine import Engine
from atlas_jax.engine.runner import bigram_table
from atlas_jax.engine.runner.warmup import WarmUp
from atlas_jax.engine.scheduler.speculation import StepWidths
from atlas_jax.gguf import GGUFFile
from atlas_jax.model.loading import model_config
from tests import tiny_model
from tests.patience import PATIENCE


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("engines")


@pytest.fixture(scope="session")
def cache(folder: Path) -> Path:
    """Compiled programs, shared by all engines of a run."""
    return Path(os.environ.get("JAX_COMPILATION_CACHE_DIR") or folder / "cache")


@pytest.fixture(scope="session")
def models(folder: Path) -> dict[str, tuple[Path, Path]]:
    """Model and adapter files by name."""
    out = {}
    begun = dataclasses.replace(tiny_model.LLAMA, add_bos=True)
    native = tiny_model.Shape(embed=64, heads=2, kv_heads=1, head_dim=64, ff=128)  # all of it in the C kernels
    shapes = {"llama": tiny_model.LLAMA, "gemma": tiny_model.GEMMA, "hybrid": tiny_model.HYBRID}
    shapes |= {"begun": begun, "native": native}
    for name, shape in shapes.items():
        model = tiny_model.write_model(folder / f"{name}.gguf", shape)
        out[name] = model, tiny_model.write_adapter(folder / f"{name}.safetensors", model)
    return out


class _FirstPrograms(WarmUp):
    """Compiles what is needed to serve, and the rest when it is needed."""

    def _tasks(self) -> list[Callable[[], None]]:
        return []


@pytest.fixture(scope="session")
def opened(models: dict[str, tuple[Path, Path]], cache: Path) -> Callable[..., Any]:
    """A context manager that opens an engine; the defaults are those of the `engine` fixture.

    Only one that is `warm` compiles in the background: that takes longer than most tests.

    Every model has a bigram table, whose draft tokens are drawn at random: right ones are rare, wrong ones many.
    """
    for model, _ in models.values():
        with GGUFFile.open(model) as file:
            fingerprint, vocab = file.fingerprint(), model_config(file).vocab
        path = bigram_table.cached_path(cache, fingerprint)
        path.parent.mkdir(parents=True, exist_ok=True)
        table = np.random.default_rng(1).integers(0, vocab, vocab)
        path.write_bytes(bigram_table.encode(fingerprint, table.astype(np.int32)))

    @contextmanager
    def open_engine(
        name: str = "llama", dtype: str = "int8", *, warm: bool = False, **settings: Any
    ) -> Iterator[Engine]:
        model, adapter = models[name]
        defaults = {"adapter_path": adapter, "max_concurrent": 4, "max_window": 256, "max_context": 1024}
        defaults["cache_path"] = cache
        with pytest.MonkeyPatch.context() as patch:
            if not warm:
                patch.setattr("atlas_jax.engine.serving.WarmUp", _FirstPrograms)
            engine = Engine.open(
                model_path=model,
                weight_dtype=dtype,  # type: ignore[arg-type]
                kv_dtype=dtype,  # type: ignore[arg-type]
                **{**defaults, **settings},
            )
        try:
            yield engine
        finally:
            engine.close(timeout=PATIENCE)
        assert not engine.alive()

    return open_engine


@pytest.fixture(scope="session")
def engines(opened: Callable[..., Any]) -> Iterator[Callable[[str], Engine]]:
    """Engines by name, each opened when it is first asked for; and each `… undrafted`."""
    known: dict[str, dict[str, Any]] = {
        "int8": {"warm": True},
        "float32": {"dtype": "float32", "max_concurrent": 2},
        "gemma": {"name": "gemma", "max_concurrent": 2},
        "hybrid": {"name": "hybrid", "max_concurrent": 2},
        "hybrid float32": {"name": "hybrid", "dtype": "float32", "max_concurrent": 2},
        "begun": {"name": "begun", "dtype": "float32", "max_concurrent": 2},
    }
    undrafted = {"max_concurrent": 2, "speculate": False, "warm": False}
    known |= {f"{name} undrafted": {**how, **undrafted} for name, how in known.items()}
    found: dict[str, Engine] = {}
    with ExitStack() as stack:

        def get(name: str) -> Engine:
            if name not in found:
                found[name] = stack.enter_context(opened(**known[name]))
            return found[name]

        yield get


@pytest.fixture(scope="session")
def engine(engines: Callable[[str], Engine]) -> Engine:
    """The int8 engine."""
    return engines("int8")


@pytest.fixture
def always_drafting(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small batches take drafts whatever they bring, and however long their steps take on the machine of this test."""
    monkeypatch.setattr(StepWidths, "choose", lambda _, shape, widths, rates: widths[-1])


@pytest.fixture(scope="session")
def compiled() -> list[str]:
    """Threads that have compiled, one entry a program, but those that warm an engine up: another one's may be at it."""
    threads: list[str] = []

    def note(event: str, _: float, **__: Any) -> None:
        thread = threading.current_thread().name
        if event.endswith("backend_compile_duration") and thread != "atlas-warm-up":
            threads.append(thread)

    jax.monitoring.register_event_duration_secs_listener(note)
    return threads
