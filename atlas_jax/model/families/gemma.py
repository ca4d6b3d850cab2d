"""Gemma (the first): Llama with GELU and scaled embeddings."""

from __future__ import annotations

from atlas_jax.config import ModelConfig
from atlas_jax.model.families._checkpoint import LAYER, Checkpoint, Config, Described, decoder, scaled
from atlas_jax.model.families._checkpoint import rope as config_rope
from atlas_jax.model.families._family import Family, Fields, Vocabulary


def _config(fields: Fields, vocabulary: Vocabulary) -> ModelConfig:
    embed = fields.integer("embedding_length", 1)
    base = fields.rope_base("rope.freq_base", default=10_000.0)
    return fields.model(vocabulary, rope_base=base, activation="gelu_tanh", embed_scale=float(embed) ** 0.5)


def _describe(config: Config) -> Described:
    # the first files say "gelu", and were trained with its approximation all the same
    config.same("hidden_act", "gelu", "gelu_pytorch_tanh")
    config.same("hidden_activation", "gelu_pytorch_tanh")
    found = decoder(config, {"head_dim": 256})
    base, scaling = config_rope(config, 10_000.0)
    found |= {"rope.freq_base": base} | scaled(scaling, found["context_length"])
    return Described(found, tied=config.get("tie_word_embeddings") is not False)


FAMILY = Family(
    "gemma",
    "Gemma, the first",
    _config,
    checkpoint=Checkpoint(
        classes=("GemmaForCausalLM",),
        describe=_describe,
        layer={**LAYER, "post_attention_layernorm": "ffn_norm"},
        norms_plus_one=True,
    ),
)
