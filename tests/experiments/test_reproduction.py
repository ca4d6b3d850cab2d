"""The comparison of the papers: models of equal size, texts that are held out, runs that go on, a page of what was run."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path

import jax
import numpy as np
import pytest

from atlas_jax.experiments.reproduction import __main__ as command
from atlas_jax.experiments.reproduction import arms, texts
from atlas_jax.experiments.reproduction.arms import ABLATIONS, MODELS, SIZES
from atlas_jax.model.lm import IGNORE

MINI = dataclasses.replace(SIZES["tiny"], layers=1, length=32, batch=2, steps=4, needle_length=24, needle_steps=2)


@pytest.mark.parametrize("name", ["tiny", *(pytest.param(name, marks=pytest.mark.slow) for name in ("small", "20m"))])
def test_compared_models_have_as_many_parameters(name: str) -> None:
    size = SIZES[name]
    wanted = arms.count(MODELS["attention"](size))
    for arm in (*MODELS.values(), *ABLATIONS.values()):
        assert abs(arms.count(arms.matched(size, arm)) - wanted) <= 0.01 * wanted


def test_what_is_held_out_is_not_learned(tmp_path: Path) -> None:
    for number in range(2):
        (tmp_path / f"{number}.txt").write_bytes(bytes(range(10 + number, 110 + number)) * 4)
    learned, held_out = texts.read(tmp_path, 20)
    assert (len(learned), len(held_out)) == (720, 80)
    assert held_out[:3].tolist() == [70, 71, 72]
    cut = texts.windows(held_out, 16, 5)
    assert cut.shape == (5, 17)
    with pytest.raises(FileNotFoundError, match="--texts"):
        texts.read(tmp_path / "nowhere", 20)


def test_a_needle_is_told_once_and_asked_for_at_the_end() -> None:
    for length in (24, 96):
        batch = texts.needles((3, 1), 16, length)
        tokens, targets = np.asarray(batch.tokens), np.asarray(batch.targets)
        assert tokens.shape == (16, length)
        assert (targets[:, :-1] == IGNORE).all()
        for row, wanted in zip(tokens, targets[:, -1], strict=True):
            places = [i for i in range(length - 2) if row[i] == row[-2] and row[i + 1] == row[-1]]
            assert [row[i + 2] for i in places] == [wanted]


@pytest.fixture
def own_compilation_cache() -> Iterator[None]:
    """The command keeps what it compiles in a folder of its own; other tests have theirs back."""
    before = jax.config.jax_compilation_cache_dir
    yield
    jax.config.update("jax_compilation_cache_dir", before)


@pytest.mark.slow
@pytest.mark.usefixtures("own_compilation_cache")
def test_the_command_goes_on_and_writes_what_it_has(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(SIZES, "tiny", MINI)
    monkeypatch.setattr(arms, "NEEDLES", ("attention",))
    for part in (MODELS, ABLATIONS):
        for name in list(part)[1:]:
            monkeypatch.delitem(part, name)
    source = Path(__file__).read_bytes()
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "one.txt").write_bytes(source * 4)
    page = tmp_path / "page.md"
    arguments = [
        "--seeds",
        "2",
        "--texts",
        str(tmp_path / "texts"),
        "--out",
        str(tmp_path / "out"),
        "--report",
        str(page),
    ]
    arguments += ["--parts", "text", "needle"]
    assert command.main([*arguments, "--minutes", "0"]) == command.UNFINISHED
    assert not page.exists()
    assert command.main(arguments) == 0
    files = sorted((tmp_path / "out" / "tiny").glob("*.json"))
    names = {file.stem for file in files}
    assert names == {f"{part}_attention_{seed}" for part in ("needle", "text") for seed in (0, 1)}
    before = [file.stat().st_mtime_ns for file in files]
    assert command.main(arguments) == 0
    assert [file.stat().st_mtime_ns for file in files] == before
    text = page.read_text()
    assert "| attention |" in text
    assert "16×" in text
