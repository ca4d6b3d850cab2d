"""Real texts the tasks read: the groups of `corpora`, from a folder in which each is there already or is fetched."""

from __future__ import annotations

import subprocess
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

from atlas_jax.evaluation import corpora


class TextsError(Exception):
    """Texts that are not there and cannot be fetched."""


@dataclass(frozen=True)
class Texts:
    """Texts by group and name; a group that is not there is empty."""

    groups: dict[str, dict[str, str]] = field(default_factory=dict)

    def group(self, name: str) -> dict[str, str]:
        """The texts of a group by name, in the order of their names."""
        return self.groups.get(name, {})


def load(folder: Path, groups: tuple[str, ...], *, fetch: bool) -> Texts:
    """Reads groups of texts from a folder as `corpora` writes it.

    Args:
      fetch: get what is missing through pip.

    Raises:
      TextsError: a group is not there, and cannot be fetched or may not be.
    """
    found: dict[str, dict[str, str]] = {}
    for group in groups:
        files = sorted((folder / group).glob("*.txt"))
        if not files:
            if not fetch:
                raise TextsError(
                    f"texts: {folder / group} holds no .txt file (`python -m atlas_jax.evaluation.corpora` writes them)"
                )
            try:
                folder.mkdir(parents=True, exist_ok=True)
                with tempfile.TemporaryDirectory(
                    dir=folder
                ) as whole:  # a fetch that is stopped leaves no part of a group
                    corpora.write(corpora.documents(group), Path(whole), folder / "archives")
                    (Path(whole) / group).rename(folder / group)
            except (subprocess.CalledProcessError, OSError, SystemExit) as error:
                raise TextsError(f"texts: {group} cannot be fetched into {folder}: {error}") from error
            files = sorted((folder / group).glob("*.txt"))
        found[group] = {file.stem: file.read_text("utf-8") for file in files}
    return Texts(found)
