"""Gemma 3 (text): five sliding-window layers to one global, norms on q, k and sublayer outputs, scaled embeddings."""

from __future__ import annotations

import numpy as np

from atlas_jax.config import LayerConfig, ModelConfig
from atlas_jax.model.families._checkpoint import LAYER, Checkpoint, Config, Described, decoder, refused, scaled
from atlas_jax.model.families._checkpoint import rope as config_rope
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


def _describe(config: Config) -> Described:
    config.same("hidden_activation", "gelu_pytorch_tanh")
    config.same("hidden_act", "gelu_pytorch_tanh")
    found = decoder(config, _DEFAULTS)
    base, scaling = config_rope(config, 1_000_000.0, "full_attention", ("linear",))
    local = config.number("rope_local_base_freq", _LOCAL_ROPE_BASE)
    parameters = config.get("rope_parameters")
    if isinstance(parameters, dict) and "sliding_attention" in parameters:
        local, sliding = config_rope(config, _LOCAL_ROPE_BASE, "sliding_attention")
        if sliding["rope_type"] != "default":
            raise refused("rope_parameters", "scales the layers with a window, which is not supported")
    found |= {
        "rope.freq_base": base,
        "rope.freq_base_swa": local,
        "attention.sliding_window": config.integer("sliding_window", 4096),
        "attention.sliding_window_pattern": _config_pattern(config, found["block_count"]),
        "attention.scale": config.number("query_pre_attn_scalar", 256.0) ** -0.5,
        "final_logit_softcapping": config.number("final_logit_softcapping", 0.0),
        "attn_logit_softcapping": config.number("attn_logit_softcapping", 0.0),
    }
    return Described(
        found | scaled(scaling, found["context_length"]), tied=config.get("tie_word_embeddings") is not False
    )


def _config_pattern(config: Config, layers: int) -> int | np.ndarray:
    """The period of global layers, or a flag for every layer."""
    types, period = config.get("layer_types"), config.get("sliding_window_pattern")
    period = config.get("_sliding_window_pattern") if period is None else period
    if types is None:
        return _PERIOD if period is None else period
    known = ("sliding_attention", "full_attention")
    if not isinstance(types, list) or len(types) != layers or any(one not in known for one in types):
        raise refused("layer_types", f"must have {layers} of {' and '.join(known)}")
    return np.array([one == known[0] for one in types])


_DEFAULTS = {
    "hidden_size": 2304,
    "intermediate_size": 9216,
    "num_hidden_layers": 26,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "max_position_embeddings": 131_072,
}
"""Of the class: a model with images beside its text leaves them out of its configuration."""

FAMILY = Family(
    "gemma3",
    "Gemma 3, its text",
    _config,
    checkpoint=Checkpoint(
        classes=("Gemma3ForCausalLM", "Gemma3ForConditionalGeneration"),
        describe=_describe,
        layer={
            **LAYER,
            "post_attention_layernorm": "post_attention_norm",
            "pre_feedforward_layernorm": "ffn_norm",
            "post_feedforward_layernorm": "post_ffw_norm",
        },
        norms_plus_one=True,
        text="text_config",
        beside=("vision_tower.", "multi_modal_projector.", "model.vision_tower.", "model.multi_modal_projector."),
    ),
)
