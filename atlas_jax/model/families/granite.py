"""Granite (dense): Llama with factors on embeddings, on what sublayers add, on q·k and on logits."""

from __future__ import annotations

import dataclasses

from atlas_jax.config import ModelConfig
from atlas_jax.model.families._checkpoint import LAYER, Checkpoint, Config, Described, decoder, scaled
from atlas_jax.model.families._checkpoint import rope as config_rope
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


def _describe(config: Config) -> Described:
    config.same("hidden_act", "silu")
    found = decoder(config)
    base, scaling = config_rope(config, 10_000.0)
    found |= {
        "rope.freq_base": base,
        "attention.scale": config.number("attention_multiplier", 1.0),
        "embedding_scale": config.number("embedding_multiplier", 1.0),
        "residual_scale": config.number("residual_multiplier", 1.0),
        "logit_scale": config.number("logits_scaling", 1.0),
    }
    return Described(found | scaled(scaling, found["context_length"]), tied=config.get("tie_word_embeddings") is True)


FAMILY = Family(
    "granite",
    "Granite, dense",
    _config,
    frequency_factors=True,
    checkpoint=Checkpoint(
        classes=("GraniteForCausalLM",),
        describe=_describe,
        layer={**LAYER, "post_attention_layernorm": "ffn_norm"},
        interleaved=frozenset({"attn_q", "attn_k"}),
    ),
)
