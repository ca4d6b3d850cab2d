"""Llama and the models that share its architecture name in GGUF (Llama 1–3, SmolLM2, TinyLlama, …)."""

from __future__ import annotations

from atlas_jax.config import LayerConfig, ModelConfig, RopeConfig
from atlas_jax.model.families._family import Family, Fields, Vocabulary


def _config(fields: Fields, vocabulary: Vocabulary) -> ModelConfig:
    embed = fields.integer("embedding_length", 1)
    heads, kv_heads = fields.heads()
    head_dim = fields.head_dim(embed, heads)
    config = ModelConfig(
        family="llama",
        vocab=fields.vocabulary(vocabulary),
        embed=embed,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        ff=fields.integer("feed_forward_length", 1),
        layers=(LayerConfig(),) * fields.layers,
        ropes=(
            RopeConfig(
                base=fields.rope_base("rope.freq_base", default=10_000.0),
                dims=fields.rotated(head_dim),
                position_scale=fields.rope_scale(),
                interleaved=True,
            ),
        ),
        context_length=fields.context_length(),
        norm_eps=fields.norm_eps(),
    )
    fields.finish()
    return config


FAMILY = Family("llama", "Llama 1–3, SmolLM2, TinyLlama and others of that name", _config, frequency_factors=True)
