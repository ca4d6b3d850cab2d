"""Families of models by GGUF architecture name. A new family is a new module here and a line in `FAMILIES`."""

from __future__ import annotations

from collections.abc import Mapping

from atlas_jax.model.families import gemma3, llama
from atlas_jax.model.families._family import Family, UnsupportedModel

FAMILIES: Mapping[str, Family] = {
    "llama": llama.FAMILY,
    "gemma3": gemma3.FAMILY,
}

__all__ = ["FAMILIES", "Family", "UnsupportedModel"]
