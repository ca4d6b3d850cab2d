"""Qwen 2 and 2.5 (dense): Llama with biases on queries, keys and values."""

from __future__ import annotations

from atlas_jax.config import ModelConfig
from atlas_jax.model.families._family import Family, Fields, Vocabulary


def _config(fields: Fields, vocabulary: Vocabulary) -> ModelConfig:
    return fields.model(vocabulary)


FAMILY = Family("qwen2", "Qwen 2 and 2.5, dense", _config)
