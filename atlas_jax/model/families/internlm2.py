"""InternLM 2 and 2.5: Llama under another name."""

from __future__ import annotations

from atlas_jax.config import ModelConfig
from atlas_jax.model.families._family import Family, Fields, Vocabulary


def _config(fields: Fields, vocabulary: Vocabulary) -> ModelConfig:
    return fields.model(vocabulary, interleaved=True)


FAMILY = Family("internlm2", "InternLM 2 and 2.5", _config)
