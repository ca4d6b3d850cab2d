"""Gemma (the first): Llama with GELU and scaled embeddings."""

from __future__ import annotations

from atlas_jax.config import ModelConfig
from atlas_jax.model.families._family import Family, Fields, Vocabulary


def _config(fields: Fields, vocabulary: Vocabulary) -> ModelConfig:
    embed = fields.integer("embedding_length", 1)
    base = fields.rope_base("rope.freq_base", default=10_000.0)
    return fields.model(vocabulary, rope_base=base, activation="gelu_tanh", embed_scale=float(embed) ** 0.5)


FAMILY = Family("gemma", "Gemma, the first", _config)
