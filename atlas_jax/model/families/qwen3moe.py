"""Qwen 3 with experts."""

from __future__ import annotations

from atlas_jax.config import ModelConfig
from atlas_jax.model.families._family import Family, Fields, Vocabulary


def _config(fields: Fields, vocabulary: Vocabulary) -> ModelConfig:
    return fields.model(vocabulary, qk_norm="head", experts=fields.experts(normalised=True))


FAMILY = Family("qwen3moe", "Qwen 3 with experts", _config)
