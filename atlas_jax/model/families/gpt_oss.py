"""gpt-oss: experts with biases, a learned score in every head's softmax, and a window in every other layer."""

from __future__ import annotations

from atlas_jax.config import LayerConfig, ModelConfig
from atlas_jax.model.families._family import Family, Fields, Vocabulary

_PERIOD = 2
"""Every second layer is global, unless the file says otherwise."""


def _config(fields: Fields, vocabulary: Vocabulary) -> ModelConfig:
    embed = fields.integer("embedding_length", 1)
    heads, _ = fields.heads()
    head_dim = fields.head_dim(embed, heads)
    window = fields.integer("attention.sliding_window", 1)
    fields.rotated(head_dim, "rope.dimension_count_swa", whole=True)
    rope = fields.rope(head_dim, interleaved=False, whole=True)
    base = fields.rope_base("rope.freq_base_swa", default=rope.base)
    ropes = (rope,) if base == rope.base else (rope, fields.rope(head_dim, interleaved=False, base=base, whole=True))
    return fields.model(
        vocabulary,
        layers=[
            LayerConfig(sliding_window=window, rope=len(ropes) - 1) if sliding else LayerConfig()
            for sliding in fields.sliding(_PERIOD)
        ],
        ropes=ropes,
        activation="swiglu_oai",
        null_logits=True,
        experts=fields.experts(normalised=True, biases=True),
    )


FAMILY = Family("gpt-oss", "gpt-oss 20B and 120B", _config)
