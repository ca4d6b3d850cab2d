"""OLMo 2 and 3: norms after sublayers instead of before, and over the whole width of queries and of keys.

OLMo 3 adds sliding windows, in three of four layers; those keep the rotary embedding that the others scale.
"""

from __future__ import annotations

import numpy as np

from atlas_jax.config import LayerConfig, ModelConfig
from atlas_jax.model.families._checkpoint import LAYER, Checkpoint, Config, Described, decoder, refused, scaled
from atlas_jax.model.families._checkpoint import rope as config_rope
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


def _describe(config: Config) -> Described:
    config.same("hidden_act", "silu")
    found = decoder(config)
    window, types = config.get("sliding_window"), config.get("layer_types")
    if window is not None:
        known = ("sliding_attention", "full_attention")
        if types is None:
            types = [known[index % _PERIOD == _PERIOD - 1] for index in range(found["block_count"])]
        if not isinstance(types, list) or len(types) != found["block_count"] or any(one not in known for one in types):
            raise refused("layer_types", f"must have {found['block_count']} of {' and '.join(known)}")
        found["attention.sliding_window"] = config.integer("sliding_window")
        found["attention.sliding_window_pattern"] = np.array([one == known[0] for one in types])
    base, scaling = config_rope(config, 500_000.0)
    found |= {"rope.freq_base": base} | scaled(scaling, found["context_length"])
    return Described(found, tied=config.get("tie_word_embeddings") is True)


FAMILY = Family(
    "olmo2",
    "OLMo 2 and 3",
    _config,
    checkpoint=Checkpoint(
        classes=("Olmo2ForCausalLM", "Olmo3ForCausalLM"),
        describe=_describe,
        layer={
            **LAYER,
            "post_attention_layernorm": "post_attention_norm",
            "post_feedforward_layernorm": "post_ffw_norm",
        },
    ),
)
