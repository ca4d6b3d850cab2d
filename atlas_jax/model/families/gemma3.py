"""Gemma 3 (text): five sliding-window layers to one global, norms on q, k and sublayer outputs, scaled embeddings."""

from __future__ import annotations

from atlas_jax.config import LayerConfig, ModelConfig
from atlas_jax.model.families._family import Family, Fields, Vocabulary

_PERIOD = 6
"""Every sixth layer is global, unless the file says otherwise."""
_LOCAL_ROPE_BASE = 10_000.0
_MAX_SOFTCAP = 1e6


def _config(fields: Fields, vocabulary: Vocabulary) -> ModelConfig:
    embed = fields.integer("embedding_length", 1)
    heads, _ = fields.heads()
    # the 27B model scales by (embed / heads)^-½ instead of its heads' size; the only one of the family with 62 layers
    attention_scale = (embed / heads) ** -0.5 if fields.layers == 62 else None
    head_dim = fields.head_dim(embed, heads, attention_scale)
    fields.rotated(head_dim, "rope.dimension_count_swa", whole=True)
    fields.same("attention.key_length_swa", head_dim)
    fields.same("attention.value_length_swa", head_dim)
    window = fields.integer("attention.sliding_window", 1)
    # files of one runtime call the two bases global and local
    global_base = fields.rope_base("rope.freq_base", "rope.global.freq_base")
    local_base = fields.rope_base("rope.freq_base_swa", "rope.local.freq_base", default=_LOCAL_ROPE_BASE)
    return fields.model(
        vocabulary,
        layers=[
            LayerConfig(sliding_window=window, rope=1) if sliding else LayerConfig(rope=0)
            for sliding in fields.sliding(_PERIOD)
        ],
        ropes=(
            fields.rope(head_dim, interleaved=False, base=global_base, whole=True),
            fields.rope(head_dim, interleaved=False, base=local_base, scaled=False),
        ),
        activation="gelu_tanh",
        qk_norm="head",
        post_norms=True,
        embed_scale=float(embed) ** 0.5,
        attention_scale=attention_scale,
        final_softcap=fields.number("final_logit_softcapping", 0.0, _MAX_SOFTCAP, default=0.0) or None,
    )


FAMILY = Family("gemma3", "Gemma 3, its text", _config)
