"""SmolLM 3: Llama whose every fourth layer does not rotate queries and keys."""

from __future__ import annotations

import dataclasses

from atlas_jax.config import LayerConfig, ModelConfig
from atlas_jax.model.families._checkpoint import (
    LAYER,
    Checkpoint,
    Config,
    Described,
    decoder,
    refused,
    scaled,
    whole_attention,
)
from atlas_jax.model.families._checkpoint import rope as config_rope
from atlas_jax.model.families._family import Family, Fields, Vocabulary

_PERIOD = 4


def _config(fields: Fields, vocabulary: Vocabulary) -> ModelConfig:
    embed = fields.integer("embedding_length", 1)
    heads, _ = fields.heads()
    rope = fields.rope(fields.head_dim(embed, heads), interleaved=True)
    return fields.model(
        vocabulary,
        layers=[LayerConfig(rope=int(index % _PERIOD == _PERIOD - 1)) for index in range(fields.layers)],
        ropes=(rope, dataclasses.replace(rope, position_scale=0.0, magnitude=1.0)),
    )


def _describe(config: Config) -> Described:
    config.same("hidden_act", "silu")
    config.same("no_rope_layer_interval", _PERIOD)
    found = decoder(config)
    whole_attention(config, found["context_length"] if config.get("use_sliding_window") else 0)
    rotates = config.get("no_rope_layers")  # 0 where a layer does not
    if rotates and rotates != [int(index % _PERIOD != _PERIOD - 1) for index in range(found["block_count"])]:
        raise refused("no_rope_layers", f"must leave out every {_PERIOD}th layer and no other")
    base, scaling = config_rope(config, 2_000_000.0)
    found |= {"rope.freq_base": base} | scaled(scaling, found["context_length"])
    return Described(found, tied=config.get("tie_word_embeddings") is not False)


FAMILY = Family(
    "smollm3",
    "SmolLM 3",
    _config,
    checkpoint=Checkpoint(
        classes=("SmolLM3ForCausalLM",),
        describe=_describe,
        layer={**LAYER, "post_attention_layernorm": "ffn_norm"},
        interleaved=frozenset({"attn_q", "attn_k"}),
    ),
)
