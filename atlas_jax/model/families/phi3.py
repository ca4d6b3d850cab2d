"""Phi 3, 3.5 and 4: Llama with its input matrices in one tensor each, and LongRoPE."""

from __future__ import annotations

from atlas_jax.config import ModelConfig
from atlas_jax.model.families._family import Family, Fields, Vocabulary


def _config(fields: Fields, vocabulary: Vocabulary) -> ModelConfig:
    # what files name as the window is not the models' own; llama.cpp attends to everything
    fields.no_window()
    return fields.model(vocabulary, rope_base=fields.rope_base("rope.freq_base", default=10_000.0))


FAMILY = Family("phi3", "Phi 3, 3.5 and 4, without experts", _config, frequency_factors=True)
