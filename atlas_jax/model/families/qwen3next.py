"""Qwen 3 Next: Gated DeltaNet in three of four layers, gated attention in the others; experts, one used by all tokens."""

from __future__ import annotations

from atlas_jax.config import ModelConfig
from atlas_jax.model.families._family import Family, Fields, Vocabulary
from atlas_jax.model.families._hybrid import hybrid


def _config(fields: Fields, vocabulary: Vocabulary) -> ModelConfig:
    return hybrid(fields, vocabulary, experts=fields.experts(normalised=True, shared=True))


FAMILY = Family("qwen3next", "Qwen 3 Next", _config)
