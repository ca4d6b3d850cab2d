"""Qwen 3 (dense): Llama with norms on queries and keys."""

from __future__ import annotations

from atlas_jax.config import ModelConfig
from atlas_jax.model.families._family import Family, Fields, Vocabulary


def _config(fields: Fields, vocabulary: Vocabulary) -> ModelConfig:
    return fields.model(vocabulary, qk_norm="head")


FAMILY = Family("qwen3", "Qwen 3, dense", _config)
