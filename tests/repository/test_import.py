"""What `import atlas_jax` gives, and what it says when it comes too late."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
import tomllib
from pathlib import Path

import pytest

import atlas_jax
from tests.patience import PATIENCE
from tools import wheel_server

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
    assert all((ROOT / package / "py.typed").is_file() for package in [*wheel["packages"], wheel_server.FOLDER])


def test_a_wheel_has_no_package_named_server(tmp_path: Path) -> None:
    """The server's own name in a wheel is enough: with the folder out of reach it imports, and runs its command."""
    wheel_server.copy(ROOT, tmp_path / wheel_server.PACKAGE)
    assert (tmp_path / wheel_server.PACKAGE / "web" / "index.html").read_bytes() == (
        ROOT / "server" / "web" / "index.html"
    ).read_bytes()
    program = textwrap.dedent("""
        import sys

        class Nowhere:
            @staticmethod
            def find_spec(name, *_):
                if name.partition(".")[0] == "server":
                    raise ImportError(name)

        sys.meta_path.insert(0, Nowhere)
        import atlas_jax_server.app
        from atlas_jax_server.cli import main
        from atlas_jax_server.terminal.commands import COMMANDS

        assert all(one.parser() for name, one in COMMANDS.items() if name != "completion")
        sys.exit(main(["--help"]))
    """)
    environment = {**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"}
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=PATIENCE
    )
    assert done.returncode == 0, done.stderr
    assert "serve a model over HTTP" in done.stdout


def test_an_import_that_cannot_be_renamed_is_refused() -> None:
    assert wheel_server.renamed("from server.a import (\n    b,\n)\nx = 'server.a'\n") == (
        "from atlas_jax_server.a import (\n    b,\n)\nx = 'server.a'\n"
    )
    with pytest.raises(ValueError, match="line 2"):
        wheel_server.renamed("x = 1\nimport server.app\n")
