"""Granite (dense): Llama with factors on embeddings, on what sublayers add, on q·k and on logits."""

from __future__ import annotations

import dataclasses

from atlas_jax.config import ModelConfig
from atlas_jax.model.families._family import Family, Fields, Vocabulary

_MAX_SCALE = 1e6


def _config(fields: Fields, vocabulary: Vocabulary) -> ModelConfig:
    embed = fields.integer("embedding_length", 1)
    heads, _ = fields.heads()
    scale = fields.number("attention.scale", 0.0, _MAX_SCALE, default=0.0) or None
    rope = fields.rope(
        fields.head_dim(embed, heads, scale),
        interleaved=True,
        base=fields.rope_base("rope.freq_base", default=10_000.0),
    )
    # of a model whose layers do not rotate, files say that its rotation was not trained
    if not fields.truth("rope.scaling.finetuned", default=True):
        rope = dataclasses.replace(rope, position_scale=0.0, magnitude=1.0)
    return fields.model(
        vocabulary,
        ropes=(rope,),
        embed_scale=fields.factor("embedding_scale"),
        residual_scale=fields.factor("residual_scale"),
        attention_scale=scale,
        logit_scale=1.0 / fields.factor("logit_scale"),
    )


FAMILY = Family("granite", "Granite, dense", _config, frequency_factors=True)
