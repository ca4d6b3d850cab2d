"""Folders that belong to the user."""

from __future__ import annotations

import os
from pathlib import Path


def state_folder() -> Path:
    """`$XDG_STATE_HOME/atlas-jax`: histories, transcripts, and the sessions of models that are asked here."""
    base = os.environ.get("XDG_STATE_HOME")
    return (Path(base) if base else Path.home() / ".local" / "state") / "atlas-jax"
