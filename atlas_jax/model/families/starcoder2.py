"""StarCoder 2: LayerNorm, biases everywhere, an MLP without a gate."""

from __future__ import annotations

from atlas_jax.config import ModelConfig
from atlas_jax.model.families._family import Family, Fields, Vocabulary


def _config(fields: Fields, vocabulary: Vocabulary) -> ModelConfig:
    return fields.model(vocabulary, norm="layer", gated=False, activation="gelu_tanh")


FAMILY = Family("starcoder2", "StarCoder 2", _config)
