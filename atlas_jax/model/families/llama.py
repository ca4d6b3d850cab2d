"""Llama and the models that share its architecture name in GGUF (Llama 1–3, Mistral, SmolLM2, TinyLlama, …)."""

from __future__ import annotations

from atlas_jax.config import ModelConfig
from atlas_jax.model.families._family import Family, Fields, Vocabulary


def _config(fields: Fields, vocabulary: Vocabulary) -> ModelConfig:
    # of the first Mistral, whose files may name it; llama.cpp attends to everything, and later ones have none
    fields.no_window()
    return fields.model(
        vocabulary,
        interleaved=True,
        rope_base=fields.rope_base("rope.freq_base", default=10_000.0),
        experts=fields.experts(normalised=True),
    )


FAMILY = Family(
    "llama", "Llama 1–3, Mistral, Mixtral, SmolLM2, TinyLlama and others of that name", _config, frequency_factors=True
)
