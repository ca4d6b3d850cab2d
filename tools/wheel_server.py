"""The server as a wheel holds it, `atlas_jax_server`: the name `server` in everybody's site-packages is not ours to take.

In the repository it is the folder `server`. Only import statements differ; no name in a string is looked up.
"""

from __future__ import annotations

import ast
import re
import shutil
from pathlib import Path

FOLDER, PACKAGE = "server", "atlas_jax_server"


def renamed(code: str) -> str:
    """A module with its imports of `server` as imports of `atlas_jax_server`.

    Raises:
      ValueError: an import that binds the name `server` itself, which the rest of the module would then use.
    """
    lines = code.splitlines(keepends=True)
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.Import) and any(alias.name.partition(".")[0] == FOLDER for alias in node.names):
            raise ValueError(f"line {node.lineno}: write `from {FOLDER}… import …`, which can be renamed")
        if isinstance(node, ast.ImportFrom) and not node.level and (node.module or "").partition(".")[0] == FOLDER:
            line = lines[node.lineno - 1]
            before, after = line[: node.col_offset], line[node.col_offset :]
            lines[node.lineno - 1] = before + re.sub(rf"^from(\s+){FOLDER}\b", rf"from\1{PACKAGE}", after)
    return "".join(lines)


def copy(root: Path, target: Path) -> None:
    """Writes the package into a folder, its Python files renamed and all else as it is."""
    for path in sorted((root / FOLDER).rglob("*")):
        place = target / path.relative_to(root / FOLDER)
        if path.is_dir() or "__pycache__" in path.parts:
            continue
        place.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix == ".py":
            place.write_text(renamed(path.read_text("utf-8")), "utf-8")
        else:
            shutil.copyfile(path, place)


def alias(target: Path) -> None:
    """Writes the package of an editable install: the command's way to the folder `server`."""
    target.mkdir(parents=True, exist_ok=True)
    (target / "__init__.py").write_text("")
    (target / "cli.py").write_text(f"from {FOLDER}.cli import main as main\n")
    (target / "__main__.py").write_text(f"import sys\n\nfrom {FOLDER}.cli import main\n\nsys.exit(main())\n")
