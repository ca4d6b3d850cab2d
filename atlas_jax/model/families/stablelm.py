"""StableLM 3B and 2: LayerNorm, and a part of each head rotates; the 12B model runs MLP and attention side by side."""

from __future__ import annotations

from atlas_jax.config import ModelConfig
from atlas_jax.model.families._family import Family, Fields, Vocabulary


def _config(fields: Fields, vocabulary: Vocabulary) -> ModelConfig:
    # converters write this key as true for models that have it not, so the norm that is not there decides
    fields.truth("use_parallel_residual", default=True)
    return fields.model(
        vocabulary,
        rope_base=fields.rope_base("rope.freq_base", default=10_000.0),
        norm="layer",
        parallel=not fields.has("ffn_norm.weight"),
        qk_norm="heads" if fields.has("attn_q_norm.weight") else None,
    )


FAMILY = Family("stablelm", "StableLM 3B and StableLM 2", _config)
