"""Qwen 3.5 and 3.6, their text: layers of Qwen 3 Next around an MLP; and with experts."""

from __future__ import annotations

from atlas_jax.config import ModelConfig
from atlas_jax.model.families._family import Family, Fields, Vocabulary
from atlas_jax.model.families._hybrid import hybrid


def _config(fields: Fields, vocabulary: Vocabulary) -> ModelConfig:
    return hybrid(fields, vocabulary, tiled=True)


def _config_of_experts(fields: Fields, vocabulary: Vocabulary) -> ModelConfig:
    return hybrid(fields, vocabulary, tiled=True, experts=fields.experts(normalised=True, shared=True))


FAMILY = Family("qwen35", "Qwen 3.5 and 3.6, dense, their text", _config)
WITH_EXPERTS = Family("qwen35moe", "Qwen 3.5 and 3.6 with experts, their text", _config_of_experts)
