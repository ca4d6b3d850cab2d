"""Command R and R+, Aya 23: LayerNorm without bias, MLP and attention side by side, a factor on logits."""

from __future__ import annotations

from atlas_jax.config import ModelConfig
from atlas_jax.model.families._family import Family, Fields, Vocabulary


def _config(fields: Fields, vocabulary: Vocabulary) -> ModelConfig:
    return fields.model(
        vocabulary,
        interleaved=True,
        norm="layer",
        parallel=True,
        qk_norm="heads" if fields.has("attn_q_norm.weight") else None,
        logit_scale=fields.factor("logit_scale"),
    )


FAMILY = Family("command-r", "Command R and R+, Aya 23", _config)
