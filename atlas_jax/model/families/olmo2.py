"""OLMo 2 and 3: norms after sublayers instead of before, and over the whole width of queries and of keys.

OLMo 3 adds sliding windows, in three of four layers; those keep the rotary embedding that the others scale.
"""

from __future__ import annotations

from atlas_jax.config import LayerConfig, ModelConfig
from atlas_jax.model.families._family import Family, Fields, Vocabulary

_PERIOD = 4


def _config(fields: Fields, vocabulary: Vocabulary) -> ModelConfig:
    embed = fields.integer("embedding_length", 1)
    heads, _ = fields.heads()
    head_dim = fields.head_dim(embed, heads)
    window = fields.integer("attention.sliding_window", 0, default=0) or None
    sliding = fields.sliding(_PERIOD) if window else [False] * fields.layers
    base = fields.rope_base("rope.freq_base")
    local_base = fields.rope_base("rope.freq_base_swa", default=base)
    return fields.model(
        vocabulary,
        layers=[LayerConfig(sliding_window=window, rope=1) if one else LayerConfig() for one in sliding],
        ropes=(
            fields.rope(head_dim, interleaved=False, base=base),
            *([fields.rope(head_dim, interleaved=False, base=local_base, scaled=False)] if window else []),
        ),
        pre_norms=False,
        post_norms=True,
        qk_norm="width",
    )


FAMILY = Family("olmo2", "OLMo 2 and 3", _config)
