"""SmolLM 3: Llama whose every fourth layer does not rotate queries and keys."""

from __future__ import annotations

import dataclasses

from atlas_jax.config import LayerConfig, ModelConfig
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


FAMILY = Family("smollm3", "SmolLM 3", _config)
