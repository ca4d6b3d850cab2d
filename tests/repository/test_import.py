"""What `import atlas_jax` gives, and what it says when it comes too late."""

from __future__ import annotations

import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import atlas_jax
from tests.patience import PATIENCE

ROOT = Path(__file__).parents[2]


def test_the_package_shows_its_own_names_only() -> None:
    assert dir(atlas_jax) == sorted(atlas_jax.__all__)
    assert all(getattr(atlas_jax, name) is not None for name in dir(atlas_jax))
    assert not {"Any", "importlib", "annotations"} & set(dir(atlas_jax))


@pytest.mark.parametrize(
    ("program", "warns"),
    [
        ("import jax; jax.devices(); import atlas_jax", True),
        ("import jax; import atlas_jax; jax.devices()", False),
    ],
)
def test_an_import_after_jax_has_started_is_warned_of(program: str, warns: bool) -> None:
    """XLA reads its flags once; without ours it may compute sums wrongly."""
    environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=PATIENCE
    )
    assert done.returncode == 0, done.stderr
    assert ("RuntimeWarning: atlas_jax was imported after jax had started" in done.stderr) == warns


def test_what_the_wheel_holds_is_typed() -> None:
    wheel = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["tool"]["hatch"]["build"]["targets"]["wheel"]
    assert all((ROOT / package / "py.typed").is_file() for package in wheel["packages"])
