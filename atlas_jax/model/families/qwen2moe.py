"""Qwen 1.5 and 2 with experts: one of them is used by all tokens."""

from __future__ import annotations

from atlas_jax.config import ModelConfig
from atlas_jax.model.families._family import Family, Fields, Vocabulary


def _config(fields: Fields, vocabulary: Vocabulary) -> ModelConfig:
    return fields.model(vocabulary, experts=fields.experts(normalised=False, shared=True))


FAMILY = Family("qwen2moe", "Qwen 1.5 and 2 with experts", _config)
